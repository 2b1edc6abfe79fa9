"""Media of a request: opened, bounded, sampled, and known by their content.

1. The gate opens what is named; its first bytes, size, duration and pixels are checked before
   frames are decoded, and the number of frames before any of them is.
2. Frames are sampled and decoded as `longvila ask` does, and stay bytes: pixel values of a frame
   are made when the model reads it, a slice of the prompt at a time.
3. Each frame has a digest of its pixels under a key of this process. The digests stand for the
   media when prompts are compared: two clients that send the same clip share its cache, and nobody
   can prepare a clip whose digests are another's.

Decoded frames are kept under a bound of bytes, by the file's identity or the digest of its bytes,
and what was asked for. Cost of a repeated file: a look at its status; of repeated bytes: a digest.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longvila.errors import VideoError
from longvila.inference.serving.access import Gate, Opened
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.formats import (
    check_duration,
    check_pixels,
    check_video,
    open_picture,
)
from longvila.inference.serving.lru import WeightedLRU
from longvila.inference.serving.settings import Limits
from longvila.inference.sight import FamilySampler, sampler_of, tiles_of
from longvila.media.image import load_image
from longvila.media.reader import VideoMetadata
from longvila.media.sources import Limits as SourceLimits
from longvila.media.video import SampledVideo, open_video

#: Called with (stage, done, total); raises to stop.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """A medium as a request names it.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        url: What is named.
        num_frames: Frames of a video; with ``fps``, at most so many.
        fps: Frames a second.
        tiled: Whether an image may be cut into tiles.
    """

    kind: Literal["image", "video"]
    url: str
    num_frames: int | None = None
    fps: float | None = None
    tiled: bool = False


@dataclass(frozen=True, eq=False)
class Medium:
    """A medium that the model can read.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        count: Frames of a video, tiles of an image.
        digests: Of each frame, or one for each tile of an image; negative.
        whole: A digest of all frames together; negative.
        video: The sampled video.
        tiles: Pixel values of an image's tiles; None where the processor makes them later.
        picture: The image where it has no tiles yet.
        tiled: Whether the image went through tiling.
    """

    kind: Literal["image", "video"]
    count: int
    digests: NDArray[np.int64]
    whole: int
    video: SampledVideo | None = None
    tiles: Tensor | None = None
    picture: Any = None
    tiled: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of what is held."""
        if self.video is not None:
            return int(self.video.frames.nbytes)
        if self.tiles is None:
            return 3 * int(self.picture.width) * int(self.picture.height)
        return self.tiles.numel() * self.tiles.element_size()

    @property
    def timestamps_s(self) -> list[float]:
        """When each frame of a video appears."""
        return [] if self.video is None else [float(t) for t in self.video.timestamps_s]


