"""Which rank holds which token: pure integers, no communication, no tensors of the model.

Letters: S tokens of the packed global sequence, N documents, R ring ranks, U Ulysses ranks,
L tokens of one rank.

1. The global sequence is documents laid end to end, of any lengths. It is cut into chunks:
   ``contiguous``       R near-equal chunks; ring rank r holds chunk r.
   ``zigzag``           2R near-equal chunks of the *global* order; ring rank r holds chunks r and
                        2R-1-r, so that early and late tokens pair up and causal work evens out.
   ``document_zigzag``  the same inside every document, which evens out the work of packed
                        documents too. Tokens left over by the division rotate over the ranks, so
                        two ring ranks never differ by more than one token in total.
2. A ring rank's local sequence is its tokens in global order.
3. That local sequence is cut into U near-equal consecutive parts, one for each Ulysses rank.
   Putting the U parts side by side gives back the ring rank's sequence, which is what the head
   exchange of :mod:`longvila.sp.ulysses` does: the zigzag pair is formed *before* the Ulysses cut.

``sp_rank = ring_rank * U + ulysses_rank``. Twelve chunks' worth of tokens, R = 2, U = 2, zigzag::

    global   | c0       | c1       | c2       | c3       |     2R = 4 chunks
    ring 0   | c0       |                     | c3       |  -> local sequence c0 c3
    ring 1              | c1       | c2       |             -> local sequence c1 c2

    ring 0   [ c0 c3 ]  = [ part 0 | part 1 ]  -> sp ranks 0, 1
    ring 1   [ c1 c2 ]  = [ part 0 | part 1 ]  -> sp ranks 2, 3

Cost: O(R * N) integers in numpy, whatever S is; indices of one rank's tokens are made on demand.
It does not pad, does not require any length to divide anything, and gives a rank no tokens
when there are fewer tokens than ranks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LayoutKind = Literal["contiguous", "zigzag", "document_zigzag"]
LAYOUT_KINDS: tuple[str, ...] = get_args(LayoutKind)

#: A half-open range of global token positions.
Interval = tuple[int, int]

IntArray = NDArray[np.int64]

#: Above this many intervals one gather by index is cheaper than that many copies of slices.
_MAX_SLICES = 8


def split_evenly(length: int, parts: int, index: int) -> Interval:
    """Return the half-open range of part ``index`` when ``length`` is cut in near-equal parts.

    Args:
        length: Length to cut.
        parts: Number of parts.
        index: Which part.

    Returns:
        ``(start, stop)``; parts differ by at most one.
    """
    return index * length // parts, (index + 1) * length // parts


@dataclass(frozen=True)
class SequenceLayout:
    """Where every token of a packed global sequence lives.

    Two layouts are equal when their four arguments are equal.

    Args:
        document_lengths: Tokens of each packed document, in order; zero is allowed.
        ring_size: R, ranks that share the sequence.
        ulysses_size: U, ranks that share the heads of one ring rank's sequence.
        kind: One of ``LAYOUT_KINDS``.

    Raises:
        ValueError: If a size is below one, a length is negative, or the kind is unknown.
    """

    document_lengths: tuple[int, ...]
    ring_size: int = 1
    ulysses_size: int = 1
    kind: LayoutKind = "zigzag"

    def __post_init__(self) -> None:
        lengths = tuple(operator.index(length) for length in self.document_lengths)
        object.__setattr__(self, "document_lengths", lengths)
        if not lengths:
            raise ValueError("document_lengths is empty: a layout needs at least one document")
        if min(lengths) < 0:
            raise ValueError(f"document lengths must not be negative, got {min(lengths)}")
        for name in ("ring_size", "ulysses_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kind not in LAYOUT_KINDS:
            raise ValueError(f"unknown layout kind {self.kind!r}; known: {', '.join(LAYOUT_KINDS)}")

    # ---- sizes -----------------------------------------------------------------------------

    @property
    def sp_size(self) -> int:
        """Number of ranks, ``ring_size * ulysses_size``."""
        return self.ring_size * self.ulysses_size

    @property
    def num_tokens(self) -> int:
        """S, tokens of the global sequence."""
        return int(self.document_starts[-1])

    @cached_property
    def document_starts(self) -> IntArray:
        """Global position where each document starts, and S at the end: ``(N + 1,)``."""
        return np.concatenate([[0], np.cumsum(self.document_lengths)]).astype(np.int64)

    @cached_property
    def ring_lengths(self) -> tuple[int, ...]:
        """Tokens of each ring rank's local sequence."""
        return tuple(int(n) for n in (self.piece_stops - self.piece_starts).sum(axis=(1, 2)))

    @cached_property
    def local_lengths(self) -> tuple[int, ...]:
        """L, tokens of each sp rank."""
        return tuple(stop - start for start, stop in map(self._part, range(self.sp_size)))

    # ---- pieces ----------------------------------------------------------------------------

    @cached_property
    def piece_starts(self) -> IntArray:
        """Global start of every piece, ``(R, N, J)``: what ring rank r holds of document n.

        A rank holds at most J pieces of a document (one if contiguous, else two); absent ones
        have start = stop. Reading the pieces of a rank document by document gives its local
        sequence: chunks are disjoint and ordered, so (document, piece) order is global order.
        """
        return self._pieces[0]

    @cached_property
    def piece_stops(self) -> IntArray:
        """Global stop of every piece, ``(R, N, J)``."""
        return self._pieces[1]

    @cached_property
    def piece_offsets(self) -> IntArray:
        """Row of every piece in its ring rank's local sequence, ``(R, N, J)``."""
        sizes = self.piece_stops - self.piece_starts
        flat = sizes.reshape(self.ring_size, -1)
        return (np.cumsum(flat, axis=1) - flat).reshape(sizes.shape)

    @cached_property
    def _pieces(self) -> tuple[IntArray, IntArray]:
        starts, stops = self.document_starts[:-1], self.document_starts[1:]
        if self.kind == "document_zigzag":
            return self._document_pieces(starts)
        # Chunks of the global order, clipped to each document.
        num_chunks = self.ring_size if self.kind == "contiguous" else 2 * self.ring_size
        bounds = np.arange(num_chunks + 1, dtype=np.int64) * self.num_tokens // num_chunks
        if self.kind == "contiguous":
            chunks = np.arange(self.ring_size)[:, None]
        else:
            low = np.arange(self.ring_size)
            chunks = np.stack([low, num_chunks - 1 - low], axis=1)
        begin = np.maximum(bounds[chunks][:, None, :], starts[None, :, None])
        end = np.minimum(bounds[chunks + 1][:, None, :], stops[None, :, None])
        return begin, np.maximum(begin, end)

    def _document_pieces(self, starts: IntArray) -> tuple[IntArray, IntArray]:
        """Pieces of ``document_zigzag``: 2R a document, the remainder dealt round robin."""
        ring = self.ring_size
        lengths = np.asarray(self.document_lengths, dtype=np.int64)
        base, extra = lengths // (2 * ring), lengths % (2 * ring)
        first = (np.cumsum(extra) - extra) % ring  # whose turn it is when a document begins
        turn = (np.arange(ring)[:, None] - first[None, :]) % ring
        received = (extra[None, :] - turn + ring - 1) // ring  # 0, 1 or 2 extra tokens, (R, N)
        low = base + (received >= 1)
        high = base + (received >= 2)
        sizes = np.concatenate([low, high[::-1]], axis=0)  # piece i of 2R, by document
        ends = starts[None, :] + np.cumsum(sizes, axis=0)
        begins = ends - sizes
        mirror = 2 * ring - 1 - np.arange(ring)
        begin = np.stack([begins[:ring], begins[mirror]], axis=2)
        end = np.stack([ends[:ring], ends[mirror]], axis=2)
        return begin, end

    # ---- what a rank holds -----------------------------------------------------------------

    def ring_rank(self, sp_rank: int) -> int:
        """Ring coordinate of an sp rank."""
        return self._check_rank(sp_rank) // self.ulysses_size

    def ulysses_rank(self, sp_rank: int) -> int:
        """Ulysses coordinate of an sp rank."""
        return self._check_rank(sp_rank) % self.ulysses_size

    def ring_intervals(self, ring_rank: int) -> tuple[Interval, ...]:
        """Global intervals of a ring rank's local sequence, in order, neighbours joined."""
        return _join(self.piece_starts[ring_rank].ravel(), self.piece_stops[ring_rank].ravel())

    def intervals(self, sp_rank: int) -> tuple[Interval, ...]:
        """Global intervals that one sp rank holds, in order, neighbours joined."""
        begin, end = self._part(sp_rank)
        found: list[Interval] = []
        offset = 0
        for start, stop in self.ring_intervals(self.ring_rank(sp_rank)):
            low, high = max(begin - offset, 0), min(end - offset, stop - start)
            if low < high:
                found.append((start + low, start + high))
            offset += stop - start
        return tuple(found)

    def token_indices(self, sp_rank: int) -> Tensor:
        """Return the global positions of one rank's tokens.

        Args:
            sp_rank: Rank within the sequence-parallel group.

        Returns:
            int64 ``(L,)``, ascending, in the order the rank holds them; possibly empty.

        Raises:
            ValueError: If the rank is outside the layout.
        """
        ranges = [torch.arange(*interval) for interval in self.intervals(sp_rank)]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    def locate(self, positions: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return who holds given tokens, and in which local row.

        Args:
            positions: Global positions, ``(N,)`` integers on the host.

        Returns:
            ``(sp_ranks, rows)``, both int64 ``(N,)``.

        Raises:
            ValueError: If a position is outside the sequence.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.num_tokens):
            raise ValueError(
                f"positions run from {wanted.min()} to {wanted.max()}, but the sequence has "
                f"{self.num_tokens} tokens"
            )
        starts, ranks, rows = self._interval_table
        index = np.searchsorted(starts, wanted, side="right") - 1
        return (
            torch.from_numpy(ranks[index].copy()),
            torch.from_numpy(rows[index] + wanted - starts[index]),
        )

    @cached_property
    def _interval_table(self) -> tuple[IntArray, IntArray, IntArray]:
        """All intervals of all ranks by global start: start, sp rank, first local row."""
        entries: list[tuple[int, int, int]] = []
        for rank in range(self.sp_size):
            row = 0
            for start, stop in self.intervals(rank):
                entries.append((start, rank, row))
                row += stop - start
        table = np.asarray(sorted(entries), dtype=np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    # ---- tensors ---------------------------------------------------------------------------

    def shard(self, x: Tensor, sp_rank: int, dim: int = 0) -> Tensor:
        """Return one rank's part of a whole-sequence tensor.

        Args:
            x: Tensor with S entries along ``dim``; every rank has the same.
            sp_rank: Rank within the sequence-parallel group.
            dim: Sequence dimension.

        Returns:
            The rank's L entries in its order; a view where they are one run, ``x`` itself where
            they are all of it.

        Raises:
            ValueError: If ``x`` does not have S entries along ``dim``.
        """
        if x.shape[dim] != self.num_tokens:
            raise ValueError(
                f"expected {self.num_tokens} tokens along dim {dim} (the sum of the layout's "
                f"document lengths), got {x.shape[dim]} in shape {tuple(x.shape)}"
            )
        intervals = self.intervals(sp_rank)
        if not intervals:
            return x.narrow(dim, 0, 0)
        if intervals == ((0, self.num_tokens),):
            return x
        if len(intervals) <= _MAX_SLICES:
            parts = [x.narrow(dim, start, stop - start) for start, stop in intervals]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return x.index_select(dim, self.token_indices(sp_rank).to(x.device))

    def unshard(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Return the whole-sequence tensor from the parts of all ranks.

        Args:
            parts: One tensor a rank, by sp rank, as :meth:`shard` returns them.
            dim: Sequence dimension.

        Returns:
            Tensor with S entries along ``dim``.

        Raises:
            ValueError: If the number of parts or the length of one does not fit the layout.
        """
        lengths = tuple(part.shape[dim] for part in parts)
        if lengths != self.local_lengths:
            raise ValueError(f"expected parts of {self.local_lengths} tokens, got {lengths}")
        order = torch.cat([self.token_indices(rank) for rank in range(self.sp_size)])
        stacked = torch.cat(list(parts), dim)
        return torch.empty_like(stacked).index_copy(dim, order.to(stacked.device), stacked)

    # ---- balance ---------------------------------------------------------------------------

    def causal_work(self, ring_rank: int) -> int:
        """Return how many (query, key) pairs one ring rank's queries see within documents."""
        first = self.piece_starts[ring_rank] - self.document_starts[:-1, None]
        last = self.piece_stops[ring_rank] - self.document_starts[:-1, None]
        return int((last * (last + 1) // 2 - first * (first + 1) // 2).sum())

    # ---- inner -----------------------------------------------------------------------------

    def _check_rank(self, sp_rank: int) -> int:
        if not 0 <= sp_rank < self.sp_size:
            raise ValueError(
                f"sp_rank {sp_rank} is outside this layout of {self.ring_size} ring x "
                f"{self.ulysses_size} ulysses = {self.sp_size} ranks"
            )
        return sp_rank

    def _part(self, sp_rank: int) -> Interval:
        """Rows of the ring rank's local sequence that an sp rank holds."""
        length = self.ring_lengths[self.ring_rank(sp_rank)]
        return split_evenly(length, self.ulysses_size, self.ulysses_rank(sp_rank))


def _join(starts: IntArray, stops: IntArray) -> tuple[Interval, ...]:
    """Drop empty intervals of an ascending list and join the ones that touch."""
    filled = starts < stops
    starts, stops = starts[filled], stops[filled]
    if starts.size == 0:
        return ()
    first = np.concatenate([[True], starts[1:] != stops[:-1]])
    last = np.concatenate([first[1:], [True]])
    pairs = np.stack([starts[first], stops[last]], axis=1).tolist()
    return tuple(cast(Interval, tuple(pair)) for pair in pairs)
