"""Frames come in order, when asked for, and what cannot be decoded is named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longvila.inference.frames import (
    FrameSource,
    JoinedFrames,
    MissingFrames,
    TensorFrames,
    VideoFrames,
    in_background,
)
from longvila.media.synthetic import clip, damage
from longvila.media.video import read_frames


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("frames") / "film.mp4", 30)


def source(path: Path, indices: list[int], **options: Any) -> VideoFrames:
    return VideoFrames(
        str(path), path.name, np.asarray(indices), torch.from_numpy,
        size=(16, 24), device=torch.device("cpu"), **options,
    )  # fmt: skip


def expected(path: Path, indices: list[int]) -> Tensor:
    return torch.from_numpy(read_frames(path, indices=indices, size=(16, 24)).frames)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("batch", [1, 4, None])
def test_ranges_of_sampled_frames(film: Path, batch: int | None, background: bool) -> None:
    indices = [0, 3, 3, 3, 9, 12, 20, 20, 29]
    steps: list[tuple[int, int]] = []
    frames = source(
        film, indices, background=background, on_decoded=lambda *step: steps.append(step)
    )
    assert isinstance(frames, FrameSource) and frames.num_frames == 9
    pieces = list(frames.stream([(1, 3), (5, 9)], batch=batch))
    assert torch.equal(torch.cat(pieces), expected(film, [3, 3, 12, 20, 20, 29]))
    assert max(len(piece) for piece in pieces) <= (batch or 16)
    assert steps[-1] == (6, 6)


def test_frames_in_an_order_that_is_not_the_videos(film: Path) -> None:
    indices = [9, 2, 9, 5]
    frames = source(film, indices)
    assert torch.equal(torch.cat(list(frames.stream([(0, 4)], batch=3))), expected(film, indices))


def test_items_lie_behind_one_another(film: Path) -> None:
    first, last = torch.zeros(2, 16, 24, 3, dtype=torch.uint8), torch.ones(3, 16, 24, 3)
    joined = JoinedFrames([TensorFrames(first), source(film, [4, 8]), TensorFrames(last.byte())])
    whole = torch.cat([first, expected(film, [4, 8]), last.byte()])
    assert joined.num_frames == 7
    for ranges in ([(0, 7)], [(1, 3)], [(0, 1), (3, 6)], [(2, 2), (6, 7)]):
        asked = [n for a, b in ranges for n in range(a, b)]
        assert torch.equal(torch.cat(list(joined.stream(ranges, batch=2))), whole[asked])


@pytest.mark.parametrize("background", [False, True])
def test_a_frame_that_cannot_be_decoded_is_named(tmp_path: Path, background: bool) -> None:
    path = clip(tmp_path / "hit.mp4", 30, codec="mjpeg", pixel_format="yuvj420p")
    content = path.read_bytes()
    starts = [i for i in range(len(content)) if content[i : i + 3] == b"\xff\xd8\xff"]
    damage(path, starts[10] / len(content), starts[12] / len(content))
    frames = source(path, list(range(30)), background=background)
    with pytest.raises(MissingFrames) as caught:
        list(frames.stream([(0, 30)], batch=4))
    missing = frames.find_missing()
    assert len(missing) == 2 and caught.value.indices[0] == missing[0]
    assert sorted(frames.find_missing(0, 2) + frames.find_missing(1, 2)) == missing


def test_a_thread_ends_with_its_reader_and_hands_errors_on() -> None:
    closed = threading.Event()

    def pieces() -> Iterator[Tensor]:
        try:
            for number in range(1000):
                yield torch.tensor([number])
        finally:
            closed.set()

    stream = in_background(pieces(), 2)
    assert int(next(stream)) == 0
    stream.close()  # type: ignore[attr-defined]
    assert closed.wait(30)

    def failing() -> Iterator[Tensor]:
        yield torch.zeros(1)
        raise KeyError("decoder")

    stream = in_background(failing(), 2)
    next(stream)
    with pytest.raises(KeyError, match="decoder"):
        next(stream)
