"""Reading a prompt over ranks a chunk at a time: memory stays flat, work stays even.

A chunk of R times ``chunk_tokens`` tokens is dealt in zigzag, so that each rank has an early and a
late part of it. Everything but attention is local to a rank's tokens. In a layer::

    all       one all-gather of the chunk's q, k, v                 a chunk's, whatever came before
    rank r    q of all ranks  x  keys of its own shard of the past  unmasked, equal work
    all       one all-to-all takes partial (out, lse) to their rank
    rank r    its own q  x  the chunk's keys up to each of its parts  causal, even by the zigzag
              everything merged by lse

So keys of the past never move: queries visit them. Per layer a rank sends its share of a chunk's
q, k, v, and one partial result a visiting query, however long the past is; moving the past's keys
would send ``2 * K * D`` numbers for each of its tokens in every chunk.

Frames: the units that a chunk's placeholders need are dealt over the ranks by cost, each encodes
its own, and their rows go to the owners of the placeholders in one all-to-all-v. Rows that later
chunks need (temporal pooling writes a video several times) wait where they were encoded. All of it
is planned on the host before anything is decoded, so each rank's source is streamed once, in order.

A rank whose decoder or encoder fails tells the others before the exchange, and all of them raise.

Letters: R ranks, C tokens of a chunk, L = C / R, H query heads, K kv heads, D head dim, S tokens of
the prompt, N rows, M model dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from longvila.inference.cache import ShardedCache
from longvila.inference.decode import (
    attend_paged,
    attend_segment,
    gather_equal,
    merge_stacked,
    shared_logits,
)
from longvila.inference.frames import FrameSource, TensorFrames
from longvila.inference.prefill import (
    ReadTimes,
    agree,
    describe_items,
    media_mask,
    place_media,
    report_read,
)
from longvila.ops.attention import attention_forward
from longvila.ops.lse import merge_many
from longvila.parallel.families import Family, MediaKind
from longvila.parallel.hf_attention import AttentionStep, check_calls, sentinel_mask
from longvila.parallel.plan import plan_media
from longvila.sp.comm import post_all_to_all
from longvila.sp.layout import SequenceLayout
from longvila.sp.vision import plan_frames

# ---- attention -------------------------------------------------------------------------------


class ChunkStep(AttentionStep):
    """One chunk of a prompt over all ranks; travels to the attention function as ``sp_context``.

    Args:
        cache: The cache, in a step.
        layout: Who has which token of the chunk; all ranks have equally many.
        total: Tokens of the chunk that are the prompt's; the rest is filler.
    """

    def __init__(self, cache: ShardedCache, layout: SequenceLayout, total: int) -> None:
        super().__init__(cache.get_seq_length() + total)
        self.cache, self.layout = cache, layout
        own = layout.intervals(cache.rank)
        self.kept = sum(max(0, min(stop, total) - start) for start, stop in own)
        self.has_past = cache.get_seq_length() > 0
        self.walk = cache.walk()
        self._order: Tensor | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None
    ) -> Tensor:
        """Return attention of this rank's tokens of the chunk; see `AttentionStep.attend`.

        Comm: One all-gather of ``L * (H + 2 K) * D`` elements a rank; behind a past one all-to-all
            of ``C * H * (D + 1)`` float32 (float64) elements.

        Memory: The chunk's q, k, v and twice its partial results.
        """
        cache = self.cache
        heads, kv_heads = q.shape[2], k.shape[2]
        packed = torch.cat([q[0], k[0], v[0]], dim=1)
        gathered = gather_equal(packed, cache)
        parts = []
        if self.has_past:
            parts.append(self._visit(layer, gathered[:, :, :heads], kv_heads, softmax_scale))
        keys, values = self._in_order(gathered[:, :, heads:]).split(kv_heads, dim=2)
        parts.append(self._within(q, keys, values, softmax_scale))
        out, _ = parts[0] if len(parts) == 1 else merge_many(*zip(*parts, strict=True))
        return out.to(q.dtype)

    def _visit(
        self, layer: int, q: Tensor, kv_heads: int, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """All queries ``(R, L, H, D)`` over this rank's past; own ones over all ranks' pasts."""
        cache, (ranks, tokens, heads, dim) = self.cache, q.shape
        visiting = q.reshape(1, ranks * tokens, heads, dim)
        results = [
            attend_segment(visiting, keys, values, causal=False, softmax_scale=scale)
            for keys, values in cache.shards[layer].earlier(self.kept)
        ]
        paged = attend_paged(self.walk, layer, visiting, softmax_scale=scale)
        if paged is not None:
            results.append(paged)
        if not results:
            like = visiting[:, :0, :kv_heads]
            results = [attention_forward(visiting, like, like, causal=False, needs_backward=False)]
        out, lse = results[0] if len(results) == 1 else merge_many(*zip(*results, strict=True))
        # (1, R L, H, D) and (1, H, R L) -> (R, 1, L, H, D + 1)
        leaving = torch.cat([out.to(lse.dtype), lse.transpose(1, 2).unsqueeze(-1)], dim=-1)
        leaving = leaving.view(ranks, 1, tokens, heads, dim + 1)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=cache.group)
        out, lse = merge_stacked(arriving[..., :-1], arriving[..., -1])
        return out, lse.transpose(1, 2)

    def _within(
        self, q: Tensor, keys: Tensor, values: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """This rank's queries over the chunk's own keys up to themselves."""
        outs, lses, row = [], [], 0
        for start, stop in self.layout.intervals(self.cache.rank):
            part = q[:, row : row + stop - start]
            row += stop - start
            out, lse = attention_forward(
                part, keys[:, :stop], values[:, :stop], causal=True, softmax_scale=scale,
                needs_backward=False,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, dim=1), torch.cat(lses, dim=2)

    def _in_order(self, gathered: Tensor) -> Tensor:
        """``(R, L, n, D)`` as ranks have it -> ``(1, C, n, D)`` in the order of the tokens."""
        if self._order is None:
            ranks = range(self.layout.sp_size)
            held = torch.cat([self.layout.token_indices(rank) for rank in ranks])
            self._order = held.argsort().to(gathered.device)
        return gathered.flatten(0, 1).index_select(0, self._order)[None]


# ---- media -----------------------------------------------------------------------------------


class DealtRows:
    """Media rows of one kind, encoded over ranks as the chunks of a prompt need them.

    Args:
        model: The model.
        kind: The kind of medium.
        pixels: Of all items: a tensor, or a source; or this rank's own as a tensor.
        items: What describes each item.
        own: Where units are cut between ranks, R + 1 numbers, if ``pixels`` are this rank's own;
            None to deal the units of each chunk.
        places: ``(N,)`` positions of the placeholders in the prompt, ascending.
        edges: Where chunks begin, and S.
        cache: Whose ranks.
        times: Where to count.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kind: MediaKind,
        pixels: Tensor | FrameSource,
        items: Sequence[Any],
        own: Sequence[int] | None,
        places: Tensor,
        edges: Sequence[int],
        cache: ShardedCache,
        times: ReadTimes,
    ) -> None:
        self.model, self.kind, self.cache, self.times = model, kind, cache, times
        self.places = places
        self.units = units = kind.units(model.config, list(items))
        ranks, me = cache.num_ranks, cache.rank
        count = len(units.frames)
        rows = torch.tensor(units.rows)
        unit_of_row = torch.arange(count).repeat_interleave(rows)
        self.row_of_slot = units.slots.argsort()
        needs = unit_of_row[self.row_of_slot].cummax(0).values
        unit_rank = torch.zeros(count, dtype=torch.int64)
        self.row_edges = [0, *accumulate(units.rows)]
        frame_edges = [0, *accumulate(units.frames)]
        #: For each chunk: the units new in it on all ranks, and this rank's.
        self.chunks: list[tuple[int, range]] = []
        done = 0
        for stop in edges[1:]:
            slots = int((places < stop).sum())
            last = max(done, int(needs[slots - 1]) + 1 if slots else 0)
            cuts = [done + cut for cut in plan_frames(units.costs[done:last], ranks).cuts]
            if own is not None:
                last = count
                cuts = list(own) if done == 0 else [count] * (ranks + 1)
            for rank in range(ranks):
                unit_rank[cuts[rank] : cuts[rank + 1]] = rank
            self.chunks.append((last - done, range(cuts[me], cuts[me + 1])))
            done = last
        self.rank_of_row = unit_rank[unit_of_row]
        ranges = [(frame_edges[u.start], frame_edges[u.stop]) for _, u in self.chunks if len(u)]
        times.expect("encode", sum(stop - start for start, stop in ranges))
        self.batch = kind.frames_per_call(model.config)
        if isinstance(pixels, Tensor):
            if own is not None:
                base = frame_edges[own[me]]
                ranges = [(start - base, stop - base) for start, stop in ranges]
            pixels = TensorFrames(pixels)
        self._pieces: Iterator[Tensor] = pixels.stream(ranges, batch=self.batch)
        self._left: Tensor | None = None
        self._rows: list[Tensor] = []
        self._slots: list[Tensor] = []

    def encode(self, chunk: int) -> None:
        """Encode this rank's units that a chunk is the first to need."""
        todo = list(self.chunks[chunk][1])
        while todo:
            group = [todo.pop(0)]
            frames = self.units.frames[group[0]]
            while todo and (
                self.batch is None or frames + self.units.frames[todo[0]] <= self.batch
            ):
                frames += self.units.frames[todo[0]]
                group.append(todo.pop(0))
            with self.times.decoding():
                pixels = self._pull(frames)
            shapes = [self.units.unit_shapes[unit] for unit in group]
            with self.times.encoding():
                pixels = pixels.to(self.times.device, non_blocking=True)
                self._rows.append(self.kind.encode(self.model, pixels, shapes))
            first, last = self.row_edges[group[0]], self.row_edges[group[-1] + 1]
            self._slots.append(self.units.slots[first:last])
            self.times.advance("encode", frames)

    def _pull(self, frames: int) -> Tensor:
        parts: list[Tensor] = []
        while frames:
            if self._left is None or self._left.shape[0] == 0:
                self._left = next(self._pieces, None)
            if self._left is None:
                raise ValueError(f"the {self.kind.name} frames end {frames} before they should")
            parts.append(self._left[:frames])
            self._left = self._left[frames:]
            frames -= parts[-1].shape[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take(
        self, start: int, stop: int, layout: SequenceLayout, width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | None:
        """Return the rows of this rank's placeholders in a chunk, and their local places.

        Args:
            start: First token of the chunk.
            stop: One past its last token.
            layout: Who has which of its tokens.
            width: Columns of a row.
            dtype: In which rows travel.

        Returns:
            Rows and places, possibly none; None where the chunk has no placeholder on any rank.

        Comm: One all-to-all-v of the chunk's rows.
        """
        first, last = (int((self.places < edge).sum()) for edge in (start, stop))
        if first == last:
            return None
        ranks, me = self.cache.num_ranks, self.cache.rank
        slots = torch.arange(first, last)
        source = self.rank_of_row[self.row_of_slot[slots]]
        target, local = layout.locate(self.places[first:last] - start)
        held = torch.cat([torch.empty(0, dtype=torch.int64), *self._slots])
        rows = torch.cat(self._rows) if self._rows else None
        sent = (source == me).nonzero().flatten()
        sent = sent[target[sent].argsort(stable=True)]
        if rows is None:
            leaving = torch.empty(0, width, dtype=dtype, device=self.times.device)
        else:
            order = held.argsort()
            found = order[torch.searchsorted(held[order], slots[sent])]
            leaving = rows.index_select(0, found.to(rows.device)).to(dtype)
            later = (held >= last).nonzero().flatten()
            self._slots = [held[later]]
            self._rows = [rows.index_select(0, later.to(rows.device))]
        got = (target == me).nonzero().flatten()
        got = got[source[got].argsort(stable=True)]
        received, pending = post_all_to_all(
            leaving,
            torch.bincount(target[sent], minlength=ranks).tolist(),
            torch.bincount(source[got], minlength=ranks).tolist(),
            self.cache.group,
        )
        pending.wait()
        return received, local[got].to(received.device)


# ---- the prompt ------------------------------------------------------------------------------


def prefill_rank_chunks(
    model: PreTrainedModel,
    family: Family,
    cache: ShardedCache,
    input_ids: Tensor,
    inputs: Mapping[str, Any],
    *,
    chunk_tokens: int,
    positions: Tensor | None = None,
    times: ReadTimes | None = None,
) -> Tensor:
    """Read a prompt over all ranks behind what a cache holds, a chunk at a time.

    Args:
        model: The whole model.
        family: Its family.
        cache: Extended by the prompt.
        input_ids: ``(1, S)``, the same on every rank.
        inputs: Pixels as tensors or sources, all of them or under ``local_...`` this rank's, and
            counts.
        chunk_tokens: Tokens of a chunk that a rank has.
        positions: ``(3, S)`` positions, for families that have them in 3-D.
        times: Where to count time, and report.

    Returns:
        ``(1, V)`` logits of the last token, the same on every rank.

    Raises:
        ValueError: If media and placeholders do not match, pixels come in pieces, or ranks have
            different prompts.
        RankError: If another rank failed to decode or encode its frames, or to report progress.

    Comm: As `ChunkStep.attend` a layer and chunk, `DealtRows.take` a chunk and kind; an
        all-reduce of a flag a chunk of media, and one more; a broadcast of V logits.

    Memory: This rank's shard, the activations of ``chunk_tokens`` tokens, and those of one
        micro-batch of frames.
    """
    ranks, rank = cache.num_ranks, cache.rank
    on_host = input_ids[0].cpu()
    total = on_host.numel()
    head, text = model.get_output_embeddings(), family.text_model(model)
    device = head.weight.device
    times = times or ReadTimes(device)
    times.expect("read", total)
    _check_same(on_host, cache, device)
    # Whole zigzag parts, so that only the last chunk has filler.
    step_tokens = max(1, chunk_tokens // 2) * 2 * ranks
    edges = [*range(0, total, step_tokens), total]
    streams = _open(model, family, on_host, inputs, edges, cache, times)
    is_media = media_mask(model, family, on_host)
    cache.reserve(-(-total // ranks) + 2 * len(edges))
    hidden = layout = None
    error: Exception | None = None
    for chunk, (start, stop) in enumerate(pairwise(edges)):
        filled = -(-(stop - start) // (2 * ranks)) * 2 * ranks
        layout = SequenceLayout((filled,), ranks, 1, "zigzag")
        mine = layout.token_indices(rank)
        inside = mine.clamp(max=stop - start - 1) + start
        embeds = family.embed(model, on_host[inside].to(device))
        if any(stream.chunks[chunk][0] for stream in streams):
            try:
                for stream in streams:
                    stream.encode(chunk)
            except Exception as fault:  # raised on every rank by agree
                error = error or fault
            agree(error, cache, device)
        width = embeds.shape[1] * family.row_multiple(model.config)
        taken = [stream.take(start, stop, layout, width, embeds.dtype) for stream in streams]
        embeds, further = place_media(family, embeds, [each for each in taken if each is not None])
        where = _positions(cache, positions, mine, inside)
        with cache.receiving(layout, stop - start, behind=True):
            step = ChunkStep(cache, layout, stop - start)
            hidden = text(
                inputs_embeds=embeds[None],
                attention_mask=sentinel_mask(device),
                position_ids=where.to(device),
                past_key_values=cache,
                use_cache=True,
                sp_context=step,
                **further,
            ).last_hidden_state[0]
            check_calls(
                step.calls,
                expected=text.config.num_hidden_layers,
                implementation=text.config._attn_implementation,
            )
        if cache.text_runs is not None and positions is not None:
            own = slice(start, stop)
            cache.text_runs = cache.text_runs.read(positions[:, own], is_media[own])
        error = error or report_read(times, stop - start)
    agree(error, cache, device)
    assert hidden is not None and layout is not None
    owners, rows = layout.locate([total - 1 - edges[-2]])
    owner, row = int(owners[0]), int(rows[0])
    # Every rank makes the tensor; that of the owner is sent.
    logits = head(hidden[row if owner == rank else 0].view(1, -1))
    return shared_logits(logits, cache, owner)


def _check_same(input_ids: Tensor, cache: ShardedCache, device: torch.device) -> None:
    """Ranks with different prompts would wait for each other, or answer nonsense.

    Comm: One all-reduce of six integers.
    """
    places = torch.arange(1, input_ids.numel() + 1) % 1_000_003
    own = torch.tensor([input_ids.numel(), int((input_ids * places).sum()), cache.get_seq_length()])
    both = torch.cat([own, -own]).to(device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=cache.group)
    if not torch.equal(both[:3], -both[3:]):
        raise ValueError(
            f"the ranks were given different prompts, or caches of different lengths; rank "
            f"{cache.rank} has {input_ids.numel()} tokens behind {cache.get_seq_length()}"
        )


def _positions(
    cache: ShardedCache, positions: Tensor | None, mine: Tensor, inside: Tensor
) -> Tensor:
    """Positions of this rank's tokens of a chunk; filler has any."""
    if positions is None:
        return (cache.get_seq_length() + mine)[None]
    return positions[:, None, inside.to(positions.device)]


def _open(
    model: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    inputs: Mapping[str, Any],
    edges: Sequence[int],
    cache: ShardedCache,
    times: ReadTimes,
) -> list[DealtRows]:
    """Match the media of a prompt with its placeholders; plan who encodes what, and when."""
    described = describe_items(model, family, input_ids, inputs)
    local = {kind.name for kind in family.media if inputs.get(f"local_{kind.pixels}") is not None}
    plan = None
    if local:
        counts = {kind.name: items for kind, _, items in described}
        plan = plan_media(model.config, cache.num_ranks, counts)
    streams = []
    for kind, where, items in described:
        own = None
        pixels = inputs.get(kind.pixels)
        if kind.name in local:
            assert plan is not None
            pixels = inputs[f"local_{kind.pixels}"]
            own = _unit_cuts(plan, kind.name)
        if not isinstance(pixels, Tensor | FrameSource):
            raise ValueError(
                f"{kind.pixels} in pieces cannot be read over several ranks, which take frames "
                f"out of turn: give a FrameSource, or this rank's as one tensor "
                f"local_{kind.pixels}"
            )
        places = where.nonzero().flatten()
        streams.append(DealtRows(model, kind, pixels, items, own, places, edges, cache, times))
    return streams


def _unit_cuts(plan: Any, name: str) -> list[int]:
    """Where the units of one kind are cut by a plan of all kinds."""
    base = 0
    for kind, units in plan.units.items():
        if kind == name:
            total = len(units.frames)
            return [min(max(cut - base, 0), total) for cut in plan.frames.cuts]
        base += len(units.frames)
    raise ValueError(f"no {name!r} in the plan")
