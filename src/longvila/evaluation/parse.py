"""From what a model wrote to the option it chose, or to the plain fact that it chose none.

A benchmark's number must not depend on luck or on goodwill: an answer from which no option follows
is None. It counts as wrong and is reported apart; nothing is guessed, and nothing is left out of
the denominator. Rules, the first that applies decides:

1. The whole answer is one letter, in brackets or with punctuation or not: ``b``, ``(B)``, ``B.``
2. It is one option's text, case and final punctuation aside, behind that option's letter or not,
   and behind ``the answer is`` or not.
3. It begins with a letter that is set off by brackets or punctuation, or a capital one that ends
   its line or ``is correct``: ``B. Perhaps``. What goes on with another letter is a list.
4. It names options (``answer is B``, ``option (c)``), all the same, none of them in a list.
5. It has capital letters in brackets, all the same one.

``A dog runs`` is no A, and ``B or C`` is neither. Cost: a few regular expressions an answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_MARKS = "".join(
    chr(code) for code in range(0x300, 0xFE00) if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
#: A pattern of a word in any script: vowels of many are marks on letters, which \w leaves out.
WORD = rf"[^\W_](?:[^\W_]|[{_MARKS}])*"
_WHOLE = re.compile(r"[\s\"'`*(\[]*([A-Za-z])[\s\"'`*)\].,:;!]*")
_LEADING = re.compile(
    r"[\s\"'`*]*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])(?:[.):,*]|\s*\n)|([a-z])[.):](?=\s)"
    r"|([A-Z])(?=[\"'`*]*\s+is\s+(?:the\s+)?(?:correct|right|best)"
    r"(?:\s+(?:answer|choice|one|option))?\s*(?:[.,;:!]|because\b|\Z)))"
)
_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)\b(?:\s+(?:is|was|would\s+be))?|\bI\s+(?:choose|pick|select)\b)"
    r"[\s:*\"'`]*(?i:(?:option|choice)\s+)?[(\[\"'`*]*(?:([A-Z])(?![A-Za-z0-9'])"
    # An article is no letter, unless the sentence goes on about the choice.
    r"(?!(?<=A)\s+(?!because|since|as\b|for\b|and\b)[a-z])"
    r"|([a-z])(?=[)\]\"'`*.,;:!]+(?:\s|\Z)|\s*\Z))"
)
_PREFIX = re.compile(
    r"\W*(?:the\s+|my\s+)?(?:(?:best|correct|final|right)\s+)?(?:answer|choice|option)"
    r"(?:\s+is\b:?|\s*:)",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")
_LABEL = re.compile(r"\s*[(\[]?([A-Z])[.)\]:]\s+")
_OWN_LETTER = re.compile(r"[\W_]*([A-Za-z])\b[\W_]*")
# What makes a letter the first of a list: another one straight behind it ...
_NEXT = re.compile(
    r"[)\]\"'`*.]*\s*(?:(?:,\s*)?(?:and|or)\b|[/&+])\s*(?i:option\s+)?[(\[\"'`*]*([A-Za-z])"
    r"(?![\w'])(?!(?<=[Aa])\s+[a-z])"
    r"|[)\]\"'`*.]*\s*[,;]\s*[(\[\"'`*]*([A-Za-z])(?![\w'])(?!\s+[a-z])"
)
_SECOND = re.compile(r"\s*[(\[\"'`*]*([A-Z])(?![\w'])(?!\s+[a-z])")
# ... or the labels of other options further on, or below.
_LABELLED = re.compile(r"(?<=\s)[(\[]?([A-Z])[.):\]]\s+\S")
_BELOW = re.compile(r"\s*[(\[\"'`*]*([A-Z])(?:[.):\],]|[\"'`*]*\s*(?:\n|\Z))")


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
    same = [
        letter
        for letter, option in zip(letters, options, strict=False)
        if _repeats(text, letter, option)
    ]
    if len(same) == 1:
        return same[0]
    if leading := _LEADING.match(text):
        letter = _letter(leading)
        if letter in known and not _others(text[leading.end() :]) & known - {letter}:
            return letter
        return None
    if found := list(_NAMED.finditer(text)):
        named = {_letter(match) for match in found}
        behind = (_NEXT.match(text, match.end()) for match in found)
        named |= {_letter(match) for match in behind if match} & known
        (letter, *more) = sorted(named)
        return letter if not more and letter in known else None
    bracketed = {match[1] for match in _BRACKETED.finditer(text)}
    if len(bracketed) == 1 and bracketed <= known:
        return bracketed.pop()
    return None


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()


def _repeats(text: str, letter: str, option: str) -> bool:
    """Whether a text is an option's, behind its letter or ``the answer is`` or not."""
    texts = {_plain(option), _plain(strip_label(option))} - {""}
    for said in (text, _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text):
        own = _OWN_LETTER.match(said)
        if _plain(said) in texts:
            return True
        if own and own[1].upper() == letter and _plain(said[own.end() :]) in texts:
            return True
    return False


def _others(rest: str) -> set[str]:
    """Letters that are listed behind a leading one."""
    line, _, below = rest.partition("\n")
    listed = {*_BRACKETED.findall(line), *_LABELLED.findall(line)}
    listed |= set(re.findall(r"\b(?:or|and)\s+([A-Z])\b", line))
    return listed | {
        _letter(match)
        for match in (_NEXT.match(line), _SECOND.match(line), _BELOW.match(below))
        if match
    }


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!\"'`*").casefold()


def normal_words(text: str) -> str:
    """Return a short answer without case, articles and punctuation, for comparing.

    Args:
        text: A word or a phrase.
    """
    words = re.findall(WORD, unicodedata.normalize("NFC", text).casefold())
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words)  # An answer may be the letter A.
