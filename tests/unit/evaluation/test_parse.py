"""Answers that choose, and answers that do not."""

import pytest

from longvila.evaluation.parse import normal_words, parse_choice, strip_label

OPTIONS = ["A. A dog", "B. Two cats.", "C. An apple", "D. Dance"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("**A**", "A"),
        ("A. A dog", "A"),
        ("A, because it barks", "A"),
        ("(B) two cats", "B"),
        ("C\nbecause of the apple", "C"),
        ("The answer is B", "B"),
        ("The correct answer is: (D).", "D"),
        ("I would choose option C because B is absurd", "C"),
        ("Answer: A", "A"),
        ("two cats", "B"),
        ("An apple.", "C"),
        ("It must be (D), surely", "D"),
        ("(b) two cats", "B"),
        ("b. two", "B"),
        ("b) two", "B"),
        ("B two cats", "B"),
        ("B - two cats", "B"),
        ("the answer is (b).", "B"),
        ("Answer: b", "B"),
        ("option a, surely", "A"),
        ("The answer is a dog", "A"),
        ("The correct answer is: two cats.", "B"),
        ("B is the correct answer.", "B"),
        ("I choose B", "B"),
        ("B, because it is not A.", "B"),
        ("B\n\nA is wrong", "B"),
        ("The answer is B, A is wrong", "B"),
    ],
)
def test_chosen(answer, letter):
    assert parse_choice(answer, "ABCD", OPTIONS) == letter


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "E",
        "A dog runs past Anna",
        "I cannot tell.",
        "B or C",
        "A, or B",
        "(A) or (B)",
        "A, B",
        "B\nA",
        "A. A dog B. Two cats.",
        "A. A dog\nB. Two cats.\nC. An apple",
        "the answer is B or C",
        "the answer is A and B",
        "answer: a, b",
        "the answer is a bus",
        "A is the best friend of man",
        "a.m. is early",
        "the answer is A dog's",
        "The answer is A, but the other answer is B",
        "Apple",
        "Dancing",
        "answer",
        "The answer is E",
        "(E)",
    ],
)
def test_not_chosen(answer):
    assert parse_choice(answer, "ABCD", OPTIONS) is None


def test_equal_options_choose_nothing():
    assert parse_choice("red", "AB", ["red", "Red"]) is None


def test_letters_limit():
    assert parse_choice("E", "ABCDE") == "E"
    assert parse_choice("D", "ABC") is None


def test_labels_and_words():
    assert strip_label("(B) two cats") == "two cats"
    assert strip_label("Bold cats") == "Bold cats"
    assert normal_words(" The Red  car!") == "red car"
    assert normal_words("A.") == "a" != normal_words("B.")
    assert normal_words("Lo\u0308we") == normal_words("l\u00f6we")
    # Vowels that are marks on letters are no punctuation.
    assert normal_words("\u0936\u0947\u0930") != normal_words("\u0936\u094b\u0930")
