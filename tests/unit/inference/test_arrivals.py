"""An arrival says which of its first tokens a rank has, and in which order."""

from __future__ import annotations

import pytest

from longvila.inference.arrivals import Dealt, Given
from longvila.sp.layout import SequenceLayout


@pytest.mark.parametrize("total", [1, 5, 8, 11, 12])
def test_tokens_of_a_layout_but_for_its_filler(total: int) -> None:
    arrival = Dealt(total, SequenceLayout((12,), 2, 1, "zigzag"))
    held = [[n for a, b in arrival.intervals(rank) for n in range(a, b)] for rank in range(2)]
    assert held[0] == [n for n in (0, 1, 2, 9, 10, 11) if n < total]
    assert held[1] == [n for n in (3, 4, 5, 6, 7, 8) if n < total]
    for first in range(total + 1):
        assert arrival.counts(first) == [sum(n < first for n in own) for own in held]


def test_tokens_of_one_rank() -> None:
    arrival = Given(4, 1, 3)
    assert [arrival.intervals(rank) for rank in range(3)] == [[], [(0, 4)], []]
    assert arrival.counts(3) == [0, 3, 0]
