"""Parity of sequence-parallel attention with one process; the original's faults, each by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longvila.keep import keeping
from longvila.ops.attention import attention
from longvila.sp import SPMesh, build_mesh, make_context, sp_attention
from longvila.testing import Rank, ranks, run_ranks


def _cases() -> Any:
    # Test folders are no packages; every rank has to find the module too.
    name = "longvila_sp_attention_cases"
    if name not in sys.modules:
        path = Path(__file__).with_name("attention_cases.py")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


grid = _cases()
SUBSET = grid.pairwise_cases()
SIZES = sorted({case.world_size for case in SUBSET})


def check_all(rank: Rank, chosen: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Check cases on the same ranks; return the largest errors by precision."""
    worst: dict[str, dict[str, float]] = {}
    for values in chosen:
        case = grid.Case(**values)
        seen = worst.setdefault(case.dtype, {})
        for name, error in grid.check_case(case).items():
            seen[name] = max(seen.get(name, 0.0), error)
    return worst


def run_all(world_size: int, chosen: Sequence[Any]) -> None:
    assert chosen
    run_ranks(check_all, world_size, [asdict(case) for case in chosen], timeout_s=280)


def test_the_subset_covers_every_pair_of_factor_values(capsys: pytest.CaptureFixture[str]) -> None:
    covered = set().union(*(grid.pairs_of(case) for case in SUBSET))
    every = grid.all_pairs()
    with capsys.disabled():
        print(
            f"\nsp_attention parity: {len(SUBSET)} cases cover {len(covered & every)} of "
            f"{len(every)} pairs of factor values; the grid has {sum(1 for _ in grid.full_grid())}"
        )
    assert covered >= every


@pytest.mark.parametrize("world_size", SIZES)
def test_out_and_gradients_equal_one_process(world_size: int) -> None:
    run_all(world_size, [case for case in SUBSET if case.world_size == world_size])


@pytest.mark.slow
@pytest.mark.parametrize("heads", grid.FACTORS["heads"], ids=str)
@pytest.mark.parametrize("mesh", grid.MESHES, ids=str)
def test_out_and_gradients_equal_one_process_in_the_whole_grid(
    mesh: tuple[int, int], heads: tuple[int, int]
) -> None:
    chosen = [case for case in grid.full_grid() if case.mesh == mesh and case.heads == heads]
    run_all(mesh[0] * mesh[1], chosen)


