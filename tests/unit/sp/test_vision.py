"""The frame deal and the row exchange against brute force and one process."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from longvila.sp.layout import SequenceLayout
from longvila.sp.vision import (
    FramePlan,
    exchange_rows,
    frame_cost,
    group_frames,
    place_rows,
    plan_frames,
    plan_rows,
)
from longvila.testing import Rank, ranks
from longvila.testing.asserts import assert_close

WIDTH = 3


def layout_of(tokens: int, num_ranks: int, seed: int = 0) -> SequenceLayout:
    """A layout with uneven documents; its ring is as large as the ranks allow."""
    cut = tokens // 3 + seed % 3
    ulysses = 2 if num_ranks % 4 == 0 else 1
    kinds = ("contiguous", "zigzag", "document_zigzag")
    return SequenceLayout(
        (cut, tokens - cut), num_ranks // ulysses, ulysses, kinds[seed % len(kinds)]
    )


def lowest_bottleneck(costs: list[int], num_ranks: int) -> int:
    """Oracle: every way to cut the units into consecutive stretches."""
    places = range(len(costs) + 1)
    best = None
    for inner in itertools.combinations_with_replacement(places, num_ranks - 1):
        cuts = (0, *inner, len(costs))
        worst = max(sum(costs[a:b]) for a, b in itertools.pairwise(cuts))
        best = worst if best is None else min(best, worst)
    assert best is not None
    return best


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=9), st.integers(1, 4))
def test_no_consecutive_deal_has_a_lower_bottleneck(costs: list[int], num_ranks: int) -> None:
    plan = plan_frames(costs, num_ranks)
    assert plan.num_ranks == num_ranks and plan.num_units == len(costs)
    assert list(itertools.chain(*(plan.units(r) for r in range(num_ranks)))) == list(
        range(len(costs))
    )
    assert plan.rank_costs == tuple(sum(costs[u] for u in plan.units(r)) for r in range(num_ranks))
    assert max(plan.rank_costs) == lowest_bottleneck(costs, num_ranks)


@given(st.integers(0, 300), st.integers(1, 16))
def test_equal_frames_are_dealt_within_one_of_each_other(frames: int, num_ranks: int) -> None:
    """A greedy fill would leave the last ranks idle: 9 frames on 4 ranks as 3, 3, 3, 0."""
    plan = plan_frames([5] * frames, num_ranks)
    counts = [len(plan.units(rank)) for rank in range(num_ranks)]
    assert max(counts) - min(counts) <= 1 and sum(counts) == frames


def test_no_frame_is_dropped_when_ranks_do_not_divide_frames() -> None:
    """Upstream cuts 256 frames to 252 on 14 ranks, and fewer frames than ranks to none."""
    for frames, num_ranks in [(256, 14), (3, 8), (1, 2)]:
        assert plan_frames([1] * frames, num_ranks).num_units == frames
        assert frames // num_ranks * num_ranks != frames


def test_sizes_matter() -> None:
    """Two large images and eight small frames: a deal by count would put both on one rank."""
    large = frame_cost(1024, linear_patches=512)
    small = frame_cost(256, linear_patches=512)
    costs = [large, large] + [small] * 20
    plan = plan_frames(costs, 2)
    assert list(plan.units(0)) == [0, 1, 2, 3]
    assert plan.balance > 0.99
    by_count = max(sum(costs[:11]), sum(costs[11:]))
    assert max(plan.rank_costs) < 0.75 * by_count


def test_the_bottleneck_is_near_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = torch.randint(1, 1000, (5000,), generator=generator).tolist()
    for num_ranks in (2, 7, 16, 64):
        plan = plan_frames(costs, num_ranks)
        assert max(plan.rank_costs) <= sum(costs) / num_ranks + max(costs)
        assert plan.balance > 0.98


def test_no_frames_at_all() -> None:
    plan = plan_frames([], 4)
    assert plan.cuts == (0, 0, 0, 0, 0) and plan.balance == 1.0
    assert plan.describe() == "0 units over 4 ranks [0, 0, 0, 0], 100%"


def test_cost_is_quadratic_beyond_the_linear_part() -> None:
    assert frame_cost(10, linear_patches=0) == 100
    assert frame_cost(10, linear_patches=90) == 1000
    with pytest.raises(ValueError, match="must not be negative"):
        frame_cost(-1, linear_patches=0)


def test_frames_pooled_together_stay_together() -> None:
    assert group_frames(11, [4]) == [4, 4, 3]
    assert group_frames(13, [2, 3]) == [6, 6, 1]
    assert group_frames(3, [1, 1]) == [1, 1, 1]
    assert group_frames(0, [8]) == []
    with pytest.raises(ValueError, match="strides be positive"):
        group_frames(4, [0])


def test_wrong_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="num_ranks must be at least 1"):
        plan_frames([1], 0)
    with pytest.raises(ValueError, match="must not be negative, got -2"):
        plan_frames([1, -2], 2)
    with pytest.raises(TypeError, match="must be integers"):
        plan_frames([1.5], 2)  # type: ignore[list-item]
    plan = plan_frames(np.array([3, 4]), 2)  # type: ignore[arg-type]
    assert plan == plan_frames([3, 4], 2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} is not of the 2"):
            plan.units(rank)


CASES = {
    # tokens, rows per unit
    "balanced": (40, [3] * 8),
    "uneven units": (40, [1, 7, 2, 9, 4]),
    "fewer units than ranks": (24, [10]),
    "ranks without tokens": (
        5,
        [2, 2],
    ),
    "no media": (12, []),
    "every token a row": (12, [5, 0, 7]),
}


@ranks(1, 2, 4, 8)
def test_exchange_forward_and_backward_are_those_of_one_process(rank: Rank) -> None:
    """Encoder weight and token embeddings get the gradient of the whole sequence."""
    for seed, (name, (tokens, rows_per_unit)) in enumerate(CASES.items()):
        _check_exchange(rank, name, tokens, rows_per_unit, seed)


def _check_exchange(
    rank: Rank, name: str, tokens: int, rows_per_unit: list[int], seed: int
) -> None:
    total = sum(rows_per_unit)
    generator = torch.Generator().manual_seed(1)
    positions = torch.randperm(tokens, generator=generator)[:total]
    raw = torch.randn(total, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    embeds = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    probe = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)

    w, e = weight.clone().requires_grad_(), embeds.clone().requires_grad_()
    expected = e.index_copy(0, positions, raw @ w)
    (expected.pow(2) * probe).sum().backward()

    layout = layout_of(tokens, rank.world_size, seed)
    frames = plan_frames(rows_per_unit, rank.world_size)
    plan = plan_rows(frames, rows_per_unit, positions, layout, rank=rank.rank)
    first = sum(rows_per_unit[: frames.cuts[rank.rank]])
    local_w, local_e = weight.clone().requires_grad_(), embeds.clone().requires_grad_()
    held = layout.token_indices(rank.rank)
    # A rank without units has rows that know nothing of the weight.
    encoded = raw[first : first + plan.num_sent]
    encoded = encoded @ local_w if plan.num_sent else encoded
    received = exchange_rows(encoded, plan, group=dist.group.WORLD, differentiable=True)
    local = place_rows(local_e[held], received, plan)
    assert torch.equal(local, expected.detach()[held]), name
    (local.pow(2) * probe[held]).sum().backward()

    grads = [torch.zeros_like(weight) if local_w.grad is None else local_w.grad, local_e.grad]
    for grad in grads:
        dist.all_reduce(grad)
    if total:
        assert_close(grads[0], w.grad, name=f"{name}: encoder weight")
    assert torch.equal(grads[1], e.grad), name


@ranks(4)
def test_summing_a_zero_buffer_loses_most_of_the_gradient(rank: Rank) -> None:
    """What the original does: an all-reduce that autograd does not see. Forward is right.

    Backward reaches a row only where the rank that encoded it also holds its token: with equal
    deals 1/R of the gradients survive. Ours keep all.
    """
    tokens, per_rank = 16, 4
    layout = SequenceLayout((tokens,), 4, 1, "zigzag")
    positions = torch.arange(tokens)
    frames = FramePlan((0, 4, 8, 12, 16), (4, 4, 4, 4))
    rows = torch.randn(per_rank, WIDTH, dtype=torch.float64).requires_grad_()
    held = layout.token_indices(rank.rank)

    buffer = torch.zeros(tokens, WIDTH, dtype=torch.float64)
    mine = slice(per_rank * rank.rank, per_rank * (rank.rank + 1))
    buffer[mine] = rows
    whole = buffer.detach().clone()
    dist.all_reduce(whole)
    buffer.data.copy_(whole)
    buffer[held].sum().backward()
    survived = (rows.grad != 0).all(dim=1).sum()
    dist.all_reduce(survived)
    assert survived == tokens // 4

    theirs = buffer[held].detach()
    rows.grad = None
    plan = plan_rows(frames, [1] * tokens, positions, layout, rank=rank.rank)
    ours = exchange_rows(rows, plan, group=dist.group.WORLD, differentiable=True)
    placed = place_rows(torch.zeros(held.numel(), WIDTH, dtype=torch.float64), ours, plan)
    assert torch.equal(placed, theirs)
    placed.sum().backward()
    assert (rows.grad == 1).all()


@ranks(2)
def test_a_frozen_encoder_needs_no_backward_exchange(rank: Rank) -> None:
    layout = layout_of(8, 2)
    plan = plan_rows(plan_frames([4], 2), [4], torch.arange(4), layout, rank=rank.rank)
    rows = torch.ones(plan.num_sent, WIDTH)
    received = exchange_rows(rows, plan, group=dist.group.WORLD, differentiable=False)
    assert not received.requires_grad and received.shape == (plan.num_received, WIDTH)


def test_plans_of_all_ranks_agree_and_hold_nothing_but_their_own() -> None:
    """What r sends to s is what s expects from r, and a rank holds its rows only: O(S/R)."""
    tokens, num_ranks = 4096, 8
    layout = layout_of(tokens, num_ranks, 2)
    rows_per_unit = [16] * 200
    positions = torch.randperm(tokens)[:3200].sort().values
    frames = plan_frames(rows_per_unit, num_ranks)
    plans = [plan_rows(frames, rows_per_unit, positions, layout, rank=r) for r in range(num_ranks)]
    for r, s in itertools.product(range(num_ranks), repeat=2):
        assert plans[r].send_counts[s] == plans[s].receive_counts[r]
    assert sum(plan.num_received for plan in plans) == 3200
    assert max(plan.num_sent for plan in plans) == 400
    for r in range(num_ranks):
        held = layout.token_indices(r)
        assert set(held[plans[r].destination].tolist()) == set(held.tolist()) & set(
            positions.tolist()
        )


@pytest.mark.parametrize(
    ("rows_per_unit", "positions", "message"),
    [
        ([2, 2], [0, 1, 2], "give 4 rows but the sequence has 3 placeholders"),
        ([2], [0, 1], "rows_per_unit has 1 units, the frame plan 2"),
        ([1, 1], [0, 9], "the sequence has 6 tokens"),
        ([1, 1], [3, 3], "positions repeat"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    rows_per_unit: list[int], positions: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rows(
            plan_frames([1, 1], 2), rows_per_unit, torch.tensor(positions), layout_of(6, 2), rank=0
        )


def test_an_encoder_that_gives_other_rows_than_announced_is_refused() -> None:
    plan = plan_rows(plan_frames([1], 1), [2], torch.tensor([0, 1]), layout_of(4, 1), rank=0)
    with pytest.raises(ValueError, match=r"sends 2 rows from this rank, got \(3, 3\)"):
        exchange_rows(torch.zeros(3, WIDTH), plan, group=None, differentiable=False)
    with pytest.raises(ValueError, match="declared without one"):
        exchange_rows(
            torch.zeros(2, WIDTH, requires_grad=True), plan, group=None, differentiable=False
        )
