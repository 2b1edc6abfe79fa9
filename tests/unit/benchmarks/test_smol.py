"""The small model's page: drawn from what a run leaves, and no more than that."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import render, smol

from longvila.evaluation.summary import grid_rows, result_rows, summarise

RECIPE = Path(__file__).parents[3] / "recipes" / "smol"
ABOUT = {
    "date": "2026-01-02", "commit": "abc", "hardware": {"gpu": "H", "count": 1, "link": None},
    "versions": {"torch": "2"},
}  # fmt: skip
PAGE = "".join(
    f"<!-- bench:{name} -->\n<!-- /bench -->\n"
    for name in (
        "smol_losses", "smol_heat", "smol_lengths", "smol_tiers", "smol_ablations",
        "smol_two_gpus", "smol_shipped", "smol_summary", "smol_views",
        "smol_right method=smol-second",
    )
)  # fmt: skip


@pytest.fixture
def collect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("collect").collect
    sys.modules.pop("collect", None)


def records(tier: str, right: Callable[[int, str], bool]) -> list[dict[str, Any]]:
    """Answers of a run of two lengths and three depths, with controls."""
    rows = []
    for frames in (32, 2048):
        for depth in (0.0, 0.5, 1.0):
            for ask in ("free", "choice"):
                for control in (None, "grey"):
                    name = f"{frames}/{depth}/{ask}/{control}"
                    correct = control is None and right(frames, ask)
                    rows.append(
                        {
                            "id": name, "scene": name, "task": "retrieval", "ask": ask,
                            "correct": correct, "score": float(correct), "read": "x",
                            "chance": 0.05, "tokens": 24 * frames,
                            "shape": {"frames": frames, "depth": depth, "tier": tier,
                                      "control": control},
                        }
                    )  # fmt: skip
    return rows


def keep(work: Path, part: str, tier: str, right: Callable[[int, str], bool]) -> None:
    """Leave a result as ``run.py`` does."""
    found = records(tier, right)
    groups = summarise(found)
    result = {
        "benchmark": "needle", "question": "?", **ABOUT,
        "command": f"/x/longvila/__main__.py needle --model /tmp/w/models/{part} --out /tmp/w/o",
        "settings": {"film": {"file": "/tmp/w/data/haystack.mp4"}},
        "rows": result_rows(f"smol-stages {part}", groups), "grids": grid_rows(found, groups),
    }  # fmt: skip
    folder = work / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"2026-01-02_needle_smol_{part}_{tier}.json").write_text(json.dumps(result))


def leave(work: Path, name: str, found: list[dict[str, Any]]) -> Path:
    """Leave a folder of answers as ``longvila needle`` does; return it."""
    folder = work / "needle" / name
    folder.mkdir(parents=True)
    groups = summarise(found)
    result = {
        "benchmark": "needle", "question": "?", "rows": result_rows("x", groups),
        "command": "/p/__main__.py needle --model /tmp/w/models/longest",
        "grids": grid_rows(found, groups),
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def train(work: Path, part: str, losses: list[float], first: int = 1) -> None:
    folder = work / "results"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{part}.metrics.jsonl").open("a") as file:
        for step, loss in enumerate(losses, start=first):
            line = {"step": step, "loss": loss, "tokens": 1000, "frames": 30, "step_s": 0.5,
                    "tokens_per_s_per_gpu": 2000.0, "data_wait_share": 0.1}  # fmt: skip
            file.write(json.dumps(line) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "docs" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "results" / "smol.md").write_text(PAGE)
    return tmp_path


def run(root: Path, *flags: str) -> str:
    status = render.main([*flags, "--root", str(root), "--results", str(root / "out")])
    assert status == 0
    return (root / "docs" / "results" / "smol.md").read_text()


def test_nothing_is_drawn_of_what_was_not_measured(root: Path) -> None:
    text = run(root)
    assert text.count("*Not measured yet: ") == PAGE.count("bench:")
    assert "|" not in text and "svg" not in text
    assert not (root / "docs" / "results" / "smol").exists()


def test_a_page_of_a_whole_run(root: Path, collect: Callable[..., Any]) -> None:
    work = root / "work"
    keep(work, "sft", "a", lambda frames, ask: frames < 1000)
    keep(work, "longest", "a", lambda frames, ask: True)
    keep(work, "longest", "b", lambda frames, ask: ask == "choice")
    train(work, "sft", [4.0, 3.0, 2.0, 1.0])
    train(root / "two", "sft", [4.0, 3.0, 2.0, 1.001])
    about = {**ABOUT, "commit": "abc"}
    collect(work, root / "out", two_gpus=root / "two", about=about, two_command="longvila on two")
    text = run(root)
    assert run(root, "--check") == text

    heading, _, tiers = text.partition("<!-- bench:smol_tiers -->")
    tiers = tiers.partition("<!-- /bench -->")[0]
    tier_a, _, tier_b = tiers.partition("**Tier b: unseen pictures of trained names**")
    assert "The model after stage 5" in tier_a and "Tier c" not in tiers
    words = smol.WAYS["retrieval", "free"]
    assert f"| {words} | 6 | 100 [61, 100] | 5 | 100 | 100 |" in tier_a
    assert f"| control, grey: {words} | 6 | 0 [0, 39] | 5 | 0 | 0 |" in tier_a
    assert f"| {words} | 6 | 0 [0, 39] | 5 | 0 | 0 |" in tier_b
    assert "3 of 3 to 3 of 3 right, +0 points." in tier_b
    # Both sides of 1,024 frames, stage by stage.
    assert f"| {smol.PARTS['sft']} | 100 | 0 | 100 [44, 100] (3) | 0 [0, 56] (3) |" in heading
    assert "(3 of 3 right): after stage 3: -100 points." in heading
    assert "| stage 3, short videos | 4 | 1,000 | 30 | 4.000 | 1.000 | 0.50 |  | 10% |" in heading
    assert "no result of half-long, half-extend" in text
    assert "| stage 3, short videos | 2 GPUs | 4 | 0.0e+00 | 2.5e-04 | 1.0e-03 |" in text
    assert "2 x H, torch 2; 2026-01-02, commit `abc`. `longvila on two`" in text
    assert "no result of `needle method=smol-shipped`" in text

    assert "no result of" in text.partition("<!-- bench:smol_summary -->")[2]  # of what ships
    summary = "\n".join(smol.summary(root / "out"))
    assert "| unseen pictures of trained names; likeliest name | 6 | 100 [61, 100] | 5 |" in summary

    drawn = sorted(path.name for path in (root / "docs" / "results" / "smol").iterdir())
    assert drawn == ["heat-longest-free.svg", "heat-sft-free.svg", "loss.svg"]
    assert all(f"](smol/{name})" in text for name in drawn)
    heat = (root / "docs" / "results" / "smol" / "heat-sft-free.svg").read_text()
    assert heat.count("1/1") == 3 and heat.count("0/1") == 3 and "3 of 6 right" in heat
    assert (root / "docs" / "results" / "smol" / "loss.svg").read_text().count("<polyline") == 2


def test_drawings_are_checked_and_old_ones_go(root: Path, collect: Callable[..., Any]) -> None:
    train(root / "work", "sft", [2.0, 1.0])
    collect(root / "work", root / "out", two_gpus=None, about=ABOUT)
    run(root)
    drawing = root / "docs" / "results" / "smol" / "loss.svg"
    (drawing.with_name("heat-old.svg")).write_text("<svg/>")
    drawing.write_text("<svg/>")
    arguments = ["--root", str(root), "--results", str(root / "out")]
    assert render.main(["--check", *arguments]) == 1
    run(root)
    assert "polyline" in drawing.read_text() and len(list(drawing.parent.iterdir())) == 1


def test_collected_files_name_no_folder_and_a_step_done_twice_counts_once(
    root: Path, collect: Callable[..., Any]
) -> None:
    work = root / "work"
    keep(work, "sft", "a", lambda frames, ask: True)
    train(work, "sft", [2.0, 1.0])
    train(work, "sft", [1.5, 0.5], first=2)
    files = collect(work, root / "out", two_gpus=None, about=ABOUT)
    needle, training = (json.loads(path.read_text()) for path in sorted(files))
    assert needle["command"] == "longvila needle --model WORK/models/sft --out WORK/o"
    assert needle["settings"]["film"]["file"] == "WORK/data/haystack.mp4"
    assert training["rows"][0]["samples"] == [[1, 2.0], [2, 1.5], [3, 0.5]]


def test_a_run_that_was_cut_off_says_so(root: Path, collect: Callable[..., Any]) -> None:
    folder = root / "work" / "needle" / "half-long-b"
    folder.mkdir(parents=True)
    lines = [{"settings": {}, "key": ""}, *records("b", lambda frames, ask: True)[:7]]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"step": 1, "loss": 2.5, "tokens": 8, "frames": 8638, "step_s": 0.5}]
    folder = root / "work" / "stages" / "pretrain"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path, training = collect(root / "work", root / "out", two_gpus=None, about=ABOUT)
    assert json.loads(training.read_text())["rows"][0]["samples"] == [[1, 2.5]]
    assert "| stage 2, pretrain | 1 | 8,638 | 8,638 | 2 |" in run(root)
    assert path.name == "2026-01-02_needle_smol_half-long_b.json"
    result = json.loads(path.read_text())
    assert result["notes"]["cut_off"] == "The run was cut off after 7 answers."
    assert "stages 3, 4, 5" in run(root)


def test_another_protocol_joins_its_tier(root: Path, collect: Callable[..., Any]) -> None:
    work = root / "work"
    keep(work, "longest", "a", lambda frames, ask: False)
    found = [row for row in records("a", lambda frames, ask: True) if not row["shape"]["control"]]
    found = [{**row, "task": "paper", "ask": "forced"} for row in found if row["ask"] == "free"]
    folder = leave(work, "longest-a-paper", found)
    names = [path.name for path in collect(work, root / "out", two_gpus=None, about=ABOUT)]
    assert names == [f"2026-01-02_needle_smol_longest_a{end}.json" for end in ("", "_paper")]
    assert json.loads((root / "out" / names[1]).read_text())["commit"] == "abc"
    # The shipped model, measured on another machine, is no stage of the run.
    shutil.copytree(folder, root / "cpu" / "needle" / "shipped-a")
    other = {**ABOUT, "hardware": {"gpu": "CPU", "count": 1, "link": None}}
    collect(root / "cpu", root / "out", two_gpus=None, about=other)
    text = run(root)
    stages, _, shipped = text.partition("<!-- bench:smol_shipped -->")
    assert "1 x CPU" not in stages.partition("<!-- bench:smol_tiers -->")[2]
    assert "The model as shipped" in shipped
    assert f"| {smol.WAYS['paper', 'forced']} | 6 | 100 [61, 100] | 5 | 100 | 100 |" in text
    assert "](smol/heat-longest-forced.svg)" in text


def test_another_recipe_takes_no_place_of_the_first(
    root: Path, collect: Callable[..., Any]
) -> None:
    first, other = root / "first", root / "other"
    keep(first, "longest", "a", lambda frames, ask: True)
    train(first, "sft", [4.0, 1.0])
    collect(first, root / "out", two_gpus=None, about=ABOUT)
    before = run(root)
    keep(other, "longest", "a", lambda frames, ask: frames < 1000)
    keep(other, "half-long", "b", lambda frames, ask: ask == "choice")
    train(other, "sft", [4.0, 3.0])
    train(other, "half-long", [2.0])
    train(root / "two", "sft", [4.0, 3.0])
    files = collect(other, root / "out", two_gpus=root / "two", about=ABOUT, run="second")
    assert [path.name for path in files if "smol-second" not in path.name] == [
        "2026-01-02_training_smol-two.json"
    ]
    text = run(root)
    for block in PAGE.split("<!-- /bench -->"):
        name = block.partition("<!-- bench:")[2].partition(" -->")[0]
        same = [t.partition(f"<!-- bench:{name} -->")[2].partition("<!-- /bench")[0]
                for t in (before, text)]  # fmt: skip
        other_recipe = name in ("smol_right method=smol-second", "smol_two_gpus")
        assert (same[0] == same[1]) == (not other_recipe), name
    second = text.partition("<!-- bench:smol_right method=smol-second -->")[2]
    words, choice = (smol.WAYS["retrieval", ask] for ask in ("free", "choice"))
    assert f"| after stage 5 | a | {words} | 5 | 3 of 3 | 0 of 3 |" in second
    half = f"half the steps: {smol.ABLATIONS['half-long']}"
    assert f"| {half} | b | {choice} | 5 | 3 of 3 | 3 of 3 |" in second
    assert "| stage 3, short videos | 2 | 1,000 | 30 | 4.000 | 3.000 |" in second
    assert "| stage 5, to 2,048 frames, half | 1 |" in second


def test_a_recipe_that_went_on_has_what_it_shares_and_takes_the_drawings(
    root: Path, collect: Callable[..., Any]
) -> None:
    first, third = root / "first", root / "third"
    for part in ("sft", "longest"):
        keep(first, part, "a", lambda frames, ask: frames < 1000)
    train(first, "sft", [4.0, 1.0])
    train(first, "longest", [3.0])
    collect(first, root / "out", two_gpus=None, about=ABOUT)
    keep(third, "longest", "a", lambda frames, ask: True)
    train(third, "longer", [2.0])
    # The controls were asked in a run of their own, with fewer questions.
    (kept,) = (third / "results").glob("*_a.json")
    plain = json.loads(kept.read_text())
    plain["rows"] = [row for row in plain["rows"] if not row["shape"]["control"]]
    kept.write_text(json.dumps(plain))
    found = records("a", lambda frames, ask: False)
    found = [row for row in found if row["shape"]["frames"] == 32]
    leave(third, "longest-a-controls", found)
    collect(third, root / "out", two_gpus=None, about=ABOUT, run="third")

    page = "".join(
        f"<!-- bench:{name} method=smol-{recipe} -->\n<!-- /bench -->\n"
        for name, recipe in (
            ("smol_tiers", "third"), ("smol_lengths", "third"), ("smol_losses", "third"),
            ("smol_heat", "third"), ("smol_summary", "third"), ("smol_right", "stages"),
        )
    )  # fmt: skip
    (root / "docs" / "results" / "smol.md").write_text(page)
    blocks = run(root).split("<!-- /bench -->\n")
    words = smol.WAYS["retrieval", "free"]
    assert f"| {words} | 6 | 100 [61, 100] | 5 | 100 | 100 |" in blocks[0]
    assert f"| control, grey: {words} | 3 | 0 [0, 56] | 5 | 0 |  |" in blocks[0]
    assert f"| {smol.PARTS['sft']} | 100 | 0 |" in blocks[1]
    assert f"| {smol.PARTS['longest']} | 100 | 100 |" in blocks[1]
    assert "| stage 3, short videos | 2 |" in blocks[2] and "first to 6,000 frames" in blocks[2]
    assert "stage 5, to 6,000 frames |" not in blocks[2]
    assert "](smol/heat-sft-free.svg)" in blocks[3]
    assert "pictures seen in training; own words | 6 | 100 [61, 100]" in blocks[4]
    assert f"| after stage 5 | a | {words} | 5 | 3 of 3 | 0 of 3 |" in blocks[5]
    drawn = (root / "docs" / "results" / "smol" / "heat-longest-free.svg").read_text()
    assert "6 of 6 right" in drawn


def test_other_lengths_of_a_question_join_its_grid() -> None:
    def grid(frames: int, right: int, chance: float) -> dict[str, Any]:
        return {"task": "retrieval", "ask": "free", "chance": chance,
                "cells": [[frames, 0.0, right, 2]]}  # fmt: skip

    grids = [grid(32, 2, 0.1)]
    smol._join(grids, grid(256, 1, 0.3))
    smol._join(grids, {**grid(256, 1, 0.3), "ask": "choice"})
    assert grids[0]["cells"] == [[32, 0.0, 2, 2], [256, 0.0, 1, 2]]
    assert grids[0]["chance"] == pytest.approx(0.2) and len(grids) == 2
    # More questions in the same cell.
    smol._join(grids, grid(256, 2, 0.2))
    assert grids[0]["cells"] == [[32, 0.0, 2, 2], [256, 0.0, 3, 4]]


def test_more_questions_of_a_kind_are_added_up(root: Path, collect: Callable[..., Any]) -> None:
    work = root / "work"
    keep(work, "longest", "a", lambda frames, ask: True)
    train(work, "longest", [2.0])
    found = [row for row in records("a", lambda frames, ask: False) if not row["shape"]["control"]]
    leave(work, "longest-a-wide", found)
    collect(work, root / "out", two_gpus=None, about=ABOUT, command="train it", gpus=2)
    text = run(root)
    assert f"| {smol.WAYS['retrieval', 'free']} | 12 | 50 [25, 75] | 5 | 50 | 50 |" in text
    drawn = (root / "docs" / "results" / "smol" / "heat-longest-free.svg").read_text()
    assert "6 of 12 right" in drawn and ">1/2<" in drawn
    # Trained on two GPUs, asked on one.
    losses, tiers = (text.partition(f"bench:smol_{name} -->")[2] for name in ("losses", "tiers"))
    assert (
        "2 x H" in losses.partition("/bench")[0] and "`train it`" in losses.partition("/bench")[0]
    )
    assert "1 x H" in tiers.partition("/bench")[0]
