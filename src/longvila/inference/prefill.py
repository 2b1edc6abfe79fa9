"""Reading a prompt with its media into a cache, on one process or over the ranks of a group.

**One process** (`prefill_chunks`): the prompt is read a chunk at a time, each over the cache of the
chunks before it. Frames are encoded when the first chunk that holds one of their placeholders
comes, a micro-batch at a time, from a tensor or from an iterator that still decodes; rows are
dropped once they are in an embedding. The head sees the last position only::

    frames  | f0 f1 f2 f3 | f4 f5 f6 f7 | ...        a micro-batch when a chunk needs it
    tokens  | chunk 0  | chunk 1  | chunk 2  | ...   embed, put rows in place, text model, cache

Beyond the cache, memory is that of one chunk and one micro-batch, whatever the prompt. A chunk
attends to everything before it without a mask, and to itself causally, so a chunk's size changes
the order of sums and nothing else.

**Many ranks** (`prefill_ranks`): the two-stage forward of `longvila.parallel.mmsp` on the whole
prompt at once: frames dealt by cost, rows sent to the owners of their tokens, tokens dealt by the
layout, attention over all ranks. Each layer leaves the keys and values of the rank's tokens in its
shard; nothing is moved afterwards. Causal work is as balanced as the layout. The rank that holds
the last token computes its logits and broadcasts them.

A prompt whose share of a rank is longer than a chunk, or whose frames are streamed, is read over
ranks a chunk at a time (`longvila.inference.ranks`).

Letters: S tokens of the prompt, N rows, M model dim, F frames, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from longvila.errors import RankError
from longvila.inference.cache import ShardedCache
from longvila.inference.decode import read_embeds, shared_logits
from longvila.inference.frames import FrameSource, MissingFrames
from longvila.parallel.families import Family, MediaKind
from longvila.parallel.mmsp import TwoStageForward
from longvila.parallel.plan import StepPlan

#: Pixels ``(F, ...)``: whole, in pieces as they are decoded, or a source that is asked for them.
Pixels = Tensor | Iterable[Tensor] | FrameSource


class ReadTimes:
    """Where the time of a prefill went, apart from the text model.

    Args:
        device: Where the encoder runs; on a GPU its time is that of the device.
        progress: Called with a stage, ``"encode"`` (frames) or ``"read"`` (tokens), what is done
            of it, and its total.
    """

    def __init__(
        self, device: torch.device, progress: Callable[[str, int, int], None] | None = None
    ) -> None:
        self.device, self.progress = device, progress
        self.decode_s = 0.0
        self._vision_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._done: dict[str, int] = {}
        self._totals: dict[str, int] = {}

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Time a wait for frames."""
        start = time.perf_counter()
        yield
        self.decode_s += time.perf_counter() - start

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Time a call of the encoder, without waiting for it."""
        if self.device.type == "cuda":
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
            return
        start = time.perf_counter()
        yield
        self._vision_s += time.perf_counter() - start

    def expect(self, stage: str, number: int) -> None:
        """Add to the total of a stage."""
        self._totals[stage] = self._totals.get(stage, 0) + number

    def advance(self, stage: str, number: int) -> None:
        """Report progress."""
        self._done[stage] = self._done.get(stage, 0) + number
        if self.progress is not None:
            self.progress(stage, self._done[stage], self._totals[stage])

    @property
    def vision_s(self) -> float:
        """Seconds in the encoder; on a GPU, of calls that have ended."""
        return self._vision_s + sum(a.elapsed_time(b) for a, b in self._events) / 1000


def agree(error: Exception | None, cache: ShardedCache, device: torch.device) -> None:
    """Raise on every rank if one failed.

    Args:
        error: What failed on this rank.
        cache: Whose ranks.
        device: Of tensors that ranks exchange.

    Raises:
        MissingFrames: On every rank, if that is what failed.
        RankError: If another rank failed in another way.
        Exception: What failed on this rank.

    Comm: On one process none, else one all-reduce of a flag; if it is set, one all-gather of the
        errors.
    """
    if cache.num_ranks == 1:
        if error is not None:
            raise error
        return
    flag = torch.tensor(float(error is not None), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=cache.group)
    if not flag.item():
        return
    mine: Any = None
    if isinstance(error, MissingFrames):
        mine = (error.name, error.indices)
    elif error is not None:
        mine = f"{type(error).__name__}: {error}"
    found: list[Any] = [None] * cache.num_ranks
    dist.all_gather_object(found, mine, group=cache.group)
    if error is not None and not isinstance(error, MissingFrames):
        raise error
    for rank, each in enumerate(found):
        if isinstance(each, str):
            raise RankError(f"rank {rank} failed while it read the prompt: {each}")
    name, indices = next(each for each in found if each is not None)
    raise MissingFrames(name, indices)


def report_read(times: ReadTimes, tokens: int) -> Exception | None:
    """Report tokens that were read.

    A caller's progress may raise, on one rank alone. The others learn of it where ranks meet next
    (`agree`): a meeting after every chunk would keep the host from preparing the next one.

    Args:
        times: Whose progress is told.
        tokens: How many.

    Returns:
        What it raised.
    """
    try:
        times.advance("read", tokens)
    except Exception as fault:  # raised on every rank by agree
        return fault
    return None


class RowStream:
    """Media rows of one kind in the order of their placeholders, encoded when asked for.

    Args:
        model: The model.
        kind: The kind of medium.
        pixels: Frames of all items, as one tensor or as pieces of any size.
        counts: Frames of each item, or what else describes it to its family.
        times: Where to count.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kind: MediaKind,
        pixels: Pixels,
        counts: Sequence[Any],
        times: ReadTimes | None = None,
    ) -> None:
        self.model, self.kind = model, kind
        self.device: torch.device = model.get_output_embeddings().weight.device
        self.times = times or ReadTimes(self.device)
        self.units = kind.units(model.config, list(counts))
        self.frames_per_call = kind.frames_per_call(model.config)
        self.times.expect("encode", sum(self.units.frames))
        if isinstance(pixels, FrameSource):
            total = sum(self.units.frames)
            pixels = pixels.stream([(0, total)], batch=self.frames_per_call)
        self._pieces: Iterator[Tensor] = iter([pixels] if isinstance(pixels, Tensor) else pixels)
        self._piece: Tensor | None = None
        self._next_unit = self._next_row = 0
        self._slots: list[Tensor] = []
        self._rows: list[Tensor] = []
        # For each placeholder the last unit that it, or one before it, needs.
        units = torch.arange(len(self.units.rows)).repeat_interleave(torch.tensor(self.units.rows))
        self._needs = units[self.units.slots.argsort()].cummax(0).values if len(units) else units

    def take(self, stop: int) -> Tensor:
        """Return the rows of all placeholders before ``stop`` that were not taken yet.

        Args:
            stop: Placeholders of this kind up to the end of the chunk.

        Returns:
            ``(n, M)`` in the order of the placeholders.

        Raises:
            ValueError: If the frames end before the rows do.

        Memory: Pixels and activations of a micro-batch; rows that later chunks need.
        """
        while self._next_unit <= int(self._needs[stop - 1]):
            self._encode()
        slots, rows = torch.cat(self._slots), torch.cat(self._rows)
        order = slots.argsort()
        now = int((slots < stop).sum())
        first, rest = order[:now].to(rows.device), order[now:]
        self._slots, self._rows = [slots[rest]], [rows[rest.to(rows.device)]]
        return rows[first]

    def _encode(self) -> None:
        """Encode the next micro-batch of whole units."""
        first, frames = self._next_unit, 0
        for count in self.units.frames[first:]:
            full = self.frames_per_call is not None and frames + count > self.frames_per_call
            if full and self._next_unit > first:
                break
            frames += count
            self._next_unit += 1
        with self.times.decoding():
            pixels = self._pull(frames)
        shapes = self.units.unit_shapes[first : self._next_unit]
        with self.times.encoding():
            pixels = pixels.to(self.device, non_blocking=True)
            rows = self.kind.encode(self.model, pixels, shapes)
        self.times.advance("encode", frames)
        start = self._next_row
        self._next_row += rows.shape[0]
        self._rows.append(rows)
        self._slots.append(self.units.slots[start : self._next_row])

    def _pull(self, frames: int) -> Tensor:
        parts: list[Tensor] = []
        while frames:
            if self._piece is None or self._piece.shape[0] == 0:
                self._piece = next(self._pieces, None)
            if self._piece is None:
                raise ValueError(
                    f"the {self.kind.name} frames end {frames} before those that "
                    f"{self.kind.counts} promises"
                )
            parts.append(self._piece[:frames])
            self._piece = self._piece[frames:]
            frames -= parts[-1].shape[0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def open_streams(
    model: PreTrainedModel,
    family: Family,
    input_ids: Tensor,
    inputs: Mapping[str, Any],
    times: ReadTimes | None = None,
) -> list[tuple[Tensor, RowStream]]:
    """Match the media of a prompt with its placeholders.

    Args:
        model: The model.
        family: Its family.
        input_ids: ``(S,)`` on the host.
        inputs: Pixels, perhaps under ``local_...``, and counts.
        times: Where to count.

    Returns:
        For each kind that there is: which tokens are its placeholders ``(S,)``, and its rows.

    Raises:
        ValueError: If placeholders and rows differ in number, or counts are missing.
    """
    found = []
    for kind, where, items in describe_items(model, family, input_ids, inputs):
        pixels = inputs.get(kind.pixels)
        if pixels is None:  # alone, a rank's own are all there are
            pixels = inputs[f"local_{kind.pixels}"]
        found.append((where, RowStream(model, kind, pixels, items, times)))
    return found


def describe_items(
    model: PreTrainedModel, family: Family, input_ids: Tensor, inputs: Mapping[str, Any]
) -> list[tuple[MediaKind, Tensor, list[Any]]]:
    """Match the media of a prompt with its placeholders, from what describes them alone.

    Args:
        model: The model.
        family: Its family.
        input_ids: ``(S,)`` on the host.
        inputs: Pixels, or under ``local_...`` a rank's, and counts.

    Returns:
        For each kind that there is: which tokens are its placeholders ``(S,)``, and its items.

    Raises:
        ValueError: If placeholders and rows differ in number, or counts are missing.
    """
    found = []
    for kind in family.media:
        where = input_ids == kind.token_id(model.config)
        pixels, counts = inputs.get(kind.pixels), inputs.get(kind.counts)
        own = inputs.get(f"local_{kind.pixels}")
        if own is not None and counts is None:
            raise ValueError(f"local_{kind.pixels} needs {kind.counts}, the frames of all items")
        if pixels is not None and counts is None:
            if not isinstance(pixels, Tensor):
                raise ValueError(f"{kind.pixels} in pieces need {kind.counts}")
            counts = kind.default_counts(pixels.shape[0])
        items: list[Any] = []
        if pixels is not None or own is not None:
            listed = torch.as_tensor(counts).tolist()
            items = [tuple(n) if isinstance(n, list) else n for n in listed]
        given = kind.units(model.config, items).slots.numel() if items else 0
        wanted = int(where.sum())
        if wanted != given:
            raise ValueError(
                f"input_ids have {wanted} {kind.name} placeholders but the {kind.name} media give "
                f"{given} rows; the prompt was cut, or expanded for other media"
            )
        if wanted:
            found.append((kind, where, items))
    return found


def prefill_chunks(
    model: PreTrainedModel,
    family: Family,
    cache: ShardedCache,
    input_ids: Tensor,
    inputs: Mapping[str, Any],
    *,
    chunk_tokens: int,
    split_tokens: int | None = None,
    positions: Tensor | None = None,
    times: ReadTimes | None = None,
) -> Tensor:
    """Read a prompt in chunks behind what a cache holds.

    On several ranks each of them reads all of it (see `prefill_ranks` for the other way), and a
    chunk goes to the shard of one rank.

    Args:
        model: The whole model.
        family: Its family.
        cache: Extended by the prompt.
        input_ids: ``(1, S)``.
        inputs: Pixels, whole or in pieces, and counts.
        chunk_tokens: Tokens read at once.
        split_tokens: As for `longvila.inference.decode.attend_segment`.
        positions: ``(3, S)`` positions, for families that have them in 3-D.
        times: Where to count time, and report.

    Returns:
        ``(1, V)`` logits of the last token.

    Raises:
        ValueError: If media and placeholders do not match.

    Comm: On one rank none, else as a step of `longvila.inference.decode` a chunk, and `agree`.

    Memory: The cache, one chunk's activations and one micro-batch's.
    """
    on_host = input_ids[0].cpu()
    times = times or ReadTimes(model.get_output_embeddings().weight.device)
    streams = open_streams(model, family, on_host, inputs, times)
    head = model.get_output_embeddings()
    is_media = media_mask(model, family, on_host)
    taken = [0] * len(streams)
    hidden = error = None
    times.expect("read", on_host.numel())
    cache.reserve(-(-on_host.numel() // cache.num_ranks))
    for start in range(0, on_host.numel(), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        embeds = family.embed(model, on_host[part].to(head.weight.device, non_blocking=True))
        found: list[tuple[Tensor, Tensor]] = []
        for number, (where, stream) in enumerate(streams):
            places = where[part].nonzero().flatten()
            if places.numel():
                taken[number] += places.numel()
                places = places.to(embeds.device, non_blocking=True)
                found.append((stream.take(taken[number]), places))
        embeds, further = place_media(family, embeds, found)
        own = None if positions is None else positions[:, part]
        hidden = read_embeds(
            model, family, cache, embeds[None],
            position_ids=None if own is None else own[:, None].to(embeds.device),
            split_tokens=split_tokens, further=further,
        )  # fmt: skip
        if cache.text_runs is not None and own is not None:
            cache.text_runs = cache.text_runs.read(own, is_media[part])
        error = error or report_read(times, embeds.shape[0])
        if cache.num_ranks == 1:
            agree(error, cache, times.device)
    agree(error, cache, times.device)
    assert hidden is not None
    return shared_logits(head(hidden[:, -1]), cache)


def media_mask(model: PreTrainedModel, family: Family, input_ids: Tensor) -> Tensor:
    """Return which tokens are placeholders of any kind."""
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for kind in family.media:
        mask |= input_ids == kind.token_id(model.config)
    return mask


def place_media(
    family: Family, embeds: Tensor, found: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, dict[str, Any]]:
    """Put rows in place of the embeddings of their placeholders.

    Args:
        family: Splits rows that feed deeper layers too.
        embeds: ``(T, M)``, not changed.
        found: Rows ``(n, M)`` or wider of each kind, and their places ``(n,)``.

    Returns:
        Embeddings, and keywords of the text model.
    """
    if not found:
        return embeds, {}
    rows = torch.cat([rows for rows, _ in found])
    places = torch.cat([places for _, places in found])
    rows, further = family.text_inputs(rows.to(embeds.dtype), places, embeds)
    return embeds.index_copy(0, places, rows), further


def prefill_ranks(
    two_stage: TwoStageForward, cache: ShardedCache, input_ids: Tensor, inputs: Mapping[str, Any]
) -> Tensor:
    """Read a prompt over all ranks into an empty cache.

    Args:
        two_stage: The two-stage forward of the model; need not be what the model's calls go to.
        cache: Filled.
        input_ids: ``(1, S)``, the same on every rank.
        inputs: Pixels, all of them or under ``local_...`` this rank's, and counts.

    Returns:
        ``(1, V)`` logits of the last token, the same on every rank.

    Raises:
        ValueError: If the cache is not empty, pixels come in pieces, or the batch does not fit.

    Comm: One all-to-all-v of media rows, in each layer that of `longvila.sp.attention`, one
        broadcast of V logits.

    Memory: This rank's rows, the activations of its tokens, and its shard.
    """
    batch = {"input_ids": input_ids, **{k: v for k, v in inputs.items() if v is not None}}
    for kind in two_stage.family.media:
        for name in (kind.pixels, f"local_{kind.pixels}"):
            if name in batch and not isinstance(batch[name], Tensor):
                raise ValueError(
                    f"{name} in pieces cannot be read over several ranks, whose plan needs whole "
                    f"frames: give this rank's as one tensor local_{kind.pixels}"
                )
    total = input_ids.shape[1]
    with ExitStack() as stack:

        def open_cache(plan: StepPlan) -> ShardedCache:
            stack.enter_context(cache.receiving(plan.context.layout, total))
            return cache

        plan, hidden = two_stage.hidden_states(batch, open_cache=open_cache)
    ranks, rows = plan.context.layout.locate([total - 1])
    owner, row = int(ranks[0]), int(rows[0])
    head = two_stage.model.get_output_embeddings()
    # Every rank makes the tensor; that of the owner is sent.
    logits = head(hidden[row if owner == cache.rank else slice(0, 1)].view(1, -1))
    return shared_logits(logits, cache, owner)
