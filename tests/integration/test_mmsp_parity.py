"""MM-SP against one process: loss, logits and every gradient, over a grid of what can differ.

The oracle is the model's own single-device forward on the whole global batch, one row a document,
with the cross-entropy written out in the model's precision. A cell of the grid says which mesh,
layout, precision, head counts, batch and wrapping; `make test` runs a subset in which every pair of
values of any two factors occurs (the coverage is printed), `make test-all` every cell.

Each assertion names the parameter: an error in the tower but not the projector points to
recomputation, in both to the row exchange, in the embedding alone to the token shards, in the head
alone to the loss, in the layers to attention.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from longvila.parallel.apply import ParallelPlan, parallelize, reduce_gradients
from longvila.parallel.mmsp import gather_logits
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.testing import Rank
from longvila.testing.asserts import TOLERANCE, assert_close, relative_error
from longvila.testing.ranks import run_ranks
from longvila.testing.tiny import TINY_IMAGE_ID, TINY_VIDEO_ID, tiny_model

PAD, VOCAB, PIXELS = 256, 250, 20

#: world: (ring, ulysses) of the sequence-parallel group; the rest is data parallel.
MESHES = {
    1: [(1, 1)],
    2: [(2, 1), (1, 2)],
    4: [(2, 1), (4, 1), (2, 2), (1, 4)],
    8: [(2, 2), (2, 4)],
}
ALL_MESHES = {
    **MESHES,
    2: [(1, 1), *MESHES[2]],
    4: [(1, 2), *MESHES[4]],
    8: [(8, 1), (4, 2), (1, 8), *MESHES[8]],
}
LAYOUTS = ("ring_varlen p2p", "zigzag_ring_varlen p2p", "zigzag_ring_varlen gather")
DTYPES = (torch.float64, torch.float32)
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "one kv head": (4, 1), "not divisible": (6, 3)}
WRAPS = ("plain", "checkpointed", "fsdp checkpointed")


class Cell(NamedTuple):
    """One point of the grid."""

    world: int
    mesh: tuple[int, int]
    layout: str
    dtype: torch.dtype
    heads: str
    batch: str
    wrap: str

    def __str__(self) -> str:
        ring, ulysses = self.mesh
        dp = self.world // (ring * ulysses)
        return (
            f"dp {dp} ring {ring} ulysses {ulysses}, {self.layout}, {self.dtype}, {self.heads}, "
            f"{self.batch}, {self.wrap}"
        )


# ---- batches ---------------------------------------------------------------------------------


class Sample:
    """One row of a batch: text with media in it, and which tokens are targets."""

    def __init__(self, generator: torch.Generator, per_frame: int) -> None:
        self.generator, self.per_frame = generator, per_frame
        self.ids: list[Tensor] = []
        self.target: list[Tensor] = []
        self.frames: dict[str, list[int]] = {"image": [], "video": []}

    def text(self, tokens: int, *, target: bool = False) -> Sample:
        self.ids.append(torch.randint(VOCAB, (tokens,), generator=self.generator))
        self.target.append(torch.full((tokens,), target))
        return self

    def media(self, kind: str, frames: int) -> Sample:
        token = TINY_VIDEO_ID if kind == "video" else TINY_IMAGE_ID
        for _ in range(frames):
            self.ids.append(torch.full((self.per_frame,), token))
            self.target.append(torch.zeros(self.per_frame, dtype=torch.bool))
            self.text(1)
        self.frames[kind].append(frames)
        return self


def collate(samples: list[Sample], dtype: torch.dtype, *, left: bool = False) -> dict[str, Any]:
    """Pad rows and pack media, as a data collator would."""
    rows = [torch.cat(sample.ids) for sample in samples]
    targets = [torch.cat(sample.target) for sample in samples]
    columns = max(row.numel() for row in rows)
    ids = torch.full((len(rows), columns), PAD)
    labels = torch.full((len(rows), columns), -100)
    mask = torch.zeros(len(rows), columns, dtype=torch.int64)
    for number, (row, target) in enumerate(zip(rows, targets, strict=True)):
        where = slice(columns - row.numel(), columns) if left else slice(0, row.numel())
        ids[number, where], mask[number, where] = row, 1
        labels[number, where] = row.masked_fill(~target, -100)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    for kind, pixels, counts in (
        ("image", "pixel_values", "image_num_tiles"),
        ("video", "pixel_values_videos", "video_num_frames"),
    ):
        frames = [n for sample in samples for n in sample.frames[kind]]
        if frames:
            size = (sum(frames), 3, PIXELS, PIXELS)
            batch[pixels] = torch.randn(size, generator=samples[0].generator, dtype=dtype)
            batch[counts] = torch.tensor(frames)
    return batch


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """The same samples behind one another in one row, told apart by restarting positions."""
    kept = batch["attention_mask"].bool()
    packed = {k: v for k, v in batch.items() if k != "attention_mask"}
    packed["input_ids"], packed["labels"] = (batch[k][kept][None] for k in ("input_ids", "labels"))
    packed["position_ids"] = torch.cat([torch.arange(int(n)) for n in kept.sum(1)])[None]
    return packed


BATCHES = (
    "padded right", "padded left", "packed", "one long document", "ranks without tokens",
    "ranks without frames", "ranks without targets", "text beside video", "several media",
    "no targets", "text only",
)  # fmt: skip


def samples_of(kind: str, dp_rank: int, per_frame: int) -> list[Sample]:
    """The samples of one data-parallel rank; other ranks get other lengths and contents."""
    generator = torch.Generator().manual_seed(1000 * BATCHES.index(kind) + dp_rank)

    def new() -> Sample:
        return Sample(generator, per_frame)

    if kind == "one long document":
        return [new().text(7).media("video", 5 + dp_rank).text(9, target=True)]
    if kind == "ranks without tokens":
        return [new().text(3 + dp_rank % 2, target=True)]
    if kind == "ranks without frames":
        return [new().text(30).media("video", 1).text(20, target=True)]
    if kind == "ranks without targets":
        return [new().text(3).media("video", 4).text(5), new().text(20 + dp_rank, target=True)]
    if kind == "text beside video":
        # On the second data-parallel rank there is no video at all.
        first = new().text(11, target=True)
        return (
            [first, new().text(4).media("video", 3 * (dp_rank % 2 == 0)).text(5, target=True)]
            if dp_rank % 2 == 0
            else [first, new().text(6, target=True)]
        )
    if kind == "several media":
        mixed = new().text(2).media("image", 3).text(2, target=True).media("video", 2)
        mixed.text(3).media("image", 1).media("video", 3).text(4, target=True)
        return [mixed, new().media("image", 1).text(6, target=True)]
    if kind == "no targets":
        return [new().text(5).media("video", 2).text(6)]
    if kind == "text only":
        return [new().text(13 + dp_rank, target=True), new().text(8, target=True)]
    first = new().text(5).media("video", 3).text(6, target=True)
    return [first, new().media("video", 1).text(3 + dp_rank, target=True), new().text(4)]


def batch_of(cell: Cell, dp_rank: int, per_frame: int) -> dict[str, Any]:
    samples = samples_of(cell.batch, dp_rank, per_frame)
    batch = collate(samples, cell.dtype, left=cell.batch == "padded left")
    return pack(batch) if cell.batch == "packed" else batch


# ---- oracle ----------------------------------------------------------------------------------


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


class Expected(NamedTuple):
    """What one process gives: the loss, the logits of each data-parallel rank, all gradients."""

    loss: Tensor
    logits: list[Tensor]
    gradients: dict[str, Tensor | None]


def oracle(cell: Cell) -> Expected:
    """Compute the whole world's batch on this process."""
    model = new_model(cell)
    dp_size = cell.world // (cell.mesh[0] * cell.mesh[1])
    summed, count, logits = 0.0, 0, []
    for dp_rank in range(dp_size):
        samples = samples_of(cell.batch, dp_rank, model.config.tokens_per_frame)
        batch = collate(samples, cell.dtype, left=cell.batch == "padded left")
        labels = batch.pop("labels")
        scores = model(**batch).logits
        targets = shifted(labels).flatten()
        summed = summed + F.cross_entropy(scores.flatten(0, 1), targets, reduction="sum")
        count += int((targets != -100).sum())
        logits.append(scores.detach()[batch["attention_mask"].bool()])
    loss = summed / max(count, 1)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Expected(loss.detach(), logits, gradients)


