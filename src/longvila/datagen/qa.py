"""Questions and answers about a video, asked for in the paper's kinds, read strictly, filtered.

1. A language model reads the numbered captions and the long caption, and writes a JSON list
   (`write_questions`). It is read strictly: one list, perhaps inside one code fence, of objects
   with exactly the keys that were asked for, kinds that were asked for and parts that exist.
   Anything else is asked for again, with what was wrong.
2. Filters, in this order, each naming its reason (`sift`):

   ``source``     it speaks of parts, captions, frames or the description
   ``length``     question or answer is too short or too long
   ``duplicate``  the same question, or nearly, is there already
   ``blind``      a model that has not seen the video answers it rightly (`blind_answers`)

The last costs two calls a video: one answers all questions blindly, one judges the answers.

Kinds: spatial, attribute, action, object, OCR, synopsis and temporal. A question rests on parts of
the video, which are kept for whoever reviews it.

Source: the question types of the paper's long-video set; filters are ours.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longvila.datagen.caption import clock, cut_words, timed
from longvila.datagen.prompts import Prompts
from longvila.errors import LongVILAError
from longvila.inference.caller import Caller, Prompt, Reply, ask_until

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)
_KEYS = {"type", "question", "answer", "parts"}
_SPEAKS_OF_SOURCE = re.compile(
    r"\b(?:captions?|frames?|the (?:text|notes|summary|transcript)|descriptions?|described"
    r"|(?:part|segment|clip)s? (?:number )?\d+|according to)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")
_EMPTY_WORDS = frozenset(
    _WORD.findall("a an and are at did do does in is it of on s that the to was were what which")
)


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        type: Its kind.
        question: What is asked.
        answer: What is right.
        parts: Numbers, from 1, of the segments that the answer rests on.
    """

    type: str
    question: str
    answer: str
    parts: tuple[int, ...]

    @property
    def key(self) -> str:
        """A name that follows from question and answer."""
        return hashlib.sha256(f"{self.question}\n{self.answer}".encode()).hexdigest()[:12]

    def plain(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "parts": list(self.parts)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Question:
        """Return what `plain` gave."""
        return cls(values["type"], values["question"], values["answer"], tuple(values["parts"]))


@dataclass(frozen=True)
class QuestionOptions:
    """What is asked for, and what is kept.

    Attributes:
        per_kind: Questions of each kind, a call.
        kinds: Kinds asked for; empty for all.
        words_per_call: Words of captions read at once; longer videos are asked about in stretches.
        max_new_tokens: Longest answer.
        attempts: Times that a usable answer is asked for.
        question_words: Fewest and most words of a question.
        answer_words: Fewest and most words of an answer.
        overlap: Share of words in common from which two questions are the same.
        blind: Whether questions that can be answered without the video are dropped.
    """

    per_kind: int = 1
    kinds: tuple[str, ...] = ()
    words_per_call: int = 6000
    max_new_tokens: int = 3000
    attempts: int = 3
    question_words: tuple[int, int] = (4, 60)
    answer_words: tuple[int, int] = (1, 120)
    overlap: float = 0.8
    blind: bool = True

    def __post_init__(self) -> None:
        if self.per_kind < 1 or self.attempts < 1:
            raise ValueError("per_kind and attempts must be at least 1")


def chosen_kinds(prompts: Prompts, names: Sequence[str]) -> dict[str, str]:
    """Return the kinds that are named, all if none is, and what each asks about.

    Raises:
        LongVILAError: If there is no such kind.
    """
    known = {}
    for line in prompts.lines("kinds"):
        name, _, about = line.partition(":")
        known[name.strip()] = about.strip()
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise LongVILAError(f"there are no questions of kind {unknown}; there are {sorted(known)}")
    return {name: about for name, about in known.items() if not names or name in names}


def read_json_list(reply: Reply) -> list[Any]:
    """Read a JSON list, perhaps inside one code fence, and nothing else.

    Raises:
        ValueError: If the answer is anything else.
    """
    if not reply.complete:
        raise ValueError("it was cut off; write less")
    text = reply.text.strip()
    fenced = _FENCE.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"it is not JSON and nothing else ({fault})") from fault
    if not isinstance(found, list):
        raise ValueError(f"it is a JSON {type(found).__name__}, not a list")
    return found


def read_questions(reply: Reply, kinds: Sequence[str], parts: range) -> list[Question]:
    """Read questions strictly.

    Raises:
        ValueError: If anything is not as it was asked for; says which entry and what.
    """
    found = []
    for number, entry in enumerate(read_json_list(reply), 1):
        where = f"entry {number}"
        if not isinstance(entry, dict) or set(entry) != _KEYS:
            keys = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{where} must have exactly the keys {sorted(_KEYS)}, has {keys}")
        if entry["type"] not in kinds:
            raise ValueError(f"{where} has the type {entry['type']!r}, not one of {list(kinds)}")
        for key in ("question", "answer"):
            if not isinstance(entry[key], str) or not entry[key].strip():
                raise ValueError(f"{where} has no {key}")
        numbers = entry["parts"]
        if (
            not isinstance(numbers, list)
            or not numbers
            or not all(type(n) is int and n in parts for n in numbers)
        ):
            raise ValueError(
                f"{where} must rest on parts {parts.start} to {parts.stop - 1}, got {numbers!r}"
            )
        found.append(
            Question(
                entry["type"],
                " ".join(entry["question"].split()),
                " ".join(entry["answer"].split()),
                tuple(sorted(set(numbers))),
            )
        )
    if not found:
        raise ValueError("the list is empty")
    return found


