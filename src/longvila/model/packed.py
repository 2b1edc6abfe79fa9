"""Rows that pack several documents, in a model's own forward pass.

transformers finds documents where positions do not go up by one, but only without a mask and
without a cache, and it opens a cache unless told otherwise: documents would see each other, and
nothing says so. Positions of one document that leave some out would be cut there in turn.

1. ``document_lengths`` without positions become positions that restart.
2. Positions that restart switch the cache off; a mask of ones goes, where lengths are given.
3. Positions that leave some out, in one document, get a mask of ones.

What transformers cannot be told is an error. `longvila.parallel` does it all.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_OTHERWISE = "; parallelize the model with ParallelPlan(two_stage=True), which serves such rows"


def keep_apart(
    embeds: Tensor, position_ids: Tensor | None, attention_mask: Any, options: dict[str, Any]
) -> tuple[Tensor | None, Any]:
    """Make transformers keep the documents of a row apart.

    Args:
        embeds: Embedded tokens, shape (B, S, M).
        position_ids: Positions, shape (B, S), None for those that ascend.
        attention_mask: What the caller gave.
        options: Further arguments of the language model; ``document_lengths`` is taken out, and
            ``use_cache`` set where there are documents.

    Returns:
        Positions and mask for the language model.

    Raises:
        ValueError: If lengths do not fit the row or the positions, or documents go with a cache, a
            mask or positions that leave some out.
    """
    lengths, shape = options.pop("document_lengths", None), tuple(embeds.shape[:2])
    several = False
    if lengths is not None:
        counts = [n for n in torch.as_tensor(lengths).flatten().tolist() if n]
        if shape != (1, sum(counts)):
            raise ValueError(
                f"document_lengths {counts} must add up to the tokens of one row, got {shape}"
                f"{_OTHERWISE}"
            )
        several = len(counts) > 1
        if isinstance(attention_mask, Tensor) and bool(attention_mask.all()):
            attention_mask = None
        if position_ids is None:
            position_ids = torch.cat([torch.arange(n, device=embeds.device) for n in counts])[None]
    if attention_mask is not None and several:
        raise ValueError(f"document_lengths do not go with an attention_mask{_OTHERWISE}")
    if attention_mask is not None or position_ids is None or position_ids.ndim != 2:
        return position_ids, attention_mask
    steps = position_ids.diff(dim=-1)
    restarts, gaps = bool((steps < 1).any()), bool((steps > 1).any())
    if not (restarts or several):
        return position_ids, position_ids.new_ones(shape) if gaps else None
    if gaps:
        raise ValueError(f"positions of several documents leave some out{_OTHERWISE}")
    if lengths is not None:
        found = ((steps[0] != 1).nonzero().flatten() + 1).tolist()
        if found != list(accumulate(counts))[:-1]:
            raise ValueError(
                f"documents of {counts} tokens, but position_ids restart at {found}{_OTHERWISE}"
            )
    if options.get("use_cache"):
        raise ValueError("a row of several documents has no cache: leave use_cache out")
    options["use_cache"] = False
    return position_ids, None


def without_first(labels: Tensor, lengths: Any, *, ignore_index: int) -> Tensor:
    """Return labels in which the first token of each document is no target.

    Args:
        labels: Targets at their own places, shape (1, S).
        lengths: Tokens of each document.
        ignore_index: What stands where there is no target.
    """
    counts = torch.as_tensor(lengths).flatten().long()
    starts = (counts.cumsum(0) - counts)[counts > 0]
    return labels.index_fill(1, starts.to(labels.device), ignore_index)
