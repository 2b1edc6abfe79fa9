"""Heads for tokens: the exchange that gives each Ulysses rank all tokens of some heads.

Letters: U Ulysses ranks, B batch, L local rows of a rank, S rows of all U ranks together,
H query heads, K kv heads, D head dim, W heads a row of the buffer carries.

1. :func:`plan_heads` deals query heads in near-equal runs, whatever U is: 28 heads on 8 ranks, or
   3 heads on 8, which leaves ranks without any. A rank is given the kv heads that its query heads
   read, once each. A kv head travels to two ranks only if query heads of both read it.
2. One packed all-to-all-v moves q, k and v. The block for rank j is ``(L, B, Wj, D)``: its query
   heads, its k heads, its v heads side by side in every row. So what arrives is already
   ``(S, B, W, D)``, and q, k, v are views of it::

        rank 0 rows   | q q q q | k | v |            to rank j: the columns of j's heads
        rank 1 rows   | q q q q | k | v |   <- S     nothing is unpacked after the exchange
        ...

3. The output goes back in one all-to-all-v: row blocks of ``(S, B, Hj, D)`` are sent as they lie.
4. Backward: dout travels like q, and dq, dk, dv return in one. A kv head that served several ranks
   gets the sum of their gradients, added in float32 although they travel in the input dtype: each
   part is rounded once, as a kernel's own output is, and the wire carries half the bytes.

Where a rank's query heads read its kv heads unevenly (rank 1 of 28/4 heads on 7 ranks: three
read one kv head, one reads the next) attention is called once for each run of equal group size
(:class:`HeadRun`): a kernel maps query head h to kv head ``h // group``, which would be wrong for
the ragged whole.

Splitting heads into chunks (:func:`plan_head_chunks`) lets one travel while another is computed.

What it does not do: choose U (see :mod:`longvila.sp.mesh`), or talk about lengths, which are in
the layout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from longvila.sp.comm import Group, Pending, post_all_to_all
from longvila.sp.layout import split_evenly

#: Whether a tensor has query heads or kv heads.
Heads = Literal["q", "kv"]


@dataclass(frozen=True)
class HeadRun:
    """Local query heads that read local kv heads in groups of one size."""

    q: slice
    kv: slice


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank.

    Attributes:
        q: ``(start, stop)`` of its query heads.
        kv: ``(start, stop)`` of the kv heads they read.
        runs: Its query heads in runs of equal group size, in local numbers.
    """

    q: tuple[int, int]
    kv: tuple[int, int]
    runs: tuple[HeadRun, ...]

    def of(self, heads: Heads) -> tuple[int, int]:
        """Return the range of query or kv heads."""
        return self.q if heads == "q" else self.kv

    @property
    def num_heads(self) -> int:
        """Query heads of the rank."""
        return self.q[1] - self.q[0]

    @property
    def num_kv_heads(self) -> int:
        """Kv heads of the rank."""
        return self.kv[1] - self.kv[0]


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """Which rank computes which heads.

    Attributes:
        num_heads: H.
        num_kv_heads: K.
        shares: One a rank.
    """

    num_heads: int
    num_kv_heads: int
    shares: tuple[HeadShare, ...]


@dataclass(frozen=True, eq=False)
class HeadChunks:
    """A head plan in parts that are exchanged and computed one after another.

    Attributes:
        plans: The parts.
        kv_is_shared: Whether some kv head serves several ranks or parts, so that its gradients
            have to be added up.
    """

    plans: tuple[HeadPlan, ...]
    kv_is_shared: bool


