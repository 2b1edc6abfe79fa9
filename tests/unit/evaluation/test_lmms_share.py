"""A video decoded in stretches is the video decoded whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from longvila.evaluation.lmms_media import read_video
from longvila.evaluation.lmms_share import Part, Ranks, can_be_shared, own_part, whole
from longvila.media.synthetic import clip, damage
from longvila.media.video import SampledVideo
from longvila.model.video_processing_longvila import LongVILAVideoProcessor
from longvila.testing.ranks import Rank, ranks

SAMPLER = LongVILAVideoProcessor(size={"height": 48, "width": 64}, image_aspect_ratio="resize")


def same(first: SampledVideo, second: SampledVideo) -> None:
    assert np.array_equal(first.frames, second.frames)
    assert first.indices.tolist() == second.indices.tolist()
    assert first.timestamps_s.tolist() == second.timestamps_s.tolist()
    assert first.missing == second.missing
    assert first.metadata.name == second.metadata.name
    assert first.metadata.num_frames == second.metadata.num_frames


@ranks(3)
def test_stretches_make_the_whole(rank: Rank, tmp_path: Path) -> None:
    file = str(tmp_path / "a.mp4")
    if rank.rank == 0:
        clip(file, 20, fps=10, gop=4)
    dist.barrier()
    group = Ranks(dist.group.WORLD, rank.rank, rank.world_size)
    for source, frames, fps in (
        (file, 7, None),
        (file, 2, None),  # fewer than ranks
        (file, 50, None),  # more than the video has
        (file, 50, 4.0),
        ({"path": file, "start_s": 0.5, "end_s": 1.2}, 4, None),
    ):
        joined = whole(own_part(SAMPLER, source, frames, group, fps=fps), group)
        assert isinstance(joined, SampledVideo)
        same(joined, read_video(SAMPLER, source, frames, fps=fps))


@ranks(2)
def test_what_one_rank_cannot_decode_is_missing(rank: Rank, tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    if rank.rank == 0:
        damage(clip(file, 60, gop=10, container_options={"movflags": "faststart"}), 0.55, 0.8)
    dist.barrier()
    group = Ranks(dist.group.WORLD, rank.rank, rank.world_size)
    alone = read_video(SAMPLER, str(file), 12)
    assert alone.missing
    joined = whole(own_part(SAMPLER, str(file), 12, group), group)
    assert isinstance(joined, SampledVideo)
    assert joined.missing == alone.missing and np.array_equal(joined.frames, alone.frames)
    # A rank that lost all of its stretch:
    part = own_part(SAMPLER, str(file), 12, group)
    if rank.rank == 1:
        part = Part(part.metadata, None, part.chosen, "VideoError: none")
    joined = whole(part, group)
    assert isinstance(joined, SampledVideo)
    assert joined.indices.tolist() == [i for i in alone.indices.tolist() if i < 30]


@ranks(2)
def test_no_video_is_the_same_error_everywhere(rank: Rank, tmp_path: Path) -> None:
    group = Ranks(dist.group.WORLD, rank.rank, rank.world_size)
    said = whole(own_part(SAMPLER, str(tmp_path / "none.mp4"), 4, group), group)
    assert isinstance(said, str) and "none.mp4" in said
    everywhere = [None, None]
    dist.all_gather_object(everywhere, said)
    assert everywhere[0] == everywhere[1]


def test_what_can_be_shared() -> None:
    assert can_be_shared("a.mp4") and can_be_shared({"path": "a", "start_s": 0, "end_s": 1})
    assert not can_be_shared({"pictures": ["a.png"]}) and not can_be_shared({"splice": {}})


def test_a_rank_that_alone_cannot_open_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathered(box: list[object], mine: object, group: object = None) -> None:
        box[0], box[1] = mine, (([0], [0.0], (), (2, 2, 3)), (0,), "")

    monkeypatch.setattr(dist, "all_gather_object", gathered)
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(dist, "all_gather", lambda parts, mine, group=None: None)
    with pytest.raises(RuntimeError, match="this one could not: VideoError: odd"):
        whole(Part(None, None, (), "VideoError: odd"), Ranks(None, 0, 2))
