"""Tables for a terminal.

Cost: nothing to speak of. Not done: fitting them to its width.
"""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with their columns below each other.

    Args:
        rows: Cells, as many in each row; the first row is the heading.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
