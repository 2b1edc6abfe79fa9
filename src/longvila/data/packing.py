"""Documents into rows of a token budget, best fit, without an order that depends on luck.

A packer holds a window of waiting documents. A row is:

1. the document that waited longest (so none waits forever),
2. then, again and again, the longest waiting document that still fits; of equals the older one.

The result depends on nothing but the order in which documents came, so ranks that add the same
lengths make the same rows. Cost: O(log W) comparisons a document in a window of W.

A document longer than the budget is refused on entry: `longvila.data.encode` decides about those
before (fewer frames, drop, error). There is nothing here to go round in circles.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Waiting(NamedTuple):
    """A document in the window: its position in the order, and its tokens."""

    position: int
    length: int


class Packer:
    """Packs documents as they come.

    Args:
        budget: Most tokens of a row.
        max_documents: Most documents of a row; None for any number.
    """

    def __init__(self, budget: int, *, max_documents: int | None = None) -> None:
        if budget < 1 or (max_documents is not None and max_documents < 1):
            raise ValueError(
                f"budget and max_documents must be at least 1, got {budget} and {max_documents}"
            )
        self.budget, self.max_documents = budget, max_documents
        # Ascending by length; of equal lengths the older comes last, where the search finds it.
        self._sorted: list[tuple[int, int]] = []
        self._waiting: dict[int, int] = {}

    def __len__(self) -> int:
        """Return how many documents wait."""
        return len(self._waiting)

    @property
    def waiting(self) -> list[Waiting]:
        """The documents that wait, oldest first: the packer's whole state."""
        return [Waiting(position, length) for position, length in self._waiting.items()]

    def add(self, position: int, length: int) -> None:
        """Let a document wait.

        Args:
            position: Its place in the order, none twice; who comes first is older.
            length: Its tokens.

        Raises:
            ValueError: If it cannot fit into any row, is empty, or waits already.
        """
        if not 1 <= length <= self.budget:
            raise ValueError(
                f"document {position} has {length} tokens; a row holds 1 to {self.budget}. A "
                "length policy must shorten or drop it before it is packed"
            )
        if position in self._waiting:
            raise ValueError(f"document {position} waits already")
        self._waiting[position] = length
        insort(self._sorted, (length, -position))

    def pop(self) -> list[int]:
        """Take the documents of the next row.

        Returns:
            Their positions: the oldest first, then from long to short.

        Raises:
            IndexError: If none waits.
        """
        if not self._waiting:
            raise IndexError("no document waits")
        oldest = next(iter(self._waiting))
        row = [oldest]
        room = self.budget - self._remove(oldest)
        while self._sorted and (self.max_documents is None or len(row) < self.max_documents):
            # (room, 1) is above every (room, -position): the last entry not longer than the room.
            at = bisect_right(self._sorted, (room, 1)) - 1
            if at < 0:
                break
            position = -self._sorted[at][1]
            room -= self._remove(position)
            row.append(position)
        return row

    def _remove(self, position: int) -> int:
        length = self._waiting.pop(position)
        del self._sorted[bisect_right(self._sorted, (length, -position)) - 1]
        return length

    def restore(self, waiting: Iterable[Sequence[int]]) -> None:
        """Replace what waits by what `waiting` gave before."""
        self._sorted, self._waiting = [], {}
        for position, length in waiting:
            self.add(position, length)


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack all documents at once.

    Returns:
        Rows of document numbers; each number once.
    """
    packer = Packer(budget)
    for number, length in enumerate(lengths):
        packer.add(number, length)
    rows = []
    while len(packer):
        rows.append(packer.pop())
    return rows
