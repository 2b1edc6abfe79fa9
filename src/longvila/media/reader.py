"""What every video back end is, and the facts it reports.

A reader is opened on one source, says what it found (``metadata``), and decodes the frames it is
asked for, each exactly once, in the order of the video, converted to upright RGB and resized one
at a time, so that memory does not grow with the number of frames. ``stats`` counts the work.

Frame k is the k-th frame in order of presentation; its time is its own timestamp less that of
frame 0. Pixels are taken as square, as the original implementation does.

A reader belongs to one thread at a time; open one reader for each thread or process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from longvila.log import get_logger
from longvila.media.image import resize

log = get_logger(__name__)

Frame = NDArray[np.uint8]
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class VideoMetadata:
    """What is known of a video.

    Attributes:
        name: Path, address or description of the source.
        num_frames: Frames that can be asked for, counted, not taken from the header.
        fps: Average frame rate, from the timestamps.
        width: Columns of an upright frame.
        height: Rows of an upright frame.
        duration_s: From the first frame's appearance to the last one's end.
        rotation: Degrees clockwise that the stored picture is turned for display; 0, 90, 180, 270.
        timestamps_s: When each frame appears, in seconds after the first, shape (F,).
        codec: Name of the codec; ``"pictures"`` for folders, lists and arrays.
        backend: Name of the back end that reads it.
        header_frames: Frames the header promises, where it does.
    """

    name: str
    num_frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    rotation: int
    timestamps_s: NDArray[np.float64]
    codec: str
    backend: str
    header_frames: int | None = None


@dataclass
class ReadStats:
    """Work done by a reader since it was opened.

    Attributes:
        decoded_frames: Frames the decoder gave out, wanted or not.
        packets: Packets given to the decoder.
        seeks: Jumps inside the file.
        errors: Packets (of pictures: files) that could not be decoded.
        retries: Stretches decoded a second time because a wanted frame had not come.
    """

    decoded_frames: int = 0
    packets: int = 0
    seeks: int = 0
    errors: int = 0
    retries: int = 0


class DecodedFrame(NamedTuple):
    """One frame: its number, when it appears in seconds, and RGB uint8 of shape (H, W, 3)."""

    index: int  # type: ignore[assignment]  # tuple.index is not missed
    timestamp_s: float
    image: Frame


class VideoReader(ABC):
    """What a back end offers; usable in a ``with`` block."""

    metadata: VideoMetadata
    stats: ReadStats

    @abstractmethod
    def frames(self, indices: Iterable[int], *, size: Size | None = None) -> Iterator[DecodedFrame]:
        """Decode frames.

        Args:
            indices: Frame numbers in any order; repeated ones count once.
            size: (height, width) to resize to with PIL's bicubic filter; None keeps the size.

        Returns:
            The frames, ascending. One that cannot be decoded is left out.

        Raises:
            IndexError: If a number is outside the video.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the file and the decoder; harmless when repeated."""

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(self, *fault: object) -> None:
        """Close it."""
        self.close()


def check_indices(indices: Iterable[int], metadata: VideoMetadata) -> list[int]:
    """Return the distinct frame numbers asked for, ascending.

    Raises:
        IndexError: If one is outside the video.
    """
    wanted = sorted({int(index) for index in indices})
    if wanted and (wanted[0] < 0 or wanted[-1] >= metadata.num_frames):
        wrong = wanted[0] if wanted[0] < 0 else wanted[-1]
        raise IndexError(
            f"{metadata.name}: there is no frame {wrong}; the video has frames 0 to "
            f"{metadata.num_frames - 1}"
        )
    return wanted


def fit(image: Frame, size: Size) -> Frame:
    """Resize RGB uint8 to (height, width) with PIL's bicubic filter; equal sizes are untouched."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(resize(Image.fromarray(image), size))


def warn_lost(name: str, lost: Sequence[int], wanted: Sequence[int]) -> None:
    """Log which of the frames asked for did not come, if any."""
    if lost:
        log.warning(
            "%s: %d of %d frames asked for cannot be decoded, the first of them frame %d",
            name,
            len(lost),
            len(wanted),
            min(lost),
        )
