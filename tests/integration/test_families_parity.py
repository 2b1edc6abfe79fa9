"""MM-SP on unmodified models of transformers: loss, logits and every gradient of one process.

The oracle is the model's own forward on the whole batch. `family_cases` has the models and batches:
images and videos of several sizes, samples of text among them, fewer units than ranks.
"""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent))
from family_cases import CASES

from longvila.parallel.apply import ParallelPlan, last_step_plan, parallelize, reduce_gradients
from longvila.parallel.families import family_of
from longvila.parallel.mmsp import gather_logits
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.testing import Rank
from longvila.testing.asserts import TOLERANCE, assert_close
from longvila.testing.ranks import run_ranks

MESHES = {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}


class Expected(NamedTuple):
    """What one process gives for the whole batch."""

    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor | None]


@functools.cache
def prototype(family: str, dtype: torch.dtype) -> Any:
    return CASES[family].model(dtype)


@functools.cache
def new_mesh(ring: int, ulysses: int) -> SPMesh:
    return build_mesh(ring * ulysses, ring, ulysses_size=ulysses)


def oracle(family: str, name: str, dtype: torch.dtype) -> Expected:
    model, batch = copy.deepcopy(prototype(family, dtype)), CASES[family].batches[name](dtype)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits
    targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), targets)
    loss.backward()
    gradients = {path: parameter.grad for path, parameter in model.named_parameters()}
    return Expected(loss.detach(), logits.detach(), gradients)


@functools.cache
def told(rank: Rank, dtype: torch.dtype) -> dict[tuple[str, str], Expected]:
    """The oracles of all families and batches: ranks share the work and tell each other."""
    cells = [(family, name) for family, case in CASES.items() for name in case.batches]
    mine = {cell: oracle(*cell, dtype) for cell in cells[rank.rank :: rank.world_size]}
    everyones: list[Any] = [None] * rank.world_size
    dist.all_gather_object(everyones, mine)
    return {cell: expected for each in everyones for cell, expected in each.items()}


def error_of(gradient: Tensor, wanted: Tensor) -> Tensor:
    """The squared distance of this rank's part of a gradient."""
    if isinstance(gradient, DTensor):
        whole = distribute_tensor(
            wanted, gradient.device_mesh, gradient.placements, src_data_rank=None
        )
        gradient, wanted = gradient.to_local(), whole.to_local()
    return (gradient - wanted).norm() ** 2


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """The same samples behind one another in one row."""
    kept = batch["attention_mask"].bool()
    per_token = {k: v for k, v in batch.items() if getattr(v, "shape", None) == kept.shape}
    packed = batch | {k: v[kept][None] for k, v in per_token.items()}
    del packed["attention_mask"]
    return packed | {"document_lengths": kept.sum(1).tolist()}


