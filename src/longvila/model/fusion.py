"""Putting media rows in the places of their placeholders, and pooling videos over time and space.

`scatter_rows` finds the placeholders of one kind in ``input_ids``, checks that there are as many as
rows, and writes row ``i`` over the ``i``-th of them (batch-major order). It is an index copy: its
temporary is the list of positions, not a mask of the whole embedding as ``masked_scatter`` makes,
and gradients go to the rows and, at every other position, to the text embeddings. Nothing else in
the sequence is touched: separators after frames are ordinary tokens.

`pool_video` is temporal-spatial pooling: for each block size the mean over blocks of frames, height
and width. A block at the ragged end averages the frames (or tokens) that are there, so any number
of frames works and every frame weighs the same inside its block; where sizes divide, the result is
upstream's.

Dimensions: B batch, S sequence, N rows, M model dim, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MediaFeatures:
    """Rows of several images or videos, packed.

    Args:
        rows: Rows of all items one after the other, shape (N, M).
        counts: Rows of each item; they add up to N.
    """

    rows: Tensor
    counts: list[int]

    def split(self) -> list[Tensor]:
        """Return one (rows, M) view for each item."""
        return list(self.rows.split(self.counts)) if self.counts else []


def scatter_rows(
    input_ids: Tensor, inputs_embeds: Tensor, rows: Tensor, token_id: int, *, kind: str
) -> Tensor:
    """Write rows over the placeholders of one kind.

    Args:
        input_ids: Token ids, shape (B, S).
        inputs_embeds: Embeddings of the same sequence, shape (B, S, M); not changed.
        rows: Rows in the order of the placeholders, shape (N, M).
        token_id: Id of the placeholder.
        kind: What to call the medium in an error.

    Returns:
        New embeddings, shape (B, S, M).

    Raises:
        ValueError: If there are more or fewer placeholders than rows.
    """
    positions = (input_ids.reshape(-1) == token_id).nonzero().squeeze(-1)
    if positions.numel() != rows.shape[0]:
        raise ValueError(
            f"input_ids have {positions.numel()} {kind} placeholders (id {token_id}) but the "
            f"{kind} features have {rows.shape[0]} rows; the prompt was cut, or expanded for "
            "another number of frames or tokens per frame"
        )
    flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
    rows = rows.to(flat.device, flat.dtype)
    return flat.index_copy(0, positions.to(flat.device), rows).view_as(inputs_embeds)


def pool_video(
    rows: Tensor, grid: tuple[int, int], pool_sizes: Sequence[Sequence[int]], *, column: bool
) -> Tensor:
    """Pool one video by each block size and join the results.

    Args:
        rows: Tokens of the frames, shape (F, N, M).
        grid: Tokens of a frame as (height, width).
        pool_sizes: Block sizes as ``[frames, height, width]``.
        column: Whether the tokens of a frame come column by column.

    Returns:
        Rows of all pooled copies in order, shape (rows, M).
    """
    height, width = grid
    frames, _, dim = rows.shape
    sides = (width, height) if column else (height, width)
    volume = rows.view(frames, *sides, dim).permute(3, 0, 1, 2).unsqueeze(0)
    pooled = []
    for t, h, w in pool_sizes:
        sizes = (t, w, h) if column else (t, h, w)
        block = [min(a, b) for a, b in zip(sizes, volume.shape[2:], strict=True)]
        means = F.avg_pool3d(volume, block, ceil_mode=True, count_include_pad=False)
        pooled.append(means.squeeze(0).permute(1, 2, 3, 0).reshape(-1, dim))
    return torch.cat(pooled)


def pack_features(features: Any) -> Tensor:
    """Join the features of items, however a caller holds them.

    Args:
        features: A list of (rows, M), or one tensor whose last dim is M.

    Returns:
        Packed rows, shape (N, M); of a single item, a view.
    """
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    items = [item.reshape(-1, item.shape[-1]) for item in features]
    return items[0] if len(items) == 1 else torch.cat(items)
