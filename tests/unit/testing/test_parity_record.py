"""The record of the parity grids: whole, of the cells there are, and added up from lanes' lines."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
RECORDS = sorted((ROOT / "benchmarks/results").glob("*_parity_*.json"))


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location(
        "parity_record", ROOT / "scripts/parity_record.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    yield module
    for name in ("test_attention", "test_mmsp_parity"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(not RECORDS, reason="the whole grid has not been recorded yet")
def test_the_record_is_of_these_cells_and_none_failed(script: Any) -> None:
    content = json.loads(RECORDS[-1].read_text())
    assert content["notes"]["grid"] == script.fingerprint(), (
        "the grids changed after the record; run scripts/parity_record.py again"
    )
    assert content["notes"]["failures"] == []
    for row in content["rows"]:
        metrics = row["metrics"]
        assert metrics["ran"] == metrics["cells"] and metrics["failed"] == 0, row["method"]
        assert metrics.get("float64_error", 0) < 2e-9 and metrics.get("float32_error", 0) < 2e-4
    cells = sum(len(each) for _, _, each in script.chunks())
    assert sum(row["metrics"]["cells"] for row in content["rows"]) == cells
    assert sum(content["notes"]["cells_by_commit"].values()) == cells
    assert len(RECORDS[-1].read_text()) < 20_000, "totals, not a line a cell"


def line(script: Any, number: int, grid: str = "", **values: Any) -> dict[str, Any]:
    name, _, cells = list(script.chunks())[number]
    return {
        "grid": grid or script.fingerprint(), "commit": "abc", "chunk": number, "mesh": name,
        "cells": len(cells), "versions": script.versions(), "worst": {}, "failures": [], **values,
    }  # fmt: skip


def test_lines_of_several_runs_add_up(script: Any, tmp_path: Path) -> None:
    last = len(list(script.chunks())) - 1
    worse = {"float64": {"out": 1e-15, "dq": 3e-15}}
    lines = [
        line(script, 0, worst={"float64": {"loss": 1e-16}, "float32": {"loss": 2e-7}}),
        line(script, last, worst=worse, failures=["attention: off"]),
        line(script, 0, commit="def", worst={"float64": {"loss": 5e-16}}),
        line(script, 1, grid="of other cells"),
    ]
    for lane in range(2):
        text = "".join(json.dumps(each) + "\n" for each in lines[2 * lane : 2 * lane + 2])
        (tmp_path / f"r.{lane}.jsonl").write_text(text)
    found = script.lines_of(tmp_path)
    # A chunk counts once, the later line; lines of other cells do not count.
    assert [each["chunk"] for each in found] == [0, last]
    assert not script.collect(tmp_path, tmp_path / "results", "xyz")
    (path,) = (tmp_path / "results").glob("*_parity_cpu.json")
    content = json.loads(path.read_text())
    rows = {row["method"]: row for row in content["rows"]}
    first, own = rows["model, 8 ranks"]["metrics"], rows["attention, 1 rank"]["metrics"]
    assert first["ran"] == first["errors_of_cells"] == found[0]["cells"] < first["cells"]
    assert first["float64_error"] == 5e-16 and "float32_error" not in first
    assert own["float64_error"] == 3e-15 and own["failed"] == 1
    assert content["notes"]["cells_by_commit"] == {
        "def": found[0]["cells"], "abc": found[1]["cells"]
    }  # fmt: skip
    assert content["notes"]["failures"] == ["attention: off"]
    factors = content["notes"]["cells_by_factor"]
    for grid in ("model", "attention"):
        totals = {sum(values.values()) for values in factors[grid].values()}
        assert totals == {
            sum(r["shape"]["grid"] == grid and r["metrics"]["cells"] for r in content["rows"])
        }


def test_other_cells_are_another_grid(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = script.fingerprint()
    assert before == script.fingerprint()
    cells = script.attention_cells()
    cells[0][2]["batch"] += 1
    monkeypatch.setattr(script, "attention_cells", lambda: cells)
    assert script.fingerprint() != before


def test_a_failed_cell_hides_no_other(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_ranks(check: Any, world: int, cells: list[int], *, timeout_s: float) -> list[Any]:
        if 2 in cells:
            raise script.RankError("off by one")
        return [{"float64": {"out": 1e-16 * cell}} for cell in cells]

    monkeypatch.setattr(script, "run_ranks", run_ranks)
    worst, failures = script.run_chunk("attention 2", 2, [1, 2, 3])
    assert failures == ["attention 2 2: off by one"]
    assert worst == {"float64": {"out": pytest.approx(3e-16)}}
    assert script.run_chunk("attention 2", 2, [1, 3])[1] == []