def oracles(rank: Rank, cells: list[Cell]) -> Iterator[Expected]:
    """Those of all cells: each is computed by one rank alone, which tells the others."""
    for n in range(len(cells)):
        turn = n % rank.world_size
        if turn == 0:
            own = oracle(cells[n + rank.rank]) if n + rank.rank < len(cells) else None
        told = [own]
        dist.broadcast_object_list(told, src=turn)
        assert told[0] is not None
        yield told[0]


# ---- a cell ----------------------------------------------------------------------------------


@functools.cache
def prototype(heads: str, dtype: torch.dtype) -> Any:
    query_heads, kv_heads = HEADS[heads]
    text = {
        "num_attention_heads": query_heads, "num_key_value_heads": kv_heads,
        "hidden_size": 8 * query_heads, "head_dim": 8,
    }  # fmt: skip
    return tiny_model(dtype=dtype, text_config=text, vision_batch_size=2).train()


def new_model(cell: Cell) -> Any:
    return copy.deepcopy(prototype(cell.heads, cell.dtype))


@functools.cache
def new_mesh(mesh: tuple[int, int], layout: str) -> SPMesh:
    ring, ulysses = mesh
    ring_type, exchange = layout.split()
    return build_mesh(
        ring * ulysses, ring, ring_type, ulysses_size=ulysses, kv_exchange=exchange  # type: ignore[arg-type]
    )  # fmt: skip


