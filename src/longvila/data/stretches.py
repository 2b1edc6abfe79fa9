"""Token ids of texts of any length, in bounded memory and the same as of the whole text at once.

A tokenizer keeps some 140 bytes for each character until it is done, so a document of 50 MB would
take 7 GB. Here

1. a longer text is cut in front of a space, a line break or a sign that follows a letter;
2. a cut is taken only where the tokenizer says the same of it: around the place, its normaliser and
   pre-tokenizer make the same words of both sides as of the whole, and it makes the same ids.
   Models see words one by one, and no known pre-tokenizer looks behind the start of a word, so what
   holds around the place holds for the text;
3. stretches are tokenised some at a time, and only ids are kept.

Where a tokenizer has no words (it sees the text as one), or a text no such place (an hour of base64
without a space), the text is tokenised in one, and refused where that would take all memory.

Cost: two short texts more for each stretch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

Ids = np.ndarray[Any, Any]
#: Characters from which a place to cut is looked for, that are tokenised at once, and that cannot
#: be tokenised in one.
STRETCH = 1 << 18
AT_ONCE = 1 << 21
LONGEST = 1 << 25
#: Characters on both sides of a place that are looked at, and places tried before going on.
_AROUND = 512
_TRIES = 16
_PLACE = re.compile(r"(?<=[^\W\d_])[ \n\t，。、；：！？]")  # noqa: RUF001


def encode(backend: Any, texts: Sequence[str]) -> Iterator[Ids]:
    """Yield the ids of each text, special tokens of the tokenizer's own left out.

    Args:
        backend: A ``tokenizers.Tokenizer`` without padding and truncation.
        texts: The texts.

    Yields:
        int32 ids.

    Raises:
        ValueError: If a text is too long to be tokenised in one and cannot be cut.

    Memory: Ids of the texts of one group, and some hundred MB.
    """
    waiting: list[tuple[bool, str]] = []
    size = 0
    parts: list[Ids] = []
    for text in texts:
        *before, last = stretches(backend, text)
        for ends, stretch in [*((False, each) for each in before), (True, last)]:
            if waiting and size + len(stretch) > AT_ONCE:
                yield from _encode(backend, waiting, parts)
                waiting, size = [], 0
            waiting.append((ends, stretch))
            size += len(stretch)
    yield from _encode(backend, waiting, parts)


def _encode(backend: Any, found: Sequence[tuple[bool, str]], parts: list[Ids]) -> Iterator[Ids]:
    """Ids of the texts that end among some stretches; the others wait in ``parts``."""
    encoded = backend.encode_batch_fast([each for _, each in found], add_special_tokens=False)
    # Turned into arrays at once: what the tokenizer returns is many times larger.
    for (ends, _), each in zip(
        found, [np.array(e.ids, dtype=np.int32) for e in encoded], strict=True
    ):
        parts.append(each)
        if ends:
            yield np.concatenate(parts)
            parts.clear()


def stretches(backend: Any, text: str) -> list[str]:
    """Cut a text where its ids do not change.

    Raises:
        ValueError: If a stretch is too long and cannot be cut.
    """
    found: list[str] = []
    start, look = 0, STRETCH
    while look + STRETCH < len(text):
        places = (m.start() for m in _PLACE.finditer(text, look, look + STRETCH))
        letters = (place for place in places if text[place - 1].isalpha())
        place = next((p for p in islice(letters, _TRIES) if _parts(backend, text, p)), None)
        if place is not None:
            found.append(text[start:place])
            start = place
        elif look + STRETCH - start > LONGEST:
            break
        look = (look if place is None else place) + STRETCH
    if len(text) - start > LONGEST and look + STRETCH < len(text):
        raise ValueError(
            f"a text has more than {LONGEST:,} characters from number {start:,} on without a place "
            f"where this tokenizer lets it be cut (it begins {text[start : start + 40]!r}); split "
            "it into several documents, or leave it out"
        )
    found.append(text[start:])
    return found


def _parts(backend: Any, text: str, place: int) -> bool:
    """Whether the tokenizer makes of both sides of a place what it makes of the whole."""
    left, right = text[max(place - _AROUND, 0) : place], text[place : place + _AROUND]
    whole, *sides = (_words(backend, each) for each in (left + right, left, right))
    if whole != sides[0] + sides[1]:
        return False
    ids, *of_sides = (
        each.ids
        for each in backend.encode_batch_fast([left + right, left, right], add_special_tokens=False)
    )
    return bool(ids == of_sides[0] + of_sides[1])


def _words(backend: Any, text: str) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
