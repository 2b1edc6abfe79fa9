"""Which position the token after a prefix has, in models that do not just count tokens.

Rotary embeddings over time, height and width give the patches of a frame positions that advance by
far less than their number, so behind media position and index differ. Between media they advance
together: a stretch of text is told by where it starts and by how much position exceeds index. These
stretches are all that is needed to go on behind a prefix, or behind a cut of it. Text goes on
behind the height and width of a medium, whatever its time, which counts seconds and runs ahead::

    index     0 1 2 | 3 ... 98 | 99 100 101 ...
    position  0 1 2 | media    | 11  12  13 ...       runs (0, 3, 0), (99, open, -88)

A cut inside media has no next position and is refused.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextRuns:
    """The stretches of text of a sequence.

    Attributes:
        runs: (first index, index past the last, position less index) of each; the last is where the
            sequence ends and goes on.
    """

    runs: tuple[tuple[int, int, int], ...] = ((0, 0, 0),)

    @property
    def offset(self) -> int:
        """Position less index of whatever text comes next."""
        return self.runs[-1][2]

    def read(self, positions: Tensor, is_media: Tensor) -> TextRuns:
        """Return the runs after further tokens.

        Args:
            positions: ``(3, n)`` positions of the tokens.
            is_media: ``(n,)``, which of them are placeholders.
        """
        start = self.runs[-1][1]
        positions, is_media = positions.cpu(), is_media.cpu()
        index = torch.arange(start, start + positions.shape[1])
        offsets = (positions[0] - index).masked_fill(is_media, torch.iinfo(torch.int64).min)
        edges = [0, *((offsets[1:] != offsets[:-1]).nonzero().flatten() + 1).tolist(), len(index)]
        runs = list(self.runs)
        for a, b in itertools.pairwise(edges):
            if a < b and not bool(is_media[a]):
                offset = int(offsets[a])
                if runs[-1][1] == start + a and runs[-1][2] == offset:
                    runs[-1] = (runs[-1][0], start + b, offset)
                else:
                    runs.append((start + a, start + b, offset))
        end = start + len(index)
        if runs[-1][1] < end:  # ends with media
            runs.append((end, end, int(positions[1:].max()) + 1 - end))
        return TextRuns(tuple(runs))

    def count(self, tokens: int) -> TextRuns:
        """Return the runs after further text."""
        first, stop, offset = self.runs[-1]
        return TextRuns((*self.runs[:-1], (first, stop + tokens, offset)))

    def cut(self, length: int) -> TextRuns:
        """Return the runs of the first tokens.

        Args:
            length: How many.

        Raises:
            ValueError: If the cut is inside media.
        """
        # Where two of them meet, text that was read is the later one.
        for number in reversed(range(len(self.runs))):
            first, stop, offset = self.runs[number]
            if first <= length <= stop:
                return TextRuns((*self.runs[:number], (first, length, offset)))
        raise ValueError(
            f"a cut behind {length} tokens is inside a medium of a model with 3-D positions; cut "
            "before or behind it"
        )
