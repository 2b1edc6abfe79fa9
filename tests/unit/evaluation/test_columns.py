"""Tables for a terminal."""

from __future__ import annotations

import pytest

from longvila.evaluation.columns import aligned


def test_columns_stand_below_each_other_and_lines_end_with_words() -> None:
    rows = [("", "n", "by frames"), ("film, choice", "10", ""), ("order", "2", "32: 0.50")]
    assert aligned(rows).splitlines() == [
        "              n   by frames",
        "film, choice  10",
        "order         2   32: 0.50",
    ]
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c",)])
