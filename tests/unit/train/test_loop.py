"""The loop: killed and resumed to the bit, resumed on other ranks, and never a lost save."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import Rows, assert_same, fresh_model, put_on_mesh, whole

from longvila.errors import CheckpointError, RankError
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import tiny_model
from longvila.train import checkpoint
from longvila.train.loop import run_stage
from longvila.train.parts import tune
from longvila.train.stages import Adapter, Data, Optimizer, Rates, Saving, Stage
from longvila.train.step import build_optimizer

STAGE = Stage(
    name="sft",
    rates=Rates(vision_tower=1e-3, projector=1e-3, language_model=1e-3),
    data=Data(rows_per_step=4),
    optimizer=Optimizer(epochs=None, max_steps=4, eps=1e-4, clip_norm=1.0),
    saving=Saving(every=2, keep=2),
)


def train(
    _: Rank | None,
    output: str,
    sp: int = 1,
    stop_after: int | None = None,
    stage: Stage = STAGE,
    rows_per_epoch: int = 1000,
    seed: int = 3,
) -> dict[str, Any]:
    checkpoint.seed_everything(0)
    model = tune(tiny_model(seed=seed, dtype=torch.float64), stage.rates, stage.adapter)
    model, mesh = put_on_mesh(model, sp=sp, fsdp=_ is not None)
    loader = Rows(mesh, dtype=torch.float64, rows_per_epoch=rows_per_epoch)
    progress = run_stage(
        model, mesh, loader, stage, Path(output), stop_after=stop_after, trackers=()
    )
    return {
        "step": progress.step, "losses": progress.losses, "seen": progress.seen,
        "rows": loader.rows, "stopped": progress.stopped, "weights": whole(model),
    }  # fmt: skip


def test_a_resumed_run_takes_its_own_rates_and_says_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(None, str(tmp_path), 1, 1)
    before = checkpoint.find_saves(tmp_path / "saves")[-1]
    slow = replace(STAGE, rates=Rates(vision_tower=1e-9, projector=1e-9, language_model=1e-9))
    model = tune(tiny_model(dtype=torch.float64), slow.rates)
    optimizer = build_optimizer(model, slow.rates, slow.optimizer)
    checkpoint.load(before, model, optimizer, seed=slow.seed)
    assert {group["full_lr"] for group in optimizer.param_groups} == {1e-9}
    saved = whole(model)
    caplog.clear()
    train(None, str(tmp_path), 1, 1, slow)
    said = [each.getMessage() for each in caplog.records if "was saved with" in each.getMessage()]
    assert [each.partition("saved with ")[2] for each in said] == [
        f"rates.{part} 0.001, this run has 1e-09"
        for part in ("vision_tower", "projector", "language_model")
    ]
    resumed = checkpoint.find_saves(tmp_path / "saves")[-1]
    assert resumed.step == 2
    checkpoint.load(resumed, model, optimizer, seed=slow.seed)
    moved = max(np.abs(value - saved[name]).max() for name, value in whole(model).items())
    assert 0 < moved < 1e-7


def test_stopped_and_resumed_is_the_run_that_was_not(tmp_path: Path) -> None:
    world, sp = 4, 2
    one = run_ranks(train, world, str(tmp_path / "one"), sp)
    first = run_ranks(train, world, str(tmp_path / "two"), sp, 3)
    second = run_ranks(train, world, str(tmp_path / "two"), sp)
    for whole_run, begun, resumed in zip(one, first, second, strict=True):
        assert begun["stopped"] and begun["step"] == 3 and resumed["step"] == 4
        assert begun["losses"] + resumed["losses"] == whole_run["losses"]
        assert resumed["seen"] == whole_run["seen"] and resumed["rows"] == whole_run["rows"]
        for name, value in whole_run["weights"].items():
            assert np.array_equal(resumed["weights"][name], value), name
    assert [s.step for s in checkpoint.find_saves(tmp_path / "two" / "saves")] == [3, 4]
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_random_numbers_go_on_too(tmp_path: Path) -> None:
    stage = replace(STAGE, adapter=Adapter(rank=2, dropout=0.2))
    whole_run = train(None, str(tmp_path / "one"), stage=stage)
    begun = train(None, str(tmp_path / "two"), stop_after=1, stage=stage)
    resumed = train(None, str(tmp_path / "two"), stage=stage)
    assert begun["losses"] + resumed["losses"] == whole_run["losses"]
    for name, value in whole_run["weights"].items():
        assert np.array_equal(resumed["weights"][name], value), name


def breaks(_: Rank, output: str) -> str:
    """Rank 1 cannot make its second row."""
    model, mesh = put_on_mesh(tune(fresh_model(torch.float64), STAGE.rates))
    loader = Rows(mesh, dtype=torch.float64)

    class Broken(Rows):
        def __iter__(self) -> Any:
            for number, batch in enumerate(Rows.__iter__(self)):
                if number == 2 and mesh.rank == 1:
                    raise OSError("the disk is gone")
                yield batch

    loader.__class__ = Broken
    with pytest.raises((OSError, RuntimeError)) as caught:
        run_stage(model, mesh, loader, STAGE, Path(output), trackers=())
    return f"{caught.value} {caught.value.__notes__}"


def test_a_rank_that_breaks_says_where_it_was(tmp_path: Path) -> None:
    said = run_ranks(breaks, 2, str(tmp_path))
    assert "the disk is gone ['on rank 1 (dp 1, ring 0, ulysses 0), step 2']" in said[1]
    assert "on rank 0 (dp 0, ring 0, ulysses 0), step 2" in said[0]


def test_a_finished_stage_takes_no_further_step(tmp_path: Path) -> None:
    first = train(None, str(tmp_path))
    again = train(None, str(tmp_path))
    assert again["losses"] == [] and again["step"] == first["step"] == 4
    assert_same(again["weights"], first["weights"])


def test_resuming_on_other_ranks(tmp_path: Path) -> None:
    one = train(None, str(tmp_path / "one"))
    begun = run_ranks(train, 4, str(tmp_path / "two"), 4, 2)
    resumed = run_ranks(train, 2, str(tmp_path / "two"), 1)
    for number, run in enumerate(resumed):
        losses = begun[number]["losses"] + run["losses"]
        assert losses == pytest.approx(one["losses"], rel=1e-6)
        assert run["seen"] == one["seen"] and run["rows"] == 16
        assert_same(run["weights"], one["weights"], 1e-5)


def test_epochs_and_samples_end_a_stage(tmp_path: Path) -> None:
    stage = replace(
        STAGE,
        data=Data(samples_per_step=7),
        optimizer=Optimizer(epochs=2, warmup_ratio=0.1),
        saving=Saving(every=None),
    )
    # Rows have three samples, so a step takes three of them; twice five rows end in a short step.
    out = train(None, str(tmp_path), stage=stage, rows_per_epoch=5)
    assert (out["step"], out["rows"], out["seen"].rows) == (4, 10, 10)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["documents"] for line in lines] == [9, 9, 9, 3]
    assert lines[-1]["progress"] == 1.0
    rates = [line["rate"] for line in lines]
    assert all(0 < rate <= 1 for rate in rates) and rates == sorted(rates, reverse=True)
    assert {"tokens_per_s_per_gpu", "data_wait_share", "tflops_per_gpu"} <= set(lines[0])


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.distcp"))


def test_frozen_parts_are_saved_once(tmp_path: Path) -> None:
    frozen = replace(STAGE, rates=Rates(projector=1e-3), saving=Saving(every=1, keep=2))
    whole_run = train(None, str(tmp_path / "one"), stage=frozen)
    run_ranks(train, 2, str(tmp_path / "two"), 2, 2, frozen)
    saves = tmp_path / "two" / "saves"
    before = {p: p.stat().st_mtime_ns for p in (saves / "frozen").iterdir()}
    # Saves hold the projector and its two moments; all else is beside them.
    assert size_of(saves / "step-2") < size_of(saves / "frozen")
    # On another number of ranks, and from another model: the frozen weights are the run's own.
    resumed = train(None, str(tmp_path / "two"), stage=frozen, seed=8)
    assert resumed["step"] == 4
    assert_same(resumed["weights"], whole_run["weights"], 1e-5)
    name = "model.language_model.embed_tokens.weight"
    assert np.array_equal(resumed["weights"][name], whole_run["weights"][name])
    assert {p: p.stat().st_mtime_ns for p in (saves / "frozen").iterdir()} == before
    (saves / "frozen" / "name").write_text("other")
    with pytest.raises(CheckpointError, match="of another run; copy saves with their folder"):
        train(None, str(tmp_path / "two"), stage=frozen)
    for path in saves.glob("step-*"):
        path.rename(path.with_name(f"gone-{path.name}"))
    train(None, str(tmp_path / "two"), stage=frozen, stop_after=1)
    assert (saves / "frozen" / "name").read_text() != "other"


def test_a_save_of_another_stage_or_adapter_is_refused(tmp_path: Path) -> None:
    train(None, str(tmp_path), stop_after=1)
    with pytest.raises(CheckpointError, match="a save of the stage sft, this is align"):
        train(None, str(tmp_path), stage=replace(STAGE, name="align"))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train(None, str(tmp_path), stage=replace(STAGE, adapter=Adapter()))
    run = tmp_path / "saves" / "step-1" / "run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="is of version 99, this is 2"):
        checkpoint.find_saves(tmp_path / "saves")


def save_for_ever(_: Rank, output: str, log: str) -> None:
    """Save as fast as possible until killed, and say what is done."""
    model, _mesh = put_on_mesh(fresh_model(), fsdp=False)
    optimizer = torch.optim.AdamW(model.parameters())
    folder = Path(output) / "saves"
    checkpoint.clean(folder)
    saves = checkpoint.find_saves(folder)
    step = saves[-1].step if saves else 0
    with open(log, "w", buffering=1) as said:
        said.write(f"{os.getpid()}\n")
        while True:
            step += 1
            with torch.no_grad():
                model.lm_head.weight.fill_(step)
            checkpoint.save(folder, step, model, optimizer, run={}, data={"step": step}, keep=2)
            said.write(f"{step}\n")


def kill_after(log: Path, saves: int, delay_s: float) -> None:
    """Kill the process whose id is the first line of a file, some saves later."""
    while not log.exists() or len(lines := log.read_text().split()) <= saves:
        time.sleep(0.005)
    time.sleep(delay_s)
    os.kill(int(lines[0]), signal.SIGKILL)


def test_killed_at_any_moment_there_is_a_whole_save(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    last = 0
    for number in range(2):
        log = tmp_path / f"said{number}"
        delay_s = float(generator.uniform(0, 0.15))
        killer = threading.Thread(target=kill_after, args=(log, 3, delay_s), daemon=True)
        killer.start()
        with pytest.raises(RankError, match="without an answer"):
            run_ranks(save_for_ever, 1, str(tmp_path), str(log))
        killer.join()
        said = [int(line) for line in log.read_text().split()[1:]]
        saves = checkpoint.find_saves(tmp_path / "saves")
        # The last save that was said to be done is there, or a newer one; it began after the last.
        assert saves[-1].step >= said[-1] > last
        last = saves[-1].step
        for each in saves[-1:]:
            model, _ = put_on_mesh(fresh_model(), fsdp=False)
            optimizer = torch.optim.AdamW(model.parameters())
            data = checkpoint.load(each, model, optimizer, seed=0)
            assert data == {"step": each.step}
            assert bool((model.lm_head.weight == each.step).all())
