"""Subtitle files, and which of their lines are on screen with the frames a model sees.

1. Lines of an ``.srt`` file are read with their times; markup is taken out.
2. A line is chosen if one of the sampled frames' times lies in it, its end excluded.
3. Chosen lines keep their order in time and come once each.

The original evaluator chose lines alike but let a set decide their order; the chosen ones are the
same here.

Cost: one pass over lines and times.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMES = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True)
class Line:
    """A subtitle.

    Attributes:
        start_s: When it appears.
        end_s: When it is gone.
        text: Its words, without markup.
    """

    start_s: float
    end_s: float
    text: str


def read_srt(file: Path) -> list[Line]:
    """Read a subtitle file.

    Args:
        file: An ``.srt`` file; bytes that are no UTF-8 are replaced.

    Returns:
        Its lines in order of their start; those without words are left out.
    """
    text = file.read_text(encoding="utf-8-sig", errors="replace")
    lines = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        found = _TIMES.search(block)
        if found is None:
            continue
        start, end = (_seconds(found.groups()[i : i + 4]) for i in (0, 4))
        # Behind the times there may be a place on the screen, which nobody reads.
        _, _, said = block[found.end() :].partition("\n")
        words = " ".join(_MARKUP.sub("", said).split())
        if words:
            lines.append(Line(start, end, words))
    return sorted(lines, key=lambda line: (line.start_s, line.end_s))


def on_screen(lines: Sequence[Line], times_s: Sequence[float]) -> list[Line]:
    """Choose the lines that are on screen at some of the times.

    Args:
        lines: Subtitles in order.
        times_s: Times of the sampled frames.

    Returns:
        The chosen lines, in order.
    """
    return [line for line in lines if any(line.start_s <= t < line.end_s for t in times_s)]


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds, fraction = parts
    whole = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    return whole + int(fraction) / 10 ** len(fraction)
