"""Grades: strictly read, bounded in asking, kept, counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from longvila.errors import LongVILAError
from longvila.evaluation.answers import Answers, write_lines
from longvila.evaluation.judge import (
    AXES,
    PROMPTS_FOLDER,
    Item,
    Prompt,
    axis_scores,
    grade,
    grade_all,
    parse_grade,
    read_items,
)
from longvila.evaluation.judge_models import JudgeError, Recording
from longvila.inference.caller import CallError

ITEM = Item("a", "film", "Who?", "A man", "A {tall} man")


class Scripted:
    """A judge with a list of replies; the last one is repeated."""

    name = "scripted"

    def __init__(self, *replies: str) -> None:
        self.replies = list(replies)
        self.asked: list[Sequence[Any]] = []

    def reply(self, messages: Sequence[Any]) -> str:
        self.asked.append(list(messages))
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@pytest.mark.parametrize(
    ("reply", "score"),
    [('{"score": 4}', 4), (' {"score":0}\n', 0), ('```json\n{"score": 5}\n```', 5)],
)
def test_grades_in_the_form(reply: str, score: int) -> None:
    assert parse_grade(reply, "detail") == {"score": score}


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "4",
        "{'score': 4}",
        '{"score": 4.8}',
        '{"score": 4.0}',
        '{"score": "4"}',
        '{"score": true}',
        '{"score": 6}',
        '{"score": -1}',
        '{"score": null}',
        '{"score": 4, "why": "good"}',
        '{"score": 1, "score": 5}',
        '[{"score": 4}]',
        'The score is {"score": 4}',
        '{"score": 4} because',
        '{"score": 4}{"score": 4}',
        "__import__('os').getcwd()",
        "[" * 100_000,
        '{"score": NaN}',
        '{"score": ' + "9" * 5000 + "}",
    ],
    ids=lambda reply: reply[:12],
)
def test_anything_else_is_no_grade(reply: str) -> None:
    assert parse_grade(reply, "detail") is None


def test_right_or_wrong() -> None:
    assert parse_grade('{"match": "yes", "score": 5}', "match") == {"score": 5, "match": True}
    assert parse_grade('{"match": "no", "score": 1}', "match") == {"score": 1, "match": False}
    for reply in ('{"score": 5}', '{"match": true, "score": 5}', '{"match": "Yes", "score": 5}'):
        assert parse_grade(reply, "match") is None


@pytest.mark.parametrize("axis", [*AXES, "match"])
def test_packaged_prompts_say_what_they_grade_and_in_which_form(axis: str) -> None:
    item = Item("a", "film", "Who walks?", "A man", "A boy", "Which person?", "A girl")
    system, user = Prompt.read(axis).messages(item)
    assert (system["role"], user["role"]) == ("system", "user")
    assert "Grade one thing only" in " ".join(system["content"].split()) or axis == "match"
    for text in ("Who walks?", "A man", "A boy", '"score": 0'):
        assert text in user["content"]
    assert ("A girl" in user["content"]) == (axis == "consistency")
    assert "{prediction" not in user["content"]


def test_what_a_candidate_says_is_not_filled_in() -> None:
    _, user = Prompt.read("detail").messages(ITEM)
    assert "A {tall} man" in user["content"]
    with pytest.raises(LongVILAError, match=r"consistency cannot be filled for a.*question_2"):
        Prompt.read("consistency").messages(ITEM)


def test_prompts_of_the_user_come_first(tmp_path: Path) -> None:
    (tmp_path / "detail.txt").write_text("[system]\nBe kind.\n[user]\n{prediction}?\n")
    assert Prompt.read("detail", tmp_path).messages(ITEM)[1]["content"] == "A {tall} man?"
    assert Prompt.read("context", tmp_path) == Prompt.read("context")
    (tmp_path / "new.txt").write_text("Grade this: {prediction}")
    with pytest.raises(LongVILAError, match="must have one part"):
        Prompt.read("new", tmp_path)
    (tmp_path / "brace.txt").write_text('[system]\nx\n[user]\n{"score": 0}\n')
    with pytest.raises(LongVILAError, match="a brace is written twice"):
        Prompt.read("brace", tmp_path).messages(ITEM)
    with pytest.raises(LongVILAError, match="no axis 'style'; there are"):
        Prompt.read("style")


def test_a_judge_is_asked_again_and_told_why_but_not_for_ever() -> None:
    prompt = Prompt.read("detail")
    judge = Scripted("Four!", '{"score": 4}')
    record = grade(ITEM, prompt, judge, attempts=3)
    assert record["grade"] == {"score": 4}
    assert [exchange["reply"] for exchange in record["exchanges"]] == ["Four!", '{"score": 4}']
    assert [m["role"] for m in judge.asked[1]] == ["system", "user", "assistant", "user"]
    assert judge.asked[1][2]["content"] == "Four!"
    stubborn = Scripted("Four!")
    record = grade(ITEM, prompt, stubborn, attempts=3)
    assert record["grade"] is None and len(stubborn.asked) == 3


def items(count: int) -> list[Item]:
    return [Item(f"{i:03d}", f"film {i // 2}", f"Q{i}", "right", f"said {i}") for i in range(count)]


class Fair:
    """Grades an answer by the number in it; breaks after so many."""

    name = "fair"

    def __init__(self, breaks_after: int | None = None) -> None:
        self.count, self.breaks_after = 0, breaks_after

    def reply(self, messages: Sequence[Any]) -> str:
        if self.breaks_after is not None and self.count >= self.breaks_after:
            raise CallError("the line is dead")
        self.count += 1
        text = messages[1]["content"]
        number = next(i for i in range(100) if f"said {i}\n" in text)
        return json.dumps({"score": number % 6})


class Picky(Fair):
    """Cannot be asked about one answer, as an endpoint that finds it too long."""

    def reply(self, messages: Sequence[Any]) -> str:
        if "said 2\n" in messages[1]["content"]:
            raise CallError("status 400: too long")
        return super().reply(messages)


def test_an_answer_that_cannot_be_graded_stops_nobody_and_is_tried_again(tmp_path: Path) -> None:
    axes = ("detail",)
    records = grade_all(items(6), axes, Picky(), Answers(tmp_path, "grades"))
    assert [record["grade"] is None for record in records] == [False] * 2 + [True] + [False] * 3
    assert records[2]["error"] == "status 400: too long"
    assert axis_scores(records)["detail"].ungraded == 1
    # Alone among what is open it is no sign of a judge that is down.
    once_more = grade_all(items(6), axes, Picky(), Answers(tmp_path, "grades"))
    assert [record["grade"] for record in once_more] == [record["grade"] for record in records]
    again = Fair()
    assert grade_all(items(6), axes, again, Answers(tmp_path, "grades"))[2]["grade"] == {"score": 2}
    assert again.count == 1


@pytest.mark.parametrize("parallel", [1, 3])
def test_grades_survive_a_judge_that_breaks(tmp_path: Path, parallel: int) -> None:
    axes = ("correctness", "detail")
    with pytest.raises(JudgeError, match=r"no answer \d+ times in a row; the last: .*dead"):
        grade_all(items(30), axes, Fair(7), Answers(tmp_path, "grades"), parallel=parallel)
    kept = sum("error" not in record for record in Answers(tmp_path, None).records())
    assert 7 <= kept < 7 + parallel
    again = Fair()
    records = grade_all(items(30), axes, again, Answers(tmp_path, "grades"), parallel=parallel)
    assert again.count == 60 - kept
    assert [(r["doc_id"], r["task"]) for r in records] == [
        (item.id, axis) for item in items(30) for axis in axes
    ]
    assert [r["grade"]["score"] for r in records[:14:2]] == [0, 1, 2, 3, 4, 5, 0]
    silent = Fair(0)
    assert grade_all(items(30), axes, silent, Answers(tmp_path, "grades")) == records


def test_a_recording_replays_and_knows_what_it_lacks(tmp_path: Path) -> None:
    axes = ("correctness",)
    records = grade_all(items(4), axes, Fair(), Answers(None, None))
    write_lines(tmp_path / "judged.jsonl", records)
    recording = Recording(tmp_path / "judged.jsonl")
    assert grade_all(items(4), axes, recording, Answers(None, None)) == records
    with pytest.raises(JudgeError, match="has no reply to"):
        grade_all(items(5), axes, recording, Answers(None, None))


def test_an_item_may_say_what_it_is_graded_by() -> None:
    own = Item("z", "film", "Q", "right", "said 3", axes=("match",))
    judge = Scripted('{"match": "yes", "score": 5}')
    records = grade_all([own], ("detail",), judge, Answers(None, None))
    assert [record["task"] for record in records] == ["match"]
    with pytest.raises(LongVILAError, match="same id"):
        grade_all([own, own], (), judge, Answers(None, None))


def record(axis: str, score: int | None, video: str, match: bool | None = None) -> dict[str, Any]:
    found = None if score is None else {"score": score}
    if found is not None and match is not None:
        found["match"] = match
    return {"task": axis, "video": video, "grade": found}


def test_means_say_how_sure_they_are_and_what_is_missing() -> None:
    records = [record("detail", s, v) for s, v in ((5, "a"), (3, "a"), (1, "b"))]
    records.append(record("detail", None, "b"))
    one = axis_scores(records)["detail"]
    assert (one.graded, one.ungraded, one.mean) == (3, 1, 3.0)
    # Deviations 2 + 0 and -2: sqrt((4 + 4) * 2 / 1) / 3.
    assert one.error == pytest.approx(4 / 3)
    assert (one.low, one.high) == (9 / 4, 14 / 4)
    assert one.counts == (0, 1, 0, 1, 0, 1) and one.accuracy is None


def test_what_was_not_graded_does_not_match() -> None:
    records = [record("match", 5, "a", True), record("match", 1, "b", False)]
    records += [record("match", None, "c"), record("match", 4, "d", True)]
    assert axis_scores(records)["match"].accuracy == 0.5
    none = axis_scores([record("detail", None, "a")])["detail"]
    assert (none.mean, none.low, none.high) == (None, 0.0, 5.0)


def test_files_of_answers(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"Q": "Who?", "A": "He", "pred": "She", "video_name": "v"}]))
    assert read_items(file) == [Item("000000", "v", "Who?", "He", "She")]
    pair = {"Q1": "Who?", "Q2": "Which?", "A": "He", "pred1": "She", "pred2": "It"}
    file.write_text(json.dumps({"x": pair}))
    assert read_items(file) == [Item("x", "000000", "Who?", "He", "She", "Which?", "It")]
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(LongVILAError, match=r"answer 000000 has no prediction"):
        read_items(tmp_path / "b.jsonl")
    with pytest.raises(LongVILAError, match="there is no file"):
        read_items(tmp_path / "c.jsonl")
    for content, message in (
        ("{", "is no JSON"), ('["a"]', "must hold objects"), ('{"a": 1}', "must hold objects"),
        ("[]", "holds no answers"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(LongVILAError, match=message):
            read_items(file)
    (tmp_path / "b.jsonl").write_text('{"question": \n{}\n')
    with pytest.raises(LongVILAError, match=r"b.jsonl is no JSON"):
        read_items(tmp_path / "b.jsonl")
    # Somebody else's file: a mark at its beginning, a blank line, no end of its last line.
    line = b'{"question": "q", "answer": "a", "prediction": "p"}'
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\n\n" + line)
    assert [item.id for item in read_items(tmp_path / "b.jsonl")] == ["000000", "000001"]


def test_answers_of_a_run(tmp_path: Path) -> None:
    def answer(doc_id: int, benchmark: str, **more: Any) -> dict[str, Any]:
        return {
            "task": benchmark, "benchmark": benchmark, "split": "test", "doc_id": doc_id,
            "repeat": 0, "video": "v", "prompt": f"Q{doc_id}", "gold": "A", "answer": f"P{doc_id}",
            "group": None, **more,
        }  # fmt: skip

    rows = [
        answer(0, "activitynetqa"),
        answer(1, "videomme"),
        answer(2, "videochatgpt_gen"),
        answer(3, "videochatgpt_consistency", group="g"),
        answer(4, "videochatgpt_consistency", group="g"),
    ]
    write_lines(tmp_path / "samples.jsonl", rows)
    first, second, third = read_items(tmp_path)
    assert (first.id, first.axes) == ("activitynetqa/test/000000/0", ("match",))
    assert second.axes == ("correctness", "detail", "context")
    assert (third.question, third.question_2) == ("Q3", "Q4")
    assert (third.prediction, third.prediction_2, third.axes) == ("P3", "P4", ("consistency",))
    write_lines(tmp_path / "samples.jsonl", rows[:4])
    with pytest.raises(LongVILAError, match="asks everything twice, but v has 1 answers"):
        read_items(tmp_path)
    write_lines(tmp_path / "samples.jsonl", rows[1:2])
    with pytest.raises(LongVILAError, match="no answers that want a judge"):
        read_items(tmp_path)
    with pytest.raises(LongVILAError, match="no finished run"):
        read_items(PROMPTS_FOLDER)
