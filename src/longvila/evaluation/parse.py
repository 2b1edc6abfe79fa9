"""From what a model wrote to the option it chose, or to the plain fact that it chose none.

A benchmark's number must not depend on luck or on goodwill: an answer from which no option follows
is None. It counts as wrong and is reported apart; nothing is guessed, and nothing is left out of
the denominator. Rules, the first that applies decides:

1. The whole answer is one letter, in brackets or with punctuation or not: ``b``, ``(B)``, ``B.``
2. It begins with a capital letter that is set off by punctuation or ends its line: ``B. A dog``.
3. It names options (``answer is B``, ``option (C)``), all the same.
4. It is one option's text, case and final punctuation aside.
5. It has capital letters in brackets, all the same one.

``A dog runs`` is no A, and ``B or C`` is neither. Cost: a few regular expressions an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WHOLE = re.compile(r"[\s\"'`*(\[]*([A-Za-z])[\s\"'`*)\].,:;!]*")
_LEADING = re.compile(r"[\s\"'`*]*(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])(?:[.):,*]|\s*\n))")
_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|was|would\s+be))?)[\s:*\"'`]*"
    r"(?i:(?:option|choice)\s+)?[(\[\"'`*]*([A-Z])(?![A-Za-z0-9'])"
    # An article is no letter, unless the sentence goes on about the choice.
    r"(?!(?<=A)\s+(?!because|since|as\b|for\b|and\b)[a-z])"
)
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_LABEL = re.compile(r"\s*[(\[]?([A-Z])[.)\]:]\s+")


def strip_label(option: str) -> str:
    """Return an option without a letter before it."""
    return _LABEL.sub("", option, count=1)


def parse_choice(answer: str, letters: Sequence[str], options: Sequence[str] = ()) -> str | None:
    """Return the letter that an answer chooses.

    Args:
        answer: What the model wrote.
        letters: Capital letters there are to choose from.
        options: The options' texts in the order of the letters, for answers that repeat one.

    Returns:
        One of the letters, or None where no single one follows.
    """
    known = set(letters)
    text = answer.strip()
    if whole := _WHOLE.fullmatch(text):
        letter = whole[1].upper()
        return letter if letter in known else None
    if leading := _LEADING.match(text):
        letter = next(group for group in leading.groups() if group)
        # A second letter set off alike on the same line is a list, not a choice.
        rest = text[leading.end() :].partition("\n")[0]
        others = {match[1] for match in _BRACKETED.finditer(rest)} | set(_lone(rest, known))
        if letter in known and not others - {letter}:
            return letter
        return None
    named = {match[1] for match in _NAMED.finditer(text)}
    if named:
        (letter, *more) = sorted(named)
        return letter if not more and letter in known else None
    plain = _plain(text)
    same = [
        letter
        for letter, option in zip(letters, options, strict=False)
        if plain and _plain(strip_label(option)) == plain
    ]
    if len(same) == 1:
        return same[0]
    bracketed = {match[1] for match in _BRACKETED.finditer(text)}
    if len(bracketed) == 1 and bracketed <= known:
        return bracketed.pop()
    return None


def _lone(text: str, known: set[str]) -> list[str]:
    """Letters that stand alone behind a conjunction: ``A, or B``."""
    return [match for match in re.findall(r"\b(?:or|and)\s+([A-Z])\b", text) if match in known]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!\"'`*").casefold()


def normal_words(text: str) -> str:
    """Return a short answer without case, articles and punctuation, for comparing.

    Args:
        text: A word or a phrase.
    """
    words = re.sub(r"[^\w\s]", " ", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
