"""Pictures to pixels: loading, resizing, tiling and normalising with PIL, NumPy and torch only.

The way of one picture, as the original implementation has it:

1. ``load_image``: RGB, uint8.
2. ``resize`` (aspect ignored), ``pad_to_square`` then resize, or ``dynamic_tiles``.
3. ``normalise``: scaled to [0, 1], less the mean, over the deviation.

PIL's bicubic filter on uint8, rows before columns, is the reference and the default: that is the
order of every Pillow before 13 and of the pictures the published weights were trained on, while
newer ones take the columns first for some shapes and then differ by a few levels.
``resize_tensor`` gives the same levels with torch, batched and on any device.

What differs from the original: pictures are turned upright by their EXIF orientation, as videos
are by their display matrix; sixteen-bit pictures are scaled to eight bits, where a plain
``convert`` would clip them to white. Transparency is dropped as there: the colour under it shows.

Dimension legend: F frames or tiles, S side of a tile in pixels.
"""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from longvila.errors import LongVILAError
from longvila.media.sources import Limits, resolve

#: Fraction bits of PIL's integer filter weights.
_WEIGHT_BITS = 22
#: What an orientation in EXIF asks for; 1 asks for nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: What PIL raises at a file that is damaged or too large.
_FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageError(LongVILAError, ValueError):
    """A picture could not be read; the message names it."""


def load_image(source: Any, *, limits: Limits | None = None) -> Image.Image:
    """Load a picture as RGB.

    Args:
        source: A path, an address (``file://``, ``http(s)://``, ``data:``), base64, bytes, an open
            binary file, a PIL image, or a uint8 array or tensor of shape (H, W), (H, W, 1),
            (H, W, 3), (H, W, 4) or (3, H, W).
        limits: How far fetching may go.

    Returns:
        The picture, mode RGB.

    Raises:
        ImageError: If it is missing, empty, truncated, or no picture.
        TypeError: If the type is none of those listed.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, getattr(source, "filename", "") or "<picture>")
    if isinstance(source, np.ndarray | Tensor):
        return _from_array(source)
    resolved = resolve(source, limits=limits, error=ImageError)
    try:
        if resolved.pictures is not None:
            raise ImageError(f"{resolved.name}: expected one picture, got a folder or a list")
        try:
            picture = Image.open(resolved.path or io.BytesIO(resolved.data or b""))
        except UnidentifiedImageError as fault:
            raise ImageError(f"{resolved.name}: is no picture that PIL can read") from fault
        except _FAULTS as fault:
            raise ImageError(f"{resolved.name}: cannot be read as a picture: {fault}") from fault
        with picture:
            refuse_programs(picture, resolved.name)
            return _to_rgb(picture, resolved.name)
    finally:
        resolved.close()


def refuse_programs(picture: Image.Image, name: str) -> None:
    """Refuse a picture that PIL, on loading it, would have another program draw.

    Raises:
        ImageError: If it is PostScript.
    """
    if picture.format == "EPS":
        raise ImageError(
            f"{name}: is PostScript, a program that would have to be run; save what it draws as PNG"
        )


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width) with PIL's bicubic filter, ignoring the aspect ratio."""
    height, width = size
    if image.size == (width, height):
        return image
    # Two calls, each in one direction, so that the order does not depend on Pillow's version.
    wide = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return wide.resize((width, height), Image.Resampling.BICUBIC)


def resize_tensor(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames with torch, to the very levels that ``resize`` gives.

    PIL's filter is a sum of a few levels with integer weights, so int32 arithmetic repeats it
    exactly on any device. Worth it for frames that are on a GPU; on a CPU ``resize`` is faster.

    Args:
        frames: uint8, shape (F, H, W, 3), on any device.
        size: (height, width) wanted.

    Returns:
        uint8, shape (F, height, width, 3).
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            "expected uint8 frames of shape (F, H, W, 3), "
            f"got {frames.dtype} of shape {tuple(frames.shape)}"
        )
    return _resample(_resample(frames, 2, size[1]), 1, size[0])


def _resample(frames: Tensor, dim: int, length: int) -> Tensor:
    """Resize one dim of uint8 frames with PIL's bicubic weights."""
    if frames.shape[dim] == length:
        return frames
    places, weights = _bicubic_taps(frames.shape[dim], length)
    shape = [1] * frames.ndim
    shape[dim] = length
    total = torch.full((), 1 << (_WEIGHT_BITS - 1), dtype=torch.int32, device=frames.device)
    for tap in range(places.shape[0]):
        levels = frames.index_select(dim, places[tap].to(frames.device))
        total = total + levels.to(torch.int32) * weights[tap].view(shape).to(frames.device)
    return (total >> _WEIGHT_BITS).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def _bicubic_taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """Source places and weights of each output level, both of shape (taps, new)."""
    scale = old / new
    stretch = max(scale, 1.0)
    center = (np.arange(new) + 0.5) * scale
    first = np.maximum((center - 2 * stretch + 0.5).astype(np.int64), 0)
    stop = np.minimum((center + 2 * stretch + 0.5).astype(np.int64), old)
    taps = np.arange(int((stop - first).max()))[:, None]
    distance = np.abs((taps + first - center + 0.5) / stretch)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    weight = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    weight = np.where(taps + first < stop, weight, 0.0)
    weight /= weight.sum(axis=0)
    whole = np.trunc(weight * (1 << _WEIGHT_BITS) + np.copysign(0.5, weight)).astype(np.int32)
    places = np.minimum(taps + first, old - 1)
    return torch.from_numpy(places), torch.from_numpy(whole)