class MediaLoader:
    """Loads media, and keeps those that were used last.

    Args:
        processor: The model's processor.
        gate: Opens what requests name.
        limits: Bounds.
        frames: Frames sampled where a request does not say; None as the processor says.
        cache_bytes: Decoded frames that are kept.
    """

    def __init__(
        self, processor: Any, gate: Gate, limits: Limits, *, frames: int | None, cache_bytes: int
    ) -> None:
        self.processor, self.gate, self.limits, self.frames = processor, gate, limits, frames
        self.sampler = sampler_of(processor)
        #: Whether frames are small as soon as they are decoded.
        self.resizes = not (
            isinstance(self.sampler, FamilySampler) or self.sampler.image_aspect_ratio == "pad"
        )
        self.kept: WeightedLRU[tuple[Any, ...], Medium] = WeightedLRU(cache_bytes)
        self._secret = secrets.token_bytes(32)

    def load(
        self,
        wanted: Wanted,
        *,
        frames_left: int | None = None,
        deadline: float | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> Medium:
        """Load one medium.

        Args:
            wanted: What is named.
            frames_left: Frames that the request may still have.
            deadline: When to give up, on the monotonic clock.
            progress: Called while decoding goes on.

        Returns:
            The medium.

        Raises:
            RequestError: If it is refused or cannot be read.
        """
        left = self.limits.frames if frames_left is None else frames_left
        if deadline is None:
            deadline = time.monotonic() + self.limits.media_s

        def report(done: int, total: int) -> None:
            if time.monotonic() > deadline:
                raise RequestError(
                    f"decoding took longer than {self.limits.media_s:.0f} s; ask for fewer frames",
                    code="media_timeout",
                )
            progress("decode", done, total)

        timeout_s = max(0.1, deadline - time.monotonic())
        with self.gate.open(
            wanted.url, timeout_s=timeout_s, check=lambda: progress("fetch", 0, 1)
        ) as opened:
            key = (self._source_key(opened), replace(wanted, url=""))
            medium = self.kept.get(key)
            if medium is not None:
                self._check_frames(medium.count if medium.kind == "video" else 0, left, None)
                return medium
            if wanted.kind == "image":
                medium = self._image(opened, wanted)
            else:
                medium = self._video(opened, wanted, left, report)
            opened.check()
        self.kept.put(key, medium, medium.num_bytes)
        return medium

    def _source_key(self, opened: Opened) -> Any:
        if opened.identity is not None:
            return opened.identity
        if isinstance(opened.source, bytes):
            return self._digest(opened.source).digest()
        with opened.source.open("rb") as file:
            return hashlib.file_digest(file, self._digest).digest()

    def _digest(self, data: Any = b"") -> Any:
        return hashlib.blake2b(data, digest_size=16, key=self._secret)

    def number(self, *data: Any) -> int:
        """A negative number that stands for some pixels."""
        whole = self._digest()
        for part in data:
            whole.update(part)
        return -1 - (int.from_bytes(whole.digest()[:8], "little") >> 1)

    # ---- images

    def _image(self, opened: Opened, wanted: Wanted) -> Medium:
        picture = open_picture(opened.source, opened.name, self.limits)
        tiles = tiles_of(self.processor, picture, tiled=wanted.tiled)
        if tiles is None:
            picture = load_image(picture)
            number = self.number(repr(picture.size).encode(), np.asarray(picture))
            return Medium("image", 1, np.array([number], np.int64), number, picture=picture)
        number = self.number(np.ascontiguousarray(tiles.float().numpy()))
        return Medium(
            "image",
            tiles.shape[0],
            np.full(tiles.shape[0], number, np.int64),
            number,
            tiles=tiles,
            tiled=wanted.tiled,
        )

    # ---- videos

    def _video(
        self, opened: Opened, wanted: Wanted, left: int, report: Callable[[int, int], None]
    ) -> Medium:
        check_video(opened.source, opened.name, self.limits)
        report(0, 1)
        num_frames, fps = wanted.num_frames, wanted.fps
        part = self.sampler
        if num_frames is None and fps is None:
            num_frames, fps = self.frames, None
            if num_frames is None:
                num_frames, fps = part.num_frames, part.fps
        local = SourceLimits(allow_http=False, max_bytes=self.limits.media_bytes)
        try:
            with open_video(opened.source, limits=local) as reader:
                metadata = reader.metadata
            check_pixels(metadata.width, metadata.height, opened.name, self.limits)
            check_duration(metadata.duration_s, opened.name, self.limits)
            # Estimated first: a list of what was asked for may itself be too large.
            most = _most_frames(metadata, num_frames, fps, part.short)
            self._check_frames(most, left, metadata.duration_s)
            if not self.resizes:
                self._check_bytes(most * metadata.width * metadata.height * 3, opened.name)
            video: SampledVideo = part.sample(
                opened.source, num_frames=num_frames, fps=fps, progress=report, limits=local
            )
        except VideoError as fault:
            message = str(fault)
            if isinstance(opened.source, Path):
                message = message.replace(str(opened.source), opened.name)
            raise RequestError(message, code="invalid_media") from fault
        # The shape counts: a black frame that lies has the bytes of one that stands, but is padded
        # elsewhere.
        shape = repr(video.frames.shape[1:]).encode()
        each = [self.number(shape, np.ascontiguousarray(frame)) for frame in video.frames]
        digests = np.array(each, np.int64)
        return Medium("video", len(digests), digests, self.number(digests), video=video)

    def _check_frames(self, count: int, left: int, duration_s: float | None) -> None:
        if count > left:
            advice = "" if not duration_s else f" (fps of at most {left / duration_s:.3g})"
            raise RequestError(
                f"{count} frames of a video, {left} of the {self.limits.frames} frames that a "
                f"request may have are left; ask for fewer: num_frames, or a lower fps{advice}",
                code="too_many_frames",
                param="num_frames",
            )

    def _check_bytes(self, size: int, name: str) -> None:
        if size > self.limits.decoded_bytes:
            raise RequestError(
                f"{name}: its frames have {size} bytes, at most {self.limits.decoded_bytes} are "
                "taken; ask for fewer (num_frames, fps), or scale it down",
                code="too_many_frames",
                param="num_frames",
            )

    # ---- what the model reads

    def pixels(self, medium: Medium, start: int, stop: int) -> Tensor:
        """Return pixel values of some frames of a video."""
        assert medium.video is not None
        part = replace(medium.video, frames=medium.video.frames[start:stop])
        pixels: Tensor = self.processor.video_processor.frame_pixels(part)
        return pixels


def _most_frames(
    metadata: VideoMetadata, num_frames: int | None, fps: float | None, short: str
) -> int:
    """Count the frames that sampling gives, at most one more."""
    if fps is not None:
        count = math.ceil(metadata.duration_s * fps) or 1
        return count if num_frames is None else min(count, num_frames)
    assert num_frames is not None
    return num_frames if short == "repeat" else min(num_frames, metadata.num_frames)
