"""Answers survive: a crash, a second writer, another number of groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longvila.evaluation.answers import Answers, AnswersError, digest, read_lines, write_lines


def record(key: str, doc_id: int = 0, **more: Any) -> dict[str, Any]:
    return {"key": key, "task": "t", "split": "s", "doc_id": doc_id, "repeat": 0, **more}


def test_digest_tells_values_apart_and_orders_apart_not() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest(["a", "bc"]) != digest(["ab", "c"])
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


def test_what_was_answered_is_found_again(tmp_path: Path) -> None:
    first = Answers(tmp_path, "group-0")
    first.add(record("k", answer="yes"))
    assert first.find("k") is not None and first.find("other") is None
    with pytest.raises(AnswersError, match=r"another run is writing .*group-0.jsonl: wait"):
        Answers(tmp_path, "group-0")
    assert len(Answers(tmp_path, "group-1")) == 1
    first.close()
    again = Answers(tmp_path, "group-0")
    found = again.find("k")
    assert found is not None and found["answer"] == "yes"
    assert len(again) == 1


def test_a_cut_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    answers = Answers(tmp_path, "group-0")
    answers.add(record("a"))
    answers.add(record("b", doc_id=1))
    file = tmp_path / "group-0.jsonl"
    answers.close()
    file.write_bytes(file.read_bytes()[:-9])
    again = Answers(tmp_path, "group-0")
    assert again.find("a") is not None and again.find("b") is None
    again.add(record("b", doc_id=1))
    assert [line["key"] for line in read_lines(file)] == ["a", "b"]


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "group-0.jsonl").write_text('{"key": "a"\n{"key": "b"}\n')
    with pytest.raises(ValueError, match="line 1 is no JSON"):
        Answers(tmp_path, None)
    (tmp_path / "group-0.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1 is no JSON object"):
        Answers(tmp_path, None)
    (tmp_path / "group-0.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match="holds no answers: give a folder of its own"):
        Answers(tmp_path, None)


def test_two_files_count_a_question_once(tmp_path: Path) -> None:
    Answers(tmp_path, "group-0").add(record("a", answer="one"))
    (tmp_path / "group-1.jsonl").write_bytes((tmp_path / "group-0.jsonl").read_bytes())
    assert [r["key"] for r in Answers(tmp_path, None).records()] == ["a"]


def test_no_question_is_answered_twice_but_failures_are_tried_again(tmp_path: Path) -> None:
    answers = Answers(tmp_path, "group-0")
    answers.add(record("a", error="VideoError: broken"))
    assert answers.find("a") is None and len(answers) == 1
    answers.add(record("a", error=None, answer="yes"))
    with pytest.raises(ValueError, match="answered already"):
        answers.add(record("a"))
    assert len(Answers(tmp_path, None).records()) == 1
    found = Answers(tmp_path, None).find("a")
    assert found is not None and found["answer"] == "yes"


def test_a_failure_in_one_file_does_not_hide_an_answer_in_another(tmp_path: Path) -> None:
    Answers(tmp_path, "group-0").add(record("a", answer="yes"))
    (tmp_path / "group-1.jsonl").write_text(
        '{"key": "a", "task": "t", "split": "s", "doc_id": 0, "repeat": 0, "error": "gone"}\n'
    )
    assert Answers(tmp_path, None).find("a") is not None


def test_memory_alone_and_order(tmp_path: Path) -> None:
    answers = Answers(None, None)
    for key, doc_id in (("x", 2), ("y", 0), ("z", 1)):
        answers.add(record(key, doc_id=doc_id))
    assert [r["doc_id"] for r in answers.records()] == [0, 1, 2]
    write_lines(tmp_path / "deep" / "all.jsonl", answers.records())
    assert [r["key"] for r in read_lines(tmp_path / "deep" / "all.jsonl")] == ["y", "z", "x"]