# ---- off means off -----------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(40,), (11, 0, 29)])
@pytest.mark.parametrize("batch", [1, 2])
def test_off_is_the_plain_attention_bit_for_bit(lengths: tuple[int, ...], batch: int) -> None:
    context = make_context(SPMesh(), lengths, head_chunks=3)
    q, k, v, dout = (torch.randn(batch, 40, n, 8) for n in (4, 2, 2, 4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = sp_attention(*leaves, context)
    grads = torch.autograd.grad(out, leaves, dout)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    packing: dict[str, Any] = {}
    if len(lengths) > 1:
        packing["cu_seqlens_q"] = torch.tensor([0, 11, 40], dtype=torch.int32)
        expected = torch.stack(
            [attention(*x, causal=True, **packing)[0] for x in zip(*plain, strict=True)]
        )
    else:
        expected = attention(*plain, causal=True)[0]
    assert torch.equal(out, expected)
    for got, want in zip(grads, torch.autograd.grad(expected, plain, dout), strict=True):
        assert torch.equal(got, want)


@ranks(2)
def test_one_chunk_and_many_give_the_same_bits_where_kv_heads_divide(rank: Rank) -> None:
    case = grid.Case(mesh=(1, 2), heads=(8, 4), documents="packed", dtype="float32")
    whole, chunked = grid.run_case(case), grid.run_case(replace(case, chunks=2))
    for a, b in zip(whole, chunked, strict=True):
        assert torch.equal(a, b)


@ranks(2)
def test_p2p_and_gather_give_the_same_bits_on_two_ring_ranks(rank: Rank) -> None:
    case = grid.Case(mesh=(2, 1), heads=(8, 4), documents="packed", dtype="float32")
    for a, b in zip(
        grid.run_case(case), grid.run_case(replace(case, exchange="gather")), strict=True
    ):
        assert torch.equal(a, b)


# ---- what is communicated ----------------------------------------------------------------------

FORBIDDEN = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier",
    "broadcast", "broadcast_object_list", "reduce_scatter_tensor", "monitored_barrier",
    "all_to_all", "send", "recv",
)  # fmt: skip


class Spy:
    """Counts what attention communicates; anything but the two planned operations is an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all_to_alls = 0
        self.batches = 0
        exchange, batch = dist.all_to_all_single, dist.batch_isend_irecv

        def count_exchange(*args: Any, **kwargs: Any) -> Any:
            self.all_to_alls += 1
            return exchange(*args, **kwargs)

        def count_batch(*args: Any, **kwargs: Any) -> Any:
            self.batches += 1
            return batch(*args, **kwargs)

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError("a collective that attention has no use for")

        def no_sync(self: Tensor, *args: Any) -> Any:
            raise AssertionError("a tensor was read on the host")

        monkeypatch.setattr(dist, "all_to_all_single", count_exchange)
        monkeypatch.setattr(dist, "batch_isend_irecv", count_batch)
        for name in FORBIDDEN:
            monkeypatch.setattr(dist, name, refuse)
        for name in ("item", "tolist", "__bool__", "__int__"):
            monkeypatch.setattr(Tensor, name, no_sync)


@ranks(4)
def test_layers_exchange_tensors_only_never_lengths_and_read_nothing_back(rank: Rank) -> None:
    # The original sets two barriers, gathers lengths, reads them back and reduces the mask,
    # in every all-to-all of every layer.
    mesh = build_mesh(4, 2, ulysses_size=2, kv_exchange="gather")
    context = make_context(mesh, (30, 31))
    local = [torch.randn(1, context.num_local_tokens, n, 8, requires_grad=True) for n in (4, 2, 2)]
    sp_attention(*local, context)
    with pytest.MonkeyPatch.context() as monkeypatch:
        spy = Spy(monkeypatch)
        out = sp_attention(*local, context)
        assert (spy.all_to_alls, spy.batches) == (2, 1)
        out.backward(torch.ones_like(out))
        assert (spy.all_to_alls, spy.batches) == (4, 3)


@ranks(4)
def test_a_kept_result_repeats_no_exchange(rank: Rank) -> None:
    mesh = build_mesh(4, 2, ulysses_size=2)
    context = make_context(mesh, (30, 31))
    local = [torch.randn(1, context.num_local_tokens, n, 8, requires_grad=True) for n in (4, 2, 2)]
    keeper = grid.ListKeeper()
    with keeping(keeper):
        sp_attention(*local, context)
        keeper.replaying = True
        with pytest.MonkeyPatch.context() as monkeypatch:
            spy = Spy(monkeypatch)
            out = sp_attention(*local, context)
            assert (spy.all_to_alls, spy.batches) == (0, 0)
            out.backward(torch.ones_like(out))
            assert spy.all_to_alls == 2, "q, k, v, out and dout in one exchange, gradients in one"


@ranks(2)
def test_torch_checkpointing_around_it_gives_the_same_gradients(rank: Rank) -> None:
    from torch.utils.checkpoint import checkpoint

    context = make_context(build_mesh(2, 1), (33,))
    local = [
        torch.randn(1, context.num_local_tokens, n, 8, requires_grad=True, dtype=torch.float64)
        for n in (4, 2, 2)
    ]
    for reentrant in (False, True):
        plain = torch.autograd.grad(sp_attention(*local, context).square().sum(), local)
        out = checkpoint(lambda *x: sp_attention(*x, context), *local, use_reentrant=reentrant)
        out.square().sum().backward()
        for x, want in zip(local, plain, strict=True):
            assert torch.equal(x.grad, want)
            x.grad = None


# ---- the original's faults ---------------------------------------------------------------------


def attend(context: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of whole-sequence tensors; returns the whole output on every rank."""
    mesh = context.mesh
    local = [context.layout.shard(x, mesh.sp_rank, 1) for x in (q, k, v)]
    out = sp_attention(*local, context)
    parts = [out.new_empty((out.shape[0], n, *out.shape[2:])) for n in context.layout.local_lengths]
    for source, part in enumerate(parts):
        part.copy_(out) if source == mesh.sp_rank else None
        dist.broadcast(part, group=mesh.sp_group, group_src=source)
    return context.layout.unshard(parts, 1)


def drawn(tokens: int, *heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, tokens, n, 8, generator=generator, dtype=torch.float64) for n in heads]


