"""Reading new tokens over a cache that lies on several ranks.

Every rank has the new tokens and runs the whole text model on them. In each layer::

    rank r    q of the new tokens  x  keys of its shard        -> out_r, lse_r     no communication
    all       one all-gather of (out_r, lse_r), packed         -> R partial results
    all       merged by lse, in the order of the ranks         -> out

1. The rank that keeps the new tokens has them in its tail and attends to them causally (aligned to
   the end); everything else lies before them and is attended to without a mask.
2. A long segment and few queries leave most of a GPU idle, since kernels cut queries, not keys. So
   the segment is read by a kernel that is split over the keys (`longvila.ops.decode`). Where that
   cannot be had, the queries that share a kv head become one block of queries, and the segment is
   viewed as equal chunks in the batch dimension: one call over all of them, merged by lse. Steps
   of the same few tokens are replayed, not launched (`longvila.inference.static_step`).
3. **The same logits, to the bit, on all ranks.** Gathered partial results are equal everywhere and
   merged in one order, so ranks can drift apart only in what each computes for itself from equal
   inputs. Equal GPUs give equal bits there in practice; libraries do not promise it, and one
   different argmax would leave ranks waiting for each other for ever. So the logits of a step are
   those of the first rank, broadcast: V numbers a row, against a gather in every layer.

Cost a step and rank: the text model's weights once, its own shard once, and a layer's gather of
``R * B * T * H * (D + 1)`` float32. It does not shard the weights or the work of the new tokens.

Letters: B rows, T new tokens, n tokens of a segment, H query heads, K kv heads, G = H / K, D head
dim, V vocabulary, R ranks.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from longvila.inference.cache import ShardedCache
from longvila.inference.inputs import new_ids, new_pads
from longvila.inference.paging import Walk
from longvila.inference.static_step import StaticSteps
from longvila.log import log_once
from longvila.ops.attention import attention_forward
from longvila.ops.decode import MAX_NEW_TOKENS, decode_attention, decode_refusal
from longvila.ops.lse import merge, merge_into, merge_many
from longvila.parallel.families import Family
from longvila.parallel.hf_attention import NAME, AttentionStep, check_calls, sentinel_mask

#: At most so many queries (rows times tokens) are few.
_FEW_QUERIES = 16
#: Chunks of a segment fill the multiprocessors so many times over. A block reads its chunk at the
#: rate of one multiprocessor, so what counts is that the last round is full: rounds times
#: multiprocessors is divided by the kv heads, and the chunks are cut to just that number.
_ROUNDS = 4
_SHORTEST_CHUNK = 512
#: Many queries read a long segment in pieces of one length, so that a kernel library that plans for
#: each shape plans for few.
_PIECE_TOKENS = 131072


# ---- one shard -------------------------------------------------------------------------------


def merge_stacked(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Merge partial attention over many disjoint sets of keys at once.

    Args:
        outs: ``(R, B, T, H, D)`` float32 or float64.
        lses: ``(R, B, T, H)``, -inf where a set has no key for a query.

    Returns:
        ``(B, T, H, D)`` and ``(B, T, H)``. The sum runs over the first dimension in its order.
    """
    top = lses.amax(0)
    top = top.masked_fill(torch.isneginf(top), 0.0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    out = (outs * weights.unsqueeze(-1)).sum(0)
    seen = total > 0
    return out / total.where(seen, 1.0).unsqueeze(-1), top + total.log()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def chunk_tokens(tokens: int, kv_heads: int, multiprocessors: int) -> int:
    """Return the tokens of the chunks that few queries view a segment as.

    Args:
        tokens: n.
        kv_heads: K; a chunk is K blocks of work.
        multiprocessors: Of the device.

    Returns:
        A number that leaves fewer tokens over than there are chunks.
    """
    chunks = max(1, min(_ROUNDS * multiprocessors // kv_heads, tokens // _SHORTEST_CHUNK))
    return tokens // chunks


#: How few queries read a long segment: in chunks of so many tokens, in chunks chosen by device
#: (None), or by the kernel that splits the keys where it can be used.
Split = int | Literal["kernel"] | None


def _chunk(tokens: int, kv_heads: int, device: torch.device, split_tokens: Split) -> int:
    """Tokens of the chunks that a segment is viewed as; all of them for no chunks."""
    if isinstance(split_tokens, int):
        return split_tokens
    if device.type != "cuda":
        return tokens
    return chunk_tokens(tokens, kv_heads, _multiprocessors(device))


def attend_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float | None,
    split_tokens: Split = None,
    piece_tokens: int = _PIECE_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Return attention of new queries over one segment.

    Args:
        q: ``(B, T, H, D)``.
        k: ``(B, n, K, D)``, or ``(1, n, K, D)`` for a segment that all rows share.
        v: As ``k``.
        causal: Whether the segment ends with the tokens of the queries.
        softmax_scale: Factor on the scores.
        split_tokens: How few queries read, see `Split`.
        piece_tokens: Tokens of the pieces that many queries read a long segment in.

    Returns:
        ``out (B, T, H, D)`` and ``lse (B, H, T)``.

    Raises:
        ValueError: If a causal segment is shared by several rows.

    Comm: None.
    """
    batch, new, heads, dim = q.shape
    kv_heads = k.shape[2]
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "needs_backward": False}
    # One query at the end sees everything.
    causal = causal and new > 1
    shared = k.shape[0] == 1 and batch > 1
    if causal and shared:
        raise ValueError("rows with tokens of their own cannot share the segment they end in")
    if split_tokens == "kernel" and new <= MAX_NEW_TOKENS and batch * new <= _FEW_QUERIES:
        reason = decode_refusal(q.dtype, dim, q.device)
        if reason is None and k.shape[1]:
            return decode_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)
        if q.device.type == "cuda" and reason is not None:
            log_once(__name__, logging.WARNING, f"few queries without the split kernel: {reason}")
    if causal:
        if k.shape[1] <= piece_tokens:
            return attention_forward(q, k, v, causal=True, **options)
        before = k.shape[1] - new
        own = attention_forward(q, k[:, before:], v[:, before:], causal=True, **options)
        return merge(*_attend_pieces(q, k[:, :before], v[:, :before], options, piece_tokens), *own)
    if shared:
        out, lse = attend_segment(
            q.reshape(1, batch * new, heads, dim), k, v,
            causal=False, softmax_scale=softmax_scale, split_tokens=split_tokens,
            piece_tokens=piece_tokens,
        )  # fmt: skip
        return (
            out.view(batch, new, heads, dim),
            lse.view(heads, batch, new).transpose(0, 1),
        )
    if batch * new > _FEW_QUERIES:
        return _attend_pieces(q, k, v, options, piece_tokens)
    group = heads // kv_heads
    # (B, T, K, G, D) -> (B, T * G, K, D): the queries of a kv head side by side.
    folded = q.unflatten(2, (kv_heads, group)).transpose(2, 3).reshape(batch, -1, kv_heads, dim)
    out, lse = _attend_chunks(folded, k, v, options, split_tokens)
    out = out.view(batch, new, group, kv_heads, dim).transpose(2, 3)
    lse = lse.view(batch, kv_heads, new, group).transpose(2, 3)
    return out.reshape(q.shape), lse.reshape(batch, heads, new)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Sequence[int],
    *,
    causal: bool,
    softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Return attention of rows over keys that each row has behind filler of its own length.

    Args:
        q: ``(B, T, H, D)``.
        k: ``(B, n, K, D)``.
        v: As ``k``.
        starts: For each row, how many keys are filler.
        causal: Whether the keys end with those of the queries.
        softmax_scale: Factor on the scores.

    Returns:
        ``out (B, T, H, D)`` and ``lse (B, H, T)``; queries that are filler see no key.

    Comm: None.
    """
    batch, new, heads, dim = q.shape
    if new > 1:
        results = [
            attention_forward(
                q[row : row + 1], k[row : row + 1, start:], v[row : row + 1, start:],
                causal=causal, softmax_scale=softmax_scale, needs_backward=False,
            )
            for row, start in enumerate(starts)
        ]  # fmt: skip
        outs, lses = zip(*results, strict=True)
        return torch.cat(outs), torch.cat(lses)
    # One token a row: a few hundred keys, all rows at once.
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads = k.shape[2]
    grouped = q.view(batch, kv_heads, heads // kv_heads, dim).to(wide)
    scores = torch.einsum("bkgd,bnkd->bkgn", grouped, k.to(wide))
    scores = scores * (dim**-0.5 if softmax_scale is None else softmax_scale)
    first = torch.tensor(starts, device=q.device)
    hidden = torch.arange(k.shape[1], device=q.device) < first[:, None]
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0).unsqueeze(-1))
    out = torch.einsum("bkgn,bnkd->bkgd", weights, v.to(wide))
    return out.reshape(q.shape), lse.reshape(batch, heads, 1)


def _attend_pieces(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], piece_tokens: int
) -> tuple[Tensor, Tensor]:
    pieces = zip(k.split(piece_tokens, dim=1), v.split(piece_tokens, dim=1), strict=True)
    results = (attention_forward(q, *piece, causal=False, **options) for piece in pieces)
    total = next(results)
    # Merged as they come: a list of them would grow with the segment.
    for number, part in enumerate(results):
        if number == 0:
            total = merge(*total, *part)
        else:
            merge_into(*total, *part)
    return total


def _attend_chunks(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], split_tokens: Split
) -> tuple[Tensor, Tensor]:
    tokens = k.shape[1]
    chunk = _chunk(tokens, k.shape[2], k.device, split_tokens)
    chunks = tokens // chunk
    if chunks < 2 or k.shape[0] > 1:
        return attention_forward(q, k, v, causal=False, **options)
    cut = chunks * chunk
    out, lse = attention_forward(
        q.expand(chunks, -1, -1, -1),
        k[0, :cut].unflatten(0, (chunks, chunk)),
        v[0, :cut].unflatten(0, (chunks, chunk)),
        causal=False,
        **options,
    )
    out, lse = merge_stacked(out.unsqueeze(1).to(lse.dtype), lse.transpose(1, 2).unsqueeze(1))
    lse = lse.transpose(1, 2)
    if cut < tokens:
        rest = attention_forward(q, k[:, cut:], v[:, cut:], causal=False, **options)
        out, lse = merge(out, lse, *rest)
    return out, lse


