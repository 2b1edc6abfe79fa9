"""Positions spread over a longer context than a row has.

    tokens     [ frame ][ frame ]         [ frame ][ frame ]      [ question, answer ]
    positions   0 1 2 ...          jump ->              jump ->          ... < reach

Attention costs the square of a row's length, its positions cost nothing. A document of 50,000
tokens whose positions run to 150,000 meets the rotary angles of a document three times as long at
a ninth of its arithmetic. Jumps stand behind a frame's tokens, so that neighbours stay neighbours
where they belong together; a document without media may jump anywhere. Half of all documents keep
their own positions, or no distance would look as it does in use. What this does not teach is to
attend among as many tokens as the long context has: steps at full length come after it.

All follows from the document's tokens: the same on every rank and after a resume.

Source: positional skip-wise training, Zhu et al., "PoSE: Efficient Context Window Extension of LLMs
via Positional Skip-wise Training", ICLR 2024. There two chunks of text; here up to four, between
frames.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection

import torch
from torch import Tensor

#: Most jumps of a document.
JUMPS = 3


def spread_positions(input_ids: Tensor, reach: int, media_ids: Collection[int] = ()) -> Tensor:
    """Return ascending positions of a document's tokens.

    Args:
        input_ids: ``(T,)`` int64 tokens of one document.
        reach: Positions stay below it.
        media_ids: Placeholders; jumps stand behind runs of these, if there are any.

    Returns:
        ``(T,)`` int64, from zero, rising by one but at jumps.

    Raises:
        ValueError: If the document is longer than ``reach``.
    """
    size = input_ids.numel()
    if size > reach:
        raise ValueError(f"a document of {size} tokens does not fit {reach} positions")
    plain = torch.arange(size)
    held = torch.isin(input_ids, torch.tensor(sorted(media_ids), dtype=input_ids.dtype))
    behind = torch.arange(1, size)
    if bool(held.any()):
        behind = behind[held[:-1] & ~held[1:]]
    draw = torch.Generator().manual_seed(zlib.crc32(input_ids.numpy().tobytes()))
    if behind.numel() == 0 or size == reach or bool(torch.rand((), generator=draw) < 0.5):
        return plain
    places = behind[torch.randperm(behind.numel(), generator=draw)[:JUMPS]]
    total = torch.randint(1, reach - size + 1, (), generator=draw)
    shares = torch.rand(places.numel(), generator=draw, dtype=torch.float64)
    jumps = torch.zeros(size, dtype=torch.int64)
    jumps[places] = (shares / shares.sum() * total).long()
    return plain + jumps.cumsum(0)