def _share(start: int, stop: int, group: int) -> HeadShare:
    """Return the share of query heads ``[start, stop)`` when ``group`` of them read a kv head."""
    if start == stop:
        return HeadShare((start, start), (start // group, start // group), ())
    first, last = start // group, (stop - 1) // group + 1
    counts = [min(stop, (kv + 1) * group) - max(start, kv * group) for kv in range(first, last)]
    runs: list[HeadRun] = []
    q = kv = 0
    while kv < len(counts):
        end = kv
        while end < len(counts) and counts[end] == counts[kv]:
            end += 1
        width = counts[kv] * (end - kv)
        runs.append(HeadRun(slice(q, q + width), slice(kv, end)))
        q, kv = q + width, end
    return HeadShare((start, stop), (first, last), tuple(runs))


@functools.cache
def plan_heads(num_heads: int, num_kv_heads: int, ulysses_size: int) -> HeadPlan:
    """Return which of U ranks computes which heads.

    Args:
        num_heads: H, query heads.
        num_kv_heads: K, kv heads; divides H.
        ulysses_size: U; need not divide either, and may exceed both.

    Raises:
        ValueError: If K does not divide H.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads; "
            "q is (B, L, H, D) and k, v are (B, L, K, D): are they heads first?"
        )
    # Cuts at floor(j * H / U) meet kv boundaries wherever one of U and K divides the other.
    group = num_heads // num_kv_heads
    cuts = [split_evenly(num_heads, ulysses_size, rank) for rank in range(ulysses_size)]
    return HeadPlan(num_heads, num_kv_heads, tuple(_share(*cut, group) for cut in cuts))


@functools.cache
def plan_head_chunks(
    num_heads: int, num_kv_heads: int, ulysses_size: int, count: int
) -> HeadChunks:
    """Return the head plan of U ranks cut into parts.

    A rank's cut falls between kv heads where it has at least ``count`` of them; else inside a
    group, and the kv head travels with each part.

    Args:
        num_heads: H, query heads.
        num_kv_heads: K, kv heads; divides H.
        ulysses_size: U.
        count: Parts; fewer if no rank has that many query heads.

    Raises:
        ValueError: If K does not divide H, or ``count`` is below one.
    """
    if count < 1:
        raise ValueError(f"the number of head chunks must be at least 1, got {count}")
    plan = plan_heads(num_heads, num_kv_heads, ulysses_size)
    count = min(count, max(share.num_heads for share in plan.shares))
    plans: tuple[HeadPlan, ...] = (plan,)
    if count > 1:
        group = num_heads // num_kv_heads
        cuts = [_cuts(share, count, group) for share in plan.shares]
        plans = tuple(
            HeadPlan(
                num_heads,
                num_kv_heads,
                tuple(_share(cut[chunk], cut[chunk + 1], group) for cut in cuts),
            )
            for chunk in range(count)
        )
    served = [0] * num_kv_heads
    for share in (share for part in plans for share in part.shares):
        for head in range(*share.kv):
            served[head] += 1
    return HeadChunks(plans, max(served) > 1)


def _cuts(share: HeadShare, count: int, group: int) -> list[int]:
    """Return where a rank's query heads are cut."""
    start, stop = share.q
    if share.num_kv_heads < count:
        return [start + share.num_heads * chunk // count for chunk in range(count + 1)]
    first = share.kv[0]
    inner = [(first + share.num_kv_heads * chunk // count) * group for chunk in range(1, count)]
    return [start, *inner, stop]


@dataclass(frozen=True, eq=False)
class HeadExchange:
    """The exchanges of one head plan among the ranks of a Ulysses group.

    Attributes:
        plan: Who computes which heads.
        lengths: L of each rank of the group.
        rank: This rank's place in it.
        group: Process group; None for one rank.
    """

    plan: HeadPlan
    lengths: tuple[int, ...]
    rank: int
    group: Group

    @property
    def share(self) -> HeadShare:
        """This rank's heads."""
        return self.plan.shares[self.rank]

    def width(self, rank: int, kinds: Sequence[Heads]) -> int:
        """W: heads a row carries for a rank."""
        ranges = [self.plan.shares[rank].of(kind) for kind in kinds]
        return sum(stop - start for start, stop in ranges)

    def post_scatter(self, tensors: Sequence[Tensor], kinds: Sequence[Heads]) -> PendingHeads:
        """Start giving every rank all tokens of its heads, for several tensors at once.

        Args:
            tensors: ``(B, L, heads, D)`` each, of one dtype.
            kinds: Whether each has query or kv heads.

        Returns:
            The exchange under way; its ``wait`` gives ``(S, B, W, D)``, the tensors side by side.

        Comm: One all-to-all-v; ``B * L * D * sum of all ranks' W`` elements sent by the rank.
        """
        batch, length, _, dim = tensors[0].shape
        widths = [self.width(rank, kinds) for rank in range(len(self.lengths))]
        sizes = [batch * length * width * dim for width in widths]
        packed = tensors[0].new_empty(sum(sizes))
        self._copy(packed, tensors, kinds, to_packed=True)
        mine = widths[self.rank]
        received, pending = post_all_to_all(
            packed, sizes, [batch * n * mine * dim for n in self.lengths], self.group
        )
        shape = (sum(self.lengths), batch, mine, dim)
        return PendingHeads(received.view(shape), pending)

    def post_gather(self, rows: Tensor, kinds: Sequence[Heads]) -> PendingHeads:
        """Start the way back: every rank gets its own tokens of all heads.

        Args:
            rows: ``(S, B, W, D)``, what this rank computed for its heads.
            kinds: The tensors side by side in it.

        Returns:
            The exchange under way; its ``wait`` gives the flat buffer that :meth:`collect` reads.

        Comm: One all-to-all-v; ``rows.numel()`` elements sent by the rank.
        """
        _, batch, mine, dim = rows.shape
        length = self.lengths[self.rank]
        received, pending = post_all_to_all(
            rows.reshape(-1),
            [batch * n * mine * dim for n in self.lengths],
            [batch * length * self.width(r, kinds) * dim for r in range(len(self.lengths))],
            self.group,
        )
        return PendingHeads(received, pending)

    def collect(
        self, received: Tensor, kinds: Sequence[Heads], into: Sequence[Tensor], add: bool = False
    ) -> None:
        """Put what came back where it belongs.

        Args:
            received: The buffer of :meth:`post_gather`.
            kinds: The tensors side by side in it.
            into: ``(B, L, heads, D)`` each; the heads of this plan are written.
            add: Whether kv heads are added to what is there, rather than written.
        """
        self._copy(received, into, kinds, to_packed=False, add=add)

    def _copy(
        self,
        packed: Tensor,
        tensors: Sequence[Tensor],
        kinds: Sequence[Heads],
        *,
        to_packed: bool,
        add: bool = False,
    ) -> None:
        """Copy between tensors and a flat buffer with a block ``(L, B, W, D)`` for each rank."""
        batch, length, _, dim = tensors[0].shape
        widths = [self.width(rank, kinds) for rank in range(len(self.lengths))]
        parts = packed.split([batch * length * width * dim for width in widths])
        blocks = [
            part.view(length, batch, width, dim) for part, width in zip(parts, widths, strict=True)
        ]
        offsets = [0] * len(blocks)
        for tensor, kind in zip(tensors, kinds, strict=True):
            rows = tensor.transpose(0, 1)  # (B, L, heads, D) -> (L, B, heads, D)
            ranges = [share.of(kind) for share in self.plan.shares]
            columns = [slice(o, o + b - a) for o, (a, b) in zip(offsets, ranges, strict=True)]
            adds = add and kind == "kv"
            if adds or not _copy_evenly(packed, widths, columns, rows, ranges, to_packed=to_packed):
                for block, column, (start, stop) in zip(blocks, columns, ranges, strict=True):
                    if to_packed:
                        block[:, :, column] = rows[:, :, start:stop]
                    elif adds:
                        rows[:, :, start:stop] += block[:, :, column]
                    else:
                        rows[:, :, start:stop] = block[:, :, column]
            offsets = [column.stop for column in columns]


@dataclass(frozen=True, eq=False)
class PendingHeads:
    """An exchange under way."""

    buffer: Tensor
    pending: Pending

    def wait(self) -> Tensor:
        """Return the buffer once everything after this call is ordered behind the transfer."""
        self.pending.wait()
        return self.buffer


def _copy_evenly(
    packed: Tensor,
    widths: Sequence[int],
    columns: Sequence[slice],
    rows: Tensor,
    ranges: Sequence[tuple[int, int]],
    *,
    to_packed: bool,
) -> bool:
    """Copy between the packed buffer and ``(L, B, heads, D)`` in one kernel if all ranks are alike.

    Returns whether they are: equal widths and columns, head ranges at one distance.
    """
    size = ranges[0][1] - ranges[0][0]
    steps = {b[0] - a[0] for a, b in pairwise(ranges)}
    alike = len(set(widths)) == 1 and len({(c.start, c.stop) for c in columns}) == 1
    if not alike or len({b - a for a, b in ranges}) != 1 or len(steps) > 1 or size == 0:
        return False
    step = steps.pop() if steps else size
    if step < size:
        return False  # shared kv heads overlap
    length, batch, _, dim = rows.shape
    # (L, B, heads, D) -> (L, B, U, D, size) -> (U, L, B, size, D), a view
    span = rows[:, :, ranges[0][0] : ranges[-1][1]]
    by_rank = span.unfold(2, size, step).permute(2, 0, 1, 4, 3)
    block = packed.view(len(ranges), length, batch, widths[0], dim)[:, :, :, columns[0]]
    if to_packed:
        _copy_bits(block, by_rank)
    else:
        _copy_bits(by_rank, block)
    return True


def _copy_bits(target: Tensor, source: Tensor) -> None:
    """Copy rows of heads, 16 bytes at a time where the layout allows it.

    Strided copies go element by element; in bfloat16 that is a fraction of the memory's rate.
    """
    wide = 16 // source.element_size()
    if all(_is_aligned(tensor, wide) for tensor in (target, source)):
        target, source = target.view(torch.complex128), source.view(torch.complex128)
    target.copy_(source)


def _is_aligned(tensor: Tensor, elements: int) -> bool:
    *outer, inner = tensor.stride()
    sizes = (*outer, tensor.shape[-1], tensor.storage_offset())
    return inner == 1 and all(size % elements == 0 for size in sizes)


def split_columns(buffer: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return the tensors side by side in ``(S, B, W, D)`` as ``(B, S, heads, D)`` views."""
    return [batch_first(part) for part in buffer.split(list(counts), dim=2)]


def batch_first(rows: Tensor) -> Tensor:
    """Return ``(S, B, heads, D)`` as ``(B, S, heads, D)``, a view."""
    if rows.shape[1] == 1:
        # With the strides of a plain (1, S, ...) tensor: some kernels compare strides, and copy.
        return rows[:, 0].unsqueeze(0)
    return rows.transpose(0, 1)