# ---- all shards ------------------------------------------------------------------------------

# Renamed in torch 2.13, which warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_equal(x: Tensor, cache: ShardedCache) -> Tensor:
    """Return ``(R, *x.shape)`` of all ranks, whose tensors have one shape.

    Comm: One all-gather of ``x.numel()`` elements a rank.
    """
    gathered = x.new_empty((cache.num_ranks, *x.shape))
    _all_gather(gathered.flatten(0, 1), x.contiguous(), group=cache.group)
    return gathered


def attend_paged(
    walk: Walk | None,
    layer: int,
    q: Tensor,
    *,
    softmax_scale: float | None,
    split_tokens: Split = None,
) -> tuple[Tensor, Tensor] | None:
    """Return attention over what a layer has on the host; None if it has nothing there.

    Args:
        walk: The step's pass over it.
        layer: Which layer.
        q: ``(B, T, H, D)`` queries, which follow all of it.
        softmax_scale: Factor on the scores.
        split_tokens: As for `attend_segment`.

    Comm: None.

    Memory: One partial result, whatever there is.
    """
    total: tuple[Tensor, Tensor] | None = None
    if walk is not None:
        for keys, values in walk.layer(layer):
            part = attend_segment(
                q, keys, values, causal=False, softmax_scale=softmax_scale,
                split_tokens=split_tokens,
            )  # fmt: skip
            total = part if total is None else merge(*total, *part)
    return total


