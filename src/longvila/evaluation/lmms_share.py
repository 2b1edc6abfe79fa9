"""One video decoded by several ranks, each its stretch, and known to all.

Ranks that share a sequence all need the video they are asked about, and decoding an hour of film
costs more than reading it with the model. So::

    chosen frames   f0 f1 f2 | f3 f4 f5 | f6 f7          as on one process, from metadata alone
    rank            0        | 1        | 2              decodes its stretch, maybe ahead of time
                             all gather                  8-bit pixels, once a video

1. `own_part` chooses frames as one process would and decodes this rank's. It talks to nobody, so a
   thread may run it while the model works.
2. `whole` gathers the parts. What one rank cannot decode is missing, as it is on one process; if
   nobody has a frame, that is the error of the first rank.

Cost: 1/R of the decoding. Comm: two gathers, of F * H * W * 3 bytes and of a few numbers a frame.
Pictures, and videos with pictures put in, are read by every rank whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from longvila.errors import VideoError
from longvila.evaluation.lmms_media import inside
from longvila.media.reader import ReadStats, VideoMetadata
from longvila.media.video import SampledVideo, choose_indices, open_video


@dataclass(frozen=True)
class Ranks:
    """Ranks that share a sequence.

    Attributes:
        group: Their process group.
        rank: This one among them.
        size: How many.
    """

    group: Any
    rank: int
    size: int


@dataclass(frozen=True)
class Part:
    """This rank's stretch of a video.

    Attributes:
        metadata: The video's; None if it could not be opened.
        video: What was decoded; None if there was nothing to decode, or it failed.
        chosen: Frame numbers that were to be decoded.
        error: Why it failed.
    """

    metadata: VideoMetadata | None
    video: SampledVideo | None
    chosen: tuple[int, ...]
    error: str = ""


def can_be_shared(source: Any) -> bool:
    """Return whether a source is a video file or a part of one.

    Args:
        source: See `longvila.evaluation.lmms_media`.
    """
    return isinstance(source, str) or (isinstance(source, Mapping) and "path" in source)


def own_part(
    sampler: Any, source: Any, frames: int, ranks: Ranks, *, fps: float | None = None
) -> Part:
    """Decode this rank's stretch of a video.

    Args:
        sampler: A processor's part for videos.
        source: The video, one that `can_be_shared`.
        frames: Frames to sample of the whole; with ``fps``, at most so many.
        ranks: Who shares it.
        fps: Frames a second to sample of a whole video; of a part ``frames`` are taken.
    """
    path = source if isinstance(source, str) else source["path"]
    try:
        with open_video(path) as reader:
            metadata = reader.metadata
        if isinstance(source, str):
            chosen = choose_indices(metadata, num_frames=frames, fps=fps, short=sampler.short)
        else:
            chosen = inside(metadata.timestamps_s, source, frames, sampler.short)
    except (VideoError, FileNotFoundError) as fault:
        return Part(None, None, (), f"{type(fault).__name__}: {fault}")
    start, stop = (len(chosen) * r // ranks.size for r in (ranks.rank, ranks.rank + 1))
    mine = tuple(int(i) for i in chosen[start:stop])
    if not mine:
        return Part(metadata, None, ())
    try:
        video = sampler.sample(path, indices=mine)
    except VideoError as fault:
        return Part(metadata, None, mine, f"VideoError: {fault}")
    return Part(metadata, video, mine)


def whole(part: Part, ranks: Ranks) -> SampledVideo | str:
    """Put the stretches of all ranks together.

    Args:
        part: This rank's.
        ranks: Who shares the video.

    Returns:
        The video, equal on all ranks; or why there is none.

    Raises:
        RuntimeError: If only some ranks could open it.

    Comm: A gather of objects, and one of frames padded to the longest stretch.
    """
    video = part.video
    about = None
    if video is not None:
        plain = (video.indices.tolist(), video.timestamps_s.tolist(), video.missing)
        about = (*plain, video.frames.shape[1:])
    facts: list[Any] = [None] * ranks.size
    dist.all_gather_object(facts, (about, part.chosen, part.error), group=ranks.group)
    have = [about for about, _, _ in facts if about is not None]
    if not have:
        return next((error for _, _, error in facts if error), "VideoError: no frame")
    longest = max(len(about[0]) for about in have)
    sent = np.zeros((longest, *have[0][3]), dtype=np.uint8)
    if video is not None:
        sent[: len(video.frames)] = video.frames
    # NCCL sends from GPUs only, gloo from the host.
    device = "cuda" if "nccl" in dist.get_backend(ranks.group) else "cpu"
    mine = torch.from_numpy(sent).to(device)
    parts = [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_gather(parts, mine, group=ranks.group)
    frames = [
        each[: len(about[0])].cpu().numpy()
        for each, (about, _, _) in zip(parts, facts, strict=True)
        if about is not None
    ]
    lost: set[int] = set()
    for about, chosen, _ in facts:
        lost.update(chosen if about is None else about[2])
    if part.metadata is None:
        raise RuntimeError(f"other ranks could open a video that this one could not: {part.error}")
    return SampledVideo(
        frames=np.concatenate(frames),
        indices=np.concatenate([np.asarray(about[0], dtype=np.int64) for about in have]),
        timestamps_s=np.concatenate([np.asarray(about[1], dtype=np.float64) for about in have]),
        metadata=part.metadata,
        missing=tuple(sorted(lost)),
        stats=ReadStats() if video is None else video.stats,
    )
