"""A model that knows scores 1, one that guesses scores chance, and nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longvila.evaluation.measure import measure
from longvila.evaluation.metrics import wilson_interval
from longvila.evaluation.needle import Plan, about, make_parts, run_needle, settings_of
from longvila.evaluation.needle_frames import FrameRows
from longvila.evaluation.needle_plan import Words
from longvila.evaluation.runner import Records, RecordsError
from longvila.evaluation.summary import Group
from longvila.inference.engine import Engine
from longvila.parallel.families.longvila import LONGVILA
from longvila.sp.mesh import build_mesh
from longvila.testing.ranks import Rank, ranks
from longvila.testing.tiny import tiny_model, tiny_processor

from .cases import ScriptedEngine, film, guessing, knowing, needles
from .seer import LETTERS, colour_family, seer

SMALL = {"max_frames": 40, "interval": 20, "depth_interval": 0.5, "trials": 2}


def _measure(
    out: Path,
    plan: Plan,
    *,
    timestamps: bool = True,
    blind: bool = False,
    stop_after: int = 0,
    undecoded: Sequence[str] = (),
) -> tuple[list[Group], ScriptedEngine]:
    processor = tiny_processor(timestamps=timestamps)
    haystack = film(processor, plan.max_frames)
    book = haystack.book
    mind = knowing()
    parts = make_parts(plan, haystack, needles(), processor)
    if blind:
        mind = guessing([scene for part in parts for scene in part.scenes])
    engine = ScriptedEngine(processor, book, mind)
    rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
    done = 0

    def count(number: int, total: int, _: Any) -> None:
        nonlocal done
        done += 1
        assert number == done <= total  # over both layouts
        if done == stop_after:
            raise KeyboardInterrupt

    groups = measure(
        engine,
        processor,
        parts,
        settings_of(plan, haystack, needles(), "script"),
        rows,
        about=about(haystack, "script"),
        out=out,
        progress=count,
        undecoded=lambda: list(undecoded),
    )
    return groups, engine


@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("insert", ["frame", "paste"])
def test_a_model_that_knows_is_right_everywhere(
    tmp_path: Path, timestamps: bool, insert: Any
) -> None:
    plan = Plan(**SMALL, insert=insert, strict_insert=insert)
    groups, _ = _measure(tmp_path, plan, timestamps=timestamps)
    real = [group for group in groups if group.control is None]
    tasks = {"paper", "retrieval", "presence", "ordering", "counting", "listing"}
    assert {group.task for group in real} == tasks | ({"grounding"} if timestamps else set())
    assert [group.name for group in real if group.all.accuracy < 1] == []
    assert all(share.n for group in real for share in group.by_frames.values())
    # The same questions without needles: what it says is what it sees.
    control = {group.control: group for group in groups if group.task == "retrieval"}
    assert control["no needle"].all.accuracy < 0.5 and control["grey"].all.accuracy < 0.5


def test_frames_that_could_not_be_decoded_are_named_also_by_a_run_that_only_draws(
    tmp_path: Path,
) -> None:
    plan = Plan(max_frames=16, interval=16, depth_interval=1.0, protocol="paper")
    _measure(tmp_path, plan, undecoded=["film.mp4, frame 3"])
    _measure(tmp_path, plan)
    assert json.loads((tmp_path / "result.json").read_text())["undecoded"] == ["film.mp4, frame 3"]
    page = (tmp_path / "page.html").read_text()
    assert "1 frame could not be decoded, others stood in: film.mp4, frame 3" in page


def test_a_blind_model_scores_what_a_guess_scores(tmp_path: Path) -> None:
    plan = Plan(max_frames=40, interval=20, depth_interval=0.25, trials=8, insert="paste")
    groups, _ = _measure(tmp_path, plan, blind=True)
    # The paper's, listing, both ways of five tasks, two controls of two of these.
    assert len(groups) == 2 + 2 * 5 + 2 * 4
    for group in groups:
        if group.task == "listing":
            assert abs(group.all.score - group.all.chance) < 3 * group.all.error
            continue
        low, high = wilson_interval(group.all.correct, group.all.n, confidence=0.999)
        assert low <= group.all.chance <= high, (group.name, group.all)
        assert group.all.chance < 0.6


def test_six_thousand_frames(tmp_path: Path) -> None:
    plan = Plan(max_frames=6000, interval=6000, depth_interval=0.5)
    groups, _ = _measure(tmp_path, plan)
    assert all(g.all.accuracy == 1 for g in groups if g.control is None)
    assert {frames for g in groups for frames in g.by_frames} == {6000}
    blind, _ = _measure(tmp_path / "blind", plan, blind=True)
    assert sum(g.all.correct for g in blind) < 0.6 * sum(g.all.n for g in blind)


def test_six_thousand_frames_through_an_engine(tmp_path: Path) -> None:
    """A language model that can see the needle's row finds it in every cell; without values not."""
    plan = Plan(
        max_frames=6000, interval=6000, depth_interval=0.25, protocol="paper", seed=3,
        words=Words(only="Which letter?"),
    )  # fmt: skip
    letters = [replace(n, answer=a) for n, a in zip(needles(4), LETTERS, strict=False)]
    for blind in (False, True):
        model = seer(blind=blind)
        processor = tiny_processor(model.config)
        haystack = film(processor, plan.max_frames)
        rows = FrameRows(colour_family(), haystack.book, processor.video_processor.pixels)
        with Engine(model, family=rows.family) as engine:
            out = tmp_path / str(blind)
            (group,) = measure(
                engine, processor, make_parts(plan, haystack, letters, processor), {"model": ""},
                rows, about=about(haystack, ""), out=out,
            )  # fmt: skip
        assert group.all.n == 5 * 4
        assert group.all.accuracy == (group.all.chance if blind else 1.0)
        assert rows.encoded == 6000 + 4


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    plan = Plan(**SMALL)
    _, whole = _measure(tmp_path / "whole", plan)
    with pytest.raises(KeyboardInterrupt):
        _measure(tmp_path / "parts", plan, stop_after=30)
    before = (tmp_path / "parts" / "records.jsonl").read_bytes()
    assert before.count(b"\n") > 20
    # The process died over a line.
    (tmp_path / "parts" / "records.jsonl").write_bytes(before[:-7])
    groups, rest = _measure(tmp_path / "parts", plan)
    assert 0 < rest.asked < whole.asked - 20
    same, again = _measure(tmp_path / "parts", plan)
    assert again.asked == again.tokens_read == 0 and same == groups
    contents = [(tmp_path / n / "records.jsonl").read_bytes() for n in ("whole", "parts")]
    assert contents[0] == contents[1]


