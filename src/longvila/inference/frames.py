"""Pixels that are not there yet: frames decoded when the prompt is read, and not kept.

A `FrameSource` knows how many frames it has and gives those asked for, in order, a batch at a time.
A prefill asks each rank's source for the frames that this rank encodes, so a rank decodes nothing
else, and asks once, so a decoder runs forward through its file::

    file -> reader -> uint8 frames of a batch -> pixel values -> (queue of two) -> encoder
            '------------- background thread on a GPU -------------'

With a device the work up to the queue is done by a thread: frames are decoded while the model reads
the ones before, and lie in pinned memory, so that the copy to the device waits for nothing.

A frame that cannot be decoded would shift everything behind it, and what was read of the prompt is
wrong. `MissingFrames` says which; whoever rendered the prompt does it again without them.

Memory: three batches of frames, whatever the length of the video. Two cases hold the distinct
frames as uint8 instead: frames asked for in an order that is not the video's, and a damaged file
whose reader finds some frames at a second try, behind later ones.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvila.errors import LongVILAError
from longvila.media.video import open_video

#: Half-open ranges of frames.
Ranges = Sequence[tuple[int, int]]
ToPixels = Callable[[NDArray[np.uint8]], Tensor]
_AHEAD = 2


class MissingFrames(LongVILAError):  # says what there is, is always handled
    """Frames that a prompt counts on cannot be decoded.

    Args:
        name: The video.
        indices: Their numbers in the file.
    """

    def __init__(self, name: str, indices: Sequence[int]) -> None:
        super().__init__(f"{name}: frames {list(indices)[:8]} cannot be decoded")
        self.name, self.indices = name, tuple(int(index) for index in indices)


@runtime_checkable
class FrameSource(Protocol):
    """Pixels of one or more items of a kind, given when asked for.

    Attributes:
        num_frames: F, entries of the first dimension of all pixels.
    """

    num_frames: int

    def stream(self, ranges: Ranges, *, batch: int | None) -> Iterator[Tensor]:
        """Give some frames.

        Args:
            ranges: Which, ascending.
            batch: Frames to give at once; None for any number.

        Returns:
            Pieces ``(n, ...)`` that follow one another without gaps.
        """
        ...


class TensorFrames:
    """Pixels that are in memory.

    Args:
        pixels: ``(F, ...)``.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.num_frames = pixels, pixels.shape[0]

    def stream(self, ranges: Ranges, *, batch: int | None) -> Iterator[Tensor]:
        """Give views; see `FrameSource.stream`."""
        for start, stop in ranges:
            if start < stop:
                yield self.pixels[start:stop]


class JoinedFrames:
    """Sources behind one another, as a prompt has its items.

    Args:
        sources: Of each item.
    """

    def __init__(self, sources: Sequence[FrameSource]) -> None:
        self.sources = list(sources)
        self.num_frames = sum(source.num_frames for source in self.sources)

    def stream(self, ranges: Ranges, *, batch: int | None) -> Iterator[Tensor]:
        """Give frames of one source after the other; see `FrameSource.stream`."""
        base = 0
        for source in self.sources:
            end = base + source.num_frames
            own = [(max(a, base) - base, min(b, end) - base) for a, b in ranges]
            own = [(a, b) for a, b in own if a < b]
            if own:
                yield from source.stream(own, batch=batch)
            base = end


