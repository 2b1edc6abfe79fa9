"""What is asked and how an answer is graded, as plain data.

A `Scene` is a video made of numbered frames; its `Question`s are asked about it. How they are put
(`ask`) is one of

- ``forced``: teacher forcing, as the original's needle test. Right if the likeliest tokens, spaces
  taken out and in lower case, are the answer;
- ``free``: the model's own greedy words, read by a strict reader of the kind of answer;
- ``choice``: the likeliest of given options, whole answers compared.

A reader finds in free text what the question wants and nothing else: which of the known names are
mentioned, the only number, the order of first mentions, a time. An answer that names two things
where one was wanted, or nothing that can be read, is wrong and counted as unread; it never leaves
the denominator and is never replaced by a guess.

``chance`` is what guessing among the options gives, also for free answers, so that a blind model
has a known score on every question.

Cost: nothing to speak of. Not done: judging prose; synonyms (a name is what the set says).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longvila.model.processing_longvila import clock

Ask = Literal["forced", "free", "choice"]
Reader = Literal["text", "name", "number", "order", "time", "list"]

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Attributes:
        id: Unique in a run; names the record.
        task: What is measured: "retrieval", "ordering" ...
        ask: How it is put.
        text: The question.
        answer: The answer as a model should write it.
        options: Answers to choose from, the right one among them; what a guess would draw from.
        reader: How free words are read.
        names: Every name that a free answer may mention.
        tolerance_s: Seconds that a time may be off.
        chance: Expected score of a guess.
        shape: What results are grouped by: frames, depth, tier, control ...
        max_new_tokens: Most tokens of a free answer.
    """

    id: str
    task: str
    ask: Ask
    text: str
    answer: str
    options: tuple[str, ...] = ()
    reader: Reader = "text"
    names: tuple[str, ...] = ()
    tolerance_s: float = 0.0
    chance: float = 0.0
    shape: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.options and self.answer not in self.options:
            raise ValueError(f"{self.id}: the answer {self.answer!r} is none of {self.options}")
        if self.ask == "choice" and len(set(self.options)) < max(2, len(self.options)):
            raise ValueError(f"{self.id}: a choice needs different options, got {self.options}")


@dataclass(frozen=True)
class Scene:
    """A video put together of numbered frames, and what is asked about it.

    Attributes:
        id: Unique in a run; questions of one scene share a cluster.
        frames: Numbers in a `longvila.evaluation.needle_frames.FrameBook`.
        step_s: Seconds from a frame to the next; the first is at 0.
        questions: What is asked.
    """

    id: str
    frames: tuple[int, ...]
    step_s: float
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Grade:
    """What an answer is worth.

    Attributes:
        score: 0 to 1; below 1 only for lists.
        correct: Whether all of it is right.
        read: What was read out of the answer; None if nothing that can be graded.
    """

    score: float
    correct: bool
    read: str | None


def grade(question: Question, said: str) -> Grade:
    """Grade an answer in words, or the option that was chosen.

    Args:
        question: What was asked.
        said: The answer.

    Returns:
        The grade.
    """
    if question.ask == "choice":
        return _whole(said == question.answer, said)
    if question.ask == "forced":
        return _whole(_squeeze(said) == _squeeze(question.answer), said)
    return _READERS[question.reader](question, said)


def plain(text: str) -> str:
    """Return a text in lower case, words only, without articles."""
    # Letters of any script: a name may be in any language.
    words = re.findall(r"[^\W_]+(?:[':-][^\W_]+)*", text.lower().replace("\u2019", "'"))
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def mentions(text: str, names: Sequence[str]) -> list[str]:
    """Find which names a text mentions, in the order of their first mention.

    Args:
        text: Free words.
        names: What may be mentioned; a name inside a longer one that is mentioned does not count.

    Returns:
        Names as given, each once.
    """
    by_words = {plain(name): name for name in names}
    longest_first = sorted((name for name in by_words if name), key=lambda name: -len(name))
    if not longest_first:
        return []
    either = "|".join(re.escape(name) for name in longest_first)
    found = re.findall(rf"(?<![\w-])(?:{either})(?![\w-])", plain(text))
    return [by_words[name] for name in dict.fromkeys(found)]


def same_word_tokens(first: str, second: str) -> bool:
    """Return whether two answers are the same by words."""
    return plain(first) == plain(second)


def _whole(correct: bool, read: str | None) -> Grade:
    return Grade(float(correct), correct, read)


def _squeeze(text: str) -> str:
    return text.replace(" ", "").lower()


def _read_text(question: Question, said: str) -> Grade:
    return _whole(same_word_tokens(said, question.answer), plain(said) or None)


def _read_name(question: Question, said: str) -> Grade:
    found = mentions(said, question.names)
    return _whole(found == [question.answer], found[0] if len(found) == 1 else None)


def _read_number(question: Question, said: str) -> Grade:
    words = re.findall(r"\d+|[a-z]+", said.lower())
    found = [
        int(word) if word.isdigit() else _NUMBERS.index(word)
        for word in words
        if word.isdigit() or word in _NUMBERS
    ]
    if len(set(found)) != 1:
        return Grade(0.0, False, None)
    return _whole(found[0] == int(question.answer), str(found[0]))


def _read_order(question: Question, said: str) -> Grade:
    found = ", ".join(mentions(said, question.names))
    return _whole(found == question.answer, found or None)


def _read_time(question: Question, said: str) -> Grade:
    found = re.findall(r"\b(\d{1,4}):(\d{2})\b", said)
    if len(set(found)) != 1:
        return Grade(0.0, False, None)
    minutes, rest = (int(part) for part in found[0])
    wanted_minutes, wanted_rest = (int(part) for part in question.answer.split(":"))
    off = abs(minutes * 60 + rest - wanted_minutes * 60 - wanted_rest)
    return _whole(off <= question.tolerance_s, clock(minutes * 60 + rest))


def _read_list(question: Question, said: str) -> Grade:
    found = set(mentions(said, question.names))
    wanted = set(question.answer.split(", "))
    if not found:
        return Grade(0.0, False, None)
    f1 = 2 * len(found & wanted) / (len(found) + len(wanted))
    return Grade(f1, found == wanted, ", ".join(sorted(found)))


_READERS = {
    "text": _read_text,
    "name": _read_name,
    "number": _read_number,
    "order": _read_order,
    "time": _read_time,
    "list": _read_list,
}
