"""What families of models make of pictures and frames: shapes from sizes, pixels from a stretch.

    GridCodec     Qwen2.5-VL, Qwen3-VL      patches in a grid; a step holds two frames
    TileCodec     InternVL                  tiles of one size; a frame is a tile
    AnyResCodec   LLaVA-OneVision           frames, and images in tiles of any arrangement

1. `MediaCodec.video` says from a number of frames and their size what they will be, before one is
   decoded: the processor's own resizing runs on tensors without data.
2. `MediaCodec.video_pixels` decodes the frames of some entries and has the processor make pixels of
   them, a few at a time. Frames do not mix but within a unit, so pieces are those of the whole.
3. `MediaCodec.images` runs the image processor, since only it knows how it cuts a picture.

A codec for another family says the same three things; add it to `CODECS`. It does not know samples,
text or ranks.

Dimension legend: F frames, P patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from longvila.data.encode import Document, PlannedMedia
from longvila.errors import VideoError
from longvila.media.video import read_frames

#: Frames that are decoded and turned into pixels at once.
_FRAMES_AT_ONCE = 32


@dataclass(frozen=True)
class Shape:
    """What a medium will be.

    Attributes:
        count: Entries of the pixels that it takes.
        shape: What the plan is told about it; None for ``count``.
        inputs: What the processor's text is made from.
        more: What else is to be known of it.
    """

    count: int
    shape: Any
    inputs: Mapping[str, Any]
    more: Any = None


class MediaCodec(ABC):
    """What a family makes of media; see `GridCodec`, `TileCodec` and `AnyResCodec`.

    Args:
        processor: The family's processor.
    """

    #: Names of pixels and of what describes items, by kind; and the kind of each kind of medium.
    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {}
    kind_of: ClassVar[Mapping[str, str]] = {"image": "image", "video": "video"}

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    @abstractmethod
    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what the pictures of one sample will be."""

    @abstractmethod
    def video(self, frames: int, height: int, width: int) -> Shape:
        """Say what so many frames of a size will be."""

    @abstractmethod
    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return the pixels of a picture."""

    @abstractmethod
    def video_pixels(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        """Return some entries of a video's pixels."""

    def describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Return what the model is told about all media beside pixels."""
        return {
            self.kinds[kind][1]: torch.tensor(each, dtype=torch.int64)
            for kind, each in counts.items()
        }

    def _frames(self, planned: PlannedMedia, wanted: Sequence[int]) -> Tensor:
        """``(F, 3, height, width)`` uint8 frames of a video by their place among the chosen."""
        assert planned.indices is not None
        indices = [int(planned.indices[n]) for n in wanted]
        video = read_frames(planned.media.source, indices=indices)
        if len(video.indices) != len(indices):
            raise VideoError(
                f"{planned.media.name}: frames {list(video.missing)[:5]} cannot be decoded"
            )
        return torch.from_numpy(np.ascontiguousarray(video.frames)).permute(0, 3, 1, 2)

    def _whole(self, frames: Tensor, **options: Any) -> Any:
        return self.processor.video_processor(
            videos=[frames], do_sample_frames=False, return_tensors="pt", **options
        )


class GridCodec(MediaCodec):
    """Qwen2.5-VL and Qwen3-VL: patches in a grid of steps, rows and columns."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }

    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what pictures will be."""
        found = []
        for picture in pictures:
            out = self.processor.image_processor(images=[picture], return_tensors="pt")
            grid = tuple(out["image_grid_thw"][0].tolist())
            found.append(Shape(int(np.prod(grid)), grid, {"image_grid_thw": torch.tensor(grid)}))
        return found

    def video(self, frames: int, height: int, width: int) -> Shape:
        """Say what frames will be: the processor resizes tensors without data."""
        from transformers.image_utils import SizeDict

        part = self.processor.video_processor
        size = part.size if isinstance(part.size, SizeDict) else SizeDict(**part.size)
        step = part.temporal_patch_size
        resized = part.resize(
            torch.empty(1, max(frames, step), 3, height, width, device="meta"),
            size,
            part.resample,
            factor=part.patch_size * part.merge_size,
            temporal_factor=step,
            cap_pixels_per_frame=bool(getattr(part, "cap_pixels_per_frame", None)),
        )
        rows, columns = (n // part.patch_size for n in resized.shape[-2:])
        grid = (-(-frames // step), rows, columns)
        return Shape(int(np.prod(grid)), grid, {"video_grid_thw": torch.tensor(grid)})

    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return ``(P, values)``."""
        out = self.processor.image_processor(images=[picture], return_tensors="pt")
        pixels: Tensor = out["pixel_values"]
        return pixels

    def video_pixels(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        """Return ``(stop - start, values)``: whole steps, each of its own frames."""
        from transformers.image_utils import SizeDict
        from transformers.video_processing_utils import BaseVideoProcessor

        assert planned.indices is not None
        part = self.processor.video_processor
        _, rows, columns = planned.shape
        step, per_step = part.temporal_patch_size, rows * columns
        size = SizeDict(height=rows * part.patch_size, width=columns * part.patch_size)
        pieces = []
        for first in range(start // per_step, stop // per_step, _FRAMES_AT_ONCE // step):
            last = min(first + _FRAMES_AT_ONCE // step, stop // per_step)
            wanted = [min(n, len(planned.indices) - 1) for n in range(first * step, last * step)]
            frames = self._frames(planned, wanted)
            # As the whole video would be: its own size may depend on all of its frames.
            frames = BaseVideoProcessor.resize(part, frames, size, part.resample)
            pieces.append(self._whole(frames, do_resize=False)["pixel_values_videos"])
        return torch.cat(pieces)

    def describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Return grids, and the seconds between steps of each video where the model wants them."""
        found = super().describe(documents, counts)
        seconds = [
            media.more
            for document in documents
            for media in document.media
            if media.more is not None
        ]
        if seconds and "second_per_grid_ts" in self.processor.model_input_names:
            found["second_per_grid_ts"] = torch.tensor(seconds)
        return found


class TileCodec(MediaCodec):
    """InternVL: tiles of one size; a frame is a tile, and all are images to the model."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {"image": ("pixel_values", "image_num_tiles")}
    kind_of: ClassVar[Mapping[str, str]] = {"image": "image", "video": "image"}

    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what pictures will be."""
        counts = [len(self.image_pixels(picture)) for picture in pictures]
        return [Shape(count, None, {"num_patches": count}) for count in counts]

    def video(self, frames: int, height: int, width: int) -> Shape:
        """Say what frames will be."""
        blank = torch.empty(frames, 3, 1, 1, device="meta")
        return Shape(frames, None, {"pixel_values_videos": blank})

    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return ``(tiles, 3, height, width)``."""
        out = self.processor.image_processor(
            images=[picture], crop_to_patches=True, return_tensors="pt"
        )
        pixels: Tensor = out["pixel_values"]
        return pixels

    def video_pixels(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        """Return ``(stop - start, 3, height, width)``."""
        pieces = []
        for first in range(start, stop, _FRAMES_AT_ONCE):
            frames = self._frames(planned, range(first, min(first + _FRAMES_AT_ONCE, stop)))
            pieces.append(self._whole(frames)["pixel_values_videos"][0])
        return torch.cat(pieces)


class AnyResCodec(TileCodec):
    """LLaVA-OneVision: an image that is alone is cut into tiles, frames are not."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "image": ("pixel_values", "image_sizes"),
        "video": ("pixel_values_videos", "video_num_frames"),
    }
    kind_of: ClassVar[Mapping[str, str]] = MediaCodec.kind_of

    def images(self, pictures: Sequence[Image.Image]) -> list[Shape]:
        """Say what pictures will be."""
        if not pictures:
            return []
        alone = len(pictures) == 1
        found = []
        for picture in pictures:
            out = self.processor.image_processor(images=[picture], return_tensors="pt")
            size = out["image_sizes"][0].tolist()
            tiles = len(out["pixel_values"][0]) if alone else 1
            blank = torch.empty(out["pixel_values"][0].shape, device="meta")
            inputs = {
                "image_sizes": torch.tensor(size), "pixel_values": blank,
                "batch_num_images": len(pictures),
            }  # fmt: skip
            found.append(Shape(tiles, (*size, int(alone)), inputs))
        return found

    def image_pixels(self, picture: Image.Image) -> Tensor:
        """Return ``(tiles, 3, height, width)``, the whole picture first."""
        out = self.processor.image_processor(images=[picture], return_tensors="pt")
        pixels: Tensor = out["pixel_values"][0]
        return pixels

    def describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Return sizes and frames, and how many images each document has."""
        found = super().describe(documents, counts)
        if "image" in counts:
            found["image_sizes"] = found["image_sizes"][:, :2]
            numbers = [sum(m.media.kind == "image" for m in d.media) for d in documents]
            found["batch_num_images"] = torch.tensor([n for n in numbers if n])
        return found


#: How media are read, by the model type of a configuration; further families may be added.
CODECS: dict[str, type[MediaCodec]] = {
    "qwen2_5_vl": GridCodec,
    "qwen3_vl": GridCodec,
    "internvl": TileCodec,
    "llava_onevision": AnyResCodec,
}
