"""Rows of token ids as an engine takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longvila.inference.cache import ShardedCache


def whole_row(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the tokens of one sample, padding left out.

    Args:
        input_ids: ``(1, S)``.
        mask: Its attention mask, if there is one.

    Raises:
        ValueError: If there is not just one sample, or no token.
    """
    if input_ids.dim() != 2 or input_ids.shape[0] != 1:
        raise ValueError(
            f"prefill reads one sample, input_ids (1, S); got {tuple(input_ids.shape)}: read each "
            "row into a cache of its own"
        )
    if mask is not None:
        input_ids = input_ids[:, mask[0].bool()]
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt has no token")
    return input_ids


def pad_rows(ids: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return rows of one length, filler in front, and which tokens are not filler.

    Args:
        ids: ``(B, T)``, or B rows ``(T_b,)``.

    Returns:
        ``(B, T)`` ids, and a mask of their shape; None where there is no filler.

    Raises:
        ValueError: If a row has no token.
    """
    if isinstance(ids, Tensor):
        return ids, None
    rows = [row.flatten() for row in ids]
    longest = max((row.numel() for row in rows), default=0)
    if not rows or min(row.numel() for row in rows) == 0:
        raise ValueError(f"each of the {len(rows)} rows needs at least one token")
    padded = rows[0].new_zeros(len(rows), longest)
    mask = torch.zeros_like(padded)
    for number, row in enumerate(rows):
        padded[number, longest - row.numel() :] = row
        mask[number, longest - row.numel() :] = 1
    return padded, None if bool(mask.all()) else mask


def append_ids(cache: ShardedCache, ids: Tensor) -> None:
    """Note ids ``(B, T)`` that a cache was given behind its own."""
    before = cache.input_ids
    if before is None:
        cache.input_ids = ids
        return
    if before.shape[0] != ids.shape[0]:
        before = before.expand(ids.shape[0], -1)
    cache.input_ids = torch.cat([before, ids.to(before.device)], dim=1)
