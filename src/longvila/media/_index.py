"""Where the frames of a video file are, and the cheapest way to reach some of them.

``build_index`` reads every packet of a file once, without decoding (about a second for an hour),
and keeps when each is shown and which are keyframes. ``plan_runs`` turns frame numbers into
runs of consecutive packets to decode:

1. Find for each wanted frame its packet and the newest keyframe that is shown no later and
   stored no later. Decoding from there gives the frame, whatever leads into the next keyframe.
2. Walk the frames in order. Go on decoding while that is cheaper than a seek; begin a new run
   where the keyframe lies more than ``seek_cost`` packets past the end of the run before.
3. A run ends at the last wanted packet. The decoder is drained there, not fed further.

Everything goes by timestamps, so variable rates, B-frames, open groups of pictures and edit lists
need no care of their own. Files whose packets carry no or repeated timestamps are marked not
``seekable`` and are read from their beginning.

Cost of a plan: O(n log P). Memory of an index: 25 bytes a packet, 41 once frames were looked for
by their times. Indices are cached for the process, keyed by path, size and modification time.

Dimension legend: P packets in the order stored, F frames in the order shown.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from longvila.errors import VideoError
from longvila.log import get_logger

log = get_logger(__name__)

#: Packets that decode in about the time a seek and a refilled decoder take.
SEEK_COST = 6
_CACHE_SIZE = 64


@dataclass(frozen=True)
class Orientation:
    """Size of the frames as shown, and how to turn stored ones for display.

    Attributes:
        height: Rows as shown.
        width: Columns as shown.
        transpose: Whether rows and columns change places first.
        flip_rows: Whether the rows are then reversed.
        flip_columns: Whether the columns are then reversed.
    """

    height: int = 0
    width: int = 0
    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Orientation:
        """Read a decoded frame's display matrix; angles between quarter turns are rounded."""
        height, width = frame.height, frame.width
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls(height, width)
        # x' = a x + c y, y' = b x + d y, in 16.16 fixed point, y downwards.
        a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
        if abs(b) > abs(a):
            return cls(width, height, transpose=True, flip_rows=b < 0, flip_columns=c < 0)
        return cls(height, width, flip_rows=d < 0, flip_columns=a < 0)

    @property
    def rotation(self) -> int:
        """Clockwise turn in degrees; that of the picture before a mirror, if there is one."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows and self.flip_columns else 0

    def turn(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a view of a stored frame, shape (H, W, 3), as it is to be shown."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """Times and places of a video's frames.

    Attributes:
        packet_pts: Presentation time of each packet, in ticks, shape (P,).
        packet_keyframe: Whether each packet can be decoded on its own, shape (P,).
        frame_packet: Packet of each frame, shape (F,).
        frame_pts: Presentation time of each frame, ascending, shape (F,).
        tick_s: Seconds a tick.
        last_duration_s: How long the last frame stays, in seconds.
        seekable: Whether frames can be told by their timestamps alone.
        header_frames: Frames the header promises; None if it does not say.
        orientation: Size and orientation of the frames.
    """

    packet_pts: NDArray[np.int64]
    packet_keyframe: NDArray[np.bool_]
    frame_packet: NDArray[np.int64]
    frame_pts: NDArray[np.int64]
    tick_s: float
    last_duration_s: float
    seekable: bool
    header_frames: int | None
    orientation: Orientation = Orientation()

    def place(self, pts: int | None) -> int | None:
        """Find the packet with a presentation time; None if there is none."""
        if pts is None:
            return None
        slot = int(np.searchsorted(self._sorted_pts, pts))
        if slot == len(self._sorted_pts) or self._sorted_pts[slot] != pts:
            return None
        return int(self._packet_order[slot])

    @cached_property
    def _packet_order(self) -> NDArray[np.int64]:
        return np.argsort(self.packet_pts, kind="stable")

    @cached_property
    def _sorted_pts(self) -> NDArray[np.int64]:
        return self.packet_pts[self._packet_order]

    @property
    def timestamps_s(self) -> NDArray[np.float64]:
        """When each frame appears, in seconds after the first, shape (F,)."""
        return (self.frame_pts - self.frame_pts[0]) * self.tick_s


@dataclass(frozen=True)
class Run:
    """A stretch of packets to decode, and the frames wanted from it.

    Attributes:
        start: First packet, a keyframe.
        stop: Packet after the last one.
        frames: Wanted frame numbers, ascending.
        seek: Whether a seek leads to it; otherwise packets are read on from where they are.
    """

    start: int
    stop: int
    frames: tuple[int, ...]
    seek: bool


def plan_runs(
    index: VideoIndex,
    frames: Sequence[int],
    *,
    fresh: bool,
    seek_cost: int = SEEK_COST,
    lead: int = 0,
) -> list[Run]:
    """Plan the decoding of some frames.

    Args:
        index: The video's index, seekable.
        frames: Distinct frame numbers, ascending.
        fresh: Whether the file was just opened, so that its first packet needs no seek.
        seek_cost: Packets worth decoding to be spared one seek.
        lead: Keyframes by which to begin early, for streams that refresh gradually.

    Returns:
        Runs in order of the file; every frame is in exactly one.
    """
    if len(frames) == 0:
        return []
    wanted = np.asarray(frames, dtype=np.int64)
    packets = index.frame_packet[wanted]
    keyframes = np.flatnonzero(index.packet_keyframe)
    by_time = np.searchsorted(index.packet_pts[keyframes], index.frame_pts[wanted], "right")
    by_place = np.searchsorted(keyframes, packets, "right")
    # Before the first keyframe there is only the beginning of the file.
    slot = np.minimum(by_time, by_place) - 1 - lead
    starts = np.where(slot < 0, 0, keyframes[np.maximum(slot, 0)])
    runs: list[Run] = []
    start, stop, seek = 0, 0, not fresh
    inside: list[int] = []
    for frame, packet, keyframe in zip(
        wanted.tolist(), packets.tolist(), starts.tolist(), strict=True
    ):
        if (not inside and seek) or keyframe > stop + seek_cost:
            if inside:
                runs.append(Run(start, stop, tuple(inside), seek))
            start, stop, seek, inside = keyframe, keyframe, keyframe > 0 or seek, []
        inside.append(frame)
        stop = max(stop, packet + 1)
    runs.append(Run(start, stop, tuple(inside), seek))
    return runs


def build_index(
    container: av.container.InputContainer, stream: av.VideoStream, name: str
) -> VideoIndex:
    """Read every packet of a video stream once, without decoding.

    Args:
        container: An open file, at its beginning.
        stream: The video stream.
        name: What messages call the file.

    Returns:
        The index, without the orientation. The caller opens the file anew.

    Raises:
        VideoError: If there is no packet at all, or the packets are encrypted.
    """
    pts: list[int | None] = []
    keyframe: list[bool] = []
    shown: list[bool] = []
    broken: list[bool] = []
    duration = 0
    last_pts: int | None = None
    tells = hasattr(av.Packet, "has_sidedata")  # not in PyAV 15
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if tells and packet.is_keyframe and packet.has_sidedata("encryption_info"):
                raise VideoError(f"{name}: is encrypted; decrypt it, and give that file")
            pts.append(packet.pts)
            keyframe.append(packet.is_keyframe)
            shown.append(not packet.is_discard)
            broken.append(packet.is_corrupt)
            if packet.pts is not None and (last_pts is None or packet.pts > last_pts):
                last_pts, duration = packet.pts, packet.duration or 0
    except av.FFmpegError as fault:
        log.warning("%s: reading stops after %d packets: %s", name, len(pts), fault)
    # The last packet of a file that was cut off is itself cut off.
    while shown and broken[-1]:
        for column in (pts, keyframe, shown, broken):
            column.pop()
    if not any(shown):
        raise VideoError(f"{name}: the video stream is empty")
    tick_s = float(stream.time_base or 0) or 1.0
    known = [value for value in pts if value is not None]
    seekable = len(known) == len(pts) and len(set(known)) == len(pts) and any(keyframe)
    packet_pts = np.asarray([0 if value is None else value for value in pts], dtype=np.int64)
    packet_keyframe = np.asarray(keyframe, dtype=np.bool_)
    # Keyframes out of order would make "the newest keyframe" ambiguous.
    seekable = seekable and bool((np.diff(packet_pts[packet_keyframe]) > 0).all())
    visible = np.flatnonzero(np.asarray(shown))
    frame_packet = visible[np.argsort(packet_pts[visible], kind="stable")]
    return VideoIndex(
        packet_pts=packet_pts,
        packet_keyframe=packet_keyframe,
        frame_packet=frame_packet,
        frame_pts=packet_pts[frame_packet],
        tick_s=tick_s,
        last_duration_s=duration * tick_s,
        seekable=seekable,
        header_frames=stream.frames or None,
    )


class IndexCache:
    """The indices of recently opened files, shared by the threads of a process."""

    def __init__(self, size: int = _CACHE_SIZE) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._entries: OrderedDict[tuple[str, int, int], VideoIndex] = OrderedDict()

    @staticmethod
    def key(path: Path) -> tuple[str, int, int]:
        """Identify a file's present content by path, size and modification time."""
        facts = path.stat()
        return str(path.resolve()), facts.st_size, facts.st_mtime_ns

    def get(self, key: tuple[str, int, int]) -> VideoIndex | None:
        """Return the index of a file's content, or None if it is not known."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: tuple[str, int, int], index: VideoIndex) -> None:
        """Keep an index; the one not used for longest makes room.

        Args:
            key: From before the file was read: it may have grown since.
            index: Its index.
        """
        with self._lock:
            self._entries[key] = index
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()


INDEX_CACHE = IndexCache()
