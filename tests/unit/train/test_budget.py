"""A run that would not fit is refused before its first step, with what would help."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_cases import fresh_model, put_on_mesh, row

from longvila.memory.operations import Load
from longvila.memory.rates import GIB
from longvila.parallel.apply import ParallelPlan
from longvila.parallel.sizes import size_of
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.testing import Rank, ranks
from longvila.train import budget
from longvila.train.budget import (
    OverBudget,
    check,
    host_bytes,
    load_of_batch,
    load_of_stage,
    read_settings,
    tuned_parts,
)
from longvila.train.parts import tune
from longvila.train.stages import Adapter, Optimizer, Parallel, Rates, get_stage
from longvila.train.step import build_optimizer

CPU = torch.device("cpu")
RATES = Rates(vision_tower=1e-4, projector=1e-4, language_model=1e-4)
PLAN = ParallelPlan(compute_dtype=None, two_stage=True)


def ready(**options: Any) -> tuple[Any, SPMesh, torch.optim.Optimizer]:
    model = tune(fresh_model(), RATES)
    model, mesh = put_on_mesh(model, **options)
    return model, mesh, build_optimizer(model, RATES, Optimizer(), fused=False)


def test_a_small_step_passes() -> None:
    model, mesh, optimizer = ready()
    plan = check(model, mesh, PLAN, load_of_batch(row(1)), CPU, optimizer=optimizer)
    assert plan.fits and plan.time is None
    assert plan.size == size_of(model)
    assert plan.settings.backend == "cpu" and plan.settings.compute_bytes == 4
    held = sum(p.numel() for p in model.parameters())
    assert plan.peak.moments["optimizer"]["parameters"] == 4 * held


def test_a_large_step_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh, optimizer = ready()
    monkeypatch.setattr(budget, "host_bytes", lambda: 64 * 2**20)
    load = Load(tokens=2**18, targets=64)
    with pytest.raises(OverBudget) as caught:
        check(model, mesh, PLAN, load, CPU, optimizer=optimizer)
    message = str(caught.value)
    for part in (
        "a step of 262,144 tokens and 0 frames on 1 ranks a row", "of cpu, which has 0.1 GiB",
        "the peak is ", "tiled MLP (parallel.mlp_tile_rows=8192)", "parallel.seq_parallel_size",
        "`longvila plan`",
    ):  # fmt: skip
        assert part in message, message


def test_slightly_over_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, mesh, _ = ready()
    load = Load(tokens=2**16, targets=64)
    monkeypatch.setattr(budget, "host_bytes", lambda: 1e15)
    plan = check(model, mesh, PLAN, load, CPU)
    held = plan.peak.moments["optimizer"]["parameters"]
    monkeypatch.setattr(budget, "host_bytes", lambda: plan.peak.bytes / 1.03 - held)
    with caplog.at_level("WARNING"):
        assert not check(model, mesh, PLAN, load, CPU).fits
    assert "planned to need" in caplog.text
    monkeypatch.setattr(budget, "host_bytes", lambda: plan.peak.bytes / 1.06 - held)
    with pytest.raises(OverBudget):
        check(model, mesh, PLAN, load, CPU)


def test_what_waits_on_the_host_must_fit_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh, _ = ready()
    monkeypatch.setattr(budget, "_available", lambda *_: (1e15, 2**20))
    settings = Parallel(offload_gib=1.0, compute="float32")
    with pytest.raises(OverBudget, match="GiB of host memory a rank"):
        check(model, mesh, settings, Load(tokens=2**16, targets=64), CPU)


@ranks(2)
def test_all_ranks_refuse_or_none(rank: Rank) -> None:
    model, mesh, optimizer = ready(sp=2)
    load = load_of_batch(row(1))
    plan = check(model, mesh, PLAN, load, CPU, optimizer=optimizer)
    assert plan.fits and plan.ranks.sp == 2 and plan.settings.fsdp
    real = budget._available
    # One rank has nothing left; the other one has.
    budget._available = (lambda *_: (1.0, 1.0)) if rank.rank == 1 else real
    try:
        check(model, mesh, PLAN, load, CPU, optimizer=optimizer)
    except OverBudget as refused:
        assert "2 ranks a row" in str(refused)
    else:
        raise AssertionError(f"rank {rank.rank} went on alone")


def test_what_is_tuned() -> None:
    model = fresh_model()
    whole = tuned_parts(tune(model, RATES))
    assert whole.text and whole.tower and whole.adapter_parameters == whole.text_parameters == 0
    assert whole.parameters(size_of(model)) == sum(p.numel() for p in model.parameters())
    aligned = tuned_parts(tune(fresh_model(), Rates(projector=1e-3)))
    assert (aligned.tower, aligned.projector, aligned.text) == (False, True, False)
    pytest.importorskip("peft")
    model = tune(fresh_model(), Rates(language_model=1e-4), Adapter(rank=2))
    tuned = tuned_parts(model)
    assert not tuned.text and tuned.adapter_parameters > 0 and tuned.text_parameters > 0
    assert tuned.parameters(size_of(model)) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_settings_of_a_stage_and_of_a_plan() -> None:
    model, _, optimizer = ready()
    size = size_of(model)
    parallel = Parallel(
        offload_gib=2.0, mlp_tile_rows=512, plain_layers=1, loss_tile_rows=99, head_chunks=2
    )
    found = read_settings(model, parallel, size, CPU, optimizer)
    assert (found.offload_bytes, found.mlp_tile_rows, found.plain_layers) == (2 * 2**30, 512, 1)
    assert (found.compute_bytes, found.parameter_bytes, found.fsdp) == (2, 4, False)
    assert (found.loss_tile_rows, found.head_chunks, found.optimizer) == (99, 2, "adamw")
    eight = SimpleNamespace(state={torch.zeros(4): {"m": torch.zeros(4, dtype=torch.uint8)}})
    assert read_settings(model, parallel, size, CPU, eight).optimizer == "adamw-8bit"
    elsewhere = SimpleNamespace(state={torch.zeros(4, device="meta"): {"m": torch.zeros(4)}})
    assert read_settings(model, parallel, size, CPU, elsewhere).optimizer == "adamw-host"


def test_loads() -> None:
    model = fresh_model()
    mesh = build_mesh(1)
    text = load_of_stage(get_stage("extend-64k"), model, mesh)
    assert (text.tokens, text.frames, text.targets, text.micro_batches) == (2**16, 0, 2**16, 4)
    video = load_of_stage(get_stage("long-sft-256"), model, mesh)
    assert video.frames == (2**17 - 1) // 10 and video.micro_batches == 2
    assert video.targets == 2**17
    stage = get_stage("long-sft-256")
    single = replace(stage, data=replace(stage.data, max_documents=1))
    assert load_of_stage(single, model, mesh).frames == 256
    batch = row(1)
    load = load_of_batch(batch, micro_batches=3)
    assert load.tokens == batch["input_ids"].shape[1]
    assert load.documents == tuple(batch["document_lengths"])
    assert load.frames == int(batch["video_num_frames"].sum())


def test_the_host_says_what_is_left() -> None:
    assert 2**26 < host_bytes() < 2**50
    assert GIB == 2**30
