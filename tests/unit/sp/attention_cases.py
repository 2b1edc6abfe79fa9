"""The parity grid of sequence-parallel attention, and one case of it run on gloo ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longvila.keep import keeping
from longvila.sp import SPContext, SPMesh, build_mesh, make_context, sp_attention


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    mesh: tuple[int, int] = (1, 1)
    kind: str = "zigzag"
    heads: tuple[int, int] = (4, 2)
    documents: str = "one"
    exchange: str = "p2p"
    chunks: int = 1
    dtype: str = "float64"
    batch: int = 1
    causal: bool = True
    kept: bool = False

    @property
    def world_size(self) -> int:
        return self.mesh[0] * self.mesh[1]


#: (ring, ulysses)
MESHES = [
    (1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (8, 1), (1, 8), (2, 4), (4, 2), (1, 7), (7, 1),
]  # fmt: skip
FACTORS: dict[str, Sequence[Any]] = {
    "mesh": MESHES,
    "kind": ["contiguous", "zigzag", "document_zigzag"],
    #: MHA, GQA, fewer kv heads than ranks, heads that do not divide, fewer heads than ranks
    "heads": [(4, 4), (8, 4), (8, 2), (28, 4), (9, 3), (12, 2), (3, 1)],
    "documents": ["one", "packed", "many", "across", "fewer tokens than ranks"],
    "exchange": ["p2p", "gather"],
    "chunks": [1, 2, 3],
    "dtype": ["float64", "float32"],
    "batch": [1, 2],
    "causal": [True, False],
    "kept": [False, True],
}

LENGTHS: dict[str, tuple[int, ...]] = {
    "one": (53,),
    "packed": (17, 5, 29),
    #: more messages than are sent one by one, and an empty document
    "many": (9, 0, 11, 1, 7, 13, 2, 8, 10, 3, 6),
    #: the middle document spans every rank
    "across": (3, 60, 2),
    "fewer tokens than ranks": (2, 1),
}


def full_grid() -> Iterator[Case]:
    """Every mesh x layout x heads x documents x exchange; the other factors take turns."""
    crossed = ("mesh", "kind", "heads", "documents", "exchange")
    others = [name for name in FACTORS if name not in crossed]
    turns = itertools.cycle(itertools.product(*(FACTORS[name] for name in others)))
    for values, turn in zip(
        itertools.product(*(FACTORS[name] for name in crossed)), turns, strict=False
    ):
        yield Case(
            **dict(zip(crossed, values, strict=True)), **dict(zip(others, turn, strict=True))
        )


def all_pairs() -> set[tuple[str, Any, str, Any]]:
    return {
        (a, x, b, y)
        for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2)
        for x in xs
        for y in ys
    }


def pairs_of(case: Case) -> set[tuple[str, Any, str, Any]]:
    values = [(name, getattr(case, name)) for name in FACTORS]
    return {(*a, *b) for a, b in itertools.combinations(values, 2)}


def pairwise_cases(seed: int = 0, candidates: int = 40) -> list[Case]:
    """Return few cases in which every two values of any two factors meet."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Case:
        chosen = {
            name: values[int(torch.randint(len(values), (1,), generator=generator))]
            for name, values in FACTORS.items()
        }
        return Case(**chosen)

    missing = all_pairs()
    cases: list[Case] = []
    while missing:
        # Aim every draw at something missing, and take the one that covers most.
        a, x, b, y = min(missing, key=repr)
        drawn = [replace(draw(), **{a: x, b: y}) for _ in range(candidates)]
        best = max(drawn, key=lambda case: len(pairs_of(case) & missing))
        missing -= pairs_of(best)
        cases.append(best)
    return cases


def whole_inputs(case: Case, dim: int = 8, seed: int = 1) -> tuple[Tensor, ...]:
    """Return q, k, v, dout of the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS[case.documents])
    heads, kv_heads = case.heads
    dtype = getattr(torch, case.dtype)
    return tuple(
        torch.randn(case.batch, tokens, n, dim, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )


def oracle(case: Case) -> list[Tensor]:
    """Return out, dq, dk, dv of the whole sequence in float64: one mask, plain autograd."""
    q, k, v, dout = (x.double() for x in whole_inputs(case))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    group = case.heads[0] // case.heads[1]
    keys, values = (x.repeat_interleave(group, dim=2) for x in leaves[1:])
    lengths = torch.tensor(LENGTHS[case.documents])
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    seen = document[:, None] == document[None, :]
    if case.causal:
        seen = seen.tril()
    scores = torch.einsum("bihd,bjhd->bhij", leaves[0], keys) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


class ListKeeper:
    """Keeps results the way a checkpoint does: the second pass computes nothing."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, ...]] = []
        self.replaying = False

    def __call__(self, compute: Any) -> tuple[Tensor, ...]:
        if self.replaying:
            return self.kept.pop(0)
        self.kept.append(compute())
        return self.kept[-1]


@functools.cache
def mesh_of(mesh: tuple[int, int], exchange: str) -> SPMesh:
    return build_mesh(mesh[0] * mesh[1], mesh[0], ulysses_size=mesh[1], kv_exchange=exchange)


def context_of(case: Case) -> SPContext:
    return make_context(
        mesh_of(case.mesh, case.exchange),
        LENGTHS[case.documents],
        kind=case.kind,
        head_chunks=case.chunks,
    )


def run_case(case: Case) -> list[Tensor]:
    """Return this rank's out, dq, dk, dv."""
    context = context_of(case)
    q, k, v, dout = (
        context.layout.shard(x, context.sp_rank, 1).clone() for x in whole_inputs(case)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if case.kept:
        keeper = ListKeeper()
        with keeping(keeper):
            sp_attention(*leaves, context, causal=case.causal)
            keeper.replaying = True
            out = sp_attention(*leaves, context, causal=case.causal)
        assert not keeper.kept, "the second pass takes every kept result and computes none"
    else:
        out = sp_attention(*leaves, context, causal=case.causal)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves)]


def check_case(case: Case) -> dict[str, float]:
    """Compare this rank's results with its part of the oracle's; return the relative errors."""
    context = context_of(case)
    limit = {"float64": 1e-10, "float32": 2e-5}[case.dtype]
    actual = run_case(case)
    errors = {}
    for name, got, whole in zip(("out", "dq", "dk", "dv"), actual, oracle(case), strict=True):
        expected = context.layout.shard(whole, context.sp_rank, 1)
        assert got.shape == expected.shape, (case, name, got.shape, expected.shape)
        assert got.dtype == getattr(torch, case.dtype), (case, name, got.dtype)
        # Against the norm of the whole: a rank's own gradient may be zero.
        error = (got.double() - expected).norm() / whole.norm()
        assert error <= limit, f"{context.mesh.describe_rank()} {name} {error:.2e} in {case}"
        errors[name] = float(error)
    return errors
