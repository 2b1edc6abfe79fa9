"""Reader on torchcodec, for machines where it and a system FFmpeg load; chosen by name.

Frames are numbered and timed by the same packet index as in the PyAV reader, so that both back
ends mean the same frame by the same number; torchcodec supplies the pixels, in small
batches. Every timestamp that comes back is compared with the index. A batch that fails is asked
for again frame by frame, so that only damaged frames are left out.

torchcodec turns frames upright itself and cannot say how many frames it decoded, so ``stats``
counts only the frames delivered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from longvila.errors import VideoError
from longvila.log import get_logger
from longvila.media._pyav import PyAVReader
from longvila.media.reader import (
    DecodedFrame,
    ReadStats,
    Size,
    VideoReader,
    check_indices,
    fit,
    warn_lost,
)
from longvila.media.sources import Source

log = get_logger(__name__)

#: Frames held at a time.
_BATCH = 16
_FAULTS = (RuntimeError, ValueError, IndexError)


class TorchCodecReader(VideoReader):
    """Frames of a video file through torchcodec.

    Args:
        source: A resolved source with a ``path`` or ``data``.
        threads: Decoder threads; None for one.

    Raises:
        ImportError: If torchcodec or the FFmpeg it needs cannot be loaded.
        VideoError: If the file cannot be opened, or torchcodec numbers its frames differently.
    """

    def __init__(self, source: Source, *, threads: int | None = None) -> None:
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, RuntimeError, OSError) as fault:
            raise ImportError(
                "the torchcodec back end needs the package torchcodec in a build for this torch, "
                f"and FFmpeg's shared libraries on the system; use backend='pyav' ({fault})"
            ) from fault
        self._source = source
        self.stats = ReadStats()
        probe = PyAVReader(dataclasses.replace(source, temporary=False), threads=1)
        self.metadata = dataclasses.replace(probe.metadata, backend="torchcodec")
        probe.close()
        try:
            self._decoder: Any = VideoDecoder(
                str(source.path) if source.path is not None else source.data,
                dimension_order="NHWC",
                num_ffmpeg_threads=threads or 1,
                seek_mode="exact",
            )
            count = len(self._decoder)
            self._start_s = float(self._decoder.get_frame_at(0).pts_seconds)
        except _FAULTS as fault:
            raise VideoError(f"{source.name}: torchcodec cannot open it ({fault})") from fault
        if count != self.metadata.num_frames:
            raise VideoError(
                f"{source.name}: torchcodec counts {count} frames, its packets hold "
                f"{self.metadata.num_frames}; use backend='pyav'"
            )

    def frames(self, indices: Iterable[int], *, size: Size | None = None) -> Iterator[DecodedFrame]:
        """Decode frames; see ``VideoReader.frames``."""
        wanted = check_indices(indices, self.metadata)
        target = size or (self.metadata.height, self.metadata.width)
        lost: list[int] = []
        for start in range(0, len(wanted), _BATCH):
            for index, time_s, pixels in self._batch(wanted[start : start + _BATCH], lost):
                self._check_time(index, time_s)
                yield DecodedFrame(
                    index, float(self.metadata.timestamps_s[index]), fit(pixels.numpy(), target)
                )
        warn_lost(self._source.name, lost, wanted)

    def close(self) -> None:
        """Release the decoder; harmless when repeated."""
        self._decoder = None
        self._source.close()

    def _batch(self, wanted: list[int], lost: list[int]) -> Iterator[tuple[int, float, Any]]:
        try:
            batch = self._decoder.get_frames_at(wanted)
        except _FAULTS as fault:
            self.stats.errors += 1
            log.debug("%s: a batch failed: %s", self._source.name, fault)
            if len(wanted) == 1:
                lost.extend(wanted)
            else:
                for index in wanted:
                    yield from self._batch([index], lost)
            return
        self.stats.decoded_frames += len(wanted)
        yield from zip(wanted, batch.pts_seconds.tolist(), batch.data, strict=True)

    def _check_time(self, index: int, time_s: float) -> None:
        expected = float(self.metadata.timestamps_s[index])
        if abs(time_s - self._start_s - expected) > 1e-4:
            raise VideoError(
                f"{self._source.name}: torchcodec gave the frame at {time_s - self._start_s:.4f} s "
                f"for frame {index}, which is shown at {expected:.4f} s; use backend='pyav'"
            )