class ReadStep(AttentionStep):
    """One pass of new tokens over a cache; travels to the attention function as ``sp_context``.

    Args:
        cache: The cache, in a step.
        tokens: T.
        owner: The rank that keeps the new tokens.
        split_tokens: As for `attend_segment`.
    """

    def __init__(self, cache: ShardedCache, tokens: int, owner: int, split_tokens: Split) -> None:
        super().__init__(cache.get_seq_length() + tokens)
        self.cache, self.owner, self.split_tokens = cache, owner, split_tokens
        self.walk = cache.walk()

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None
    ) -> Tensor:
        """Return attention of new tokens over all ranks; see `AttentionStep.attend`.

        Comm: One all-gather of ``B * T * H * (D + 1)`` float32 (float64) elements a rank.

        Memory: R times that.
        """
        cache = self.cache
        past = attend_paged(
            self.walk, layer, q, softmax_scale=softmax_scale, split_tokens=self.split_tokens
        )
        parts = cache.shards[layer].parts()
        keeps = self.owner == cache.rank
        results = []
        for number, (part_k, part_v) in enumerate(parts):
            causal = keeps and number == len(parts) - 1
            starts = cache.shards[layer].starts(number)
            if starts is not None:
                part = attend_rows(
                    q, part_k, part_v, starts, causal=causal, softmax_scale=softmax_scale
                )
            else:
                part = attend_segment(
                    q, part_k, part_v, causal=causal, softmax_scale=softmax_scale,
                    split_tokens=self.split_tokens,
                )  # fmt: skip
            results.append(part)
        if past is not None:
            results.append(past)
        if not results:
            # No token of this rank: the neutral element, from the one place that defines it.
            results = [attention_forward(q, k[:, :0], v[:, :0], causal=False, needs_backward=False)]
        out, lse = results[0] if len(results) == 1 else merge_many(*zip(*results, strict=True))
        if cache.num_ranks > 1:
            packed = torch.cat([out.to(lse.dtype), lse.transpose(1, 2).unsqueeze(-1)], dim=-1)
            gathered = gather_equal(packed, cache)
            out, _ = merge_stacked(gathered[..., :-1], gathered[..., -1])
        return out.to(q.dtype)


