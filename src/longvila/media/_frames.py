"""Reader of frames that are pictures already: a folder, a list, an array.

Each picture is loaded when its turn comes, so a folder of any size takes the memory of one. Such
sources carry no clock; the caller says how many pictures make a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from longvila.errors import VideoError
from longvila.log import get_logger
from longvila.media.image import ImageError, load_image
from longvila.media.reader import (
    DecodedFrame,
    Frame,
    ReadStats,
    Size,
    VideoMetadata,
    VideoReader,
    check_indices,
    fit,
)
from longvila.media.sources import Limits, Source

log = get_logger(__name__)


class FramesReader(VideoReader):
    """Frames from pictures; pictures of other sizes are resized to the first one's.

    Args:
        source: A resolved source with ``pictures``.
        frame_rate: Pictures a second.
        limits: How far fetching may go, for lists of addresses.
    """

    def __init__(self, source: Source, *, frame_rate: float, limits: Limits | None = None) -> None:
        if not (np.isfinite(frame_rate) and frame_rate > 0):
            raise ValueError(f"frame_rate must be a positive number, got {frame_rate!r}")
        self._pictures = source.pictures or ()
        self._name = source.name
        self._limits = limits
        self.stats = ReadStats()
        loaded = (self._load(index) for index in range(len(self._pictures)))
        first = next((image for image in loaded if image is not None), None)
        if first is None:
            raise VideoError(
                f"{source.name}: none of its {len(self._pictures)} pictures is readable"
            )
        count = len(self._pictures)
        self.stats = ReadStats()
        self.metadata = VideoMetadata(
            name=source.name,
            num_frames=count,
            fps=float(frame_rate),
            width=first.shape[1],
            height=first.shape[0],
            duration_s=count / frame_rate,
            rotation=0,
            timestamps_s=np.arange(count) / frame_rate,
            codec="pictures",
            backend="pictures",
        )

    def frames(self, indices: Iterable[int], *, size: Size | None = None) -> Iterator[DecodedFrame]:
        """Load pictures; see ``VideoReader.frames``."""
        target = size or (self.metadata.height, self.metadata.width)
        for index in check_indices(indices, self.metadata):
            image = self._load(index)
            if image is not None:
                time_s = float(self.metadata.timestamps_s[index])
                yield DecodedFrame(index, time_s, fit(image, target))

    def close(self) -> None:
        """Nothing is held open."""

    def _load(self, index: int) -> Frame | None:
        try:
            image = np.asarray(load_image(self._pictures[index], limits=self._limits))
        except ImageError as fault:
            self.stats.errors += 1
            log.warning("%s: frame %d is unreadable: %s", self._name, index, fault)
            return None
        self.stats.decoded_frames += 1
        return image
