"""Pictures: every mode becomes the RGB a user would expect, and torch's resize follows PIL's."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from longvila.media.image import (
    ImageError,
    choose_grid,
    dynamic_tiles,
    load_image,
    normalise,
    pad_to_square,
    resize,
    resize_tensor,
)
from longvila.media.video import read_frames


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes with sharp edges and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(2, 30)) * np.cos(y / rng.uniform(2, 30)) for _ in range(3)]
    image = np.stack(waves, -1) * 100 + 128 + rng.normal(0, 12, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def test_sources_of_a_picture(tmp_path: Path) -> None:
    array = photo(20, 30)
    picture = Image.fromarray(array)
    data = saved(picture, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    tensor = torch.from_numpy(array)
    for source in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").as_uri(),
        data,
        io.BytesIO(data),
        picture,
        array,
        tensor,
        tensor.permute(2, 0, 1),
    ):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), array)


def test_modes() -> None:
    array = photo(16, 16)
    rgb = Image.fromarray(array)
    alpha = rgb.copy()
    alpha.putalpha(0)
    # Transparency is dropped, not blended: as the original does.
    assert np.array_equal(np.asarray(load_image(saved(alpha, "PNG"))), array)
    palette = rgb.quantize(16)
    assert np.array_equal(
        np.asarray(load_image(saved(palette, "PNG"))), np.asarray(palette.convert("RGB"))
    )
    for mode in ("L", "LA", "1"):
        other = rgb.convert(mode)
        assert np.array_equal(
            np.asarray(load_image(saved(other, "PNG"))), np.asarray(other.convert("RGB"))
        )
    ink = rgb.convert("CMYK")
    loaded = np.asarray(load_image(saved(ink, "TIFF"))).astype(int)
    assert np.abs(loaded - array).max() <= 2
    assert load_image(array[..., 0]).getpixel((3, 4)) == (array[4, 3, 0],) * 3
    assert load_image(array[..., :1]).getpixel((3, 4)) == (array[4, 3, 0],) * 3
    assert load_image(np.dstack([array, array[..., :1]])).mode == "RGB"


def test_sixteen_bits_are_scaled() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    loaded = np.asarray(load_image(saved(Image.fromarray(levels), "PNG")))
    assert np.array_equal(loaded[..., 0], (levels >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation: int) -> None:
    picture = Image.fromarray(photo(10, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture, "PNG", exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert expected.shape == ((20, 10, 3) if orientation in (5, 6, 7, 8) else (10, 20, 3))
    assert np.array_equal(np.asarray(load_image(data)), expected)


def test_a_damaged_orientation_leaves_the_pixels() -> None:
    picture = Image.fromarray(photo(10, 20))
    data = saved(picture, "WEBP", lossless=True, exif=b"Exif\0\0damaged")
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(picture))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"not a picture", "<13 bytes>: is no picture that PIL can read$"),
        (saved(Image.fromarray(photo(64, 64)), "PNG")[:300], "cannot be read as a picture"),
        ([1, 2], "expected one picture"),
        (np.zeros((4, 4, 2), np.uint8), r"got uint8 of shape \(4, 4, 2\)"),
        (np.zeros((4, 4, 3)), "got float64"),
        (saved(Image.new("F", (4, 4), 0.5), "TIFF"), "has floating-point pixels; save it with 8"),
        ("no/such.png", r"no/such\.png: no such file"),
    ],
)
def test_messages(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_a_picture_opened_by_pil_and_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    file.write_bytes(saved(Image.fromarray(photo(64, 64)), "PNG")[:300])
    with Image.open(file) as picture, pytest.raises(ImageError, match=r"cut\.png: cannot be read"):
        load_image(picture)
    with Image.open(io.BytesIO(file.read_bytes())) as picture:
        got = read_frames([photo(8, 8), picture], indices=[0, 1])
    assert got.indices.tolist() == [0] and got.missing == (1,)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="decompression bomb"):
        load_image(saved(Image.fromarray(photo(20, 20)), "PNG"))


@pytest.mark.parametrize("size", [(224, 224), (384, 384), (17, 250), (480, 640), (500, 500)])
@pytest.mark.parametrize("shape", [(480, 640), (97, 31), (384, 500)])
def test_torch_resize_equals_pil(shape: tuple[int, int], size: tuple[int, int]) -> None:
    frames = np.stack([photo(*shape, seed=seed) for seed in range(2)])
    frames[1] = np.random.default_rng(1).integers(0, 256, frames[1].shape)  # the worst case
    got = resize_tensor(torch.from_numpy(frames), size).numpy()
    for frame, resized in zip(frames, got, strict=True):
        assert np.array_equal(np.asarray(resize(Image.fromarray(frame), size)), resized)


@given(*[st.integers(1, 60)] * 4, st.integers(0, 2**32))
def test_any_torch_resize_of_noise_equals_pil(
    height: int, width: int, new_height: int, new_width: int, seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    size = (new_height, new_width)
    got = resize_tensor(torch.from_numpy(noise)[None], size)[0].numpy()
    assert np.array_equal(np.asarray(resize(Image.fromarray(noise), size)), got)


def test_resize_takes_the_rows_first() -> None:
    # The shape for which Pillow 13 itself goes the other way.
    noise = np.random.default_rng(0).integers(0, 256, (97, 31, 3), dtype=np.uint8)
    picture, bicubic = Image.fromarray(noise), Image.Resampling.BICUBIC
    expected = picture.resize((250, 97), bicubic).resize((250, 17), bicubic)
    assert np.array_equal(np.asarray(resize(picture, (17, 250))), np.asarray(expected))


def test_resize_to_the_same_size_changes_nothing() -> None:
    frames = torch.from_numpy(photo(20, 30))[None]
    assert torch.equal(resize_tensor(frames, (20, 30)), frames)


def test_normalise_equals_the_arithmetic_in_double() -> None:
    frames = photo(9, 7)[None]
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    expected = ((frames / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    got = normalise(frames, mean=mean, std=std)
    assert got.dtype == torch.float32 and got.is_contiguous()
    assert np.allclose(got.numpy(), expected, rtol=0, atol=1e-6)
    assert torch.equal(normalise(torch.from_numpy(frames), mean=mean, std=std), got)
    assert normalise(
        np.array([[[[0, 255, 0]]]], np.uint8), mean=[0.5] * 3, std=[0.5] * 3
    ).tolist() == [[[[-1.0]], [[1.0]], [[-1.0]]]]


def test_arrays_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 4, 4, 3\)"):
        normalise(torch.zeros(1, 4, 4, 3), mean=[0.0] * 3, std=[1.0] * 3)
    with pytest.raises(ValueError, match=r"got torch.uint8 of shape \(1, 3, 4, 4\)"):
        resize_tensor(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2))


@pytest.mark.parametrize("shape", [(10, 21), (21, 10), (7, 7)])
def test_pad_to_square(shape: tuple[int, int]) -> None:
    array = photo(*shape)
    square = np.asarray(pad_to_square(Image.fromarray(array)))
    side = max(shape)
    assert square.shape == (side, side, 3)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    inside = np.s_[top : top + shape[0], left : left + shape[1]]
    assert np.array_equal(square[inside], array)
    assert square.astype(int).sum() == array.astype(int).sum() + 127 * 3 * (
        side * side - shape[0] * shape[1]
    )


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 4), st.integers(0, 10))
def test_the_grid_is_the_closest_one(width: int, height: int, fewest: int, more: int) -> None:
    most = fewest + more
    columns, rows = choose_grid(width, height, 448, min_tiles=fewest, max_tiles=most)
    ratio = width / height
    grids = {
        (c, r) for c in range(1, most + 1) for r in range(1, most + 1) if fewest <= c * r <= most
    }
    assert (columns, rows) in grids
    nearest = min(abs(ratio - c / r) for c, r in grids)
    assert abs(ratio - columns / rows) == nearest
    # Of equal ones: the largest that the picture fills more than half, else the smallest.
    equal = sorted((c * r, c, r) for c, r in grids if abs(ratio - c / r) == nearest)
    filled = [one for one in equal if width * height > 0.5 * 448 * 448 * one[0]]
    assert (columns * rows) == (filled[-1] if filled else equal[0])[0]


def test_tiles_cover_the_picture() -> None:
    picture = Image.fromarray(photo(300, 900))
    tiles = dynamic_tiles(picture, 64, max_tiles=6)
    assert [tile.size for tile in tiles] == [(64, 64)] * 4
    whole = np.asarray(resize(picture, (64, 192)))
    assert np.array_equal(np.hstack([np.asarray(tile) for tile in tiles[:3]]), whole)
    assert np.array_equal(np.asarray(tiles[3]), np.asarray(resize(picture, (64, 64))))
    tall = dynamic_tiles(picture.rotate(90, expand=True), 64, max_tiles=6)
    assert len(tall) == 4
    # A single tile has no thumbnail beside it.
    assert len(dynamic_tiles(Image.fromarray(photo(100, 100)), 448, max_tiles=1)) == 1


def test_grid_limits() -> None:
    with pytest.raises(ValueError, match="min_tiles <= max_tiles, got 4 and 2"):
        choose_grid(10, 10, 448, min_tiles=4, max_tiles=2)


def test_postscript_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match="is PostScript, a program"):
            load_image(source)


def test_a_huge_file_that_is_no_picture_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    with pytest.raises(ImageError, match="no picture"):
        load_image(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()