def read_embeds(
    model: PreTrainedModel,
    family: Family,
    cache: ShardedCache,
    embeds: Tensor,
    *,
    position_ids: Tensor | None = None,
    split_tokens: Split = None,
    further: Mapping[str, Any] | None = None,
    pads: tuple[int, ...] | None = None,
) -> Tensor:
    """Run the text model on new tokens that follow a cache, and keep their keys and values.

    Args:
        model: The whole model.
        family: Where its parts are.
        cache: What came before; extended.
        embeds: ``(B, T, M)`` embeddings of the new tokens, the same on every rank.
        position_ids: ``(B, T)`` or ``(3, B, T)``; None for those of text.
        split_tokens: As for `attend_segment`.
        further: Keywords of the text model for rows that feed deeper layers.
        pads: For each row, how many of the new tokens are filler that comes first.

    Returns:
        ``(B, T, M)`` last hidden states.

    Raises:
        ValueError: If a layer did not attend over the cache.

    Comm: As `ReadStep.attend`, a layer.
    """
    text = family.text_model(model)
    tokens = embeds.shape[1]
    filler = pads or cache.pads
    if position_ids is None and (cache.text_runs is not None or filler is not None):
        position_ids = _text_positions(cache, embeds, filler)
    with cache.appending(tokens, pads=pads) as owner:
        step = ReadStep(cache, tokens, owner, split_tokens)
        hidden: Tensor = text(
            inputs_embeds=embeds,
            attention_mask=sentinel_mask(embeds.device),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            sp_context=step,
            **(further or {}),
        ).last_hidden_state
        check_calls(
            step.calls,
            expected=text.config.num_hidden_layers,
            implementation=text.config._attn_implementation,
        )
    return hidden


def _text_positions(cache: ShardedCache, new: Tensor, filler: tuple[int, ...] | None) -> Tensor:
    """Positions of text behind a cache: ``(B, T)``, or ``(3, B, T)`` where they are 3-D."""
    rows, tokens = new.shape[:2]
    runs = cache.text_runs
    first = cache.get_seq_length() + (0 if runs is None else runs.offset)
    positions = torch.arange(first, first + tokens, device=new.device).expand(rows, -1)
    if filler is not None:
        positions = positions - torch.tensor(filler, device=new.device)[:, None]
        positions = positions.clamp(min=0)
    return positions if runs is None else positions.expand(3, -1, -1)


