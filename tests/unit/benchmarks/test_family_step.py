"""The benchmark of other families on two gloo ranks, tiny, and the operations it counts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from benchmarks import _cluster, family_step
from benchmarks._attempt import OUT_OF_MEMORY
from benchmarks._results import Report, Row
from benchmarks.family_shapes import SHAPES, operations, windows
from benchmarks.peers import stock_trainer
from benchmarks.render import RENDERERS
from transformers import Trainer

from longvila.testing import Rank, ranks


def launched(rank: Rank) -> mock._patch_dict:
    """What a launcher says, so that accelerate joins the ranks of the test."""
    values = {
        "RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.world_size,
        "LOCAL_WORLD_SIZE": rank.world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500,
    }  # fmt: skip
    return mock.patch.dict("os.environ", {name: str(value) for name, value in values.items()})


@ranks(2)
def test_families_are_checked_and_timed(rank: Rank, tmp_path: Path) -> None:
    flags = f"--tiny --stock qwen2.5-vl-7b --stock-tokens 100 --out {tmp_path} --suffix x"
    # Of the processor's time: a rank that waits for its turn would have a step without parts.
    with launched(rank), mock.patch("time.perf_counter", time.process_time):
        report = family_step.run(family_step.parse(flags.split()), _cluster.start())
    assert [row.method for row in report.rows] == [
        "longvila-7b/longvila",
        "qwen2.5-vl-7b/longvila", "qwen2.5-vl-7b/replicated_tower",
        "qwen3-vl-8b/longvila", "qwen3-vl-8b/replicated_tower",
        "qwen2.5-vl-7b/stock_trainer",
    ]  # fmt: skip
    for row in report.rows[:-1]:
        assert row.tokens >= 300
        parts = [row.metrics[f"{part}_s"] for part in family_step.PARTS]
        assert min(parts) > 0
        assert 0.5 * row.metrics["step_s"] < sum(parts) <= 1.01 * row.metrics["step_s"]
        if row.kind == "ours":
            assert row.metrics["check_vision_tower_norm_error"] < 1e-4
            assert row.metrics["check_loss_error"] < 1e-5
    assert report.rows[-1].metrics["step_s"] > 0
    for line in report.notes["comparisons"][1:]:
        assert line["norm_difference_to_replicated_tower"] < 1e-4
        assert line["rate_of_longvila"] > 0
    if rank.rank == 0:
        (path,) = tmp_path.glob("*_family_step_*_x.json")
        content = json.loads(path.read_text())
        assert len(content["rows"]) == 6
        content["rows"][-1] |= {"metrics": {}, "about": {"failed": OUT_OF_MEMORY}}
        lines = RENDERERS["family_step"](content)
        assert any(line.startswith("| qwen3-vl-8b | **`longvila`** | ") for line in lines)
        assert any(OUT_OF_MEMORY in line for line in lines)
        assert lines[-1].startswith("Against one GPU at 150 tokens")


class ShardedOnCPU(Trainer):
    """Transformers' Trainer whose accelerate believes that it shards, which it does on GPUs."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True
        assert self.accelerator.is_fsdp2


@ranks(2)
def test_the_stock_trainer_grows_until_nothing_fits(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--tiny --families --stock qwen3-vl-8b --stock-tokens 60 100 140"
    options = family_step.parse(flags.split())
    arguments = stock_trainer.StockRun.arguments
    sharded: list[bool] = []

    def on_gpu(self: Any, folder: str, steps: int) -> Any:
        found = arguments(self, folder, steps)
        wanted = {"version": 2, "transformer_layer_cls_to_wrap": list(self.shape.layers)}
        found.fsdp, found.fsdp_config = True, wanted
        found.fsdp_plugin_args = found._process_fsdp_args()
        return found

    class Full(ShardedOnCPU):
        """Has no memory for the last length."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            sharded.append(any(hasattr(p, "placements") for p in model.parameters()))
            if inputs["input_ids"].shape[1] >= 130:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(stock_trainer.StockRun, "arguments", on_gpu)
    monkeypatch.setattr(stock_trainer, "Trainer", Full)
    with launched(rank):
        report = family_step.run(options, _cluster.start())
    assert [row.tokens for row in report.rows] == [60, 100, 140]
    assert report.rows[-1].about["failed"] == OUT_OF_MEMORY and not report.rows[-1].metrics
    assert all(sharded) and len(sharded) == 3


def test_shapes_are_the_published_ones() -> None:
    """Parameters of the models' cards; operations against those worked out from the sizes."""
    options = family_step.parse([])
    found = {}
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            model = shape.make(options)
        batch = shape.batch(model.config, 1000, options)
        assert batch.tokens >= 1000
        found[name] = operations(model, batch), batch
        count = sum(p.numel() for p in model.parameters()) / 1e9
        assert {"longvila-7b": 8.04, "qwen2.5-vl-7b": 8.29, "qwen3-vl-8b": 8.77}[
            name
        ] == pytest.approx(count, abs=0.005)
    # Two names, one text model; 3 * (2 * weights * tokens).
    weights = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    for name in ("longvila-7b", "qwen2.5-vl-7b"):
        parts, batch = found[name]
        assert parts["text_matrices"] == 6 * weights * batch.tokens
        assert parts["text_attention"] == 6 * 28 * 3584 * batch.tokens**2
        assert parts["head"] == 6 * 3584 * 152064 * 256
    parts, batch = found["qwen2.5-vl-7b"]
    steps = len(batch.units)
    # 4 layers over 1024 patches, 28 over 16 windows of 64.
    assert parts["tower_attention"] == 12 * 1280 * steps * (4 * 1024**2 + 28 * 16 * 64**2)
    parts, batch = found["qwen3-vl-8b"]
    merger = (4 * 1152) ** 2 + 4 * 1152 * 4096
    assert parts["projector"] == 6 * 4 * merger * batch.rows


def test_windows_at_the_edge_are_cut() -> None:
    assert windows(4, 4, 4) == [16]
    assert windows(6, 5, 4) == [16, 4, 8, 2]


def test_families_compare_with_longvila_and_their_peers() -> None:
    report = Report("family_step", "?", {})

    def add(family: str, method: str, tokens: int, step_s: float | None, rate: float) -> None:
        metrics = {"step_s": step_s, "tflops_per_gpu": rate, "gradient_norm": 2.0}
        kind = family_step.VARIANTS.get(method, "peer")
        given = {} if step_s is None else metrics
        report.rows.append(Row(f"{family}/{method}", kind, tokens, {"family": family}, given))

    add("longvila-7b", "longvila", 128, 2.0, 500.0)
    add("b", "longvila", 130, 3.0, 450.0)
    add("b", "replicated_tower", 130, 4.5, 300.0)
    add("b", "stock_trainer", 16, 1.0, 0.0)
    add("b", "stock_trainer", 32, 1.0, 0.0)
    add("b", "stock_trainer", 48, None, 0.0)
    assert family_step.compare(report) == [
        {"family": "longvila-7b", "tokens": 128},
        {
            "family": "b", "tokens": 130, "rate_of_longvila": 0.9,
            "speedup_over_replicated_tower": 1.5, "norm_difference_to_replicated_tower": 0.0,
            "stock_trainer_tokens": 32,
        },
    ]  # fmt: skip


def test_no_family_is_begun_when_time_is_up() -> None:
    options = family_step.parse(["--tiny", "--stop-after-s", "0"])
    report = family_step.run(options, _cluster.start())
    assert not report.rows
    assert {each["reason"] for each in report.not_measured} == {"no time left"}
