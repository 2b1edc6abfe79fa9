"""Frames dealt over ranks by cost, and exactly the rows each token owner needs.

    media in order     | unit 0 | unit 1 | ... | unit U-1 |       (frames, images, pooled groups)
    1. plan_frames     |   rank 0   |  rank 1  | ... | rank R-1 | consecutive cuts, equal cost
    2. each rank encodes its own units to rows (tower, projector)
    3. plan_rows       row n of the media -> the rank that holds its placeholder token
    4. exchange_rows   rank 0 ==\\ /== rank 0
                       rank 1 ==-X-== rank 1     one all-to-all-v; its transpose is the backward
    5. place_rows      received rows replace the placeholder embeddings of the local tokens

Both plans are host-only, need nothing but metadata that every rank has (sizes of the media, the
placeholders' positions, the layout), and come out the same on every rank. So no lengths are
exchanged, and no rank ever holds more than its own rows before the exchange and its own tokens'
rows after it: S/R rows when both deals are balanced.

A *unit* is what one rank must encode whole: a frame, an image, an image's tiles, or the frames
that are pooled together over time. Cuts are consecutive so that a rank decodes one stretch of a
video; the most loaded rank then carries at most ``total / R`` plus one unit, and no consecutive
deal does better.

Ranks without units and ranks without placeholders take part with empty tensors. An empty tensor
joins the autograd graph like any other, so the backward exchange is entered by every rank or by
none; nothing has to be encoded for show here (whether the tower itself must be run on every rank
depends on how its parameters are sharded: see ``longvila.parallel.mmsp``).

It does not encode anything and does not know what a row means.

Letters: R ranks, U units, N rows of all media, S global sequence, L local tokens, M model dim.
"""

from __future__ import annotations

import operator
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import lcm
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.sp.comm import post_all_to_all
from longvila.sp.layout import SequenceLayout


def frame_cost(num_patches: int, *, linear_patches: int) -> int:
    """Return the relative cost ``p * (p + c)`` of encoding one frame.

    Attention grows with the square of the patches, everything else linearly; ``c`` is the number
    of patches at which both cost the same.

    Args:
        num_patches: Patches p the tower sees in the frame.
        linear_patches: The constant c; for a plain transformer layer with a fourfold MLP it is
            six times the tower's width (``24 p w**2`` against ``4 p**2 w``).
    """
    if num_patches < 0 or linear_patches < 0:
        raise ValueError(
            "num_patches and linear_patches must not be negative, got "
            f"{num_patches} and {linear_patches}"
        )
    return num_patches * (num_patches + linear_patches)


def group_frames(num_frames: int, strides: Sequence[int]) -> list[int]:
    """Return the frames of each unit of a video that is pooled over time.

    A unit is as long as the least common multiple of the strides, so that no block of any pooling
    is cut; the last unit has what is left.

    Args:
        num_frames: Frames of the video.
        strides: Frames that each pooling takes together.
    """
    if num_frames < 0 or any(stride < 1 for stride in strides):
        raise ValueError(
            f"num_frames must not be negative and strides be positive, got {num_frames} and "
            f"{list(strides)}"
        )
    length = lcm(*strides)
    return [min(length, num_frames - start) for start in range(0, num_frames, length)]


