"""Tokenising a text in pieces that must not merge, and long runs of placeholders as one.

The separator after a frame is ordinary text, but it is an item of its own: a newline that ends a
frame and a newline that starts the question are two tokens, never the token of two newlines. So a
text carries marks where pieces end, and

1. each mark becomes a special token, around which every tokenizer splits, and a run of one
   placeholder becomes a single one: an hour of video has a million of them, placeholders are
   special tokens too, and nothing is between those of a run;
2. the text is tokenised, marks are taken out again, and each run gets its length back; offsets are
   those of the text without marks;
3. padding comes last.

Cost: that of the text between the runs, one more token for each mark, and lists of all ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: Mark of the end of a piece.
CUT = "\0"


@dataclass
class _Short:
    """A text as the tokenizer gets it.

    Attributes:
        text: Marks replaced, runs shortened.
        marks: Where in it marks stand.
        runs: Where in it a run stands, how many placeholders it has, their length, and where it
            begins in the text without marks.
    """

    text: str = ""
    marks: set[int] = field(default_factory=set)
    runs: dict[int, tuple[int, int, int]] = field(default_factory=dict)


def _shorten(text: str, mark: str, placeholders: Sequence[str]) -> _Short:
    pattern = "|".join([re.escape(CUT), *(f"(?:{re.escape(each)})+" for each in placeholders)])
    short, parts, length, moved, last = _Short(), [], 0, 0, 0
    for match in re.finditer(pattern, text):
        parts.append(text[last : match.start()])
        length += match.start() - last
        last = match.end()
        if match.group() == CUT:
            short.marks.add(length)
            parts.append(mark)
            moved -= len(mark)
        else:
            one = next(each for each in placeholders if match.group().startswith(each))
            count = len(match.group()) // len(one)
            short.runs[length] = (count, len(one), length + moved)
            parts.append(one)
            moved += (count - 1) * len(one)
        length += len(parts[-1])
    short.text = "".join([*parts, text[last:]])
    return short


def tokenize_pieces(
    tokenizer: Any, texts: list[str], mark: str, *, placeholders: Sequence[str] = (), **kwargs: Any
) -> dict[str, Any]:
    """Tokenise texts whose pieces end at marks.

    Args:
        tokenizer: A fast tokenizer.
        texts: Texts with ``CUT`` where pieces end.
        mark: A special token of the tokenizer that stands for a mark on the way.
        placeholders: Special tokens that come in long runs; the result is the same without.
        **kwargs: Options of the tokenizer.

    Returns:
        What the tokenizer returns, as lists.

    Raises:
        ValueError: If texts with marks are to be truncated, or go with an option that has no
            meaning for them, or the tokenizer does not keep a placeholder whole.
    """
    truncated = kwargs.get("truncation") not in (None, False, "do_not_truncate")
    if not any(CUT in text for text in texts) and (
        truncated or not any(each in text for text in texts for each in placeholders)
    ):
        return dict(tokenizer(texts, **kwargs))
    names = ("padding", "max_length", "pad_to_multiple_of", "padding_side")
    padding = {name: kwargs.pop(name) for name in names if name in kwargs}
    if truncated:
        raise ValueError(
            "prompts with media cannot be truncated: features would lose their placeholders; "
            "use fewer frames"
        )
    for name in ("text_pair", "is_split_into_words", "return_overflowing_tokens"):
        if kwargs.pop(name, None):
            raise ValueError(f"prompts with media do not go with {name}; leave it out")
    kwargs.pop("truncation", None)
    with_length = kwargs.pop("return_length", False)
    with_offsets = kwargs.pop("return_offsets_mapping", False)
    shorts = [_shorten(text, mark, placeholders) for text in texts]
    # Its warning of long texts would count what stands for the prompt here, not the prompt.
    kwargs.setdefault("verbose", False)
    encoded = tokenizer([short.text for short in shorts], return_offsets_mapping=True, **kwargs)
    rows: dict[str, list[Any]] = {name: [] for name in encoded}
    for i, short in enumerate(shorts):
        counts, spans = _counts(encoded["offset_mapping"][i], short, mark, with_offsets)
        for name, values in encoded.items():
            if name == "offset_mapping":
                rows[name].append(spans)
                continue
            whole: list[Any] = []
            for value, count in zip(values[i], counts, strict=True):
                if count == 1:
                    whole.append(value)
                else:
                    whole += [value] * count
            rows[name].append(whole)
    spans_of = rows.pop("offset_mapping")
    if padding.get("padding"):
        rows = dict(tokenizer.pad(rows, **padding))
        if with_offsets:
            left = padding.get("padding_side", tokenizer.padding_side) == "left"
            for i, ids in enumerate(rows["input_ids"]):
                empty = [(0, 0)] * (len(ids) - len(spans_of[i]))
                spans_of[i] = empty + spans_of[i] if left else spans_of[i] + empty
    if with_length:
        rows["length"] = [len(ids) for ids in rows["input_ids"]]
    return {**rows, "offset_mapping": spans_of} if with_offsets else rows


def _counts(
    offsets: Sequence[tuple[int, int]], short: _Short, mark: str, with_offsets: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """How often each token stands in the text, marks not at all; and where, if that is wanted."""
    counts: list[int] = []
    spans: list[tuple[int, int]] = []
    moved = found = 0
    for first, last in offsets:
        if last <= first:
            counts.append(1)
            spans.append((0, 0))
        elif first in short.marks:
            counts.append(0)
            moved -= len(mark)
        elif first in short.runs:
            count, size, start = short.runs[first]
            found += last - first == size
            counts.append(count)
            if with_offsets:
                spans += [(n, n + size) for n in range(start, start + count * size, size)]
            moved += (count - 1) * size
        else:
            counts.append(1)
            spans.append((first + moved, last + moved))
    if found != len(short.runs):
        raise ValueError(
            f"the tokenizer does not keep placeholders whole: it does at {found} of "
            f"{len(short.runs)} places"
        )
    return counts, spans
