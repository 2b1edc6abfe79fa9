"""Questions: read strictly, filtered for a reason, unseen answers judged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longvila.datagen.prompts import Prompts
from longvila.datagen.qa import (
    Question,
    QuestionOptions,
    alike,
    blind_answers,
    chosen_kinds,
    keep_questions,
    read_questions,
    sift,
    write_questions,
)
from longvila.errors import LongVILAError
from longvila.inference.caller import Prompt, Reply

KINDS = ("object", "action")


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "type": "object", "question": "What lies on the wooden table?", "answer": "A red apple.",
        "parts": [2, 1], **changes,
    }  # fmt: skip


def read(value: Any, *, complete: bool = True) -> list[Question]:
    text = value if isinstance(value, str) else json.dumps(value)
    return read_questions(Reply(text, complete), KINDS, range(1, 4))


def test_a_list_is_read_with_and_without_a_fence() -> None:
    expected = Question("object", "What lies on the wooden table?", "A red apple.", (1, 2))
    assert read([entry(question=" What lies\non the wooden table? ")]) == [expected]
    assert read(f"```json\n{json.dumps([entry()])}\n```") == [expected]
    assert read(f"```\n{json.dumps([entry()], indent=1)}\n```\n") == [expected]
    assert Question.of(expected.plain()) == expected


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("Here you are: []", "not JSON and nothing else"),
        (f"```json\n{json.dumps([entry()])}\n```\nMore?", "not JSON and nothing else"),
        ({"questions": []}, "a JSON dict, not a list"),
        ([], "the list is empty"),
        (["What?"], "entry 1 must have exactly the keys .* has str"),
        ([entry(), {**entry(), "id": 3}], "entry 2 must have exactly"),
        ([entry(type="sound")], "the type 'sound', not one of"),
        ([entry(answer=" ")], "has no answer"),
        ([entry(question=7)], "has no question"),
        ([entry(parts=[])], r"parts 1 to 3, got \[\]"),
        ([entry(parts=[4])], r"parts 1 to 3, got \[4\]"),
        ([entry(parts=[True])], "parts 1 to 3"),
        ([entry(parts="1")], "parts 1 to 3"),
    ],
)
def test_anything_else_is_refused(value: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        read(value)


def test_an_answer_that_was_cut_off_is_refused() -> None:
    with pytest.raises(ValueError, match="cut off"):
        read([entry()], complete=False)


def question(text: str, answer: str = "It is a red apple.", type_: str = "object") -> Question:
    return Question(type_, text, answer, (1,))


def test_filters_name_their_reasons() -> None:
    given = [
        question("What lies on the wooden table?"),
        question("What lies there on the wooden table?"),
        question("What lies on the wooden table?", "Something else."),
        question("What does the caption say of it?"),
        question("What is told of it?", "According to the notes, an apple."),
        question("What happens in part 3 of it?"),
        question("What is it?"),
        question("Which fruit does the woman choose?", "apple " * 200),
        question("Who leaves the room at the end?"),
    ]
    kept, dropped = sift(given, QuestionOptions(overlap=0.6))
    assert [g.question for g in kept] == [given[0].question, given[8].question]
    assert [d.reason for d in dropped] == [
        "duplicate", "duplicate", "source", "source", "source", "length", "length",
    ]  # fmt: skip
    assert dropped[5].detail == "question of 3 words"
    assert "What lies on the wooden table?" in dropped[0].detail


def test_words_in_common_tell_how_alike_questions_are() -> None:
    assert alike("What is the man doing?", "What is the man doing") == 1
    assert alike("What is the man doing?", "Which colour has her coat?") == 0
    assert alike("Is it the?", "Is it the?") == 1


class Scripted:
    """A caller that gives its answers one after another."""

    name = "scripted"

    def __init__(self, *values: Any) -> None:
        self.values, self.prompts = list(values), []

    def __call__(self, prompt: Prompt) -> Reply:
        self.prompts.append(prompt)
        value = self.values.pop(0)
        return Reply(value if isinstance(value, str) else json.dumps(value))


def test_long_videos_are_asked_about_in_stretches() -> None:
    ask = Scripted([entry(parts=[1])], "rubbish", [entry(parts=[3])])
    options = QuestionOptions(per_kind=2, kinds=("object", "action"), words_per_call=14)
    found = write_questions(ask, Prompts(), ["one two"] * 3, [0, 10, 20, 30], "All of it.", options)
    assert [each.parts for each in found] == [(1,), (3,)]
    assert "1. [00:00 to 00:10] one two\n2. [00:10" in ask.prompts[0].text
    assert "- object (2): " in ask.prompts[0].text and "ocr" not in ask.prompts[0].text
    assert "could not be used: it is not JSON" in ask.prompts[2].text
    assert "3. [00:20 to 00:30]" in ask.prompts[1].text and "2. [" not in ask.prompts[1].text


def test_parts_of_another_stretch_are_refused() -> None:
    ask = Scripted(*[[entry(parts=[3])]] * 2)
    options = QuestionOptions(kinds=("object",), words_per_call=14, attempts=2)
    with pytest.raises(ValueError, match="parts 1 to 2"):
        write_questions(ask, Prompts(), ["one two"] * 3, [0, 10, 20, 30], "All.", options)


def test_questions_that_can_be_answered_unseen_are_dropped() -> None:
    given = [question(f"What does person number {n} hold?", f"A thing {n}.") for n in range(3)]
    ask = Scripted(["UNKNOWN.", "A thing 1.", "A hat."], [True, False])
    kept, dropped = keep_questions(ask, Prompts(), given, QuestionOptions())
    assert [g.answer for g in kept] == ["A thing 0.", "A thing 2."]
    assert [(d.reason, d.question.answer) for d in dropped] == [("blind", "A thing 1.")]
    assert dropped[0].detail == "answered unseen: 'A thing 1.'"
    # The one who answers sees no answers, the one who judges sees only those that were given.
    assert "A thing" not in ask.prompts[0].text and "Below are 3" in ask.prompts[0].text
    assert "Below are 2" in ask.prompts[1].text and "A hat." in ask.prompts[1].text
    assert "A thing 0." not in ask.prompts[1].text


def test_nothing_known_needs_no_judge_and_nothing_asked_no_call() -> None:
    given = [question("What does the first one hold?")]
    ask = Scripted("not a list", ["UNKNOWN"])
    assert blind_answers(ask, Prompts(), given, attempts=2) == [("UNKNOWN", False)]
    assert len(ask.prompts) == 2
    assert blind_answers(Scripted(), Prompts(), [], attempts=1) == []
    kept, dropped = keep_questions(Scripted(), Prompts(), given, QuestionOptions(blind=False))
    assert kept == given and not dropped


@pytest.mark.parametrize("wrong", [["a"], ["a", "b", "c"], ["a", 2], [True, False]])
def test_unseen_answers_are_read_strictly(wrong: Any) -> None:
    given = [question(f"What does person number {n} hold?") for n in range(2)]
    with pytest.raises(ValueError, match="exactly 2 texts"):
        blind_answers(Scripted(wrong), Prompts(), given, attempts=1)
    with pytest.raises(ValueError, match="exactly 2 values, true or false"):
        blind_answers(Scripted(["a", "b"], [1, 0]), Prompts(), given, attempts=1)


def test_kinds_are_chosen_by_name() -> None:
    assert list(chosen_kinds(Prompts(), ("temporal", "spatial"))) == ["spatial", "temporal"]
    assert len(chosen_kinds(Prompts(), ())) == 7
    with pytest.raises(LongVILAError, match="no questions of kind"):
        chosen_kinds(Prompts(), ("sound",))
    with pytest.raises(ValueError, match="at least 1"):
        QuestionOptions(per_kind=0)
