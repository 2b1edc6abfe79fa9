"""Worker processes give what threads give, to the bit."""

from __future__ import annotations

import gc
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import Listed, text_sample, video_sample

from longvila.data.collate import BrokenMedia, Collator
from longvila.data.datasets import open_dataset
from longvila.data.encode import Document, Encoder, PlannedMedia, Rejected
from longvila.data.families import FamilyCollator
from longvila.data.loader import DataError, PackedLoader
from longvila.data.mixture import Mixture
from longvila.data.sample import Media, Sample, Turn
from longvila.data.workers import Job, Workers, _parts, read_document
from longvila.media.synthetic import clip

BUDGET = 300


def mixture(folder: Path, *more: Sample) -> Mixture:
    image = Media("image", str(folder / "image0.png"))
    album = Sample(
        "a", "all", (Turn("user", (image, image, "Both?")), Turn("assistant", ("Yes.",)))
    )
    clips = [video_sample(folder / f"clip{n % 3}.mp4", n) for n in (1, 2, 3)]
    return Mixture([Listed("all", [*clips, album, text_sample(9, "words"), *more])], seed=2)


def test_a_loader_with_workers_gives_the_batches_of_one_without(
    processor: Any, media_dir: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone.mp4"
    order = mixture(media_dir, video_sample(gone))

    def loader(workers: int) -> PackedLoader:
        coders = Encoder(processor, BUDGET), Collator(processor)
        return PackedLoader(order, *coders, window=4, workers=workers, prefetch=2)

    plain, worked = loader(0), loader(2)
    expected = list(itertools.islice(plain, 6))
    found = list(itertools.islice(worked, 6))
    assert worked.state_dict() == plain.state_dict()
    assert worked.report.counts["broken"] == plain.report.counts["broken"] > 0
    kinds = set()
    for one, other in zip(expected, found, strict=True):
        levels = [v for v in other.values() if torch.is_tensor(v) and v.dtype == torch.uint8]
        kinds |= {tuple(each.shape[-1:]) for each in levels}
        finished = worked.finish(other, torch.device("cpu"))
        assert finished.keys() == one.keys()
        for name, value in one.items():
            same = torch.equal(value, finished[name]) if torch.is_tensor(value) else None
            assert value == finished[name] if same is None else same, name
    assert kinds == {(3,)}, "no batch came as levels"


def test_a_document_and_a_rejection_come_back_whole(
    processor: Any, media_dir: Path, tmp_path: Path
) -> None:
    order = mixture(media_dir, video_sample(tmp_path / "gone.mp4"))
    encoder = Encoder(processor, BUDGET)
    workers = Workers(order, encoder, processor, processes=1)
    try:
        for position in range(len(order)):
            here = encoder(order[position])
            there = read_document(workers.encode(position).result())
            if isinstance(here, Rejected):
                assert there == here
                continue
            assert isinstance(there, Document)
            assert (there.id, there.lengths) == (here.id, here.lengths)
            assert torch.equal(there.input_ids, here.input_ids)
            assert torch.equal(there.labels, here.labels)
            assert [m.count for m in there.media] == [m.count for m in here.media]
    finally:
        workers.close()


def test_a_line_that_is_no_record_is_left_out_as_without_workers(
    processor: Any, tmp_path: Path
) -> None:
    good = '{"q": "Why?", "a": "So."}\n'
    (tmp_path / "a.jsonl").write_text(good + '{"q": \n' + good)
    order = Mixture([open_dataset("llava", tmp_path / "a.jsonl")])
    coders = Encoder(processor, BUDGET), Collator(processor)
    loader = PackedLoader(order, *coders, window=3, workers=1, epochs=1)
    assert [len(batch["document_lengths"]) for batch in loader] == [2]
    assert loader.report.counts["broken"] == 1


class Deadly(Listed):
    """Ends whichever process reads from it."""

    def __getitem__(self, index: int) -> Sample:
        os._exit(9)


def test_a_worker_that_is_killed_is_said(processor: Any) -> None:
    order = Mixture([Deadly("deadly", [text_sample(1)])])
    coders = Encoder(processor, BUDGET), Collator(processor)
    with pytest.raises(DataError, match=r"ended from outside.*set data\.workers lower"):
        next(iter(PackedLoader(order, *coders, window=1, workers=1)))


def test_what_cannot_be_decoded_is_named_and_leaves_no_descriptor(
    processor: Any, media_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "film.mp4"
    clip(path, num_frames=12)
    encoder = Encoder(processor, BUDGET)
    good, bad = encoder(video_sample(media_dir / "clip0.mp4")), encoder(video_sample(path))
    assert isinstance(good, Document)
    assert isinstance(bad, Document)
    path.unlink()
    workers = Workers(mixture(media_dir), encoder, processor, processes=1)
    try:
        collator = Collator(processor, workers=workers)
        collator([good])
        gc.collect()  # what earlier tests left would be closed at any time
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BrokenMedia, match="film") as caught:
            collator([good, bad])
        assert set(caught.value.failures) == {1}
        del caught  # its traceback holds the block
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        workers.close()


def test_no_job_outlives_the_descriptor_that_it_writes_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    video = PlannedMedia(Media("video", "v"), 1000, np.arange(1000))
    found = []

    def fill(path: str, shape: tuple[int, ...], jobs: list[Job]) -> list[tuple[int, str]]:
        if jobs[0].start == 0:
            raise ValueError("a fault of its own")
        time.sleep(0.3)  # by now the number may be another file's
        found.append(os.path.realpath(path))
        return []

    monkeypatch.setattr("longvila.data.workers._fill", fill)
    workers = object.__new__(Workers)
    with ThreadPoolExecutor(2) as pool:
        workers._pool = pool  # type: ignore[assignment]
        with pytest.raises(ValueError, match="a fault of its own"):
            workers.decode([Job(0, video, 0, 1000, 0)], (2, 2))
    assert found and all("longvila-pixels" in each for each in found), found


def test_long_videos_are_cut_and_pictures_joined_without_gaps() -> None:
    video = PlannedMedia(Media("video", "v"), 1000, np.arange(1000))
    picture = PlannedMedia(Media("image", "i"), 1)
    jobs = [Job(0, video, 100, 1000, 0)] + [Job(1, picture, 0, 1, 900 + n) for n in range(40)]
    parts = _parts(jobs)
    flat = [job for part in parts for job in part]
    assert [job.place for job in flat] == list(
        itertools.accumulate((job.stop - job.start for job in flat[:-1]), initial=0)
    )
    assert sum(job.stop - job.start for job in flat) == 940
    assert max(job.stop - job.start for job in flat) < 900
    assert len(parts) < 20, "each picture is a message of its own"


def test_other_families_decode_in_threads(processor: Any, media_dir: Path) -> None:
    encoder = Encoder(processor, BUDGET)
    with pytest.raises(ValueError, match="FamilyCollator decodes in threads only"):
        PackedLoader(mixture(media_dir), encoder, FamilyCollator(processor), workers=1)
