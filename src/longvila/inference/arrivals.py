"""Who got which tokens of a sequence: integers that every rank has, so nothing is exchanged.

A cache keeps one arrival for each prefill, chunk and step, in order. Together they say which tokens
a rank holds and in which order, which is what a cut and a stored prompt need.
"""

from __future__ import annotations

from dataclasses import dataclass

from longvila.sp.layout import SequenceLayout


@dataclass(frozen=True)
class Dealt:
    """The tokens of a prefill, or of a chunk of it, dealt by a layout."""

    total: int
    layout: SequenceLayout
    appended: bool = False

    def intervals(self, rank: int) -> list[tuple[int, int]]:
        """Tokens of a rank, as it holds them, counted from the first of this arrival."""
        own = ((a, min(b, self.total)) for a, b in self.layout.intervals(rank))
        return [(a, b) for a, b in own if a < b]

    def counts(self, first: int) -> list[int]:
        """Tokens of each rank among the first so many."""
        return [
            sum(max(0, min(stop, first) - start) for start, stop in self.layout.intervals(rank))
            for rank in range(self.layout.sp_size)
        ]


@dataclass(frozen=True)
class Given:
    """Tokens of a step, all given to one rank."""

    total: int
    owner: int
    num_ranks: int
    pads: tuple[int, ...] | None = None

    def intervals(self, rank: int) -> list[tuple[int, int]]:
        """As for `Dealt`."""
        return [(0, self.total)] if rank == self.owner else []

    def counts(self, first: int) -> list[int]:
        """As for `Dealt`."""
        return [first if rank == self.owner else 0 for rank in range(self.num_ranks)]
