"""Rows of token ids as an engine takes and gives them, and what is new in ``generate``'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

    Filler is a row's own first token: a penalty on what was said before finds nothing new in it.

    Args:
        ids: ``(B, T)``, or B rows ``(T_b,)``.

    Returns:
        ``(B, T)`` ids, and a mask of their shape; None where there is no filler.

    Raises:
        ValueError: If a tensor is not ``(B, T)``, or a row of several has no token.
    """
    if isinstance(ids, Tensor):
        if ids.dim() != 2:
            raise ValueError(f"ids must be (B, T), or a list of rows; got {tuple(ids.shape)}")
        return ids, None
    rows = [row.flatten() for row in ids]
    longest = max((row.numel() for row in rows), default=0)
    if not rows or min(row.numel() for row in rows) == 0:
        raise ValueError(f"each of the {len(rows)} rows needs at least one token")
    padded = rows[0].new_zeros(len(rows), longest)
    mask = torch.zeros_like(padded)
    for number, row in enumerate(rows):
        padded[number] = row[0]
        padded[number, longest - row.numel() :] = row
        mask[number, longest - row.numel() :] = 1
    return padded, None if bool(mask.all()) else mask


def cut_answers(rows: Tensor, ends: int | Sequence[int] | Tensor | None) -> list[Tensor]:
    """Return each row up to and with the first token that ends a text.

    Args:
        rows: ``(B, T)`` new tokens.
        ends: The tokens that do; None for none.
    """
    stops = torch.tensor([] if ends is None else ends, device=rows.device).flatten()
    found = [torch.isin(row, stops).nonzero().flatten().tolist() for row in rows]
    return [row[: at[0] + 1] if at else row for row, at in zip(rows, found, strict=True)]


def append_ids(cache: ShardedCache, ids: Tensor) -> None:
    """Note ids ``(B, T)`` that a cache was given behind its own."""
    before = cache.input_ids
    if before is None:
        cache.input_ids = ids
        return
    if before.shape[0] != ids.shape[0]:
        before = before.expand(ids.shape[0], -1)
    cache.input_ids = torch.cat([before, ids.to(before.device)], dim=1)


def new_ids(given: Mapping[str, Any], cache: ShardedCache) -> Tensor:
    """Leave out ids that the cache holds: assisted decoding begins with all of them.

    Args:
        given: What the model's forward was given.
        cache: What came before.

    Returns:
        ``(B, T)``.

    Raises:
        ValueError: If ids are given again and are not those of the cache.
    """
    ids: Tensor = given["input_ids"]
    past = cache.get_seq_length()
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if not 0 < past < ids.shape[1]:
        return ids
    # A mask of the ids' own length, or else positions that begin at 0: these are the whole.
    if mask is not None:
        if mask.shape[1] != ids.shape[1]:
            return ids
    elif positions is None or int(positions.flatten()[0]) != 0:
        return ids
    known = cache.input_ids
    if known is None or not torch.equal(ids[:, :past], known.to(ids.device).expand(len(ids), -1)):
        raise ValueError(f"the first {past} tokens are not those that the cache holds")
    return ids[:, past:]


_HIDDEN = (
    "attention_mask hides tokens; a ShardedCache holds whole rows, which may differ in length at "
    "one place: filler before the first tokens of their own"
)


def whole_mask(given: Tensor | None, own: Tensor | None, whole: Tensor, prefix: int) -> Tensor:
    """Return the mask for ``generate``.

    Args:
        given: The caller's. Steps of one token, as most are, do not look at it, so it is done here.
        own: ``(B, T)`` which of the tokens behind the prefix are not filler; None for all.
        whole: ``(B, S)`` all tokens.
        prefix: How many of them the cache holds.

    Returns:
        ``(B, S)``.

    Raises:
        ValueError: If it hides tokens of the prefix, or all of a row's own, or shows filler.
    """
    seen = torch.ones_like(whole)
    if own is not None:
        seen[:, -own.shape[1] :] = own
    if given is None:
        return seen
    shown = given.to(seen.device) != 0
    fits = given.shape == seen.shape and bool(shown[:, :prefix].all() & shown[:, -1].all())
    if not fits or bool(shown[seen == 0].any()):
        raise ValueError(_HIDDEN)
    return given


def new_pads(mask: Tensor | None, cache: ShardedCache, tokens: int) -> tuple[int, ...] | None:
    """Return the filler before each row's own tokens.

    Args:
        mask: Over the cache and the new tokens; None if nothing is masked.
        cache: What came before.
        tokens: New tokens.

    Returns:
        For each row how much; None if no row has any.

    Raises:
        ValueError: If the mask hides anything else.
    """
    if mask is None or tokens == 1:
        return None
    past = cache.get_seq_length()
    new = mask[:, -tokens:] != 0
    hidden = (~new).sum(1)
    expected = torch.arange(tokens, device=mask.device) >= hidden[:, None]
    before = mask[:, : mask.shape[1] - tokens]
    known = cache.pads
    if known is None:
        whole = bool((before != 0).all())
    else:  # filler that was read before: in its place, and nowhere else
        whole = int((before == 0).sum()) == sum(known) and not bool(hidden.any())
    if mask.shape[1] != past + tokens or not whole or not torch.equal(new, expected):
        raise ValueError(_HIDDEN)
    pads = tuple(hidden.tolist())
    return pads if any(pads) else None