def shared_logits(logits: Tensor, cache: ShardedCache, source: int = 0) -> Tensor:
    """Return one rank's logits on all ranks.

    Args:
        logits: This rank's, or a tensor to fill.
        cache: Whose ranks.
        source: Whose logits.

    Returns:
        Logits of the shape given.

    Comm: One broadcast of ``logits.numel()`` elements.
    """
    if cache.num_ranks > 1:
        logits = logits.contiguous()
        dist.broadcast(logits, group=cache.group, group_src=source)
    return logits


# ---- the model's forward ---------------------------------------------------------------------

_TAKEN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values"}
#: `generate` hands on the tokenizer that it finds ``stop_strings`` with.
_IGNORED = {
    "use_cache", "return_dict", "logits_to_keep", "cache_position", "mm_token_type_ids",
    "tokenizer",
}  # fmt: skip


class CacheForward:
    """A model's forward that reads a `ShardedCache` where it is given one.

    It replaces ``forward`` of one model object, so that ``generate`` needs to know nothing; every
    other call goes to the forward that was there.

    Args:
        model: The model.
        family: Where its parts are.
        original: Its forward so far.
        static: Steps of few tokens with fixed shapes.
        split_tokens: As for `attend_segment`; given, steps are not of fixed shapes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        original: Callable[..., Any],
        static: StaticSteps,
        split_tokens: int | None = None,
    ) -> None:
        self.model, self.family, self.original = model, family, original
        self.static, self.split_tokens = static, split_tokens
        self.names = list(inspect.signature(original).parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Read new tokens over the cache, or do what the model does without one."""
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        if not isinstance(cache, ShardedCache):
            return self.original(*args, **kwargs)
        for name, value in given.items():
            # 5.23 hands on an empty mm_encoder_outputs where there are no media.
            empty = value is None or value is False or (isinstance(value, dict) and not value)
            if name not in _TAKEN | _IGNORED and not empty:
                raise ValueError(
                    f"{name} does not go with a ShardedCache: media are read by Engine.prefill, "
                    "and layers return neither hidden states nor weights"
                )
        embeds: Any = given.get("inputs_embeds")
        ids: Any = new_ids(given, cache) if embeds is None else None
        tokens: int = (ids if embeds is None else embeds).shape[1]
        pads = new_pads(given.get("attention_mask"), cache, tokens)
        positions = given.get("position_ids")
        if positions is not None:
            positions = positions[..., -tokens:]
        if cache.text_runs is not None or pads is not None or cache.pads is not None:
            # generate has not seen the prefix's media, and makes positions that count tokens.
            positions = None
        keep = given.get("logits_to_keep")
        keep = 0 if keep is None else keep
        logits: Tensor | None = None
        if ids is not None and pads is None and isinstance(keep, int) and self.split_tokens is None:
            at = _text_positions(cache, ids, cache.pads) if positions is None else positions
            logits = self.static.try_step(cache, ids, at, keep or tokens)
        if logits is None:
            if ids is not None:
                embeds = self.family.embed(self.model, ids.flatten()).view(*ids.shape, -1)
            # The kernel belongs to steps of fixed shapes: it is used where they are switched on.
            split: Split = self.split_tokens
            if split is None and self.static.mode != "off":
                split = "kernel"
            hidden = read_embeds(
                self.model, self.family, cache, embeds,
                position_ids=positions, split_tokens=split, pads=pads,
            )  # fmt: skip
            kept = hidden[:, -keep:] if isinstance(keep, int) else hidden[:, keep]
            logits = shared_logits(self.model.get_output_embeddings()(kept), cache)
        if cache.text_runs is not None:
            cache.text_runs = cache.text_runs.count(tokens)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]


def set_attention(text: PreTrainedModel) -> str | None:
    """Tell a text model to attend by what a call carries; return what it had before, if another."""
    before: str | None = text.config._attn_implementation
    if before == NAME:
        return None
    text.set_attn_implementation(NAME)
    return before
