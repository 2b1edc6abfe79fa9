"""Frames that are pictures: folders, lists, arrays."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from longvila.errors import VideoError
from longvila.media.synthetic import numbered_frame, read_number
from longvila.media.video import open_video, read_frames


def folder(path: Path, count: int) -> Path:
    path.mkdir()
    for number in range(count):
        Image.fromarray(numbered_frame(number)).save(path / f"frame{number}.png")
    (path / "notes.txt").write_text("not a frame")
    (path / "._frame0.png").write_bytes(b"what macOS leaves beside a copied file")
    return path


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    frames = folder(tmp_path / "frames", 12)
    got = read_frames(frames, num_frames=5)
    # frame10 and frame11 come last, not after frame1.
    assert [read_number(frame) for frame in got.frames] == [0, 3, 6, 8, 11]
    assert got.metadata.backend == "pictures"
    assert got.timestamps_s.tolist() == [0.0, 3.0, 6.0, 8.0, 11.0]


def test_frame_rate_sets_the_clock(tmp_path: Path) -> None:
    frames = folder(tmp_path / "frames", 12)
    got = read_frames(frames, fps=1, frame_rate=4)
    assert got.indices.tolist() == [0, 4, 8]
    assert got.metadata.duration_s == 3.0
    with pytest.raises(ValueError, match="frame_rate must be a positive"):
        open_video(frames, frame_rate=0)


def test_lists_and_arrays_mean_the_same(tmp_path: Path) -> None:
    arrays = [numbered_frame(number) for number in (5, 6, 7)]
    stack = np.stack(arrays)
    sources = [
        arrays,
        tuple(Image.fromarray(array) for array in arrays),
        stack,
        torch.from_numpy(stack),
        torch.from_numpy(stack).permute(0, 3, 1, 2),
    ]
    for source in sources:
        got = read_frames(source, indices=[2, 0])
        assert [read_number(frame) for frame in got.frames] == [7, 5]


def test_pictures_of_another_size_are_fitted_to_the_first(tmp_path: Path) -> None:
    mixed = [numbered_frame(1, 48, 64), numbered_frame(2, 96, 128)]
    got = read_frames(mixed, indices=[0, 1])
    assert got.frames.shape == (2, 48, 64, 3)
    assert [read_number(frame) for frame in got.frames] == [1, 2]


def test_an_unreadable_picture_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = folder(tmp_path / "frames", 4)
    (frames / "frame2.png").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        got = read_frames(frames, indices=range(4))
    assert got.indices.tolist() == [0, 1, 3]
    assert got.missing == (2,)
    assert "frame 2 is unreadable" in caplog.text and "frame2.png" in caplog.text


def test_a_folder_of_broken_pictures(tmp_path: Path) -> None:
    frames = folder(tmp_path / "frames", 2)
    for file in frames.glob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(VideoError, match="none of its 2 pictures is readable"):
        open_video(frames)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list of frames is empty"),
        (np.zeros((4, 4, 3), np.uint8), r"shape \(F, H, W, 3\).*got \(4, 4, 3\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "at least one frame"),
        (np.zeros((2, 4, 4, 3), np.float32), "uint8, 0 to 255; got float32"),
    ],
)
def test_messages(source: object, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        open_video(source)
