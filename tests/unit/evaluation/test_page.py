"""Heat maps have the paper's colours, pages show what went wrong and run nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longvila.evaluation.page import COLOURS, colour, heat_map, text_table, write_page
from longvila.evaluation.summary import cells, summarise


def _rows() -> list[dict[str, Any]]:
    rows = []
    for frames in (300, 1500):
        for depth in (0.0, 1.0):
            for trial in range(2):
                correct = frames == 300 or trial == 1
                rows.append({
                    "id": f"{frames}/{depth}/{trial}", "scene": f"{frames}{depth}", "task": "paper",
                    "ask": "forced", "question": "<b>?</b>", "answer": "x", "said": "<script>",
                    "read": "y", "correct": correct, "score": float(correct), "chance": 0.1,
                    "tokens": 5, "shape": {"frames": frames, "depth": depth, "control": None},
                })  # fmt: skip
    return rows


def test_colours_are_the_papers() -> None:
    assert [colour(value) for value in (0.0, 0.5, 1.0)] == list(COLOURS)
    assert colour(0.25) == (238, 128, 84)


def test_heat_map_has_a_cell_for_each() -> None:
    (group,) = summarise(_rows())
    picture = np.asarray(heat_map(cells(_rows(), group), title="t"))
    for value, wanted in ((1.0, 2), (0.5, 2)):
        share = (picture == colour(value)).all(-1).sum()
        assert wanted * 1400 < share < wanted * 2000


def test_a_map_speaks_of_all_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "longvila.evaluation.page.ImageDraw.ImageDraw.text",
        lambda self, place, text, *rest, **options: said.append(text),
    )
    rows = [{**row, "chance": 30 / row["shape"]["frames"]} for row in _rows()][1:]
    (group,) = summarise(rows)
    heat_map(cells(rows, group), title="t")
    # Three questions of one in ten and four of one in fifty; a cell has lost one.
    assert "5 of 7 right, 1 to 2 a cell; a guess: 0.05" in said


def test_page_is_whole_and_runs_nothing(tmp_path: Path) -> None:
    rows = _rows()
    groups = summarise(rows)
    files = write_page(
        tmp_path / "page.html", title="A & B", settings={"seed": 1}, records=rows, groups=groups,
        notes=["a <note>"],
    )  # fmt: skip
    assert [file.name for file in files] == ["page.html", "heat-paper-forced.png"]
    assert all(file.exists() for file in files)
    text = files[0].read_text()
    assert "A &amp; B" in text and "a &lt;note&gt;" in text and "&lt;script&gt;" in text
    assert not re.search(r"<script|http|<b>", text)
    assert "75.0% [40.9%, 92.9%]" in text and "1 of 2, " in text
    assert "Wrong answers: 2 of 8" in text


def test_a_tier_may_be_called_what_no_file_can_be(tmp_path: Path) -> None:
    rows = [{**row, "shape": {**row["shape"], "tier": "../mine, 1/2 é"}} for row in _rows()]
    _, picture = write_page(
        tmp_path / "page.html", title="t", settings={}, records=rows, groups=summarise(rows)
    )
    assert picture == tmp_path / "heat-paper-forced-..-mine-1-2-é.png" and picture.exists()


def test_table_for_a_terminal() -> None:
    table = text_table(summarise(_rows())).splitlines()
    assert table[1].split()[:4] == ["paper,", "forced", "8", "75.0%"]
    assert "300: 1.00  1.5k: 0.50" in table[1]
