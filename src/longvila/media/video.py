"""Reading videos: open anything a user may call a video, and take frames from it.

``open_video`` resolves the source and picks a back end; ``read_frames`` opens, samples, decodes
and closes in one call. Back ends:

- ``pyav``: video files, always there.
- ``torchcodec``: video files, where torchcodec and a system FFmpeg load; chosen by name.
- folders, lists and arrays of pictures need no decoder and have a reader of their own.

Every back end gives the frames that decoding the whole file in order would give. A file that is
partly broken yields what can be read, and says so in ``SampledVideo.missing`` and the log.

Dimension legend: F frames returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from longvila.errors import VideoError
from longvila.media._frames import FramesReader
from longvila.media._pyav import PyAVReader
from longvila.media.reader import Frame, ReadStats, Size, VideoMetadata, VideoReader
from longvila.media.sampling import (
    Overflow,
    ShortPolicy,
    fps_indices,
    timestamp_indices,
    uniform_indices,
)
from longvila.media.sources import Limits, resolve

Backend = Literal["auto", "pyav", "torchcodec"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class SampledVideo:
    """Frames taken from a video.

    Attributes:
        frames: RGB, uint8, shape (F, H, W, 3).
        indices: Frame number of each, shape (F,); repeated where sampling repeats.
        timestamps_s: When each appears, in seconds after the video's first frame, shape (F,).
        metadata: The video's.
        missing: Frame numbers asked for that could not be decoded, ascending.
        stats: Work the reader did.
    """

    frames: NDArray[np.uint8]
    indices: NDArray[np.int64]
    timestamps_s: NDArray[np.float64]
    metadata: VideoMetadata
    missing: tuple[int, ...]
    stats: ReadStats


def open_video(
    source: Any,
    *,
    backend: Backend = "auto",
    threads: int | None = None,
    frame_rate: float = 1.0,
    allow_http: bool = True,
    limits: Limits | None = None,
) -> VideoReader:
    """Open a video; close the reader, or use it in a ``with`` block.

    Args:
        source: A path, ``file://``, ``http(s)://`` or ``data:`` address, base64, bytes, an open
            binary file, a folder of pictures, a list of pictures or paths, or a uint8 array of
            shape (F, H, W, 3) or (F, 3, H, W).
        backend: Which decoder reads files; ``"auto"`` is PyAV.
        threads: Decoder threads; None chooses.
        frame_rate: Pictures a second, for sources that carry no clock.
        allow_http: Whether http(s) addresses may be fetched.
        limits: Size and time limits of fetching; ``allow_http`` off overrides theirs.

    Returns:
        A reader, of one thread at a time.

    Raises:
        VideoError: If the source cannot be opened as a video; the message names it.
        TypeError: If the source's type is none of those listed.
    """
    limits = limits or Limits()
    if not allow_http:
        limits = Limits(False, limits.max_bytes, limits.timeout_s)
    if backend not in ("auto", "pyav", "torchcodec"):
        raise ValueError(f"backend must be auto, pyav or torchcodec; got {backend!r}")
    resolved = resolve(source, limits=limits)
    try:
        if resolved.pictures is not None:
            return FramesReader(resolved, frame_rate=frame_rate, limits=limits)
        if backend == "torchcodec":
            from longvila.media._torchcodec import TorchCodecReader

            return TorchCodecReader(resolved, threads=threads)
        return PyAVReader(resolved, threads=threads)
    except BaseException:
        resolved.close()
        raise


def choose_indices(
    metadata: VideoMetadata,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    indices: Iterable[int] | None = None,
    timestamps_s: ArrayLike | None = None,
    short: ShortPolicy = "repeat",
    overflow: Overflow = "spread",
) -> NDArray[np.int64]:
    """Choose frames of a video; the arguments are those of ``read_frames``."""
    given = [num_frames is not None or fps is not None, indices is not None]
    given.append(timestamps_s is not None)
    if sum(given) != 1:
        raise ValueError(
            "expected one way of sampling: num_frames, fps (with num_frames as its limit), "
            "indices, or timestamps_s"
        )
    if indices is not None:
        numbers = np.asarray(list(indices))
        if numbers.size and (numbers.dtype.kind not in "iuf" or (numbers != numbers.round()).any()):
            raise ValueError(f"indices must be whole numbers, got {numbers.tolist()[:8]}")
        return numbers.astype(np.int64)
    if timestamps_s is not None:
        return timestamp_indices(metadata.timestamps_s, timestamps_s)
    if fps is not None:
        try:
            return fps_indices(
                metadata.timestamps_s,
                fps,
                duration_s=metadata.duration_s,
                max_frames=num_frames,
                overflow=overflow,
            )
        except VideoError as fault:
            raise VideoError(f"{metadata.name}: {fault}") from fault
    assert num_frames is not None
    return uniform_indices(metadata.num_frames, num_frames, short=short)


def read_frames(
    source: Any,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    indices: Iterable[int] | None = None,
    timestamps_s: ArrayLike | None = None,
    short: ShortPolicy = "repeat",
    overflow: Overflow = "spread",
    size: Size | None = None,
    backend: Backend = "auto",
    threads: int | None = None,
    frame_rate: float = 1.0,
    allow_http: bool = True,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> SampledVideo:
    """Take frames from a video.

    Args:
        source: See ``open_video``.
        num_frames: This many, spread evenly, ends included; with ``fps``, at most this many.
        fps: This many a second.
        indices: These frame numbers, in this order.
        timestamps_s: The frames on screen at these seconds after the first frame.
        short: What ``num_frames`` gives of a shorter video: see ``uniform_indices``.
        overflow: What ``fps`` gives beyond ``num_frames``: see ``fps_indices``.
        size: (height, width) to resize to while decoding; None keeps the video's.
        backend: See ``open_video``.
        threads: See ``open_video``.
        frame_rate: See ``open_video``.
        allow_http: See ``open_video``.
        limits: See ``open_video``.
        progress: Called with (frames done, frames to do) after each.

    Returns:
        The frames in the order sampled, without those that cannot be decoded.

    Raises:
        VideoError: If the source cannot be opened, or none of the frames can be decoded.
        IndexError: If an index is outside the video.
        ValueError: If not exactly one way of sampling is given.
    """
    options: dict[str, Any] = {
        "backend": backend,
        "threads": threads,
        "frame_rate": frame_rate,
        "allow_http": allow_http,
        "limits": limits,
    }
    with open_video(source, **options) as reader:
        metadata = reader.metadata
        asked = choose_indices(
            metadata,
            num_frames=num_frames,
            fps=fps,
            indices=indices,
            timestamps_s=timestamps_s,
            short=short,
            overflow=overflow,
        )
        if asked.size == 0:
            raise ValueError(f"{metadata.name}: no frame was asked for")
        return _collect(reader, asked, size, progress)


def _collect(
    reader: VideoReader, asked: NDArray[np.int64], size: Size | None, progress: Progress | None
) -> SampledVideo:
    metadata = reader.metadata
    distinct = np.unique(asked)
    height, width = size or (metadata.height, metadata.width)
    # Decoded straight into the array that is returned, so that nothing is held twice.
    store: Frame = np.empty((len(distinct), height, width, 3), dtype=np.uint8)
    have = np.zeros(len(distinct), dtype=np.bool_)
    for done, frame in enumerate(reader.frames(distinct.tolist(), size=(height, width)), start=1):
        slot = int(np.searchsorted(distinct, frame.index))
        store[slot] = frame.image
        have[slot] = True
        if progress is not None:
            progress(done, len(distinct))
    if not have.any():
        raise VideoError(
            f"{metadata.name}: none of the {len(distinct)} frames asked for can be decoded"
        )
    slots = np.searchsorted(distinct, asked)
    slots = slots[have[slots]]
    plain = len(slots) == len(distinct) and bool((np.diff(slots) == 1).all())
    chosen = distinct[slots]
    return SampledVideo(
        frames=store if plain else store[slots],
        indices=chosen,
        timestamps_s=metadata.timestamps_s[chosen],
        metadata=metadata,
        missing=tuple(distinct[~have].tolist()),
        stats=reader.stats,
    )
