"""Which frames of a video to look at: pure index maths, no decoding.

Three ways to choose, all returning ascending ``int64`` frame numbers:

1. ``uniform_indices``: n frames spread over the video, the first and the last included.
2. ``fps_indices``: one frame every ``1 / fps`` seconds.
3. ``timestamp_indices``: the frame on screen at each given second.

The last two read the timestamps of the frames, not a frame rate, so they are right for videos
of variable frame rate. Cost is O(n log F). Nothing here opens a file or knows a decoder.

Dimension legend: F frames of the video, n frames sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longvila.errors import VideoError

Indices = NDArray[np.int64]
ShortPolicy = Literal["repeat", "all"]
Rounding = Literal["even", "down"]
Overflow = Literal["spread", "first"]

#: Slack, in seconds, between an instant and a timestamp that were computed apart.
_SLACK_S = 1e-6
#: More frames than any sample has.
_MOST = 1 << 24


def uniform_indices(
    num_frames_total: int,
    num_frames: int,
    *,
    short: ShortPolicy = "repeat",
    rounding: Rounding = "even",
) -> Indices:
    """Spread frames evenly over a video, ends included.

    Args:
        num_frames_total: Frames the video has.
        num_frames: Frames wanted.
        short: What a video with fewer frames gives: ``"repeat"`` repeats frames until there are
            ``num_frames``, ``"all"`` gives every frame once.
        rounding: ``"even"`` rounds to the nearest frame, halves to the even one; ``"down"``
            truncates, as the loader of the VILA-1.5 evaluations did.

    Returns:
        Ascending frame numbers, shape (n,).

    Raises:
        ValueError: If a count is below one or an option is unknown.

    Source:
        NVlabs/VILA ``llava/utils/media.py`` (``"even"``, ``"repeat"``) and ``llava/mm_utils.py``
        (``"down"``, ``"all"``).
    """
    _check_positive("num_frames_total", num_frames_total)
    _check_positive("num_frames", num_frames)
    _check_choice("short", short, ("repeat", "all"))
    _check_choice("rounding", rounding, ("even", "down"))
    if short == "all" and num_frames >= num_frames_total:
        return np.arange(num_frames_total, dtype=np.int64)
    spread = np.linspace(0, num_frames_total - 1, num_frames)
    return (np.round(spread) if rounding == "even" else spread).astype(np.int64)


def fps_indices(
    timestamps_s: ArrayLike,
    fps: float,
    *,
    duration_s: float | None = None,
    max_frames: int | None = None,
    overflow: Overflow = "spread",
) -> Indices:
    """Take the frame on screen at 0, 1/fps, 2/fps, ... seconds after the first frame.

    Args:
        timestamps_s: When each frame appears, in seconds, ascending, shape (F,).
        fps: Samples a second. Above the video's own rate frames repeat.
        duration_s: Length of the video; instants at or beyond it are not taken. None ends at
            the last frame's appearance, which is then included.
        max_frames: Most frames to return; None for no limit.
        overflow: What to do beyond ``max_frames``: ``"spread"`` samples the whole video at a
            lower, even rate; ``"first"`` keeps the first ``max_frames`` instants, so that the end
            of the video is never seen.

    Returns:
        Ascending frame numbers, shape (n,); at least one.

    Raises:
        ValueError: If the timestamps are empty or not ascending, or a number is not positive.
        VideoError: If there would be millions of frames.

    Source:
        ``"first"`` is what NVlabs/VILA ``llava/utils/media.py`` does when ``fps`` is set.
    """
    times = _check_timestamps(timestamps_s)
    _check_choice("overflow", overflow, ("spread", "first"))
    if not (np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps!r}")
    if max_frames is not None:
        _check_positive("max_frames", max_frames)
    last = float(times[-1] - times[0])
    if duration_s is not None and not (np.isfinite(duration_s) and duration_s >= 0):
        raise ValueError(f"duration_s must not be negative, got {duration_s!r}")
    seconds = last if duration_s is None else float(duration_s)
    if max_frames is None and seconds * fps > _MOST:
        raise VideoError(
            f"{fps:g} frames a second of {seconds:.0f} s are {seconds * fps:.3g} frames; take "
            "fewer a second, or limit their number (is a timestamp of the video damaged?)"
        )
    if duration_s is None:
        count = int(np.floor((last + _SLACK_S) * fps)) + 1
    else:
        count = max(int(np.ceil((duration_s - _SLACK_S) * fps)), 1)
    if max_frames is not None and count > max_frames:
        if overflow == "spread":
            instants = np.linspace(0, (count - 1) / fps, max_frames)
            return timestamp_indices(times, times[0] + instants)
        count = max_frames
    return timestamp_indices(times, times[0] + np.arange(count) / fps)


def timestamp_indices(timestamps_s: ArrayLike, times_s: ArrayLike | Sequence[float]) -> Indices:
    """Find the frame on screen at each instant: the newest that appeared at or before it.

    Args:
        timestamps_s: When each frame appears, in seconds, ascending, shape (F,).
        times_s: Instants, in seconds, in any order, shape (n,). Before the first frame the first
            one is meant, after the last the last one.

    Returns:
        Frame numbers in the order of ``times_s``, shape (n,).

    Raises:
        ValueError: If either is empty or not finite, or the timestamps are not ascending.
    """
    times = _check_timestamps(timestamps_s)
    asked = np.atleast_1d(np.asarray(times_s, dtype=np.float64))
    if asked.size == 0 or not np.isfinite(asked).all():
        raise ValueError(f"times_s must be finite and not empty, got {asked!r}")
    found = np.searchsorted(times, asked + _SLACK_S, side="right") - 1
    return np.clip(found, 0, len(times) - 1).astype(np.int64)


def stride_indices(num_frames_total: int, source_fps: float) -> Indices:
    """Take one frame a second by counting frames, as the original needle evaluation does.

    Args:
        num_frames_total: Frames the video has.
        source_fps: Its average frame rate.

    Returns:
        Every ``round(source_fps)``-th frame number, from 0.

    Source:
        NVlabs/VILA, the needle-in-a-haystack script. ``fps_indices`` is right where the rate
        is not a whole number or varies.
    """
    _check_positive("num_frames_total", num_frames_total)
    if not (np.isfinite(source_fps) and source_fps > 0):
        raise ValueError(f"source_fps must be a positive number, got {source_fps!r}")
    return np.arange(0, num_frames_total, max(round(source_fps), 1), dtype=np.int64)


def _check_timestamps(timestamps_s: ArrayLike) -> NDArray[np.float64]:
    times = np.asarray(timestamps_s, dtype=np.float64)
    if times.ndim != 1 or times.size == 0 or not np.isfinite(times).all():
        raise ValueError(
            f"timestamps_s must be a non-empty 1-D array of finite numbers, got shape {times.shape}"
        )
    if (np.diff(times) < 0).any():
        raise ValueError("timestamps_s must be ascending; sort the frames by presentation time")
    return times


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
