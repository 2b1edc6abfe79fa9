"""How frames are chosen and sized for a model, whatever its family.

LongVILA's processor has a part that samples videos and squares pictures, and what serves, asks and
measures is built on it. Processors of other families want frames that are decoded already, and
sizes they choose themselves; `FamilySampler` stands beside them with the same few methods, so that
nobody else has to ask which family a model is of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from PIL import Image
from torch import Tensor

from longvila.errors import ModelError
from longvila.media.video import SampledVideo, read_frames
from longvila.model.processing_longvila import LongVILAProcessor

#: Side of a frame in pixels where a film is drawn for a model that takes any size.
FRAME_SIDE = 448
#: Frames of a video where neither the user nor the processor says.
NUM_FRAMES = 32


class Sampler(Protocol):
    """Chooses and sizes frames.

    Attributes:
        num_frames: Frames of a video where nobody says; None with ``fps``.
        fps: Frames a second where nobody says.
        short: What a video gives that has fewer.
        height_width: Size of a frame of a film that is put together here.
        image_aspect_ratio: ``"pad"`` if frames are padded to that size.
    """

    num_frames: Any
    fps: Any
    short: Any
    image_aspect_ratio: Any

    @property
    def height_width(self) -> tuple[int, int]:
        """Size of a frame."""
        ...

    def sample(self, video: Any, **options: Any) -> SampledVideo:
        """Choose and decode frames; options as of `longvila.media.video.read_frames`."""
        ...

    def square(self, image: Image.Image) -> Image.Image:
        """Bring a picture to the size of a frame."""
        ...


class FamilySampler:
    """Samples videos for a processor of transformers' own.

    Args:
        processor: What AutoProcessor gives.

    Raises:
        ModelError: If it has no part for videos.
    """

    short: Literal["all"] = "all"
    image_aspect_ratio = "resize"

    def __init__(self, processor: Any) -> None:
        part = getattr(processor, "video_processor", None)
        if part is None:
            raise ModelError(
                f"{type(processor).__name__} has no video processor; the model sees no video, or "
                "its processor needs a package that is not installed (torchvision)"
            )
        self.num_frames: int | None = getattr(part, "num_frames", None)
        self.fps: float | None = getattr(part, "fps", None)
        if self.num_frames is None and self.fps is None:
            self.num_frames = NUM_FRAMES
        self._size = _frame_size(part)

    @property
    def height_width(self) -> tuple[int, int]:
        """Size of a frame that is drawn or resized before the processor has it."""
        return self._size

    def sample(
        self,
        video: Any,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        indices: Any = None,
        timestamps_s: Any = None,
        **options: Any,
    ) -> SampledVideo:
        """Choose and decode frames.

        Args:
            video: Whatever `longvila.media.video.open_video` takes; frames that were sampled before
                stay what they are.
            num_frames: Frames; with ``fps``, at most so many; None as the processor says.
            fps: Frames a second.
            indices: Frames by number instead.
            timestamps_s: Frames on screen at these seconds instead.
            **options: Of `longvila.media.video.read_frames`.

        Returns:
            The frames, in their own size.

        Raises:
            VideoError: If the video gives no frame.
        """
        if isinstance(video, SampledVideo):
            return video
        if indices is not None or timestamps_s is not None:
            return read_frames(video, indices=indices, timestamps_s=timestamps_s, **options)
        if num_frames is None and fps is None:
            num_frames, fps = self.num_frames, self.fps
        return read_frames(video, num_frames=num_frames, fps=fps, short=self.short, **options)

    def square(self, image: Image.Image) -> Image.Image:
        """Bring a picture to the size of a frame."""
        height, width = self._size
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def _frame_size(part: Any) -> tuple[int, int]:
    """The processor's own size, or a square of whole blocks that it leaves as it is."""
    size: Mapping[str, Any] = dict(part.size or {})
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    block = (getattr(part, "patch_size", None) or 14) * (getattr(part, "merge_size", None) or 1)
    most = size.get("longest_edge")
    side = FRAME_SIDE if most is None else min(FRAME_SIDE, math.isqrt(int(most)))
    side = max(side // block, 1) * block
    return side, side


def sampler_of(processor: Any) -> Sampler:
    """Return what chooses and sizes frames for a model.

    Args:
        processor: The model's.
    """
    if isinstance(processor, LongVILAProcessor):
        part: Sampler = processor.video_processor
        return part
    return FamilySampler(processor)


def tiles_of(processor: Any, picture: Image.Image, *, tiled: bool) -> Tensor | None:
    """Return the pixel values of a picture's tiles.

    Args:
        processor: The model's.
        picture: The picture.
        tiled: Whether it may be cut into tiles.

    Returns:
        ``(tiles, 3, h, w)``; None where the processor makes them when the prompt is written.
    """
    if not isinstance(processor, LongVILAProcessor):
        return None
    out = processor.image_processor([picture], dynamic=[tiled], return_tensors="pt")
    tiles: Tensor = out["pixel_values"]
    return tiles