@dataclass(frozen=True)
class FramePlan:
    """Which consecutive units each rank encodes.

    Attributes:
        cuts: R + 1 unit numbers; rank r has the units ``cuts[r] ... cuts[r + 1] - 1``.
        rank_costs: Cost of each rank's units.
    """

    cuts: tuple[int, ...]
    rank_costs: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        """R, the ranks dealt to."""
        return len(self.cuts) - 1

    @property
    def num_units(self) -> int:
        """U, the units dealt."""
        return self.cuts[-1]

    @property
    def balance(self) -> float:
        """Mean rank cost over the highest one: 1 is perfect, 1/R is one rank doing it all."""
        highest = max(self.rank_costs)
        return 1.0 if highest == 0 else sum(self.rank_costs) / (len(self.rank_costs) * highest)

    def units(self, rank: int) -> range:
        """Units that ``rank`` encodes, possibly none."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not of the {self.num_ranks} that units are dealt to")
        return range(self.cuts[rank], self.cuts[rank + 1])

    def describe(self) -> str:
        """One line for logs: units and balance."""
        counts = [len(self.units(rank)) for rank in range(self.num_ranks)]
        return f"{self.num_units} units over {self.num_ranks} ranks {counts}, {self.balance:.0%}"


def plan_frames(costs: Sequence[int], num_ranks: int) -> FramePlan:
    """Deal units to ranks in consecutive stretches with the lowest possible highest cost.

    The lowest bottleneck is found by bisection: a bottleneck is feasible if stretches filled one
    after the other need at most R ranks. Among all deals with that bottleneck the cuts are put
    nearest to the even ones, so that ranks are not left idle at the end.

    Args:
        costs: Cost of each unit, from metadata (`frame_cost`), not negative.
        num_ranks: R.

    Returns:
        The plan, the same for equal arguments on every rank. O(U + R log U log(sum)) time.

    Raises:
        ValueError: If ``num_ranks`` is not positive or a cost is negative.
        TypeError: If a cost is not an integer: plans must agree to the last bit between ranks.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    try:
        costs = [operator.index(cost) for cost in costs]
    except TypeError as error:
        raise TypeError(f"costs must be integers; scale and round before ({error})") from error
    if min(costs, default=0) < 0:
        raise ValueError(f"costs must not be negative, got {min(costs)}")
    prefix = [0, *accumulate(costs)]
    total, units = prefix[-1], len(costs)

    def needed(bottleneck: int) -> int:
        start, used = 0, 0
        while start < units and used <= num_ranks:
            start = bisect_right(prefix, prefix[start] + bottleneck) - 1
            used += 1
        return used

    low, high = max([*costs, -(-total // num_ranks)], default=0), total
    while low < high:
        middle = (low + high) // 2
        if needed(middle) <= num_ranks:
            high = middle
        else:
            low = middle + 1
    # Earliest place of each cut that leaves the ranks after it no more than the bottleneck each.
    earliest = [units]
    for _ in range(num_ranks):
        earliest.append(bisect_left(prefix, prefix[earliest[-1]] - low))
    earliest.reverse()
    cuts = [0]
    for rank in range(1, num_ranks):
        latest = bisect_right(prefix, prefix[cuts[-1]] + low) - 1
        even = _nearest(prefix, rank * total, num_ranks)
        cuts.append(min(max(even, earliest[rank], cuts[-1]), latest))
    cuts.append(units)
    spent = tuple(prefix[b] - prefix[a] for a, b in pairwise(cuts))
    return FramePlan(tuple(cuts), spent)


def _nearest(prefix: Sequence[int], numerator: int, denominator: int) -> int:
    """Index whose prefix sum is nearest to numerator / denominator, in integers."""
    above = bisect_left(prefix, -(-numerator // denominator))
    if above == 0:
        return 0
    over = prefix[above] * denominator - numerator
    under = numerator - prefix[above - 1] * denominator
    return above if over <= under else above - 1


@dataclass(frozen=True)
class RowExchange:
    """What one rank sends and receives, by rank.

    Attributes:
        send_order: ``(n_sent,)`` local rows in the order they are sent.
        send_counts: Rows for each rank.
        receive_counts: Rows from each rank.
        destination: ``(n_received,)`` local token each received row belongs to.
    """

    send_order: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    destination: Tensor

    @property
    def num_sent(self) -> int:
        """Rows this rank encoded."""
        return sum(self.send_counts)

    @property
    def num_received(self) -> int:
        """Rows this rank's tokens need."""
        return sum(self.receive_counts)

    def to(self, device: torch.device) -> RowExchange:
        """Return the plan with its indices on ``device``."""
        return RowExchange(
            self.send_order.to(device, non_blocking=True),
            self.send_counts,
            self.receive_counts,
            self.destination.to(device, non_blocking=True),
        )


def plan_rows(
    frame_plan: FramePlan,
    rows_per_unit: Sequence[int],
    positions: Tensor,
    layout: SequenceLayout,
    *,
    rank: int,
) -> RowExchange:
    """Plan which of a rank's encoded rows go where, and which rows it gets.

    Args:
        frame_plan: Who encodes which units.
        rows_per_unit: Rows each of the U units gives.
        positions: ``(N,)`` int64 global position of the token that row n of all media, in unit
            order, replaces. Any order, no position twice.
        layout: Which global positions each rank holds.
        rank: The rank to plan for. R and the ranks of the layout are the same group.

    Returns:
        The rank's part of the exchange, on the CPU. O(N) time.

    Raises:
        ValueError: If rows and placeholders differ in number (both are named), ranks do, or a
            position is outside the sequence or named twice.
    """
    ranks = frame_plan.num_ranks
    if len(rows_per_unit) != frame_plan.num_units:
        raise ValueError(
            f"rows_per_unit has {len(rows_per_unit)} units, the frame plan {frame_plan.num_units}"
        )
    positions = positions.cpu()
    num_rows = sum(rows_per_unit)
    if num_rows != positions.numel():
        raise ValueError(
            f"the media give {num_rows} rows but the sequence has {positions.numel()} "
            "placeholders; was the text expanded with other frames or another image size?"
        )
    if layout.sp_size != ranks:
        raise ValueError(f"the layout is for {layout.sp_size} ranks, the frame plan for {ranks}")
    if int(positions.unique().numel()) != num_rows:
        raise ValueError("two media rows replace the same token; placeholder positions repeat")
    owner, slot = layout.locate(positions)

    edges = [0, *accumulate(rows_per_unit)]
    row_cuts = [edges[cut] for cut in frame_plan.cuts]
    mine = slice(row_cuts[rank], row_cuts[rank + 1])
    send_order = owner[mine].argsort(stable=True)
    send_counts = torch.bincount(owner[mine], minlength=ranks)
    # Rows arrive by sender, and from one sender in its unit order: the order of the rows itself.
    arriving = (owner == rank).nonzero().flatten()
    encoder = torch.searchsorted(torch.tensor(row_cuts[1:]), arriving, right=True)
    receive_counts = torch.bincount(encoder, minlength=ranks)
    return RowExchange(
        send_order,
        tuple(send_counts.tolist()),
        tuple(receive_counts.tolist()),
        slot[arriving],
    )


class _ExchangeRows(torch.autograd.Function):
    """All-to-all-v of rows; the backward sends every gradient row back where it came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: RowExchange, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group = plan, group
        outgoing = rows.index_select(0, plan.send_order)
        received, pending = post_all_to_all(outgoing, plan.send_counts, plan.receive_counts, group)
        pending.wait()
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        plan: RowExchange = ctx.plan
        returned, pending = post_all_to_all(
            grads[0], plan.receive_counts, plan.send_counts, ctx.group
        )
        pending.wait()
        return torch.empty_like(returned).index_copy_(0, plan.send_order, returned), None, None


def exchange_rows(
    rows: Tensor,
    plan: RowExchange,
    *,
    group: dist.ProcessGroup | None,
    differentiable: bool,
) -> Tensor:
    """Send every encoded row to the rank that holds its token.

    Args:
        rows: ``(n_encoded, M)`` this rank's rows in unit order; ``(0, M)`` without units.
        plan: This rank's plan, indices on ``rows``' device.
        group: The sequence-parallel group; None where R is one.
        differentiable: Whether gradients flow to the encoder *on any rank*. It must be the same
            on all ranks (it follows from which parameters train): a rank without rows then still
            takes part in the backward exchange.

    Returns:
        ``(n_received, M)`` rows in the order of ``plan.destination``.

    Raises:
        ValueError: If ``rows`` has not the number of rows the plan sends, or requires a gradient
            although ``differentiable`` is false.

    Comm: One all-to-all-v forward and one backward; ``n_encoded * M`` elements sent by the rank.
    """
    if rows.dim() != 2 or rows.shape[0] != plan.num_sent:
        raise ValueError(
            f"the plan sends {plan.num_sent} rows from this rank, got {tuple(rows.shape)}; the "
            "encoder must give the rows that the metadata announced"
        )
    if rows.requires_grad and not differentiable:
        raise ValueError("rows require a gradient, but the exchange was declared without one")
    if differentiable and torch.is_grad_enabled() and not rows.requires_grad:
        rows = rows.detach().requires_grad_()
    if group is None:
        return rows
    return cast(Tensor, _ExchangeRows.apply(rows, plan, group))


def place_rows(inputs_embeds: Tensor, rows: Tensor, plan: RowExchange) -> Tensor:
    """Return the local token embeddings with received rows in place of the placeholders'.

    Args:
        inputs_embeds: ``(L, M)`` embeddings of the local tokens, not changed.
        rows: ``(n_received, M)`` from `exchange_rows`.
        plan: The plan that the rows came by.
    """
    return inputs_embeds.index_copy(0, plan.destination, rows.to(inputs_embeds.dtype))
