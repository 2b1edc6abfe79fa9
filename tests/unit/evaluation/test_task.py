"""Readers of answers take what was asked and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from longvila.evaluation.task import Question, grade, mentions, plain

NAMES = ("bear", "teddy bear", "ice", "rice", "T-shirt")


def _grade(reader: Any, answer: str, said: str, **options: Any) -> tuple[float, bool, str | None]:
    question = Question("q", "t", "free", "?", answer, reader=reader, **options)
    result = grade(question, said)
    return result.score, result.correct, result.read


def test_names_are_whole_words_and_the_longest_counts() -> None:
    assert mentions("A Teddy  bear, and ICE.", NAMES) == ["teddy bear", "ice"]
    assert mentions("a bear with a teddy bear", NAMES) == ["bear", "teddy bear"]
    assert mentions("rice", NAMES) == ["rice"] and mentions("nice bears", NAMES) == []
    assert mentions("the t-shirt", NAMES) == ["T-shirt"]
    assert mentions("anything", ()) == []
    assert mentions("a Teddy-bear", NAMES) == ["teddy bear"] == mentions("teddy_bear", NAMES)
    # An accent may be a character of its own, as some systems name files.
    assert mentions("EIN FUSSBALL", ["fu\u00dfball"]) == ["fu\u00dfball"]
    assert mentions("a L\u00f6we", ["lo\u0308we"]) == ["lo\u0308we"]
    assert plain("A lion\u2019s  den, the END.") == "lion's den end"


def test_names_are_found_where_words_have_no_spaces_between_them() -> None:
    assert mentions("这是狮子。", ["狮子", "熊"]) == ["狮子"]
    assert mentions("사자는 두 번 나온다", ["사자", "곰"]) == ["사자"]
    assert mentions("これは熊猫です", ["熊", "熊猫"]) == ["熊猫"]
    assert mentions("Sealöwe", ["löwe"]) == []


def test_vowels_that_are_marks_belong_to_their_words() -> None:
    lion, noise = "\u0936\u0947\u0930", "\u0936\u094b\u0930"
    assert plain(lion) == lion != plain(noise)
    assert mentions(f"\u092f\u0939 {noise} \u0939\u0948", [lion, noise[:2], noise]) == [noise]
    assert (
        mentions("\u0e40\u0e2a\u0e37\u0e48\u0e2d", ["\u0e40\u0e2a\u0e37\u0e2d"]) == []
    )  # a mat, no tiger
    assert plain("a lion \u2764\ufe0f 3\ufe0f\u20e3") == "lion 3"  # marks of signs are no words


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("It is a bear.", (1.0, True, "bear")),
        ("teddy bear", (0.0, False, "teddy bear")),
        ("a bear or ice", (0.0, False, None)),
        ("I do not know", (0.0, False, None)),
        ("", (0.0, False, None)),
    ],
)
def test_name(said: str, wanted: Any) -> None:
    assert _grade("name", "bear", said, names=NAMES) == wanted


def test_number() -> None:
    assert _grade("number", "3", "There are three of them: 3.") == (1.0, True, "3")
    assert _grade("number", "2", "It appears twice.") == (1.0, True, "2")
    assert _grade("number", "2", "Once, or twice") == (0.0, False, None)
    assert _grade("number", "3", "3 or 4") == (0.0, False, None)
    assert _grade("number", "3", "thirteen") == (0.0, False, None)
    assert _grade("number", "13", "13") == (1.0, True, "13")
    assert _grade("number", "2", "twenty-two") == (0.0, False, None)


def test_order() -> None:
    names = ("ice", "rice", "bear")
    right = _grade("order", "ice, bear, rice", "First ice, then the bear, then rice", names=names)
    assert right == (1.0, True, "ice, bear, rice")
    assert _grade("order", "ice, bear, rice", "ice, bear", names=names)[1] is False
    assert _grade("order", "ice, bear, rice", "no idea", names=names) == (0.0, False, None)


def test_time() -> None:
    assert _grade("time", "01:05", "at 01:06", tolerance_s=1) == (1.0, True, "01:06")
    assert _grade("time", "01:05", "at 01:07", tolerance_s=1) == (0.0, False, "01:07")
    assert _grade("time", "100:00", "99:59", tolerance_s=1)[1] is True
    assert _grade("time", "01:05", "01:05 to 01:09", tolerance_s=1) == (0.0, False, None)
    assert _grade("time", "01:05", "65 seconds", tolerance_s=1)[2] is None
    assert _grade("time", "121:05", "at 2:01:05.", tolerance_s=1) == (1.0, True, "121:05")
    assert _grade("time", "02:39", "01:99", tolerance_s=1) == (0.0, False, None)
    assert _grade("time", "01:02", "1:02:03", tolerance_s=1) == (0.0, False, "62:03")


def test_list() -> None:
    names = ("ice", "rice", "bear", "teddy bear")
    assert _grade("list", "bear, ice", "ice; bear", names=names) == (1.0, True, "bear, ice")
    score, correct, read = _grade("list", "bear, ice", "bear, rice, teddy bear", names=names)
    assert (score, correct, read) == (0.4, False, "bear, rice, teddy bear")
    assert _grade("list", "bear, ice", "things", names=names) == (0.0, False, None)
    commas = ("Washington, D.C.", "ice")
    assert _grade("list", ", ".join(commas), "Ice and Washington, D.C.", names=commas)[:2] == (
        1.0, True,
    )  # fmt: skip


def test_text_and_ways_of_asking() -> None:
    assert _grade("text", "The brown dog", "brown dog.") == (1.0, True, "brown dog")
    assert _grade("text", "dog", "a dog runs")[1] is False
    forced = Question("q", "t", "forced", "?", "Teddy bear")
    assert grade(forced, "teddybear").correct and not grade(forced, "teddybears").correct
    choice = Question("q", "t", "choice", "?", "a", options=("b", "a"), reader="name")
    assert grade(choice, "a").correct and not grade(choice, "b").correct


def test_questions_that_cannot_be_right_are_errors() -> None:
    with pytest.raises(ValueError, match="'a' is none of"):
        Question("q", "t", "choice", "?", "a", options=("b", "c"))
    with pytest.raises(ValueError, match="different options"):
        Question("q", "t", "choice", "?", "a", options=("a", "a"))
