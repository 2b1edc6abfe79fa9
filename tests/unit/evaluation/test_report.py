"""What answers come to: counts, errors, tables, a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longvila.evaluation.metrics import clustered_mean
from longvila.evaluation.report import (
    Run,
    compare,
    page,
    percent,
    score,
    summarise,
    table,
    write_submission,
)


def record(doc_id: int, correct: bool | None, **changes: Any) -> dict[str, Any]:
    values = {
        "key": str(doc_id),
        "task": "longvila_videomme",
        "benchmark": "videomme",
        "split": "test",
        "doc_id": doc_id,
        "repeat": 0,
        "media": [{"kind": "video", "frames": list(range(4))}],
        "answer": "A",
        "parsed": "A",
        "gold": "A" if correct else "B",
        "correct": correct,
        "error": None,
        "video": f"film {doc_id // 2}",
        "duration": ("short", "medium", "long")[doc_id % 3],
        "category": "OCR",
        "group": None,
    }
    return {**values, **changes}


RECORDS = [
    record(0, True),
    record(1, True),
    record(2, True),
    record(3, False, answer="no <idea>", parsed=None),
    record(4, False, answer="", parsed=None, error="VideoError: gone", media=[]),
    record(5, False),
]


def test_what_chooses_nothing_stays_in_the_denominator() -> None:
    one = summarise(RECORDS)["videomme"]
    assert one.score is not None
    assert (one.score.questions, one.score.right, one.score.accuracy) == (6, 3, 0.5)
    assert (one.score.unparsable, one.score.failed, one.failed) == (1, 1, 1)
    films = [record["video"] for record in RECORDS]
    assert one.score.error == clustered_mean([1, 1, 1, 0, 0, 0], films)[1]
    assert (one.videos, one.frames) == (3, (4, 4))


def test_parts_are_ordered_by_length_and_each_has_its_own_error() -> None:
    one = summarise(RECORDS)["videomme"]
    assert list(one.by_duration) == ["short", "medium", "long"]
    assert [part.accuracy for part in one.by_duration.values()] == [0.5, 0.5, 0.5]
    alone = score([record(0, True), record(1, False)])
    assert alone.error is None and percent(alone) == "50.0"
    names = ["1800-3600 s", "60-180 s", "0-60 s", "3600 s and more"]
    many = summarise([record(2 * i, True, duration=name) for i, name in enumerate(names)])
    assert list(many["videomme"].by_duration) == [
        "0-60 s",
        "60-180 s",
        "1800-3600 s",
        "3600 s and more",
    ]


def test_a_benchmark_without_lengths_is_grouped_by_what_was_decoded() -> None:
    media = [[{"kind": "video", "frames": [0], "length_s": s}] for s in (700.0, 30.0)]
    records = [record(i, True, duration=None, media=m) for i, m in enumerate(media)]
    records.append(record(2, False, duration=None, media=[], error="gone"))
    parts = summarise(records)["videomme"].by_duration
    assert {name: part.questions for name, part in parts.items()} == {"0-60 s": 1, "600-1800 s": 1}


def test_all_or_none_right_have_an_interval_and_not_an_error_of_zero() -> None:
    films = [record(2 * i, True) for i in range(20)]
    assert percent(score(films)) == "100.0 (84 to 100)"
    assert percent(score([record(2 * i, False) for i in range(20)])) == "0.0 (0 to 16)"


def test_groups_count_as_one_and_kinds_alike() -> None:
    records = [
        record(i, i != 1, group=f"g{i // 2}", category="a" if i < 3 else "b") for i in range(4)
    ]
    one = summarise(records)["videomme"]
    assert one.groups == (2, 0.5)
    assert one.mean_of_categories == pytest.approx((2 / 3 + 1) / 2)


def test_a_question_of_two_kinds_counts_to_both() -> None:
    both = {"benchmark": "lvbench", "category": ["entity recognition", "reasoning"]}
    one = {**both, "category": ["reasoning"]}
    rows = [record(0, True, **both), record(1, False, **one)]
    kinds = summarise(rows)["lvbench"].by_category
    assert {kind: (part.right, part.questions) for kind, part in kinds.items()} == {
        "entity recognition": (1, 1),
        "reasoning": (1, 2),
    }


def test_tasks_of_a_group_are_its_kinds() -> None:
    records = [
        record(i, True, benchmark="mvbench", task=f"mvbench_{kind}", category=None)
        for i, kind in enumerate(("count", "move"))
    ]
    assert list(summarise(records)["mvbench"].by_category) == ["count", "move"]


def test_answers_for_a_judge_have_no_score_here() -> None:
    one = summarise([record(0, None, benchmark="activitynetqa")])["activitynetqa"]
    assert one.score is None and one.answered == 1
    assert "not judged" in table({"activitynetqa": one})


def test_runs_are_compared_question_by_question() -> None:
    better = [{**r, "correct": True} for r in RECORDS[:4]]
    mean, error, count = compare(RECORDS, better)
    assert (mean, count) == (0.25, 4)
    assert error == clustered_mean([0, 0, 0, 1], ["0", "0", "1", "1"])[1]
    same, none, _ = compare(RECORDS, RECORDS)
    assert (same, none) == (0.0, 0.0)
    with pytest.raises(ValueError, match="no judged question in common"):
        compare(RECORDS, [record(77, True)])


def test_a_file_to_hand_in_has_a_line_a_question(tmp_path: Path) -> None:
    answers = [
        record(0, None, video="x", parsed="C"),
        record(1, None, video="y", parsed=None),
    ]
    assert write_submission(tmp_path / "deep" / "s.csv", answers) == 1
    handed_in = [record(k, None, benchmark="egoschema_test", parsed=p) for k, p in enumerate("AB")]
    handed_in.append(record(2, None, benchmark="egoschema_test", parsed=None, answer="Well"))
    one = summarise(handed_in)["egoschema_test"]
    assert one.score is None and one.unparsable == 1
    assert table({"egoschema_test": one}).splitlines()[1].split()[-3:] == ["1", "0", "4"]
    assert (tmp_path / "deep" / "s.csv").read_text().split() == ["q_uid,answer", "x,2", "y,0"]


def test_the_table_says_everything_once() -> None:
    text = table(summarise(RECORDS))
    header, first, *parts = text.splitlines()
    assert header.split() == [
        "benchmark", "score", "questions", "videos", "unparsable", "failed", "frames",
    ]  # fmt: skip
    assert first.split() == ["videomme", "50.0", "±", "28.9", "6", "3", "1", "1", "4"]
    assert [part.split()[0] for part in parts] == ["short", "medium", "long"]


def test_the_page_shows_runs_side_by_side_and_escapes_what_models_say() -> None:
    first = Run("first & old", summarise(RECORDS), RECORDS, {"model": "a"})
    better = [{**r, "correct": True, "parsed": "B"} for r in RECORDS]
    second = Run("second", summarise(better, {"videomme": {"accuracy": 1.0}}), better, {"seed": 3})
    text = page([first, second], title="Two <runs>")
    assert "Two &lt;runs&gt;" in text and "first &amp; old" in text
    assert "no &lt;idea&gt;" in text and "<idea>" not in text
    assert "+50.0 ± 28.9" in text and "over 6" in text
    assert "accuracy 1" in text and "VideoError: gone" in text
    assert "<script" not in text and "http" not in text
    with pytest.raises(ValueError, match="different names"):
        page([first, first])
