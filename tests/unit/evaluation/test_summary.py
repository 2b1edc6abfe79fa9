"""Groups are never averaged together, and say how sure they are."""

from __future__ import annotations

from typing import Any

import pytest

from longvila.evaluation.metrics import wilson_interval
from longvila.evaluation.summary import cells, grid_rows, result_rows, summarise


def _row(name: str, correct: bool, **shape: Any) -> dict[str, Any]:
    shape = {"frames": 300, "depth": 0.5, "tier": "", "control": None, **shape}
    return {
        "id": name, "scene": name[0], "task": "retrieval", "ask": "free", "correct": correct,
        "score": float(correct), "read": "x" if correct else None, "chance": 0.25, "tokens": 7,
        "shape": shape,
    }  # fmt: skip


ROWS = [
    _row("a1", True),
    _row("a2", False, depth=1.0),
    _row("b1", True, frames=600),
    _row("b2", True, frames=600),
    _row("c1", False, tier="unseen"),
    _row("d1", False, control="grey"),
]


def test_tiers_and_controls_are_groups_of_their_own() -> None:
    groups = summarise(ROWS)
    assert [(g.tier, g.control, g.all.n, g.all.correct) for g in groups] == [
        ("", None, 4, 3), ("", "grey", 1, 0), ("unseen", None, 1, 0),
    ]  # fmt: skip
    first = groups[0].all
    assert (first.low, first.high) == wilson_interval(3, 4, confidence=0.95)
    assert (first.chance, first.unread, first.tokens, first.accuracy) == (0.25, 1, 7, 0.75)
    # Two films, half and all right: the error is theirs, not that of four questions.
    assert first.score == 0.75 and first.error == pytest.approx(0.25)
    assert {n: s.accuracy for n, s in groups[0].by_frames.items()} == {300: 0.5, 600: 1.0}
    assert {d: s.n for d, s in groups[0].by_depth.items()} == {0.5: 3, 1.0: 1}
    assert [g.name for g in groups] == [
        "retrieval, free", "retrieval, free | control: grey", "retrieval, free | unseen",
    ]  # fmt: skip
    assert summarise(ROWS[::-1]) == groups


def test_grid_and_rows() -> None:
    groups = summarise(ROWS)
    grid = cells(ROWS, groups[0])
    assert {cell: s.n for cell, s in grid.items()} == {(300, 0.5): 1, (300, 1.0): 1, (600, 0.5): 2}
    rows = result_rows("model", groups)
    assert [row["shape"]["frames"] for row in rows] == [None, 300, 600, None, 300, None, 300]
    assert rows[0]["shape"]["frames_max"] == 600 and rows[0]["metrics"]["accuracy"] == 0.75
    assert rows[0]["metrics"]["accuracy_interval"] == [0.3006, 0.9544]


def test_grids_in_files_are_those_of_the_heat_maps() -> None:
    groups = summarise(ROWS)
    first, second = grid_rows(ROWS, groups)
    assert first["cells"] == [[300, 0.5, 1, 1], [300, 1.0, 0, 1], [600, 0.5, 2, 2]]
    assert (first["task"], first["ask"], first["tier"], first["chance"]) == (
        "retrieval", "free", "", 0.25,
    )  # fmt: skip
    assert (second["tier"], second["cells"]) == ("unseen", [[300, 0.5, 0, 1]])