def normalise(
    frames: Tensor | NDArray[np.uint8],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scale: float = 1 / 255,
) -> Tensor:
    """Turn uint8 frames into the pixel values a vision tower takes.

    Args:
        frames: uint8, shape (F, H, W, 3).
        mean: Mean of each channel, after scaling.
        std: Deviation of each channel, after scaling.
        scale: Factor applied to the levels first.

    Returns:
        Shape (F, 3, H, W), float32.
    """
    pixels = torch.as_tensor(frames)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(
            "expected uint8 frames of shape (F, H, W, 3), "
            f"got {pixels.dtype} of shape {tuple(pixels.shape)}"
        )
    shape = (1, 3, 1, 1)
    middle = torch.tensor(list(mean), dtype=torch.float32, device=pixels.device).view(shape)
    spread = torch.tensor(list(std), dtype=torch.float32, device=pixels.device).view(shape)
    values = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return values.mul_(scale).sub_(middle).div_(spread)


def pad_to_square(
    image: Image.Image, background: tuple[int, int, int] = (127, 127, 127)
) -> Image.Image:
    """Centre a picture on a square of its longer side.

    Source:
        NVlabs/VILA ``llava/mm_utils.py``; the background is the processor's mean, truncated.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def choose_grid(
    width: int, height: int, side: int, *, min_tiles: int = 1, max_tiles: int = 12
) -> tuple[int, int]:
    """Choose how many tiles to cut a picture into, by its aspect ratio.

    Args:
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        side: Of a tile, in pixels.
        min_tiles: Fewest tiles.
        max_tiles: Most tiles.

    Returns:
        (columns, rows): the grid whose aspect ratio is closest; of equal ones the largest that
        the picture fills more than half.

    Source:
        InternVL's rule, as in NVlabs/VILA ``llava/mm_utils.py``.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"expected 1 <= min_tiles <= max_tiles, got {min_tiles} and {max_tiles}")
    grids = [
        (columns, tiles // columns)
        for tiles in range(min_tiles, max_tiles + 1)
        for columns in range(1, tiles + 1)
        if tiles % columns == 0
    ]
    best, smallest = (1, 1), float("inf")
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * side * side * columns * rows
        if distance < smallest or (distance == smallest and fills):
            best, smallest = (columns, rows), distance
    return best


def dynamic_tiles(
    image: Image.Image,
    side: int,
    *,
    min_tiles: int = 1,
    max_tiles: int = 12,
) -> list[Image.Image]:
    """Cut a picture into square tiles that together keep its aspect ratio.

    Args:
        image: The picture, RGB.
        side: Of a tile, in pixels.
        min_tiles: Fewest tiles.
        max_tiles: Most tiles, the whole picture not counted.

    Returns:
        Tiles row by row, each ``side`` x ``side``; after several, the whole picture as one more.

    Source:
        NVlabs/VILA ``llava/mm_utils.py`` (``dynamic``).
    """
    columns, rows = choose_grid(*image.size, side, min_tiles=min_tiles, max_tiles=max_tiles)
    whole = resize(image, (side * rows, side * columns))
    tiles = [
        whole.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
        for y in range(rows)
        for x in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(resize(image, (side, side)))
    return tiles


def turn_upright(picture: Image.Image) -> Image.Image:
    """Return a picture as its EXIF orientation asks; one that stands upright is not copied.

    Args:
        picture: The picture. What is damaged in its EXIF says nothing; the pixels are whole.
    """
    try:
        turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (*_FAULTS, struct.error):
        turn = None
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    try:  # PIL reads a file when its pixels are wanted.
        picture.load()
    except _FAULTS as fault:
        raise ImageError(f"{name}: cannot be read as a picture: {fault}") from fault
    picture = turn_upright(picture)
    if picture.mode == "F":  # What is black and white in it is in no file.
        raise ImageError(f"{name}: has floating-point pixels; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64)
        return Image.fromarray((levels.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _from_array(source: Any) -> Image.Image:
    array = source if isinstance(source, np.ndarray) else source.detach().cpu().numpy()
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    right = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if array.dtype != np.uint8 or not right or 0 in array.shape:
        raise ImageError(
            "an array as a picture is uint8 of shape (H, W), (H, W, 1), (H, W, 3), (H, W, 4) or "
            f"(3, H, W); got {array.dtype} of shape {tuple(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
