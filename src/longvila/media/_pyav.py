"""Reader on PyAV, whose wheel brings its own FFmpeg: the back end that is always there.

1. On opening, one pass over the packets makes the index (``_index``); a second opening of the
   same file takes it from the cache. One frame is decoded to learn the orientation.
2. ``frames`` plans runs of packets and decodes each from its keyframe. Packets of unneeded frames
   that nothing refers to are passed over by the decoder. Every frame is known by its timestamp.
3. After a run's last wanted packet the decoder is drained, so nothing beyond it is decoded.
4. A wanted frame that did not come although its run began with a seek, or had errors, is tried
   once more from one keyframe earlier with nothing passed over, after errors on a single thread:
   streams that refresh gradually need the lead, and threads can lose a good frame beside a bad
   one. What still does not come is left out.

Files whose timestamps cannot be trusted are counted by decoding them once and are then read from
their beginning.

Colours follow the stream's own tags. Interlaced material is not deinterlaced.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from longvila.errors import VideoError
from longvila.log import get_logger
from longvila.media._index import (
    INDEX_CACHE,
    Orientation,
    Run,
    VideoIndex,
    build_index,
    plan_runs,
)
from longvila.media.reader import (
    DecodedFrame,
    Frame,
    ReadStats,
    Size,
    VideoMetadata,
    VideoReader,
    check_indices,
    fit,
    warn_lost,
)
from longvila.media.sources import Source

log = get_logger(__name__)

#: What a stream's colour tag (H.273) means to the converter; untagged streams are read as BT.601.
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9}
#: More threads than this gain little on one stream and cost memory in every worker.
_MOST_THREADS = 4
#: Packets decoded to find out whether timestamps that look made up are right.
_SUSPECT_PACKETS = 250
#: Formats that are lists of places to read from, or that read files beside the one named.
_REFERRING = frozenset(
    ("concat", "dash", "hls", "imf", "lavfi", "rtp", "rtsp", "sap", "sdp", "vobsub")
)
#: How the texts among them begin, to say what they are.
_PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"v=0")
#: FFmpeg draws any long enough text on a screen of 80 columns and calls that a video.
_DRAWN = frozenset(("tty",))
#: A file must not make the decoder open another, and a text is no video.
_OPTIONS = {
    "protocol_whitelist": "file,crypto,data,subfile",
    "pattern_type": "none",  # of pictures: a "%d" in a name is no number
    "format_whitelist": ",".join(
        sorted(
            name
            for name in av.formats_available
            if (_REFERRING | _DRAWN).isdisjoint(name.split(","))
        )
    ),
}


def open_container(file: str | io.BytesIO) -> Any:
    """Open a file or its bytes, and nothing that it names.

    Args:
        file: A path, or the bytes.

    Raises:
        av.FFmpegError: Or OSError: It cannot be opened, or is a list of other files.
    """
    # As container_options: PyAV 15 crashes when options meet streams that show up late. Titles
    # and the like are not looked at, and need not be UTF-8.
    return av.open(file, container_options=_OPTIONS, metadata_errors="replace")


class PyAVReader(VideoReader):
    """Frames of a video file through PyAV.

    Args:
        source: A resolved source with a ``path`` or ``data``.
        threads: Decoder threads; None chooses by the processors this process may use.
    """

    def __init__(self, source: Source, *, threads: int | None = None) -> None:
        self._source = source
        self._threads = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._container: Any = None
        self._turn = 0
        self._lead = 0
        self._skip = True
        self._reformatter = VideoReformatter()
        self.stats = ReadStats()
        try:
            self._open()
            self._index = self._find_index()
        except BaseException:
            self.close()
            raise
        self.stats = ReadStats()
        self.metadata = self._describe()

    def frames(self, indices: Iterable[int], *, size: Size | None = None) -> Iterator[DecodedFrame]:
        """Decode frames; see ``VideoReader.frames``."""
        wanted = check_indices(indices, self.metadata)
        if self._container is None:
            raise ValueError(f"{self._source.name}: the reader is closed")
        self._turn += 1
        return self._frames(wanted, size or (self.metadata.height, self.metadata.width))

    def close(self) -> None:
        """Release the file and the decoder; harmless when repeated."""
        self._release()
        self._source.close()

    # Opening

    def _release(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> None:
        self._release()
        name = self._source.name
        path, data = self._source.path, self._source.data
        file = str(path.resolve()) if path is not None else io.BytesIO(data or b"")
        try:
            self._container = open_container(file)
        except (av.FFmpegError, OSError) as fault:
            if self._head().startswith(_PLAYLISTS):
                raise VideoError(
                    f"{name}: is a list of other files, which are not opened for it; name them "
                    "themselves"
                ) from fault
            raise VideoError(
                f"{name}: cannot be opened as a video ({fault.strerror}); is it a video, and was "
                "its recording or copying finished?"
            ) from fault
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            # A video stream that was passed over is a cover.
            names = {"video": "a cover picture"}
            kinds = sorted({names.get(s.type, s.type) for s in self._container.streams})
            raise VideoError(f"{name}: has no video stream (found: {', '.join(kinds) or 'none'})")
        self._stream = streams[0]
        context = self._stream.codec_context
        if context is None:
            raise VideoError(f"{name}: this FFmpeg has no decoder for its video stream")
        context.thread_count = self._threads
        context.thread_type = "FRAME" if self._threads > 1 else "NONE"
        self._fresh = True

    def _head(self) -> bytes:
        if self._source.path is None:
            return (self._source.data or b"")[:16]
        with self._source.path.open("rb") as file:
            return file.read(16)

    def _find_index(self) -> VideoIndex:
        path = None if self._source.temporary else self._source.path
        key = None if path is None else INDEX_CACHE.key(path)
        index = None if key is None else INDEX_CACHE.get(key)
        if index is None:
            index = build_index(self._container, self._stream, self._source.name)
            if not index.seekable or self._misleads(index):
                index = self._count(index)
            self._open()
            index = dataclasses.replace(index, orientation=self._probe(index))
            self._open()
            if key is not None:
                INDEX_CACHE.put(key, index)
        elif not index.seekable:
            self._threads = 1
            self._open()
        return index

    def _probe(self, index: VideoIndex) -> Orientation:
        """Decode one frame for its size and orientation."""
        for packet in self._demux():
            for frame in self._decode(packet):
                return Orientation.of(frame)
        for frame in self._decode(None):
            return Orientation.of(frame)
        raise VideoError(
            f"{self._source.name}: none of its {len(index.packet_pts)} packets can be decoded"
        )

    def _misleads(self, index: VideoIndex) -> bool:
        """Whether timestamps follow the order stored although frames are reordered (AVI)."""
        reorders = getattr(self._stream.codec_context, "has_b_frames", False)
        if not reorders or (np.diff(index.packet_pts) < 0).any():
            return False
        self._open()
        self._fresh = False
        last: int | None = None
        for packet in itertools.islice(self._demux(), _SUSPECT_PACKETS):
            for frame in self._decode(packet):
                if last is not None and frame.pts < last:
                    return True
                last = frame.pts
        return False

    def _count(self, index: VideoIndex) -> VideoIndex:
        """Number the frames of a file without usable timestamps by decoding all of it."""
        log.info("%s: no usable timestamps; counting its frames by decoding", self._source.name)
        self._threads = 1  # Both readings must lose the same frames beside a damaged one.
        self._open()
        rate = float(self._stream.guessed_rate or self._stream.average_rate or 25)
        ticks: list[int | None] = []
        stored: list[int | None] = []
        self._fresh = False
        for packet in itertools.chain(self._demux(), (None,)):
            ticks += [frame.pts for frame in self._decode(packet)]
            if packet is not None:
                stored.append(packet.dts)
        if not ticks:
            raise VideoError(f"{self._source.name}: no frame can be decoded")
        known = [tick for tick in ticks if tick is not None]
        turns = [tick for tick in stored if tick is not None]
        tick_s = index.tick_s
        if len(known) == len(ticks) and sorted(known) == known and known[0] < known[-1]:
            pts = np.asarray(known, dtype=np.int64)
        elif len(turns) == len(stored) == len(ticks) and sorted(set(turns)) == turns:
            # Frames are shown as regularly as they are decoded (AVI knows no other time).
            pts = np.asarray(turns, dtype=np.int64)
        else:
            tick_s, pts = 1 / rate, np.arange(len(ticks), dtype=np.int64)
        return dataclasses.replace(
            index,
            seekable=False,
            frame_pts=pts,
            frame_packet=pts,
            tick_s=tick_s,
            last_duration_s=1 / rate,
        )

    def _describe(self) -> VideoMetadata:
        index, name = self._index, self._source.name
        times = index.timestamps_s
        count, span_s = len(times), float(times[-1])
        guess = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        fps = (count - 1) / span_s if span_s > 0 else guess or 1.0
        promised = index.header_frames
        if self._container.format.name == "avi":
            # Empty packets, by which frames stay on, count; lacking are those of a file cut off.
            ends = float((self._stream.duration or 0) * (self._stream.time_base or 0))
            promised = promised if span_s + 2 / fps < ends else None
        if promised is not None and promised > len(index.packet_pts):
            log.warning(
                "%s: the header promises %d frames, the file holds %d; it may be cut off",
                name,
                promised,
                len(index.packet_pts),
            )
        return VideoMetadata(
            name=name,
            num_frames=count,
            fps=fps,
            width=index.orientation.width,
            height=index.orientation.height,
            duration_s=span_s + (index.last_duration_s or 1 / fps),
            rotation=index.orientation.rotation,
            timestamps_s=times,
            codec=self._stream.codec_context.name,
            backend="pyav",
            header_frames=promised,
        )

    # Reading

    def _frames(self, wanted: list[int], size: Size) -> Iterator[DecodedFrame]:
        turn = self._turn
        source = self._seeking(wanted) if self._index.seekable else self._counting(wanted)
        missing = set(wanted)
        times = self._index.timestamps_s
        for index, frame in source:
            missing.discard(index)
            yield DecodedFrame(index, float(times[index]), self._convert(frame, size))
            if turn != self._turn:
                raise RuntimeError("frames() was called again before its last result was used up")
        warn_lost(self._source.name, sorted(missing), wanted)

    def _seeking(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        runs = self._plan(wanted)
        while runs:
            run = runs.pop(0)
            got: set[int] = set()
            errors = self.stats.errors
            for index, frame in self._decode_run(run):
                got.add(index)
                yield index, frame
            lost = [index for index in run.frames if index not in got]
            damaged = self.stats.errors > errors
            if not lost or not (run.seek or damaged):
                continue
            self.stats.retries += 1
            self._skip = False
            if damaged:
                self._threads = 1
            self._open()
            again = self._plan(lost, lead=self._lead + 1)
            found = 0
            for retry in again:
                for index, frame in self._decode_run(retry):
                    found += 1
                    yield index, frame
            if found and not damaged and runs:
                # The lead was needed; the rest begins with it.
                self._lead += 1
                runs = self._plan([index for later in runs for index in later.frames])

    def _plan(self, wanted: list[int], lead: int | None = None) -> list[Run]:
        return plan_runs(
            self._index,
            wanted,
            fresh=self._fresh,
            lead=self._lead if lead is None else lead,
        )

    def _counting(self, wanted: list[int]) -> Iterator[tuple[int, Any]]:
        left = set(wanted)
        if not left:
            return
        if not self._fresh:
            self._open()
        for index, frame in enumerate(self._decode_all()):
            if index in left:
                left.discard(index)
                yield index, frame
                if not left:
                    return

    def _decode_run(self, run: Run) -> Iterator[tuple[int, Any]]:
        index = self._index
        wanted = {int(index.frame_pts[frame]): frame for frame in run.frames}
        needed = {int(index.frame_packet[frame]) for frame in run.frames}
        context = self._stream.codec_context
        for place, packet in self._packets(run):
            passed_over = self._skip and place not in needed
            context.skip_frame = "NONREF" if passed_over else "DEFAULT"
            for frame in self._decode(packet):
                if frame.pts in wanted:
                    yield wanted.pop(frame.pts), frame
        for frame in self._decode(None):
            if frame.pts in wanted:
                yield wanted.pop(frame.pts), frame

    def _packets(self, run: Run) -> Iterator[tuple[int, Any]]:
        """Yield the packets of a run with their places in the file."""
        pts = self._index.packet_pts
        expected = 0
        packets = self._seek(run.start) if run.seek else self._demux()
        self._fresh = False
        for packet in packets:
            if expected >= len(pts) or pts[expected] != packet.pts:
                found = self._index.place(packet.pts)
                if found is None:
                    continue
                expected = found
            place, expected = expected, expected + 1
            if place < run.start:
                continue
            if place >= run.stop:
                return
            yield place, packet
            if place == run.stop - 1:
                return

    def _seek(self, start: int) -> Iterator[Any]:
        """Go to a packet or before it; return the packets from there on."""
        keyframes = np.flatnonzero(self._index.packet_keyframe[: start + 1])
        # Containers look for a decoding time, which a keyframe may carry later or earlier than its
        # presentation time; an earlier keyframe is tried when the jump went too far.
        for keyframe in keyframes[::-1][:3].tolist():
            if keyframe == 0:
                break
            self.stats.seeks += 1
            try:
                self._container.seek(
                    int(self._index.packet_pts[keyframe]), stream=self._stream, backward=True
                )
            except av.FFmpegError as fault:
                log.debug("%s: cannot seek: %s", self._source.name, fault)
                break
            packets = self._demux()
            first = next(packets, None)
            landed = None if first is None else self._index.place(first.pts)
            if first is not None and landed is not None and landed <= start:
                return _chain(first, packets)
        self._open()
        return self._demux()

    def _demux(self) -> Iterator[Any]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet
        except av.FFmpegError as fault:
            self.stats.errors += 1
            log.debug("%s: reading stops: %s", self._source.name, fault)

    def _decode_all(self) -> Iterator[Any]:
        self._fresh = False
        for packet in self._demux():
            yield from self._decode(packet)
        yield from self._decode(None)

    def _decode(self, packet: Any) -> list[Any]:
        try:
            frames = list(self._stream.decode(packet))
        except av.FFmpegError as fault:
            self.stats.errors += 1
            log.debug("%s: a packet was rejected: %s", self._source.name, fault)
            return []
        self.stats.packets += packet is not None
        self.stats.decoded_frames += len(frames)
        return frames

    def _convert(self, frame: Any, size: Size) -> Frame:
        # Given in full, since older PyAV leaves the stream's colour tags aside.
        rgb: Any = self._reformatter.reformat(
            frame,
            format="rgb24",
            src_colorspace=_MATRICES.get(int(frame.colorspace), Colorspace.ITU601),
            dst_colorspace=Colorspace.ITU601,
            src_color_range=_range_of(frame),
            dst_color_range=ColorRange.JPEG,
        ).to_ndarray()
        upright = self._index.orientation.turn(rgb)
        return fit(np.ascontiguousarray(upright), size)


def _range_of(frame: Any) -> ColorRange:
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    return ColorRange.JPEG if full else ColorRange.MPEG


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
