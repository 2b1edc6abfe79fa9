"""Documents to one batch: a packed row of tokens, and the pixels this rank encodes.

    documents  ->  input_ids, labels, position_ids (1, T), document_lengths  same on all ranks
               ->  video_num_frames, image_num_tiles                         of all media
               ->  deal(counts).local(kind, sp_rank)                         frames of this rank
               ->  only those are decoded, resized and normalised         local_pixel_values...

With `workers`, processes decode and batches hold levels, uint8 ``(F, h, w, 3)``, a quarter of the
pixels; `finish` moves them to the device and normalises there, to the same bits.

A rank of a sequence-parallel group decodes the frames it will encode and no others: 1/sp of the
video, from the newest keyframe before its stretch. How frames are dealt is not decided here: the
trainer gives `deal`, ``functools.partial(plan_media, config, sp_size)`` of
`longvila.parallel.mmsp`, the very plan of the step. On one rank all pixels come under the model's
own names.

Every frame that was chosen must be decoded. A video that misses one is broken for all ranks, so
that a batch does not depend on how frames were dealt; `longvila.data.loader` replaces it.

Dimension legend: T tokens of the row, F frames decoded here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from longvila.data.encode import IGNORE_INDEX, Document, Encoder, PlannedMedia, Rejected
from longvila.data.sample import Sample
from longvila.data.spread import spread_positions
from longvila.data.workers import Job, Workers, decode_levels
from longvila.errors import LongVILAError
from longvila.model.image_processing_longvila import PixelProcessor
from longvila.model.processing_longvila import LongVILAProcessor
from longvila.sp.tokens import document_position_ids

_KINDS = {
    "image": ("pixel_values", "image_num_tiles"),
    "video": ("pixel_values_videos", "video_num_frames"),
}


class Stretch(Protocol):
    """Frames ``start`` to ``stop`` of all frames of a kind."""

    @property
    def start(self) -> int:
        """First frame."""
        ...

    @property
    def stop(self) -> int:
        """One past the last."""
        ...


class Deal(Protocol):
    """Who encodes which frames of a batch."""

    def local(self, kind: str, rank: int) -> Stretch:
        """Frames of a kind that a rank encodes."""
        ...


class BrokenMedia(LongVILAError):
    """Media of a batch cannot be decoded.

    Attributes:
        failures: For each broken document, by its number in the batch, what is wrong.
    """

    def __init__(self, failures: Mapping[int, str]) -> None:
        super().__init__("; ".join(f"document {n}: {why}" for n, why in sorted(failures.items())))
        self.failures = dict(failures)


@dataclass
class Collator:
    """Makes batches of documents, or of samples that it encodes first.

    Args:
        processor: The model's processor; None for batches of token rows alone.
        encoder: Encodes samples; only needed where samples come and not documents.
        sp_rank: This rank within its sequence-parallel group.
        sp_size: Ranks of the group.
        deal: Plans who encodes what from the frames of all items by kind; needed above one rank.
        threads: Media decoded at once.
        options: Handed to `longvila.media.video.read_frames`.
        workers: Processes that decode in place of threads.
        spread: Positions that documents are spread over; see `longvila.data.spread`. None numbers
            each from zero without gaps.
    """

    processor: LongVILAProcessor | None
    encoder: Encoder | None = None
    sp_rank: int = 0
    sp_size: int = 1
    deal: Callable[[Mapping[str, Sequence[int]]], Deal] | None = None
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    workers: Workers | None = None
    spread: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sp_rank < self.sp_size:
            raise ValueError(f"sp_rank must be below sp_size, got {self.sp_rank}/{self.sp_size}")
        if self.sp_size > 1 and self.deal is None:
            raise ValueError(
                f"sp_size is {self.sp_size}; give deal, the plan of who encodes which frames "
                "(functools.partial(plan_media, config, sp_size) of longvila.parallel.mmsp)"
            )

    def __call__(self, items: Sequence[Document | Sample]) -> dict[str, Any]:
        """Make one batch.

        Args:
            items: Documents, or samples.

        Returns:
            ``input_ids``, ``labels``, ``position_ids`` ``(1, T)`` int64, ``document_lengths``, and
            of each kind of media that is there the counts of all items and the pixels: of all
            frames on one rank, under ``local_`` names this rank's in a sequence-parallel group
            (``(0, 3, h, w)`` for a rank without any).

        Raises:
            BrokenMedia: If media cannot be decoded; all documents concerned are named.
            ValueError: If there is nothing to batch, or a sample gives no document.
        """
        documents = [self._document(item) for item in items]
        if not documents:
            raise ValueError("a batch needs at least one document")
        lengths = [length for document in documents for length in document.lengths]
        batch: dict[str, Any] = {
            "input_ids": torch.cat([document.input_ids for document in documents])[None],
            "labels": torch.cat([document.labels for document in documents])[None],
            "position_ids": self._positions(documents, lengths)[None],
            "document_lengths": lengths,
        }
        assert bool((batch["labels"][batch["position_ids"] == 0] == IGNORE_INDEX).all())
        planned = [
            (number, media) for number, document in enumerate(documents) for media in document.media
        ]
        counts: dict[str, list[Any]] = {}
        for kind in self._kinds:
            found = [media for _, media in planned if self._kind_of(media) == kind]
            if found:
                counts[kind] = [m.count if m.shape is None else m.shape for m in found]
        batch.update(self._describe(documents, counts))
        batch.update(self._pixels(planned, counts))
        return batch

    # ---- what families of models do in ways of their own

    @property
    def _kinds(self) -> Mapping[str, tuple[str, str]]:
        """Names of pixels and of what describes items, by kind."""
        return _KINDS

    def _kind_of(self, media: PlannedMedia) -> str:
        return media.media.kind

    def _describe(
        self, documents: Sequence[Document], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """What the model is told about all media, beside pixels."""
        return {
            self._kinds[kind][1]: torch.tensor(each, dtype=torch.int64)
            for kind, each in counts.items()
        }

    def _positions(self, documents: Sequence[Document], lengths: Sequence[int]) -> Tensor:
        """Positions of all tokens, from zero in each document."""
        if self.spread is None:
            return document_position_ids(lengths)
        media: tuple[int, ...] = ()
        if self.processor is not None:
            media = (self.processor.image_token_id, self.processor.video_token_id)
        ids = torch.cat([document.input_ids for document in documents]).split(list(lengths))
        return torch.cat([spread_positions(each, self.spread, media) for each in ids])

    def _document(self, item: Document | Sample) -> Document:
        if isinstance(item, Document):
            return item
        if self.encoder is None:
            raise ValueError("samples came to a collator without an encoder; give encoder=Encoder")
        document = self.encoder(item)
        if isinstance(document, Rejected):
            raise ValueError(
                f"{document.reason} ({document.cause}); only a loader replaces samples"
            )
        return document

    def _pixels(
        self, planned: Sequence[tuple[int, PlannedMedia]], counts: Mapping[str, Sequence[Any]]
    ) -> dict[str, Tensor]:
        """Decode this rank's frames of every kind."""
        if not counts:
            return {}
        dealt = self.deal(counts) if self.sp_size > 1 and self.deal is not None else None
        jobs: list[tuple[str, int, PlannedMedia, int, int]] = []
        for kind in counts:
            own = [media.count for _, media in planned if self._kind_of(media) == kind]
            first, last = 0, sum(own)
            if dealt is not None:
                local = dealt.local(kind, self.sp_rank)
                first, last = local.start, local.stop
            base = 0
            for number, media in planned:
                if self._kind_of(media) != kind:
                    continue
                start, stop = max(first - base, 0), min(last - base, media.count)
                if start < stop:
                    jobs.append((kind, number, media, start, stop))
                base += media.count
        prefix = "" if dealt is None else "local_"
        if self.workers is not None:
            return {
                f"{prefix}{self._kinds[kind][0]}": self._levels(
                    kind, [job[1:] for job in jobs if job[0] == kind]
                )
                for kind in counts
            }
        with ThreadPoolExecutor(max(self.threads, 1)) as pool:
            futures = [pool.submit(self._decode, media, *cut) for _, _, media, *cut in jobs]
        decoded: dict[str, list[Tensor]] = {kind: [] for kind in counts}
        failures: dict[int, str] = {}
        for (kind, number, _, _, _), future in zip(jobs, futures, strict=True):
            fault = future.exception()
            if fault is None:
                decoded[kind].append(future.result())
            elif isinstance(fault, LongVILAError | OSError):
                failures.setdefault(number, str(fault))
            else:
                raise fault
        if failures:
            raise BrokenMedia(failures)
        return {
            f"{prefix}{self._kinds[kind][0]}": torch.cat([self._empty(kind, tensors), *tensors])
            for kind, tensors in decoded.items()
        }

    def _empty(self, kind: str, decoded: Sequence[Tensor]) -> Tensor:
        """No frames, of the shape that frames have."""
        if decoded:
            return decoded[0][:0]
        assert self.processor is not None
        part = self.processor.image_processor if kind == "image" else self.processor.video_processor
        return torch.empty(0, 3, *part.height_width)

    def _decode(self, planned: PlannedMedia, start: int, stop: int) -> Tensor:
        """Pixels of some frames (tiles) of one medium."""
        assert self.processor is not None
        levels = decode_levels(self.processor, planned, start, stop, self.options)
        return self._part(planned.media.kind).pixels(levels)

    def _part(self, kind: str) -> PixelProcessor:
        assert self.processor is not None
        part: PixelProcessor = (
            self.processor.image_processor if kind == "image" else self.processor.video_processor
        )
        return part

    # ---- by processes

    def _levels(self, kind: str, found: Sequence[tuple[int, PlannedMedia, int, int]]) -> Tensor:
        """Levels of this rank's frames of a kind."""
        assert self.workers is not None
        size = self._part(kind).height_width
        if not found:
            return torch.empty(0, *size, 3, dtype=torch.uint8)
        jobs: list[Job] = []
        place = 0
        for number, media, start, stop in found:
            jobs.append(Job(number, media, start, stop, place))
            place += stop - start
        levels, failures = self.workers.decode(jobs, size)
        if failures:
            raise BrokenMedia(failures)
        return torch.from_numpy(levels)

    def finish(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Make pixels of levels on a device; a batch of pixels stays as it is.

        Args:
            batch: What a call gave.
            device: Where levels are normalised.
        """
        finished = dict(batch)
        for kind, (pixels, _) in self._kinds.items():
            for name in (pixels, f"local_{pixels}"):
                found = batch.get(name)
                if found is not None and found.dtype == torch.uint8:
                    finished[name] = self._part(kind).pixels(found.to(device))
        return finished