def check(
    rank: Rank,
    family: str,
    name: str,
    dtype: torch.dtype,
    meshes: list[tuple[int, int]],
    *,
    packed: bool = False,
    fsdp: bool = False,
) -> None:
    batch = CASES[family].batches[name](dtype)
    loss, expected, wanted = told(rank, dtype)[family, name]
    scale = max(float(gradient.norm()) for gradient in wanted.values() if gradient is not None)
    # Norms and rotary embeddings of these models compute in float32 whatever the weights are.
    tolerance = 20 * TOLERANCE[dtype]
    for ring, ulysses in meshes:
        cell = f"[{family} {name} ring {ring} ulysses {ulysses} packed {packed} fsdp {fsdp}]"
        model, mesh = copy.deepcopy(prototype(family, dtype)), new_mesh(ring, ulysses)
        plan = ParallelPlan(fsdp=fsdp, parameter_dtype=None, compute_dtype=None, reduce_dtype=None)
        parallelize(model, mesh, plan)
        given = pack(batch) if packed else batch
        output = model(**given, output_logits=True)
        output.loss.backward()
        if not fsdp:
            reduce_gradients(model)
        assert_close(output.loss.detach(), loss, name=f"{cell} loss", tolerance=tolerance)
        rows, columns = given["input_ids"].shape
        logits = gather_logits(output, (rows, columns), mesh)
        kept = batch["attention_mask"].bool()
        assert_close(
            logits[0] if packed else logits[kept],
            expected[kept],
            name=f"{cell} logits",
            tolerance=tolerance,
        )
        assert dict(model.named_parameters()).keys() == wanted.keys()
        squares = {}
        for path, parameter in model.named_parameters():
            gradient = wanted[path]
            if gradient is None:
                assert parameter.grad is None, f"{cell} {path}: one process gives no gradient"
                continue
            assert parameter.grad is not None, f"{cell} {path} has no gradient"
            squares[path] = error_of(parameter.grad, gradient)
        total = torch.stack(list(squares.values())).double()
        if fsdp:  # each rank has looked at its shards
            dist.all_reduce(total)
        for path, error in zip(squares, total.sqrt().tolist(), strict=True):
            # Biases of keys move all scores of a query alike: theirs is rounding around zero.
            size = max(float(wanted[path].norm()), 1e-3 * scale)  # type: ignore[union-attr]
            assert error <= tolerance * size, f"{cell} {path}: {error:.1e} of {size:.1e}"
        step = last_step_plan(model)
        assert step is not None
        dealt = [len(step.media.frames.units(r)) for r in range(mesh.sp_size)]
        units = step.media.frames.num_units
        assert sum(dealt) == units
        assert (
            max(step.media.frames.rank_costs, default=0)
            < max(1, sum(step.media.frames.rank_costs) * 0.99)
            or units < 2
        ), f"{cell} one rank encodes everything: {dealt}"


def check_all(rank: Rank, dtype: torch.dtype, meshes: list[tuple[int, int]]) -> None:
    """All families on the same ranks; the ranks are started once."""
    for family, case in CASES.items():
        for name in case.batches:
            check(rank, family, name, dtype, meshes)


def check_packed_and_sharded(rank: Rank, dtype: torch.dtype) -> None:
    for family in CASES:
        check(rank, family, "mixed", dtype, [(1, 2)], packed=True)
        # One unit for two ranks: the other encodes a blank one.
        for name in ("mixed", "short", "text"):
            check(rank, family, name, dtype, [(2, 1)], fsdp=True)


def test_packed_samples_and_sharded_parameters_equal_one_process() -> None:
    run_ranks(check_packed_and_sharded, 2, torch.float64, timeout_s=280)


def check_own_pixels_and_generation(rank: Rank) -> None:
    """A rank's own pixels give the loss of all pixels; generating is left to the model."""
    for family, case in CASES.items():
        reference, model = case.model(torch.float32), case.model(torch.float32)
        batch = case.batches["mixed"](torch.float32)
        mesh = build_mesh(2, 2)
        parallelize(model, mesh, ParallelPlan(fsdp=False))
        expected = model(**batch).loss.detach()
        step = last_step_plan(model)
        assert step is not None
        entry = family_of(model.config)
        flat = entry.prepare(model.config, batch)
        local = dict(batch)
        for kind in entry.media:
            mine = step.media.local(kind.name, mesh.sp_rank)
            pixels = flat[kind.pixels]
            assert 0 <= mine.start <= mine.stop <= pixels.shape[0]
            del local[kind.pixels]
            local[f"local_{kind.pixels}"] = pixels[mine.start : mine.stop]
            if kind.counts not in local:
                local[kind.counts] = flat.get(kind.counts, torch.ones(pixels.shape[0]).long())
        assert torch.equal(model(**local).loss, expected), f"{family}: own pixels"

        batch.pop("labels")
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        wanted = reference.eval().generate(**batch, **options)
        assert torch.equal(model.eval().generate(**batch, **options), wanted), family


def test_own_pixels_and_generation() -> None:
    run_ranks(check_own_pixels_and_generation, 2, timeout_s=280)


@pytest.mark.parametrize("world", MESHES)
def test_families_equal_one_process(world: int) -> None:
    run_ranks(check_all, world, torch.float64, MESHES[world], timeout_s=280)