class VideoFrames:
    """Sampled frames of a video that is decoded each time it is streamed.

    Args:
        source: What `longvila.media.video.open_video` takes.
        name: The video, for messages.
        indices: ``(F,)`` frame numbers in the order sampled; may repeat.
        to_pixels: Makes pixel values ``(n, 3, height, width)`` of ``(n, H, W, 3)`` uint8.
        size: (height, width) to resize to while decoding; None keeps the video's.
        device: Where the pixels will go; decides whether a thread decodes.
        dtype: Type of the pixels; None leaves them.
        options: Of `longvila.media.video.open_video`.
        on_decoded: Called with the frames of a stream that are decoded, and all of them.
        background: Whether a thread decodes; None for on a GPU only.
    """

    def __init__(
        self,
        source: Any,
        name: str,
        indices: NDArray[np.int64],
        to_pixels: ToPixels,
        *,
        size: tuple[int, int] | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
        options: dict[str, Any] | None = None,
        on_decoded: Callable[[int, int], None] | None = None,
        background: bool | None = None,
    ) -> None:
        self.hold = bool((np.diff(indices) < 0).any())
        self.source, self.name, self.indices = source, name, indices
        self.to_pixels, self.size = to_pixels, size
        self.device, self.dtype = device, dtype
        self.options = dict(options or {})
        self.on_decoded = on_decoded
        self.background = device.type == "cuda" if background is None else background

    @property
    def num_frames(self) -> int:
        """F, sampled frames."""
        return len(self.indices)

    def stream(self, ranges: Ranges, *, batch: int | None) -> Iterator[Tensor]:
        """Decode frames; see `FrameSource.stream`.

        Raises:
            MissingFrames: When one cannot be decoded.
        """
        pieces = self._pieces(ranges, batch or 16)
        return in_background(pieces, _AHEAD) if self.background else pieces

    def _pieces(self, ranges: Ranges, batch: int) -> Iterator[Tensor]:
        asked = np.concatenate([self.indices[start:stop] for start, stop in ranges])
        images: list[NDArray[np.uint8]] = []
        for image in self._decode(asked):
            images.append(image)
            if len(images) == batch:
                yield self._finish(images)
                images = []
        if images:
            yield self._finish(images)

    def _decode(self, asked: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        distinct, repeats = np.unique(asked, return_counts=True)
        expected = zip(distinct.tolist(), repeats.tolist(), strict=True)
        with open_video(self.source, **self.options) as reader:
            frames = reader.frames(distinct.tolist(), size=self.size)
            if self.hold:
                held = {frame.index: frame.image for frame in frames}
                if lost := [index for index in distinct.tolist() if index not in held]:
                    raise MissingFrames(self.name, lost)
                for done, index in enumerate(asked.tolist(), start=1):
                    self._report(done, len(asked))
                    yield held[index]
                return
            done = 0
            for frame in frames:
                index, times = next(expected)
                if frame.index != index:
                    raise MissingFrames(self.name, [index])
                done += times
                self._report(done, len(asked))
                for _ in range(times):
                    yield frame.image
        if lost := [index for index, _ in expected]:
            raise MissingFrames(self.name, lost)

    def _report(self, done: int, total: int) -> None:
        if self.on_decoded is not None:
            self.on_decoded(done, total)

    def _finish(self, images: list[NDArray[np.uint8]]) -> Tensor:
        pixels = self.to_pixels(np.stack(images))
        if self.dtype is not None:
            pixels = pixels.to(self.dtype)
        return pixels.pin_memory() if self.device.type == "cuda" else pixels

    def find_missing(self, part: int = 0, parts: int = 1) -> list[int]:
        """Decode everything and return the numbers of frames that fail.

        If none does, a frame came late: from now on frames are held, and put in order.

        Args:
            part: Which part of the frames this process looks at.
            parts: Into how many they are cut.
        """
        distinct = np.unique(self.indices)
        distinct = distinct[len(distinct) * part // parts : len(distinct) * (part + 1) // parts]
        with open_video(self.source, **self.options) as reader:
            found = [frame.index for frame in reader.frames(distinct.tolist(), size=self.size)]
        self.hold = self.hold or found != sorted(found)
        return [index for index in distinct.tolist() if index not in set(found)]


class _Failed:
    """What a thread raised, on its way to whoever reads."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def in_background(pieces: Iterable[Tensor], ahead: int) -> Iterator[Tensor]:
    """Draw from an iterator in a thread.

    Args:
        pieces: Drawn by the thread alone.
        ahead: Pieces that wait at most.

    Returns:
        The same pieces; what the thread raises is raised here. Closing it ends the thread.
    """
    waiting: queue.Queue[Any] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()
    done = object()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for piece in pieces:
                if not put(piece):
                    break
            else:
                put(done)
        except BaseException as error:  # raised by the reader
            put(_Failed(error))
        finally:
            if hasattr(pieces, "close"):
                pieces.close()

    thread = threading.Thread(target=work, name="longvila-frames", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not done:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
