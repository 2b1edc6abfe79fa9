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
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from longvila.evaluation.parse import WORD
from longvila.model.processing_longvila import clock

Ask = Literal["forced", "free", "choice"]
Reader = Literal["text", "name", "number", "order", "time", "list"]

#: ``mm:ss``, or ``h:mm:ss`` as films of hours are spoken of.
_TIME = re.compile(r"(?<![\d:])(?:\d{1,2}:)?\d{1,4}:[0-5]\d(?![\d:])")
#: Scripts without spaces between words, or with endings that join them: Thai, Lao, Burmese, Khmer,
#: Japanese, Chinese, Korean.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
)
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve",
)  # fmt: skip
_TIMES = {"once": 1, "twice": 2, "thrice": 3}
#: Two of the first are no two.
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


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
    """Return a text without case and articles, words only; hyphens are spaces."""
    # Letters of any script: a name may be in any language. Some systems write names of files with
    # accents as characters of their own.
    text = unicodedata.normalize("NFC", text).casefold().replace("\u2019", "'")
    words = re.findall(rf"{WORD}(?:[':]{WORD})*", text)
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
    found = re.findall("|".join(map(_whole_words, longest_first)), plain(text))
    return [by_words[name] for name in dict.fromkeys(found)]


def _whole_words(name: str) -> str:
    """A pattern that finds a name, not inside a longer word where its script has spaces."""
    left, right = ("" if _UNSPACED.match(end) else edge for end, edge in
                   ((name[0], r"(?<![^ ':])"), (name[-1], r"(?![^ ':])")))  # fmt: skip
    return left + re.escape(name) + right


def _whole(correct: bool, read: str | None) -> Grade:
    return Grade(float(correct), correct, read)


def _squeeze(text: str) -> str:
    return text.replace(" ", "").lower()


def _read_text(question: Question, said: str) -> Grade:
    return _whole(plain(said) == plain(question.answer), plain(said) or None)


def _read_name(question: Question, said: str) -> Grade:
    found = mentions(said, question.names)
    return _whole(found == [question.answer], found[0] if len(found) == 1 else None)


def _read_number(question: Question, said: str) -> Grade:
    words = re.findall(r"\d+|[a-z]+", said.lower())
    known = {word: number for number, word in enumerate(_NUMBERS)} | _TIMES
    known |= {word: 10 * number for number, word in enumerate(_TENS, start=2)}
    found = [
        int(word) if word.isdigit() else known[word]
        for word in words
        if word.isdigit() or word in known
    ]
    if len(set(found)) != 1:
        return Grade(0.0, False, None)
    return _whole(found[0] == int(question.answer), str(found[0]))


def _read_order(question: Question, said: str) -> Grade:
    found = ", ".join(mentions(said, question.names))
    return _whole(found == question.answer, found or None)


def _read_time(question: Question, said: str) -> Grade:
    found = {seconds_of(time) for time in _TIME.findall(said)}
    if len(found) != 1:
        return Grade(0.0, False, None)
    (seconds,) = found
    off = abs(seconds - seconds_of(question.answer))
    return _whole(off <= question.tolerance_s, clock(seconds))


def seconds_of(time: str) -> int:
    """Return a time, ``mm:ss`` or ``h:mm:ss``, in seconds."""
    parts = [int(part) for part in time.split(":")]
    return sum(part * 60**place for place, part in enumerate(reversed(parts)))


def _read_list(question: Question, said: str) -> Grade:
    found = set(mentions(said, question.names))
    # A name may have commas of its own.
    wanted = set(mentions(question.answer, question.names))
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