def write_questions(
    caller: Caller,
    prompts: Prompts,
    captions: Sequence[str],
    bounds_s: Sequence[float],
    summary: str,
    options: QuestionOptions,
) -> list[Question]:
    """Have questions about a video written.

    Raises:
        LongVILAError: If there is no answer.
        ValueError: If no answer can be used.
    """
    kinds = chosen_kinds(prompts, options.kinds)
    asked = "\n".join(f"- {name} ({options.per_kind}): {about}" for name, about in kinds.items())
    found: list[Question] = []
    first = 1
    lines = timed(captions, bounds_s, numbered=True)
    for group in cut_words(lines, options.words_per_call):
        parts = range(first, first + len(group))
        text = prompts.fill(
            "questions",
            duration=clock(bounds_s[-1]),
            captions="\n".join(group),
            summary=summary,
            kinds=asked,
        )
        read = functools.partial(read_questions, kinds=tuple(kinds), parts=parts)
        prompt = Prompt(text, max_new_tokens=options.max_new_tokens)
        found += ask_until(caller, prompt, read, attempts=options.attempts)
        first = parts.stop
    return found


@dataclass(frozen=True)
class Dropped:
    """A question that was filtered out.

    Attributes:
        question: It.
        reason: Which filter.
        detail: What the filter saw.
    """

    question: Question
    reason: str
    detail: str


def sift(
    questions: Sequence[Question], options: QuestionOptions
) -> tuple[list[Question], list[Dropped]]:
    """Drop questions for what they say: filters that need no model.

    Returns:
        Kept and dropped.
    """
    kept: list[Question] = []
    dropped: list[Dropped] = []
    for each in questions:
        named = _SPEAKS_OF_SOURCE.search(f"{each.question}\n{each.answer}")
        if named is not None:
            dropped.append(Dropped(each, "source", f"says {named[0]!r}"))
            continue
        lengths = len(each.question.split()), len(each.answer.split())
        limits = options.question_words, options.answer_words
        wrong = [
            f"{what} of {length} words"
            for what, length, (low, high) in zip(
                ("question", "answer"), lengths, limits, strict=True
            )
            if not low <= length <= high
        ]
        if wrong:
            dropped.append(Dropped(each, "length", ", ".join(wrong)))
            continue
        same = next((k for k in kept if alike(k.question, each.question) >= options.overlap), None)
        if same is not None:
            dropped.append(Dropped(each, "duplicate", f"of {same.question!r}"))
            continue
        kept.append(each)
    return kept, dropped


def alike(first: str, second: str) -> float:
    """Return the share of words two questions have in common, of all words in either."""
    sets = [set(_WORD.findall(text.lower())) for text in (first, second)]
    # Short words say little of what is asked, unless there is nothing else.
    a, b = (words - _EMPTY_WORDS or words for words in sets)
    return len(a & b) / len(a | b) if a | b else 1.0


def blind_answers(
    caller: Caller, prompts: Prompts, questions: Sequence[Question], *, attempts: int
) -> list[tuple[str, bool]]:
    """Answer questions without the video, and judge the answers.

    Returns:
        For each question the blind answer and whether it is right.

    Raises:
        LongVILAError: If there is no answer.
        ValueError: If no answer can be used.
    """
    if not questions:
        return []
    number = len(questions)
    listed = "\n".join(f"{n}. {each.question}" for n, each in enumerate(questions, 1))
    text = prompts.fill("blind", count=number, questions=listed)
    prompt = Prompt(text, max_new_tokens=150 * number)
    answers = ask_until(caller, prompt, lambda r: _read_values(r, number, str), attempts=attempts)
    known = [
        n for n, answer in enumerate(answers) if answer.strip().upper().rstrip(".") != "UNKNOWN"
    ]
    right = [False] * number
    if known:
        listed = "\n\n".join(
            f"{place}. {questions[n].question}\nRight answer: {questions[n].answer}\n"
            f"Given answer: {answers[n]}"
            for place, n in enumerate(known, 1)
        )
        text = prompts.fill("judge", count=len(known), triples=listed)
        prompt = Prompt(text, max_new_tokens=20 * len(known) + 50)
        verdicts = ask_until(
            caller, prompt, lambda r: _read_values(r, len(known), bool), attempts=attempts
        )
        for n, verdict in zip(known, verdicts, strict=True):
            right[n] = verdict
    return list(zip(answers, right, strict=True))


def _read_values(reply: Reply, number: int, kind: type) -> list[Any]:
    found = read_json_list(reply)
    if len(found) != number or not all(type(each) is kind for each in found):
        name = "texts" if kind is str else "values, true or false"
        raise ValueError(f"it must be a list of exactly {number} {name}")
    return found


def keep_questions(
    caller: Caller, prompts: Prompts, questions: Sequence[Question], options: QuestionOptions
) -> tuple[list[Question], list[Dropped]]:
    """Run all filters.

    Returns:
        Kept and dropped.

    Raises:
        LongVILAError: If there is no answer.
        ValueError: If no answer can be used.
    """
    kept, dropped = sift(questions, options)
    if not options.blind:
        return kept, dropped
    told = blind_answers(caller, prompts, kept, attempts=options.attempts)
    for each, (answer, right) in zip(kept, told, strict=True):
        if right:
            dropped.append(Dropped(each, "blind", f"answered unseen: {answer!r}"))
    seen = {id(d.question) for d in dropped}
    return [each for each in kept if id(each) not in seen], dropped