def plan_of(cell: Cell) -> ParallelPlan:
    return ParallelPlan(
        fsdp=cell.wrap.startswith("fsdp"),
        parameter_dtype=None, compute_dtype=None, reduce_dtype=None,
        activation_checkpointing=cell.wrap.endswith("checkpointed"),
        loss_tile_rows=5,
        two_stage=True,
    )  # fmt: skip


def gradient_errors(model: Any, gradients: dict[str, Tensor | None]) -> dict[str, float]:
    """Distance of each gradient from one process's; of shards in one sum over the ranks."""
    squares, sharded = {}, False
    for name, parameter in model.named_parameters():
        wanted, found = gradients[name], parameter.grad
        if wanted is None:
            assert found is None, f"{name} has a gradient, one process gives none"
            continue
        assert found is not None, f"{name} has no gradient"
        if isinstance(found, DTensor):
            sharded = True
            whole = distribute_tensor(
                wanted, found.device_mesh, found.placements, src_data_rank=None
            )
            found, wanted = found.to_local(), whole.to_local()
        squares[name] = (found - wanted).norm() ** 2
    total = torch.stack([square.double() for square in squares.values()])
    if sharded:  # over all ranks, and every parameter is
        dist.all_reduce(total)
    return dict(zip(squares, total.sqrt().tolist(), strict=True))


