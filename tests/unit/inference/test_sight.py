"""Frames chosen and sized for processors that are not ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from longvila.errors import ModelError
from longvila.inference.sight import FamilySampler, sampler_of, tiles_of
from longvila.media.synthetic import clip
from longvila.testing.tiny import tiny_processor


def processor(**values: Any) -> Any:
    return SimpleNamespace(video_processor=SimpleNamespace(**{"size": None, **values}))


def test_longvila_samples_itself() -> None:
    ours = tiny_processor()
    assert sampler_of(ours) is ours.video_processor
    tiles = tiles_of(ours, Image.new("RGB", (8, 8)), tiled=False)
    assert tiles is not None and tiles.shape[:2] == (1, 3)
    assert tiles_of(processor(), Image.new("RGB", (8, 8)), tiled=False) is None


def test_frames_have_the_processors_size_or_one_that_it_leaves_alone() -> None:
    assert FamilySampler(processor(size={"height": 12, "width": 20})).height_width == (12, 20)
    qwen = {"patch_size": 14, "merge_size": 2}
    assert FamilySampler(processor(**qwen)).height_width == (448, 448)
    small = FamilySampler(processor(size={"longest_edge": 60 * 60}, **qwen))
    assert small.height_width == (56, 56)
    assert small.square(Image.new("L", (5, 9))).size == (56, 56)


def test_numbers_of_frames_are_the_users_then_the_processors_then_ours(tmp_path: Path) -> None:
    film = str(clip(tmp_path / "film.mp4", 40))
    assert len(FamilySampler(processor()).sample(film).frames) == 32
    own = FamilySampler(processor(num_frames=None, fps=2))
    assert (own.num_frames, own.fps) == (None, 2)
    assert len(FamilySampler(processor(num_frames=6)).sample(film).frames) == 6
    sampled = own.sample(film, num_frames=3)
    assert len(sampled.frames) == 3 and own.sample(sampled) is sampled
    assert own.sample(film, indices=[4, 9]).indices.tolist() == [4, 9]
    by_time = own.sample(film, timestamps_s=[0.0, 1.0]).indices.tolist()
    assert (
        by_time
        == tiny_processor().video_processor.sample(film, timestamps_s=[0.0, 1.0]).indices.tolist()
    )
    assert len(by_time) == 2


def test_a_processor_without_videos_is_refused() -> None:
    with pytest.raises(ModelError, match="no video processor"):
        sampler_of(SimpleNamespace(video_processor=None))
