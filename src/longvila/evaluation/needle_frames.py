"""Frames by number: each is decoded and encoded once, and scenes name frames.

    number   0 1 2 3 ... H-1 | H   H+1 ...
    frame    the haystack    | pictures and pasted frames that were added

A needle test shows the same film hundreds of times with a few frames changed. Frames do not see
each other in the vision tower, so a frame's rows do not depend on where it stands, and encoding it
once is exact:

1. A `FrameBook` gives the pixels of a numbered frame. The haystack is decoded in blocks as it is
   needed; added frames are made by a function each.
2. `FrameRows` is the model's family with another encoder: what goes through the engine as "pixels"
   are frame numbers, and encoding looks their rows up. Rows that are not there yet are made, of a
   haystack frame together with its whole block, so that what a frame is encoded with never depends
   on the order of scenes, nor on a run having been interrupted. They stay on the host.
3. Temporal pooling joins neighbouring frames before the language model; then rows belong to the
   frames joined, are kept for each such group, and are made anew where a needle shifts the groups.

Over several ranks each rank encodes the frames that are dealt to it. Rows of the film may be kept
in a folder, a file a block, written in one step; a run that goes on then encodes nothing again.

Memory: rows of all frames read so far, ``N * M`` in the model's type, on the host.
Cost: each frame once through the tower.

Letters: F frames, H frames of the haystack, N rows, M model dim.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from longvila.parallel.families import Family, MediaKind

Picture = NDArray[np.uint8]


class FrameBook:
    """Frames that scenes name by number.

    Args:
        num_frames: H.
        read: Pixels ``(F, h, w, 3)`` of the haystack frames from one number up to another.
        size: (height, width) of every frame.
        block: Haystack frames decoded, and encoded, at once.
        keep_bytes: Decoded blocks that are kept for frames that are pasted on; the oldest go first.
    """

    def __init__(
        self,
        num_frames: int,
        read: Callable[[int, int], Picture],
        *,
        size: tuple[int, int],
        block: int = 32,
        keep_bytes: int = 1 << 30,
    ) -> None:
        self.num_frames, self.size, self.block = num_frames, size, block
        self.keep_bytes = keep_bytes
        self._read = read
        self._blocks: dict[int, Picture] = {}
        self._made: list[Callable[[], Picture]] = []
        self._names: dict[str, int] = {}

    def add(self, name: str, make: Callable[[], Picture]) -> int:
        """Add a frame; the same name again is the same frame.

        Args:
            name: Identifies it.
            make: Draws it, ``(h, w, 3)``; called when it is needed.

        Returns:
            Its number.
        """
        if name not in self._names:
            self._names[name] = self.num_frames + len(self._made)
            self._made.append(make)
        return self._names[name]

    def block_of(self, number: int) -> range:
        """Numbers of the haystack frames that a frame is decoded with; itself if it was added."""
        if number >= self.num_frames:
            return range(number, number + 1)
        first = number // self.block * self.block
        return range(first, min(first + self.block, self.num_frames))

    def frame(self, number: int) -> Picture:
        """Return one frame, uint8 ``(h, w, 3)``."""
        return self.frames(range(number, number + 1))[0]

    def frames(self, numbers: range) -> Picture:
        """Return consecutive frames of one block, or one that was added.

        Args:
            numbers: Which.

        Raises:
            ValueError: If a frame has another size than the book's.
        """
        first = numbers.start
        if first >= self.num_frames:
            out = self._made[first - self.num_frames]()[None]
        else:
            block = self.block_of(first)
            out = self._decoded(block)[first - block.start : numbers.stop - block.start]
        if out.shape != (len(numbers), *self.size, 3):
            raise ValueError(
                f"frames {first} to {numbers.stop} have shape {out.shape}, expected "
                f"{(len(numbers), *self.size, 3)}"
            )
        return out

    def _decoded(self, block: range) -> Picture:
        if block.start not in self._blocks:
            new = self._read(block.start, block.stop)
            while self._blocks and sum(b.nbytes for b in self._blocks.values()) > self.keep_bytes:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[block.start] = new
        return self._blocks[block.start]


class FrameRows:
    """The family of a model, reading frame numbers where it would read pixels.

    Args:
        family: The model's family.
        book: The frames.
        pixels: Turns uint8 frames ``(F, h, w, 3)`` into pixel values, as the processor does.
        folder: Where rows of the film are kept; None for memory alone. Whoever names it makes sure
            that model and film are the same.

    Raises:
        ValueError: If the family has no video.
    """

    def __init__(
        self,
        family: Family,
        book: FrameBook,
        pixels: Callable[[Picture], Tensor],
        *,
        folder: Path | None = None,
    ) -> None:
        kinds = [kind for kind in family.media if kind.name == "video"]
        if not kinds:
            raise ValueError(f"{family.name} reads no video")
        self.kind: MediaKind = kinds[0]
        self.book, self.pixels, self.folder = book, pixels, folder
        self.encoded = 0
        self._rows: dict[tuple[int, ...], Tensor] = {}
        looked_up = dataclasses.replace(self.kind, encode=self.encode)
        self.family = dataclasses.replace(
            family,
            media=tuple(looked_up if kind is self.kind else kind for kind in family.media),
        )

    def inputs(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Return what goes through an engine for a video of these frames, beside its ids."""
        return {
            self.kind.pixels: torch.tensor(list(numbers), dtype=torch.int64),
            self.kind.counts: torch.tensor([len(numbers)]),
        }

    @torch.no_grad()
    def encode(self, model: PreTrainedModel, numbers: Tensor, shapes: Sequence[Any]) -> Tensor:
        """Look rows up, making those that are not there; stands in for the family's encoder.

        Args:
            model: The model.
            numbers: ``(F,)`` frame numbers.
            shapes: Frames of each unit.

        Returns:
            ``(N, M)`` rows of all units, on the model's device.
        """
        wanted = numbers.tolist()
        units: list[tuple[int, ...]] = []
        for frames in shapes:
            units.append(tuple(wanted[:frames]))
            wanted = wanted[frames:]
        for unit in units:
            if unit not in self._rows:
                self._make(model, unit)
        rows = torch.cat([self._rows[unit] for unit in units])
        return rows.to(numbers.device)

    def _make(self, model: PreTrainedModel, unit: tuple[int, ...]) -> None:
        device = model.get_output_embeddings().weight.device
        if len(unit) > 1:
            frames = np.stack([self.book.frame(number) for number in unit])
            joined = self.kind.encode(model, self.pixels(frames).to(device), (len(unit),))
            self._rows[unit] = joined.cpu()
            self.encoded += len(unit)
            return
        block = self.book.block_of(unit[0])
        rows = self._kept(block)
        if rows is None:
            pixels = self.pixels(self.book.frames(block)).to(device)
            rows = self.kind.encode(model, pixels, (1,) * len(block)).cpu()
            self.encoded += len(block)
            self._keep(block, rows)
        for number, part in zip(block, rows.chunk(len(block)), strict=True):
            # A copy, so that a block's rows can be dropped one by one.
            self._rows[(number,)] = part.clone()

    def _file(self, block: range) -> Path | None:
        if self.folder is None or block.start >= self.book.num_frames:
            return None
        return self.folder / f"{block.start:06d}-{block.stop:06d}.safetensors"

    def _kept(self, block: range) -> Tensor | None:
        file = self._file(block)
        return None if file is None or not file.exists() else load_file(file)["rows"]

    def _keep(self, block: range, rows: Tensor) -> None:
        file = self._file(block)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        # Ranks may write the same block; each moves a whole file into place.
        partial = file.with_suffix(f".{os.getpid()}")
        save_file({"rows": rows.contiguous()}, partial)
        partial.replace(file)
