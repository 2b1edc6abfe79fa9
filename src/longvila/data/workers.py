"""Processes that encode samples and decode media, where one interpreter's threads are too slow.

    this process                          each worker
    positions        ->  pool  ->         mixture[position], encoder
    (media, frames)  ->  pool  ->         decode, resize; write uint8 levels into the row's block

1. Workers come from a fork server that imported the library once and has neither a GPU nor threads.
   Each gets its own copy of mixture, encoder and the media part of the processor.
2. Documents come back as arrays. Levels do not come back: a row's block is anonymous memory that
   workers open by this process's descriptor and write at their places, so nothing is copied here.
3. Pictures are handed out by dozens and long videos in stretches, so that workers share a long
   video and a picture does not cost a message.

What is computed is what threads compute, to the bit. Cost: a worker takes the memory of an
interpreter with torch, a few hundred MB, most of it shared. It needs Linux, and serves LongVILA's
own processor; other families decode in threads.

Dimension legend: F frames of a row, h, w size in pixels.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longvila.data.encode import Document, Encoder, PlannedMedia, Rejected
from longvila.data.mixture import Mixture, Place
from longvila.data.records import RecordError
from longvila.errors import LongVILAError, VideoError
from longvila.media.image import load_image
from longvila.model.processing_longvila import LongVILAProcessor

#: Frames of a job at most, and pictures of one.
_STRETCH = 192
_PICTURES = 16

Levels = np.ndarray[Any, np.dtype[np.uint8]]


def decode_levels(
    processor: LongVILAProcessor,
    planned: PlannedMedia,
    start: int,
    stop: int,
    options: dict[str, Any],
) -> Levels:
    """Decode some frames (tiles) of one medium.

    Args:
        processor: The model's processor.
        planned: The medium.
        start: First frame.
        stop: One past the last.
        options: Handed to `longvila.media.video.read_frames`.

    Returns:
        uint8 ``(stop - start, h, w, 3)``, of the size that the tower reads.

    Raises:
        LongVILAError: If the medium cannot be read, or misses a frame.
    """
    source = planned.media.source
    if planned.indices is None:
        picture = load_image(source)
        tiles = processor.image_processor.tiles(picture, dynamic=planned.tiled)
        if len(tiles) != planned.count:
            raise VideoError(
                f"{planned.media.name}: {len(tiles)} tiles, {planned.count} were announced"
            )
        return np.stack([np.asarray(tile) for tile in tiles[start:stop]])
    part = processor.video_processor
    wanted = planned.indices[start:stop]
    video = part.sample(source, indices=wanted.tolist(), **options)
    if len(video.indices) != len(wanted):
        raise VideoError(
            f"{planned.media.name}: frames {list(video.missing)[:5]} cannot be decoded"
        )
    levels: Levels = part.frame_levels(video)
    return levels


@dataclass(frozen=True)
class Job:
    """A stretch of one medium and its place in the row.

    Attributes:
        number: Which document of the row.
        planned: The medium.
        start: First frame.
        stop: One past the last.
        place: Where its first frame stands among all frames of the row.
    """

    number: int
    planned: PlannedMedia
    start: int
    stop: int
    place: int


class Workers:
    """A pool of such processes.

    Args:
        mixture: The samples.
        encoder: Makes documents.
        processor: The model's processor.
        processes: How many.
        options: Handed to `longvila.media.video.read_frames`.
    """

    def __init__(
        self,
        mixture: Mixture,
        encoder: Encoder,
        processor: LongVILAProcessor | None,
        *,
        processes: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        if not hasattr(os, "memfd_create"):
            raise LongVILAError("data.workers needs Linux; set it to 0 to decode in threads")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pool = ProcessPoolExecutor(
            processes,
            mp_context=context,
            initializer=_begin,
            # One thread a worker and video: there are as many workers as cores to use.
            initargs=(mixture, encoder, processor, {"threads": 1, **(options or {})}),
        )

    def encode(self, position: int) -> Future[tuple[Any, ...] | Rejected]:
        """Begin to encode the sample at a position; `read_document` reads the result."""
        try:
            return self._pool.submit(_encode, position)
        except BrokenExecutor as fault:
            # Found where results are asked for, so that other ranks hear of it.
            broken: Future[tuple[Any, ...] | Rejected] = Future()
            broken.set_exception(fault)
            return broken

    def decode(self, jobs: Sequence[Job], height_width: tuple[int, int]) -> tuple[Any, Any]:
        """Decode frames into one block.

        Args:
            jobs: What goes where; together they fill the block without gaps.
            height_width: h and w.

        Returns:
            uint8 ``(F, h, w, 3)``, and what is wrong by the number of each broken document.
        """
        shape = (sum(job.stop - job.start for job in jobs), *height_width, 3)
        size = int(np.prod(shape))
        descriptor = os.memfd_create("longvila-pixels")
        futures: list[Future[list[tuple[int, str]]]] = []
        try:
            os.ftruncate(descriptor, size)
            block = mmap.mmap(descriptor, size)
            path = f"/proc/{os.getpid()}/fd/{descriptor}"
            for part in _parts(jobs):
                futures.append(self._pool.submit(_fill, path, shape, part))
            failures: dict[int, str] = {}
            for future in futures:
                for number, reason in future.result():
                    failures.setdefault(number, reason)
        finally:
            # Once closed, the number may be another file's: no worker must open it after that.
            for future in futures:
                future.cancel()
            wait(futures)
            os.close(descriptor)
        return np.frombuffer(block, np.uint8).reshape(shape), failures

    def close(self) -> None:
        """End the processes; what was begun and not wanted is dropped."""
        self._pool.shutdown(cancel_futures=True)


def encode_at(mixture: Mixture, encoder: Encoder, place: Place) -> Document | Rejected:
    """Encode one row of a mixture; a line of a file that is no record is left out."""
    dataset = mixture.datasets[place.dataset]
    try:
        sample = dataset[place.row]
    except RecordError as fault:
        return Rejected(f"{dataset.name}/record {place.row}", "broken", str(fault))
    return encoder(sample)


def read_document(result: tuple[Any, ...] | Rejected) -> Document | Rejected:
    """Read what `Workers.encode` came to."""
    if isinstance(result, Rejected):
        return result
    name, ids, labels, *rest = result
    return Document(name, torch.from_numpy(ids), torch.from_numpy(labels), *rest)


def _parts(jobs: Sequence[Job]) -> list[list[Job]]:
    """Cut long jobs, join short ones."""
    cut = [
        Job(job.number, job.planned, at, min(at + _STRETCH, job.stop), job.place + at - job.start)
        for job in jobs
        for at in range(job.start, job.stop, _STRETCH)
    ]
    parts: list[list[Job]] = []
    room = 0
    for job in cut:
        # A picture costs about as much as a dozen frames of a film.
        cost = _STRETCH // _PICTURES if job.planned.indices is None else job.stop - job.start
        if cost > room:
            parts.append([])
            room = _STRETCH
        parts[-1].append(job)
        room -= cost
    return parts


# ---- in a worker -------------------------------------------------------------------------------

_STATE: dict[str, Any] = {}


def _begin(*given: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _STATE["given"] = given


def _encode(position: int) -> tuple[Any, ...] | Rejected:
    mixture, encoder, _, _ = _STATE["given"]
    made = encode_at(mixture, encoder, mixture.place(position))
    if isinstance(made, Rejected):
        return made
    # As arrays: torch would pass its tensors by descriptors.
    arrays = (made.input_ids.numpy(), made.labels.numpy())
    return (made.id, *arrays, made.lengths, made.media, made.frames_cut)


def _fill(path: str, shape: tuple[int, ...], jobs: Sequence[Job]) -> list[tuple[int, str]]:
    _, _, processor, options = _STATE["given"]
    descriptor = os.open(path, os.O_RDWR)
    try:
        block = mmap.mmap(descriptor, int(np.prod(shape)))
    finally:
        os.close(descriptor)
    levels = np.frombuffer(block, np.uint8).reshape(shape)
    failures: list[tuple[int, str]] = []
    for job in jobs:
        try:
            decoded = decode_levels(processor, job.planned, job.start, job.stop, options)
            levels[job.place : job.place + job.stop - job.start] = decoded
        except (LongVILAError, OSError) as fault:
            failures.append((job.number, str(fault)))
    return failures
