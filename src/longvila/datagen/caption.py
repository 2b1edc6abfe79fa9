"""Captions of segments, and one long caption of all of them.

1. The frames of all segments that lack a caption are decoded in one pass over the video, and handed
   out segment by segment (`segment_pictures`).
2. A captioner sees the frames of a segment and describes it (`caption_segment`). What cannot be a
   description (a few words, one word over and over) is asked for again.
3. A language model makes one description of the captions with their times (`compose`). Where they
   have more words than it should read at once, stretches are described first, and what comes of
   that is joined, in as many rounds as it takes.

A video of one segment is described by its caption. Memory: the pictures of one segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longvila.datagen.prompts import Prompts
from longvila.errors import LongVILAError
from longvila.inference.caller import Caller, Picture, Prompt, Reply, ask_until
from longvila.media.sampling import uniform_indices
from longvila.media.video import open_video

#: Share of different words below which a longer text is taken for a loop.
_FEWEST_DIFFERENT = 0.2
_LOOP_WORDS = 40


@dataclass(frozen=True)
class CaptionOptions:
    """How segments are captioned and captions joined.

    Attributes:
        frames: Frames of a segment that are shown.
        picture_side: Most pixels of a frame's longer side; None leaves frames as they are.
        min_words: Fewest words of a caption.
        max_new_tokens: Longest answer.
        words_per_call: Words of captions that the language model reads at once.
        summary_words: Longest description of a video, in words.
        summary_tokens: Longest answer with one.
        attempts: Times that a usable answer is asked for.
    """

    frames: int = 8
    picture_side: int | None = 512
    min_words: int = 5
    max_new_tokens: int = 400
    words_per_call: int = 6000
    summary_words: int = 600
    summary_tokens: int = 2000
    attempts: int = 3

    def __post_init__(self) -> None:
        if self.frames < 1 or self.attempts < 1:
            raise ValueError(
                f"frames and attempts must be at least 1, got {self.frames} and {self.attempts}"
            )


def clock(seconds: float) -> str:
    """Write a time as mm:ss, or h:mm:ss from an hour on."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    tail = f"{minutes:02d}:{whole % 60:02d}"
    return f"{hours}:{tail}" if hours else tail


def timed(captions: Sequence[str], bounds_s: Sequence[float], *, numbered: bool) -> list[str]:
    """Put its time, and perhaps its number, before each caption.

    Args:
        captions: One a segment.
        bounds_s: One more bound than captions.
        numbered: Whether segments get numbers, from 1.
    """
    return [
        (f"{n}. " if numbered else "")
        + f"[{clock(start)} to {clock(end)}] {' '.join(text.split())}"
        for n, (text, start, end) in enumerate(
            zip(captions, bounds_s[:-1], bounds_s[1:], strict=True), 1
        )
    ]


def segment_pictures(
    source: Any,
    bounds_s: Sequence[float],
    wanted: Sequence[int],
    *,
    frames: int,
    side: int | None,
    **how: Any,
) -> Iterator[tuple[int, tuple[Picture, ...]]]:
    """Decode the frames of segments in one pass.

    Args:
        source: The video.
        bounds_s: Bounds of all its segments.
        wanted: Numbers of the segments that are wanted, ascending, from 0.
        frames: Frames of each, evenly spread; fewer where it has fewer.
        side: Most pixels of the longer side; None leaves frames as they are.
        **how: Handed to `open_video`.

    Yields:
        Each wanted segment's number and pictures, ascending; without pictures where none of its
        frames can be decoded.

    Raises:
        VideoError: If the video cannot be opened.
    """
    with open_video(source, **how) as reader:
        facts = reader.metadata
        times = facts.timestamps_s
        owner: dict[int, list[int]] = {}
        for number in wanted:
            first = int(np.searchsorted(times, bounds_s[number] - 1e-6, side="left"))
            last = int(np.searchsorted(times, bounds_s[number + 1] - 1e-6, side="left"))
            # A segment between two frames of a slide show shows the one that is on screen.
            first = min(first, len(times) - 1) if first < last else max(first - 1, 0)
            last = max(last, first + 1)
            for index in first + uniform_indices(last - first, frames, short="all"):
                owner.setdefault(int(index), []).append(number)
        size = None
        if side is not None and max(facts.height, facts.width) > side:
            scale = side / max(facts.height, facts.width)
            size = (max(round(facts.height * scale), 1), max(round(facts.width * scale), 1))
        waiting = list(wanted)
        pictures: dict[int, list[Picture]] = {number: [] for number in wanted}
        last_of = {number: index for index in sorted(owner) for number in owner[index]}
        for frame in reader.frames(sorted(owner), size=size):
            while waiting and last_of[waiting[0]] < frame.index:
                yield waiting[0], tuple(pictures.pop(waiting.pop(0)))
            for number in owner[frame.index]:
                pictures[number].append(frame.image)
        for number in waiting:
            yield number, tuple(pictures.pop(number))


