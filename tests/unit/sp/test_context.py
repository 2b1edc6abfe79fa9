from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from longvila.sp import MeshPlan, SequenceLayout, SPContext, SPMesh, make_context


def mesh(ring: int = 1, ulysses: int = 1, rank: int = 0, kind: str = "zigzag") -> SPMesh:
    plan = MeshPlan(ring_size=ring, ulysses_size=ulysses, layout_kind=kind)  # type: ignore[arg-type]
    return SPMesh(plan=plan, rank=rank)


def test_a_context_is_a_frozen_hashable_value() -> None:
    one = mesh(2, 2)
    a, b = make_context(one, [5, 6]), make_context(one, (5, 6))
    assert a == b and hash(a) == hash(b)
    assert a != make_context(one, [5, 7])
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.head_chunks = 3  # type: ignore[misc]


def test_the_same_lengths_give_the_same_plan() -> None:
    one = mesh(4, 2)
    first, second = make_context(one, [50, 61]), make_context(one, [50, 61])
    assert first is second
    assert first.ring_plan() is second.ring_plan()
    assert first.ring_plan() is not first.ring_plan(causal=False)


def test_local_tokens_are_those_of_the_layout() -> None:
    for rank in range(4):
        context = make_context(mesh(2, 2, rank), [13, 8], kind="zigzag")
        layout = SequenceLayout((13, 8), 2, 2, "zigzag")
        assert context.layout == layout
        assert context.num_tokens == 21
        assert context.num_local_tokens == layout.local_lengths[rank]
        assert torch.equal(context.token_indices(), layout.token_indices(rank))
        first = rank // 2 * 2
        assert context.ulysses_lengths == layout.local_lengths[first : first + 2]


def test_one_document_is_cut_over_the_global_order() -> None:
    assert make_context(mesh(4), [1000]).layout.kind == "zigzag"


def test_unequal_documents_are_cut_one_by_one_where_that_balances_better() -> None:
    assert make_context(mesh(4), [4096, *[512] * 8]).layout.kind == "document_zigzag"
    assert make_context(mesh(2), [100] * 64).layout.kind == "zigzag"


def test_an_explicit_kind_and_a_contiguous_mesh_are_kept() -> None:
    assert make_context(mesh(4), [4096, *[512] * 8], kind="zigzag").layout.kind == "zigzag"
    assert make_context(mesh(4, kind="contiguous"), [4096, 512]).layout.kind == "contiguous"


def test_off_is_one_rank_with_all_tokens() -> None:
    context = make_context(SPMesh(), [3, 4])
    assert not context.is_parallel
    assert context.num_local_tokens == context.num_tokens == 7
    assert context.ring_plan().steps == ()


def test_a_million_tokens_in_hundreds_of_documents_take_milliseconds() -> None:
    lengths = [500 + 37 * (i * i % 149) for i in range(300)]
    assert sum(lengths) > 900_000
    seconds = []
    for attempt in range(5):
        start = time.process_time()
        context = make_context(mesh(2, 4), [*lengths, attempt])
        context.ring_plan()
        assert context.num_local_tokens > 0
        seconds.append(time.process_time() - start)
    # About 2 ms on an idle core; the limit allows for a busy one.
    assert min(seconds) < 0.05, seconds


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="head_chunks must be at least 1, got 0"):
        make_context(SPMesh(), [4], head_chunks=0)
    with pytest.raises(ValueError, match="at least one document"):
        make_context(SPMesh(), [])
    with pytest.raises(ValueError, match="unknown layout kind 'stripe'"):
        make_context(SPMesh(), [4], kind="stripe")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'float' object"):
        make_context(SPMesh(), [3.5])  # type: ignore[list-item]
    assert make_context(SPMesh(), torch.tensor([3, 4])).num_tokens == 7  # type: ignore[arg-type]


def test_a_context_travels_as_a_keyword() -> None:
    def layer(x: torch.Tensor, *, sp_context: SPContext) -> int:
        return x.shape[0] * sp_context.num_tokens

    assert layer(torch.zeros(2), sp_context=make_context(SPMesh(), [4])) == 8