@ranks(8)
def test_zigzag_with_ulysses_never_sees_the_future(rank: Rank) -> None:
    # Original: ulysses 2 x ring 2 lets chunk 1 attend to chunk 3; ulysses 4 runs out of range.
    for ring in (2, 4):
        mesh = build_mesh(8, ring)
        context = make_context(mesh, (64,), kind="zigzag")
        q, k, v = drawn(64, 8, 4, 4)
        before = attend(context, q, k, v)
        for cut in (16, 40):
            changed = [x.clone() for x in (k, v)]
            for x in changed:
                x[:, cut:] += 5.0
            after = attend(context, q, *changed)
            assert torch.equal(after[:, :cut], before[:, :cut]), "a token saw its future"
            assert not torch.allclose(after[:, cut:], before[:, cut:])


@ranks(4)
def test_packed_documents_never_attend_to_each_other(rank: Rank) -> None:
    # Original: ring modes replace the packed lengths by one sum.
    for kind in ("contiguous", "zigzag", "document_zigzag"):
        context = make_context(build_mesh(4, 2), (20, 3, 41), kind=kind)  # type: ignore[arg-type]
        q, k, v = drawn(64, 4, 2, 2)
        before = attend(context, q, k, v)
        k[:, 20:23] += 5.0
        v[:, 20:23] += 5.0
        after = attend(context, q, k, v)
        assert torch.equal(after[:, :20], before[:, :20])
        assert torch.equal(after[:, 23:], before[:, 23:])
        assert not torch.allclose(after[:, 20:23], before[:, 20:23])


@ranks(8)
def test_28_heads_run_on_8_ulysses_ranks(rank: Rank) -> None:
    # Original: a reshape error, so that Qwen2-7B cannot use one node of 8.
    grid.check_case(grid.Case(mesh=(1, 8), heads=(28, 4), documents="one"))


@ranks(4)
def test_the_ring_runs_in_the_dtype_given(rank: Rank) -> None:
    # Original: dq is bfloat16 whatever q is.
    context = make_context(build_mesh(4, 4), (24,))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        local = [
            torch.randn(1, context.num_local_tokens, n, 8).to(dtype).requires_grad_()
            for n in (4, 2, 2)
        ]
        out = sp_attention(*local, context)
        out.backward(torch.ones_like(out))
        assert {out.dtype, *(x.grad.dtype for x in local)} == {dtype}


# ---- errors ------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_the_context_are_named() -> None:
    context = make_context(SPMesh(), (6,))
    q, k = torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 2, 8)
    with pytest.raises(ValueError, match=r"holds 6 of 6 tokens, got q \(1, 5, 4, 8\).*sharded"):
        sp_attention(q[:, :5], k[:, :5], k[:, :5], context)
    with pytest.raises(ValueError, match=r"q must be \(B, L, H, D\) and k, v .* \(6, 4, 8\)"):
        sp_attention(q[0], k, k, context)
    with pytest.raises(ValueError, match="must agree in batch and head dim"):
        sp_attention(q, k[..., :4], k[..., :4], context)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 kv heads"):
        sp_attention(q, torch.zeros(1, 6, 3, 8), torch.zeros(1, 6, 3, 8), context)
    with pytest.raises(TypeError, match="must share a dtype"):
        sp_attention(q, k.double(), k, context)


@ranks(2)
def test_errors_name_the_rank(rank: Rank) -> None:
    context = make_context(build_mesh(2, 2), (9,))
    x = torch.zeros(1, 9, 2, 8)
    with pytest.raises(
        ValueError, match=rf"rank {rank.rank} \(dp 0, ring {rank.rank}, ulysses 0\)"
    ):
        sp_attention(x, x, x, context)