def usable(reply: Reply, *, min_words: int) -> str:
    """Return a description, whole sentences of it where the answer was cut off.

    Raises:
        ValueError: If it cannot be a description.
    """
    text = reply.text.strip()
    if not reply.complete:
        end = max(text.rfind(sign) for sign in ".!?")
        if end < 0:
            raise ValueError("it was cut off before the first sentence ended")
        text = text[: end + 1]
    words = text.lower().split()
    if len(words) < min_words:
        raise ValueError(f"it has {len(words)} words, fewer than {min_words}")
    if len(words) >= _LOOP_WORDS and len(set(words)) < _FEWEST_DIFFERENT * len(words):
        raise ValueError("it says the same over and over")
    return text


def caption_segment(
    caller: Caller,
    prompts: Prompts,
    pictures: Sequence[Picture],
    start_s: float,
    end_s: float,
    options: CaptionOptions,
) -> str:
    """Describe one segment.

    Raises:
        LongVILAError: If there are no pictures, or no answer.
        ValueError: If no answer can be used.
    """
    if not pictures:
        raise LongVILAError("none of its frames can be decoded")
    text = prompts.fill("caption", frames=len(pictures), start=clock(start_s), end=clock(end_s))
    prompt = Prompt(text, tuple(pictures), max_new_tokens=options.max_new_tokens)
    found: str = ask_until(
        caller,
        prompt,
        lambda reply: usable(reply, min_words=options.min_words),
        attempts=options.attempts,
    )
    return found


def compose(
    caller: Caller,
    prompts: Prompts,
    captions: Sequence[str],
    bounds_s: Sequence[float],
    options: CaptionOptions,
) -> str:
    """Make one description of a video of the captions of its segments.

    Raises:
        LongVILAError: If there is no answer.
        ValueError: If no answer can be used.
    """
    if len(captions) == 1:
        return captions[0]
    name, texts, bounds = "compose", list(captions), list(bounds_s)
    while True:
        lines = timed(texts, bounds, numbered=False)
        groups = cut_words(lines, options.words_per_call)
        # A round that joins nothing would go on for ever: take two at a time then.
        if len(groups) == len(lines) > 1:
            groups = [lines[n : n + 2] for n in range(0, len(lines), 2)]
        texts, ends, first = [], [bounds[0]], 0
        for group in groups:
            span = bounds[first], bounds[first + len(group)]
            text = prompts.fill(
                name,
                duration=clock(span[1] - span[0]),
                captions="\n".join(group),
                words=options.summary_words,
            )
            prompt = Prompt(text, max_new_tokens=options.summary_tokens)
            texts.append(
                ask_until(
                    caller,
                    prompt,
                    lambda reply: usable(reply, min_words=options.min_words),
                    attempts=options.attempts,
                )
            )
            first += len(group)
            ends.append(span[1])
        if len(texts) == 1:
            found: str = texts[0]
            return found
        name, bounds = "merge", ends


def cut_words(texts: Sequence[str], budget: int) -> list[list[str]]:
    """Group texts in order so that no group has more words than a budget, unless one text alone."""
    groups: list[list[str]] = []
    words = 0
    for text in texts:
        number = len(text.split())
        if not groups or words + number > budget:
            groups.append([])
            words = 0
        groups[-1].append(text)
        words += number
    return groups
