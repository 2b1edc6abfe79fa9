"""One step: the same update on any mesh and any cut into micro-batches, clipped exactly."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import assert_same, fresh_model, put_on_mesh, row, whole

from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.sp.mesh import SPMesh
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.train.parts import named_parts, tune
from longvila.train.stages import Optimizer, Rates, StageError
from longvila.train.step import (
    Counts,
    NotFinite,
    build_optimizer,
    count_batch,
    gradient_norm,
    train_step,
)

STEPS, ROWS = 5, 4
RATES = Rates(vision_tower=1e-3, projector=2e-3, language_model=3e-3)
#: Some gradients are zero but for rounding (the bias of a key has no effect); eps keeps AdamW from
#: blowing that up to whole steps.
SETTINGS = Optimizer(eps=1e-4, weight_decay=0.1)
CLIP = 0.5


def run_steps(
    _: Rank | None,
    dtype: torch.dtype,
    *,
    sp: int = 1,
    ring: int = -1,
    fsdp: bool = True,
    rates: Rates = RATES,
    **plan: Any,
) -> tuple[list[tuple[float, float, Counts]], dict[str, np.ndarray]]:
    """Five steps of four rows each, dealt over the data-parallel ranks."""
    model = fresh_model(dtype)
    tune(model, rates)
    model, mesh = put_on_mesh(model, sp=sp, ring=ring, fsdp=fsdp, **plan)
    optimizer = build_optimizer(model, rates, SETTINGS)
    seen = []
    for step in range(STEPS):
        rows = range(step * ROWS + mesh.dp_rank, (step + 1) * ROWS, mesh.dp_size)
        result = train_step(
            model,
            (row(seed, dtype) for seed in rows),
            optimizer,
            mesh,
            rate=1.0 / (step + 1),
            clip_norm=CLIP,
        )
        seen.append((result.loss, result.gradient_norm, result.counts))
    return seen, whole(model)


@functools.cache
def oracle(dtype: torch.dtype) -> Any:
    """One process, the model's own forward a document, the mean over all targets, torch's clip."""
    model = fresh_model(dtype).train()
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for _, p in named if (p.ndim > 1) == matrices],
                "lr": getattr(RATES, part),
                "weight_decay": SETTINGS.weight_decay if matrices else 0.0,
            }
            for part, named in named_parts(model).items()
            for matrices in (True, False)
        ],
        eps=SETTINGS.eps,
        foreach=False,
    )
    full = [group["lr"] for group in optimizer.param_groups]
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, targets = torch.zeros((), dtype=dtype), 0
        for seed in range(step * ROWS, (step + 1) * ROWS):
            batch = row(seed, dtype)
            at = frame = video = 0
            for length in batch["document_lengths"]:
                ids = batch["input_ids"][:, at : at + length]
                wanted = batch["labels"][0, at + 1 : at + length]
                media: dict[str, Any] = {}
                if (ids == model.config.video_token_id).any():
                    number = int(batch["video_num_frames"][video])
                    media["pixel_values_videos"] = batch["pixel_values_videos"][
                        frame : frame + number
                    ]
                    media["video_num_frames"] = torch.tensor([number])
                    frame, video = frame + number, video + 1
                logits = model(input_ids=ids, **media).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(
                    logits, wanted, ignore_index=-100, reduction="sum"
                )
                targets += int((wanted != -100).sum())
                at += length
        (total / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate / (step + 1)
        optimizer.step()
        seen.append((total.item() / targets, norm.item(), targets))
    return seen, whole(model)


def check(results: Any, dtype: torch.dtype) -> None:
    expected, parameters = oracle(dtype)
    # Norms of the text model work in float32 whatever the parameters are.
    tolerance = 1e-7 if dtype == torch.float64 else 1e-5
    for seen, mine in results:
        for (loss, norm, counts), (loss0, norm0, targets) in zip(seen, expected, strict=True):
            assert counts.targets == targets and counts.rows == ROWS
            assert loss == pytest.approx(loss0, rel=tolerance)
            assert norm == pytest.approx(norm0, rel=tolerance) and norm0 > CLIP
        assert_same(mine, parameters, tolerance)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (4, {"sp": 1}),
        (4, {"sp": 4}),
        (2, {"sp": 1, "keep_gathered": True}),
        (4, {"sp": 2, "ring": 1}),
        (2, {"sp": 2, "ring": 2, "fsdp": False}),
        (2, {"sp": 1, "fsdp": False}),
    ],
    ids=str,
)
def test_every_mesh_takes_the_steps_of_one_process(world: int, options: dict[str, Any]) -> None:
    check(run_ranks(run_steps, world, torch.float64, **options), torch.float64)


def test_in_float32() -> None:
    check(run_ranks(run_steps, 4, torch.float32, sp=4), torch.float32)


def test_one_process_without_a_mesh() -> None:
    check([run_steps(None, torch.float64)], torch.float64)


def align_step(_: Rank | None, sp: int) -> Any:
    """Only the projector is tuned; rows 3 and 6 are text alone."""
    rates = Rates(projector=1e-2)
    model = fresh_model(torch.float64)
    tune(model, rates)
    model, mesh = put_on_mesh(model, sp=sp)
    optimizer = build_optimizer(model, rates, SETTINGS)
    losses = []
    for rows in ((1, 3), (3, 6), (2, 4)):
        mine = rows[mesh.dp_rank :: mesh.dp_size]
        losses.append(
            train_step(
                model, [row(seed, torch.float64) for seed in mine], optimizer, mesh, clip_norm=1.0
            ).loss
        )
    return losses, whole(model)


def test_only_the_projector_is_tuned_and_some_rows_have_no_media() -> None:
    losses, parameters = align_step(None, 1)
    before = whole(fresh_model(torch.float64))
    changed = {name for name in before if not np.array_equal(before[name], parameters[name])}
    assert changed and all("projector" in name for name in changed)
    for world, sp in ((2, 1), (2, 2)):
        for others, theirs in run_ranks(align_step, world, sp):
            assert others == pytest.approx(losses, rel=1e-7)
            assert_same(theirs, parameters, 1e-7)


def norms(_: Rank) -> tuple[float, float]:
    model, mesh = put_on_mesh(fresh_model(torch.float64))
    model(**row(mesh.dp_rank + 1, torch.float64)).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    expected = torch.stack([g.full_tensor().norm() for g in gradients]).norm()
    return float(gradient_norm(gradients)), float(expected)


def test_the_norm_is_that_of_whole_gradients() -> None:
    for mine, expected in run_ranks(norms, 4):
        assert mine == pytest.approx(expected, rel=1e-12)
    assert float(gradient_norm([])) == 0.0


def plain(rates: Rates = RATES) -> tuple[Any, Any]:
    model = fresh_model()
    tune(model, rates)
    plan = ParallelPlan(fsdp=False, two_stage=True)
    parallelize(model, SPMesh(), plan)
    return model, build_optimizer(model, rates, SETTINGS)


def test_counts() -> None:
    batch = row(1)
    lengths = batch["document_lengths"]
    counts = count_batch(batch)
    assert counts.documents == 3 and counts.tokens == sum(lengths)
    assert counts.frames == int(batch["video_num_frames"].sum())
    assert counts.pairs == sum(n * (n + 1) // 2 for n in lengths)
    # The first token of a document is nobody's target, even if it has a label.
    starts = (batch["position_ids"] == 0) & (batch["labels"] != -100)
    assert starts.sum() == 3
    assert counts.targets == int((batch["labels"] != -100).sum()) - 3
    padded = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [1, -100, 3, 4]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    assert count_batch(padded) == Counts(2, 6, 13, 0, 3, 1)
    # Of other families: steps of grids, sizes of images; pixels may be another rank's.
    grids = {"video_grid_thw": torch.tensor([[3, 2, 2], [2, 4, 2]]), "image_grid_thw": [[1, 2, 2]]}
    pixels = {"pixel_values": torch.zeros(4, 5), "pixel_values_videos": torch.zeros(28, 5)}
    assert count_batch(padded | grids | pixels).frames == count_batch(padded | grids).frames == 6
    sizes = {"image_sizes": torch.tensor([[4, 5]]), "video_num_frames": torch.tensor([3])}
    tiles = {"pixel_values": torch.zeros(7, 3, 2, 2)}
    assert count_batch(padded | sizes | tiles).frames == count_batch(padded | sizes).frames == 4


def test_a_step_without_targets_changes_nothing() -> None:
    model, optimizer = plain()
    before = whole(model)
    batch = row(1)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    result = train_step(model, [batch], optimizer, SPMesh())
    assert result.loss == 0.0 and result.counts.targets == 0
    assert_same(whole(model), before)


def test_what_is_not_finite_is_refused_before_the_update() -> None:
    model, optimizer = plain()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 3e38
    before = whole(model)
    with pytest.raises(NotFinite, match="nothing was updated"):
        train_step(model, [row(1)], optimizer, SPMesh())
    assert_same(whole(model), before)


def test_a_step_needs_a_batch_and_rates() -> None:
    model, optimizer = plain()
    with pytest.raises(ValueError, match="at least one micro-batch"):
        train_step(model, [], optimizer, SPMesh())
    with pytest.raises(StageError, match=r"of vision_tower are tuned, but it has no rate"):
        build_optimizer(model, Rates(projector=1.0), SETTINGS)
    model.requires_grad_(False)
    with pytest.raises(StageError, match="nothing is tuned"):
        build_optimizer(model, RATES, SETTINGS)


def test_each_part_has_its_rate_and_vectors_do_not_decay() -> None:
    _, optimizer = plain()
    groups = optimizer.param_groups
    assert [g["full_lr"] for g in groups] == [1e-3, 1e-3, 2e-3, 2e-3, 3e-3, 3e-3]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] * 3
    assert all(int(state["step"]) == 0 for state in optimizer.state.values())
