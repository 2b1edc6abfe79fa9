"""Metrics: operations counted by hand, lines that are written, and what is not known left out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train_cases import fresh_model

from longvila.errors import CheckpointError
from longvila.train import metrics as metrics_module
from longvila.train.metrics import Clock, Metrics, Operations, peak_flops
from longvila.train.parts import tune
from longvila.train.stages import Adapter, Rates
from longvila.train.step import Counts, StepResult

ALL = Rates(vision_tower=1.0, projector=1.0, language_model=1.0)
COUNTS = Counts(documents=3, tokens=100, pairs=1000, frames=4, targets=50, rows=2)


def linears(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def operations(rates: Rates, adapter: Adapter | None = None) -> tuple[Any, Operations]:
    model = fresh_model()
    return model, Operations.of(tune(model, rates, adapter))


def test_everything_tuned_is_six_a_weight() -> None:
    model, mine = operations(ALL)
    text, config = model.model.language_model, model.config
    assert mine.per_token == 6 * linears(text)
    assert mine.per_target == 6 * model.lm_head.weight.numel()
    # Two layers of four heads of eight: two products forward, four backward, two operations each.
    assert mine.per_pair == 12 * 4 * 8 * 2
    patches, tower = 25, model.model.vision_tower
    layers = len(tower.encoder.layers)
    assert mine.per_frame == (
        6 * linears(tower) * patches
        + 12 * 32 * layers * patches**2
        + 6 * linears(model.model.multi_modal_projector) * config.tokens_per_frame
    )


def test_frozen_parts_cost_less() -> None:
    model, mine = operations(Rates(projector=1.0))
    text, tower = model.model.language_model, model.model.vision_tower
    # Gradients pass through the language model to the projector; the tower runs forward only.
    assert mine.per_token == 4 * linears(text) and mine.per_pair == 12 * 4 * 8 * 2
    assert mine.per_target == 4 * model.lm_head.weight.numel()
    projector = 4 * linears(model.model.multi_modal_projector) * model.config.tokens_per_frame
    layers = len(tower.encoder.layers)
    assert mine.per_frame == 2 * linears(tower) * 25 + 4 * 32 * layers * 625 + projector


def test_an_adapter_passes_gradients_and_does_not_update_the_weights() -> None:
    _, mine = operations(Rates(language_model=1.0), Adapter(rank=2))
    plain = linears(fresh_model().model.language_model)
    assert mine.per_token == 4 * plain and mine.per_pair == 12 * 4 * 8 * 2


def test_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, needed = operations(ALL)
    result = StepResult(1.5, 2.5, COUNTS)
    now = [5.0]
    monkeypatch.setattr(metrics_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clock = Clock()
    now[0] += 2.0
    clock.waited_s = 1.0
    device = torch.device("cpu")
    metrics = Metrics(tmp_path, needed, world_size=4, device=device, trackers=())
    line = metrics.measure(7, result, clock, rate=0.5)
    metrics.write(line)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == line
    assert (line["step"], line["loss"], line["rate"], line["tokens"]) == (7, 1.5, 0.5, 100)
    assert line["tokens_per_s_per_gpu"] == pytest.approx(100 / 2 / 4)
    assert line["data_wait_share"] == pytest.approx(0.5)
    expected = (
        100 * needed.per_token + 50 * needed.per_target + 1000 * needed.per_pair
        + 4 * needed.per_frame
    )  # fmt: skip
    assert needed.of_step(result) == expected
    # The ceiling of a CPU is not known, so no share of it is given.
    assert peak_flops(device) is None and "mfu_percent" not in line
    metrics.ceiling = 1e9
    share = metrics.measure(7, result, clock)["mfu_percent"]
    assert share == pytest.approx(100 * expected / 2 / 4 / 1e9)


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    _, needed = operations(ALL)
    metrics = Metrics(None, needed, world_size=2, device=torch.device("cpu"))
    metrics.write({"step": 1})
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    _, needed = operations(ALL)
    metrics = Metrics(tmp_path, needed, world_size=1, device=torch.device("cpu"))
    metrics.write({"step": 3, "loss": 1.0})
    metrics.close()
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1 and b"train/loss" in events[0].read_bytes()


def test_a_line_that_a_kill_cut_is_not_glued_to_the_next(tmp_path: Path) -> None:
    needed = Operations(per_token=0.0, per_target=0.0, per_pair=0.0, per_frame=0.0)
    path = tmp_path / "metrics.jsonl"
    for before in ("", '{"step": 1}\n', '{"step": 1}\n{"step": 2, "lo'):
        path.write_text(before)
        metrics = Metrics(tmp_path, needed, world_size=1, device=torch.device("cpu"), trackers=())
        metrics.write({"step": 2})
        metrics.write({"step": 3})
        metrics.close()
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == [1, 2, 3][not before :]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    needed = Operations(per_token=0.0, per_target=0.0, per_pair=0.0, per_frame=0.0)
    metrics = Metrics(tmp_path, needed, world_size=1, device=torch.device("cpu"), trackers=())
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be written \(.*No space"):
        metrics.write({"step": 1})
    metrics.close()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H100 PCIe", 756.5e12),
     ("NVIDIA H100 NVL", 835.5e12), ("NVIDIA GeForce RTX 4090", None)],
)  # fmt: skip
def test_a_slower_card_of_a_name_has_its_own_ceiling(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == expected