def test_two_runs_with_one_seed_are_identical_and_another_seed_differs(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _measure(tmp_path / name, Plan(**SMALL, seed=seed), blind=True)
    a, b, c = ((tmp_path / name / "records.jsonl").read_text() for name in "abc")
    assert a == b and a != c
    pages = [(tmp_path / name / "page.html").read_text() for name in "ab"]
    assert pages[0] == pages[1]


def test_answers_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    _measure(tmp_path, Plan(**SMALL))
    with pytest.raises(RecordsError, match="seed was 0, is 1"):
        _measure(tmp_path, Plan(**SMALL, seed=1))


def test_results_have_intervals_chance_and_every_length(tmp_path: Path) -> None:
    _measure(tmp_path, Plan(**SMALL))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["haystack"].startswith("synthetic")
    rows = [row for row in result["rows"] if row["shape"]["task"] == "paper"]
    assert [row["shape"]["frames"] for row in rows] == [None, 20, 40]
    low, high = rows[0]["metrics"]["accuracy_interval"]
    assert 0.9 < low < high == 1.0 and rows[0]["metrics"]["chance"] == 0.125
    page = (tmp_path / "page.html").read_text()
    assert "drawn in code" in page and "data:image/png" in page
    assert (tmp_path / "heat-paper-forced.png").stat().st_size > 1000
    with Records(tmp_path, result["settings"], writes=False) as records:
        assert len(records.rows) == sum(
            row["shape"]["n"] for row in result["rows"] if row["shape"]["frames"] is None
        )


@pytest.mark.parametrize("sp", [1, 2])
@ranks(2)
def test_ranks_give_the_answers_of_one_process(rank: Rank, sp: int, tmp_path: Path) -> None:
    """Two ranks that share every sequence, and two that share the scenes."""
    plan = Plan(max_frames=16, interval=16, depth_interval=1.0, control=False, per_film=3)
    model, processor = tiny_model(1, dtype=torch.float64), tiny_processor(timestamps=True)
    mesh = build_mesh(sp, num_heads=4, num_kv_heads=2)
    assert (mesh.dp_size, mesh.sp_size) == (2 // sp, sp)
    found = []
    for out, used in ((tmp_path / f"one{rank.rank}", None), (tmp_path / "many", mesh)):
        haystack = film(processor, plan.max_frames)
        groups = run_needle(
            model, processor, plan, haystack, needles(5), out=out, name="", mesh=used
        )
        with Records(out, json.loads((tmp_path / "one0" / "result.json").read_text())["settings"],
                     writes=False) as records:  # fmt: skip
            found.append((groups, {k: (r["said"], r["read"]) for k, r in records.rows.items()}))
    assert found[0][1] == found[1][1] and found[0][0] == found[1][0]
    files = sorted(path.name for path in (tmp_path / "many").glob("records*"))
    assert files == (["records.jsonl"] if sp == 2 else ["records-1.jsonl", "records.jsonl"])