def check_cell(cell: Cell, expected: Expected) -> dict[str, float]:
    """Compare one cell; return the largest relative error of loss, logits and gradients."""
    model, mesh = new_model(cell), new_mesh(cell.mesh, cell.layout)
    parallelize(model, mesh, plan_of(cell))
    batch = batch_of(cell, mesh.dp_rank, model.config.tokens_per_frame)
    output = model(**batch, output_logits=True)
    output.loss.backward()
    if not cell.wrap.startswith("fsdp"):
        reduce_gradients(model)

    tolerance = 20 * TOLERANCE[cell.dtype]
    assert_close(output.loss.detach(), expected.loss, name="loss", tolerance=tolerance)
    shape = (batch["input_ids"].shape[0], batch["input_ids"].shape[1])
    logits = gather_logits(output, shape, mesh).flatten(0, 1)
    if "attention_mask" in batch:
        logits = logits[batch["attention_mask"].bool().flatten()]
    assert_close(logits, expected.logits[mesh.dp_rank], name="logits", tolerance=tolerance)
    errors = {
        "loss": relative_error(output.loss, expected.loss),
        "logits": relative_error(logits, expected.logits[mesh.dp_rank]),
        "gradients": 0.0,
    }
    wanted = expected.gradients
    assert dict(model.named_parameters()).keys() == wanted.keys()
    scale = max(float(gradient.norm()) for gradient in wanted.values() if gradient is not None)
    for name, error in gradient_errors(model, wanted).items():
        size = float(wanted[name].norm())  # type: ignore[union-attr]
        if "vision_tower" in name and name.endswith("k_proj.bias"):
            # It moves every score of a query alike: its gradient is rounding around zero.
            size = max(size, 1e-3 * scale)
        assert error <= tolerance * size, f"gradient of {name}: {error:.2e} of {size:.2e}"
        if size:
            errors["gradients"] = max(errors["gradients"], error / size)
    return errors


def check_cells(rank: Rank, cells: list[Cell]) -> dict[str, dict[str, float]]:
    """Several cells on the same ranks, which are started once; the largest errors by precision."""
    worst: dict[str, dict[str, float]] = {}
    for cell, expected in zip(cells, oracles(rank, cells), strict=True):
        try:
            errors = check_cell(cell, expected)
        except Exception as error:
            raise AssertionError(f"[{cell}] {type(error).__name__}: {error}") from error
        seen = worst.setdefault(str(cell.dtype).removeprefix("torch."), {})
        for name, error in errors.items():
            seen[name] = max(seen.get(name, 0.0), error)
    return worst


# ---- the grid --------------------------------------------------------------------------------


def grid(all_meshes: dict[int, list[tuple[int, int]]]) -> Iterator[Cell]:
    for world, meshes in all_meshes.items():
        for cell in itertools.product(meshes, LAYOUTS, DTYPES, HEADS, BATCHES, WRAPS):
            ring = cell[0][0]
            if ring > 1 or cell[1] == LAYOUTS[0]:  # a layout is an order over the ring
                yield Cell(world, *cell)


def pairs(cell: Cell) -> set[tuple[int, Any, int, Any]]:
    """All pairs of values of two factors; the mesh counts as one factor with its world."""
    values = [(cell.world, cell.mesh), *cell[2:]]
    return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}


def covering_subset() -> tuple[list[Cell], int]:
    """A small set of cells with every pair of values, greedily, and the number of pairs."""
    cells = list(grid(MESHES))
    open_pairs = set().union(*map(pairs, cells))
    total = len(open_pairs)
    generator = torch.Generator().manual_seed(0)
    chosen: list[Cell] = []
    while open_pairs:
        sample = torch.randint(len(cells), (300,), generator=generator).tolist()
        best = max((cells[i] for i in sample), key=lambda cell: len(pairs(cell) & open_pairs))
        gained = pairs(best) & open_pairs
        if gained:
            chosen.append(best)
            open_pairs -= gained
    return chosen, total


@pytest.mark.parametrize("world", MESHES)
def test_every_pair_of_conditions_equals_one_process(world: int) -> None:
    chosen, total = covering_subset()
    mine = [cell for cell in chosen if cell.world == world]
    print(
        f"\n{len(mine)} of {len(chosen)} cells on {world} ranks; together all {total} pairs of "
        f"{sum(1 for _ in grid(MESHES))} cells"
    )
    run_ranks(check_cells, world, mine, timeout_s=280)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("world", ALL_MESHES)
def test_every_cell_equals_one_process(world: int, batch: str) -> None:
    cells = [cell for cell in grid(ALL_MESHES) if cell.world == world and cell.batch == batch]
    run_ranks(check_cells, world, cells, timeout_s=3500)
