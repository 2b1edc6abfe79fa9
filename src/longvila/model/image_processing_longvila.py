"""Images to pixel values: PIL, NumPy and torch only, torchvision is never touched.

1. An image is loaded as RGB and made square: ``resize`` ignores its aspect ratio, ``pad`` centres
   it on the mean colour first, ``dynamic`` cuts it into tiles that keep its ratio and adds a
   thumbnail.
2. PIL's bicubic filter on uint8 is the reference.
3. Levels are scaled, less the mean, over the deviation, in float32.

Every image becomes one or more tiles; ``image_num_tiles`` says how many, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from longvila.media.image import dynamic_tiles, load_image, normalise, pad_to_square, resize
from longvila.model.configuration_longvila import LongVILAConfig

_BICUBIC = 3


class PixelProcessor(BaseImageProcessor):
    """What images and video frames share: the size, the colour statistics, the way to a square.

    Args:
        size: Height and width of what the tower reads, as ``{"height": ..., "width": ...}`` or the
            side of a square.
        image_mean: Mean of each channel after scaling.
        image_std: Deviation of each channel after scaling.
        rescale_factor: Factor applied to the levels first.
        resample: PIL's number of the filter; only bicubic is supported.
        image_aspect_ratio: ``resize``, ``pad`` or ``dynamic``.
        **kwargs: Further keys of a file, kept.
    """

    def __init__(
        self,
        size: dict[str, int] | int | None = None,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        rescale_factor: float = 1 / 255,
        resample: int = _BICUBIC,
        image_aspect_ratio: str = "resize",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size is None:
            size = 384
        if isinstance(size, int):
            size = {"height": size, "width": size}
        if int(resample) != _BICUBIC:
            raise ValueError(f"resample must be {_BICUBIC} (PIL's bicubic), got {resample}")
        if image_aspect_ratio not in ("resize", "pad", "dynamic"):
            raise ValueError(
                'image_aspect_ratio must be "resize", "pad" or "dynamic", got '
                f"{image_aspect_ratio!r}"
            )
        self.size = {"height": int(size["height"]), "width": int(size["width"])}
        self.image_mean = [float(v) for v in image_mean]
        self.image_std = [float(v) for v in image_std]
        self.rescale_factor = float(rescale_factor)
        self.resample = int(resample)
        self.image_aspect_ratio = image_aspect_ratio

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width in pixels of what the tower reads."""
        return self.size["height"], self.size["width"]

    def square(self, image: Image.Image) -> Image.Image:
        """Bring one picture to the tower's size, as one tile."""
        if self.image_aspect_ratio == "pad":
            red, green, blue = (int(255 * v) for v in self.image_mean)
            image = pad_to_square(image, (red, green, blue))
        return resize(image, self.height_width)

    def pixels(self, frames: np.ndarray | Tensor) -> Tensor:
        """Normalise frames.

        Args:
            frames: uint8, shape (F, height, width, 3).

        Returns:
            Pixel values, shape (F, 3, height, width), float32, on the frames' device.
        """
        return normalise(
            frames, mean=self.image_mean, std=self.image_std, scale=self.rescale_factor
        )


class LongVILAImageProcessor(PixelProcessor):
    """Turns images into tiles of pixel values.

    Args:
        min_tiles: Least tiles of a ``dynamic`` image.
        max_tiles: Most tiles of a ``dynamic`` image.
        **kwargs: As for `PixelProcessor`.
    """

    model_input_names = ["pixel_values", "image_num_tiles"]  # noqa: RUF012

    def __init__(self, min_tiles: int = 1, max_tiles: int = 12, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_tiles, self.max_tiles = int(min_tiles), int(max_tiles)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Load an image, or each of a (nested) list, as RGB PIL images.

        Args:
            image_url_or_urls: Whatever `longvila.media.image.load_image` takes.

        Returns:
            The same structure of PIL images.
        """
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        return load_image(image_url_or_urls)

    def tiles(self, image: Image.Image, *, dynamic: bool) -> list[Image.Image]:
        """Cut one picture into tiles.

        Args:
            image: The picture.
            dynamic: Whether it may become several tiles (if the processor's setting says so).

        Returns:
            Tiles of the tower's size.
        """
        if dynamic and self.image_aspect_ratio == "dynamic":
            height, width = self.height_width
            if height != width:
                raise ValueError(f"dynamic tiles are square, the tower reads {height} x {width}")
            return dynamic_tiles(image, height, min_tiles=self.min_tiles, max_tiles=self.max_tiles)
        return [self.square(image)]

    def __call__(  # type: ignore[override]
        self,
        images: Any,
        *,
        dynamic: Sequence[bool] | bool = True,
        return_tensors: Any = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Process images.

        Args:
            images: One image or a (nested) list of them, of any kind `load_image` takes.
            dynamic: Whether images may be tiled, for all or for each (upstream tiles only an image
                that is alone in its prompt).
            return_tensors: Type of the tensors.
            **kwargs: Accepted for the callers in transformers; not used.

        Returns:
            ``pixel_values`` (tiles, 3, height, width) and ``image_num_tiles`` (images,).
        """
        pictures = flatten(self.fetch_images(images))
        allowed = [dynamic] * len(pictures) if isinstance(dynamic, bool) else list(dynamic)
        tiles, counts = [], []
        for picture, may_tile in zip(pictures, allowed, strict=True):
            cut = self.tiles(picture, dynamic=may_tile)
            counts.append(len(cut))
            tiles += [np.asarray(tile) for tile in cut]
        data = {"pixel_values": self.pixels(np.stack(tiles)), "image_num_tiles": counts}
        return BatchFeature(data, tensor_type=return_tensors)

    preprocess = __call__


def flatten(items: Any) -> list[Any]:
    """Return the leaves of nested lists in order; a single object is one leaf."""
    if isinstance(items, list | tuple):
        return [leaf for item in items for leaf in flatten(item)]
    return [items]


AutoImageProcessor.register(
    LongVILAConfig, image_processor_classes={"pil": LongVILAImageProcessor}, exist_ok=True
)
