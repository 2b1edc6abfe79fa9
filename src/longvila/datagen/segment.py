"""Cut a video into segments, by length and where the scene changes.

1. Small pictures of the video are taken at a fixed rate (`look`): a few kilobytes each, decoded in
   one pass.
2. The change at a picture is the mean absolute difference from the one before, 0 to 1. A cut is
   where it is above `threshold`, the largest of its neighbours, and several times their median, so
   that a moving camera, which changes every picture, makes none (`scene_cuts`).
3. Scenes are joined while they stay within `length_s`, one that is shorter than `min_s` always, and
   what is then longer than one and a half lengths is cut evenly (`arrange`).

Segments cover the video without gaps. None is longer than one and a half lengths, and none shorter
than `min_s` unless the video is.

Without scene changes (``by="length"``) the video is cut evenly. Fades and dissolves shorter than
the distance between two pictures are seen as cuts, longer ones may be missed.

Cost: one pass of the decoder; 12 KB a picture and no more than two pictures are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from longvila.media.sampling import fps_indices
from longvila.media.video import open_video

By = Literal["length", "scene"]
_LOOKED_AT = (48, 64)
#: Longest segment over the length asked for.
_SLACK = 1.5


@dataclass(frozen=True)
class SegmentOptions:
    """How videos are cut.

    Attributes:
        by: ``scene`` looks for scene changes and then at the length; ``length`` cuts evenly.
        length_s: Length of a segment that is aimed at.
        min_s: Shortest segment.
        look_fps: Pictures a second that are looked at for scene changes.
        threshold: Least change that is a cut, of 1.
        contrast: Least change that is a cut, in medians of its neighbours.
    """

    by: By = "scene"
    length_s: float = 10.0
    min_s: float = 2.0
    look_fps: float = 2.0
    threshold: float = 0.08
    contrast: float = 3.0

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise ValueError(f"by must be one of {get_args(By)}, got {self.by!r}")
        if self.length_s <= 0 or not 0 <= self.min_s <= self.length_s / 2:
            raise ValueError(
                f"length_s must be above zero and min_s at most half of it, got {self.length_s:g} "
                f"and {self.min_s:g} s"
            )
        if self.look_fps <= 0 or not 0 < self.threshold < 1:
            raise ValueError("look_fps must be above zero, threshold between 0 and 1")


@dataclass(frozen=True)
class Cut:
    """A video and its segments.

    Attributes:
        duration_s: Length of the video.
        fps: Its mean frame rate.
        width: Columns of a frame.
        height: Rows of a frame.
        bounds_s: Where segments begin, and the end: one number more than there are segments.
        scenes_s: Where the scene changes.
    """

    duration_s: float
    fps: float
    width: int
    height: int
    bounds_s: tuple[float, ...]
    scenes_s: tuple[float, ...]


def cut_video(source: Any, options: SegmentOptions, **how: Any) -> Cut:
    """Cut a video into segments.

    Args:
        source: Whatever `longvila.media.video.open_video` takes.
        options: How to cut.
        **how: Handed to `open_video`.

    Returns:
        The segments.

    Raises:
        VideoError: If the video cannot be opened.
    """
    with open_video(source, **how) as reader:
        facts = reader.metadata
        cuts: list[float] = []
        if options.by == "scene":
            wanted = fps_indices(
                facts.timestamps_s, options.look_fps, duration_s=facts.duration_s
            ).tolist()
            times, changes = [], []
            for time_s, change in look(reader.frames(wanted, size=_LOOKED_AT)):
                times.append(time_s)
                changes.append(change)
            found = scene_cuts(changes, threshold=options.threshold, contrast=options.contrast)
            cuts = [times[i] for i in found]
    bounds = arrange(facts.duration_s, cuts, length_s=options.length_s, min_s=options.min_s)
    return Cut(facts.duration_s, facts.fps, facts.width, facts.height, tuple(bounds), tuple(cuts))


def look(frames: Iterator[Any]) -> Iterator[tuple[float, float]]:
    """Yield when each picture appears and how much it differs from the one before (the first: 0).

    Args:
        frames: `longvila.media.reader.DecodedFrame`, ascending.
    """
    before: NDArray[np.int16] | None = None
    for frame in frames:
        now = frame.image.astype(np.int16)
        change = 0.0 if before is None else float(np.abs(now - before).mean()) / 255
        yield frame.timestamp_s, change
        before = now


def scene_cuts(
    changes: Sequence[float], *, threshold: float, contrast: float, reach: int = 4
) -> list[int]:
    """Return the pictures with which a scene begins.

    Args:
        changes: How much each picture differs from the one before.
        threshold: Least change that is a cut.
        contrast: Least change that is a cut, in medians of its neighbours.
        reach: Neighbours on either side.
    """
    found = []
    for place, change in enumerate(changes):
        if place == 0 or change < threshold:
            continue
        around = [*changes[max(place - reach, 1) : place], *changes[place + 1 : place + 1 + reach]]
        if around and (
            change < max(changes[max(place - 1, 1) : place + 2])
            or change < contrast * float(np.median(around))
        ):
            continue
        found.append(place)
    return found


def arrange(
    duration_s: float, cuts_s: Sequence[float], *, length_s: float, min_s: float
) -> list[float]:
    """Turn scene changes into the bounds of segments.

    Args:
        duration_s: Length of the video.
        cuts_s: Where the scene changes, ascending.
        length_s: Length of a segment that is aimed at.
        min_s: Shortest segment.

    Returns:
        Bounds from 0 to the duration, one more than there are segments.
    """
    inner = [cut for cut in cuts_s if 0 < cut < duration_s]
    joined = [0.0]
    scenes = [*inner, duration_s]
    for end, following in zip(scenes, [*scenes[1:], None], strict=True):
        # The next scene is taken in where this is too short, and where both fit.
        if following is not None and (
            end - joined[-1] < min_s or following - joined[-1] <= length_s
        ):
            continue
        joined.append(end)
    if len(joined) > 2 and joined[-1] - joined[-2] < min_s:
        del joined[-2]
    bounds = [0.0]
    for start, end in pairwise(joined):
        parts = 1
        if end - start > _SLACK * length_s:
            parts = max(round((end - start) / length_s), 2)
        bounds += [start + (end - start) * n / parts for n in range(1, parts)]
        bounds.append(end)
    return bounds
