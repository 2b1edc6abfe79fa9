"""A key-value cache whose tokens lie on several ranks, and which shares what questions share.

    layer, rank 0   [ prefix shard | turn 1 ][ tail ]      a fork has the same segments and its
    layer, rank 1   [ prefix shard ]         [ tail ]      own tail: nothing is copied

1. **Shards.** Every token's keys and values (after the rotary embedding) are on exactly one rank.
   The prefill leaves them where its layout dealt them; a step of generation gives its new tokens,
   all of them, to the rank that holds the fewest. Keys need no order: they carry their position, so
   a query over any set of earlier tokens is unmasked attention.
2. **Segments.** What a rank holds is a list of segments that are never written again, and one tail
   that grows in place. `fork` turns the tail into a segment and gives the fork the same list, so
   many questions share one prefix by reference. A segment of one row serves queries of any number
   of rows: beams and batched questions share it too.
3. **Arrivals** say who got which tokens. They are integers, the same on every rank, so no length is
   ever exchanged; `crop` follows them backwards.

Without a mesh all of this is one process with one shard.

A model's own attention must not read such a cache, since ``update`` returns only what is new.
Attention goes through a step (`longvila.inference.decode`), and ``update`` outside of one raises.

Cost: nothing is copied but a tail that outgrows its buffer, and never more than a few thousand
tokens of it. It holds one sequence, or rows that share one. With a pager, the oldest segments are
taken to the host at the end of a step in which they exceed its budget
(`longvila.inference.paging`); those of several rows stay.

Letters: B rows, T new tokens, L tokens of this rank, K kv heads, D head dim, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from longvila.inference.arrivals import Dealt, Given
from longvila.inference.paging import HostBlock, Pager, Walk
from longvila.inference.positions import TextRuns
from longvila.sp.layout import SequenceLayout
from longvila.sp.mesh import SPMesh

#: Keys and values ``(B or 1, tokens, K, D)``.
Segment = tuple[Tensor, Tensor]

#: A tail of so many tokens is left as it is, and a new one begun, rather than copied to grow.
_COPIED_AT_MOST = 4096
_FIRST_CAPACITY = 64


class ShardLayer(CacheLayerMixin):
    """One layer's keys and values of this rank.

    Attributes:
        paged: The oldest tokens, on the host.
        segments: What is never written again, possibly shared with forks.
        keys: ``(B, capacity, K, D)`` buffer of the tail, None if there is none.
        values: As ``keys``.
        used: Tokens in the tail.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.paged: list[HostBlock] = []
        self.segments: list[Segment] = []
        self.used = 0
        self.reserved = 0
        #: Most tokens of a tail; None for any number.
        self.longest_tail: int | None = None
        #: The part whose rows begin with filler (None: no part does), and how much of it.
        self.padded: tuple[int, tuple[int, ...]] | None = None

    # ---- contents

    @property
    def num_local_tokens(self) -> int:
        """L, tokens that this rank holds."""
        on_device = sum(k.shape[1] for k, _ in self.segments) + self.used
        return sum(block.num_tokens for block in self.paged) + on_device

    def parts(self) -> list[Segment]:
        """Return what is on the device, oldest first; the tail, if any, is the last (a view)."""
        if not self.used:
            return list(self.segments)
        assert self.keys is not None and self.values is not None
        return [*self.segments, (self.keys[:, : self.used], self.values[:, : self.used])]

    def starts(self, number: int) -> tuple[int, ...] | None:
        """Return where the rows of a part of `parts` begin; None where all of it is theirs."""
        if self.padded is None or self.padded[0] != number:
            return None
        return self.padded[1]

    def earlier(self, newest: int) -> list[Segment]:
        """Return the parts without so many tokens that were appended last."""
        parts = self.parts()
        if newest:
            keys, values = parts.pop()
            if (left := keys.shape[1] - newest) > 0:
                parts.append((keys[:, :left], values[:, :left]))
        return parts

    def reserve(self, tokens: int) -> None:
        """Make the next tail large enough for so many tokens."""
        self.reserved = tokens if self.longest_tail is None else min(tokens, self.longest_tail)

    def everything(self) -> list[Segment]:
        """Return all keys and values, oldest first, those on the host there."""
        return [*((b.keys[None], b.values[None]) for b in self.paged), *self.parts()]

    def page_out(self, pager: Pager, budget_bytes: int) -> None:
        """Take the oldest segments to the host until the others fit a budget.

        Args:
            pager: Takes them.
            budget_bytes: Of segments of this layer.
        """
        sizes = [2 * k.numel() * k.element_size() for k, _ in self.segments]
        while sum(sizes) > budget_bytes and self.segments[0][0].shape[0] == 1:
            self.paged += pager.take_out(*self.segments.pop(0))
            sizes.pop(0)
            if self.padded is not None:
                self.padded = (self.padded[0] - 1, self.padded[1])

    def append(
        self, keys: Tensor, values: Tensor, *, starts: tuple[int, ...] | None = None
    ) -> None:
        """Write new tokens behind the tail.

        Args:
            keys: ``(B, K, T, D)``.
            values: As ``keys``.
            starts: For each row, how many of the tokens are filler that comes first.

        Memory: ``2 * B * K * D * (tokens of the tail)``, and once more while a tail grows.
        """
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        new = keys.shape[1]
        if starts is not None:
            self.seal()
            self.padded = (len(self.segments), starts)
        self.make_room(keys)
        assert self.keys is not None and self.values is not None
        self.keys[:, self.used : self.used + new] = keys
        self.values[:, self.used : self.used + new] = values
        self.used += new

    def make_room(self, like: Tensor) -> None:
        """Let the tail have room for new tokens behind those that are used.

        Args:
            like: ``(B, T, K, D)``, a tensor of their shape, type and device.

        Raises:
            ValueError: If the rows are neither those of the tail nor expanded from one.
        """
        self.lazy_initialization(like, like)
        rows, new = like.shape[:2]
        if self.keys is not None and self.keys.shape[0] != rows:
            if self.used and self.keys.shape[0] != 1:
                raise ValueError(f"the cache holds {self.keys.shape[0]} rows, got {rows} more")
            self.seal()
        if self.keys is None or self.used + new > self.keys.shape[1]:
            self._grow(like, self.used + new)

    def _grow(self, like: Tensor, needed: int) -> None:
        too_long = self.longest_tail is not None and needed > self.longest_tail
        if self.used and (self.used >= _COPIED_AT_MOST or too_long):
            needed -= self.used
            self.seal()
        old = () if self.keys is None else (self.keys, self.values)
        before = old[0].shape[1] if old else 0
        capacity = max(needed, self.reserved, 2 * before, _FIRST_CAPACITY)
        if self.longest_tail is None:
            self.reserved = 0
        else:
            capacity = max(needed, min(capacity, self.longest_tail))
        shape = (like.shape[0], capacity, *like.shape[2:])
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        if self.used:
            for new, each in zip((self.keys, self.values), old, strict=True):
                assert each is not None
                new[:, : self.used] = each[:, : self.used]

    def place(self, keys: Tensor, values: Tensor, count: int) -> None:
        """Take the first tokens of a prefill as a segment.

        Args:
            keys: ``(1, K, L, D)`` of this rank's tokens.
            values: As ``keys``.
            count: How many are the prompt's; the rest is filler.
        """
        own = tuple(x.transpose(1, 2)[:, :count].contiguous() for x in (keys, values))
        self.lazy_initialization(*own)
        if count:
            self.segments.append((own[0], own[1]))

    def seal(self) -> None:
        """Turn the tail into a segment; the next token begins a new tail."""
        if self.used:
            self.segments = self.parts()
        self.keys = self.values = None
        self.used = 0

    def drop(self, tokens: int) -> None:
        """Forget the last tokens that this rank holds; segments are cut by views."""
        from_tail = min(tokens, self.used)
        self.used -= from_tail
        tokens -= from_tail
        while tokens:
            if not self.segments:
                block = self.paged.pop()
                left = block.num_tokens - tokens
                tokens = max(-left, 0)
                if left > 0:
                    self.paged.append(block.first(left))
                continue
            keys, values = self.segments.pop()
            left = keys.shape[1] - tokens
            tokens = max(-left, 0)
            if left > 0:
                self.segments.append((keys[:, :left], values[:, :left]))
        if self.padded is not None and self.padded[0] >= len(self.parts()):
            self.padded = None

    def shared(self) -> ShardLayer:
        """Return a layer with the same segments; the tail becomes one of them."""
        self.seal()
        other = ShardLayer()
        other.paged, other.segments = list(self.paged), list(self.segments)
        other.longest_tail, other.padded = self.longest_tail, self.padded
        if self.is_initialized:
            other.dtype, other.device, other.is_initialized = self.dtype, self.device, True
        return other

    # ---- what transformers asks for

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note type and device; buffers are made when tokens come."""
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: layers are written through their cache, which knows whose tokens these are."""
        raise RuntimeError("write to a ShardedCache through its update, not to one of its layers")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a mask over what ``update`` returns: the new tokens."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens that this rank holds; the cache knows the whole length."""
        return self.num_local_tokens

    def get_max_length(self) -> int:
        """Return -1: the cache grows as needed."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.paged, self.segments, self.padded = [], [], None
        self.keys, self.values, self.used = None, None, 0

    def select(self, rows: Tensor) -> None:
        """Reorder rows; what has one row serves all of them and stays."""
        rows = rows.to(self.device) if self.is_initialized else rows
        self.segments = [
            part if part[0].shape[0] == 1 else (part[0][rows], part[1][rows])
            for part in self.segments
        ]
        if self.keys is not None and self.values is not None and self.keys.shape[0] > 1:
            self.keys, self.values = self.keys[rows], self.values[rows]
        if self.padded is not None:
            self.padded = (self.padded[0], take_rows(self.padded[1], rows))


def take_rows(values: tuple[int, ...], rows: Tensor) -> tuple[int, ...]:
    """Return one value a row, reordered."""
    return tuple(values[row] for row in rows.tolist())


class ShardedCache(Cache):
    """Keys and values of one sequence over the ranks of a sequence-parallel group.

    Args:
        num_layers: Layers of the text model.
        mesh: The mesh; None for one process.
        pager: Takes what exceeds its budget to the host; None keeps everything on the device.

    Attributes:
        held: Tokens of each rank, the same list on every rank.
        input_ids: ``(B, S)`` ids of the tokens in it, where whoever fills it keeps them.
        logits: ``(B, V)`` of the last token, likewise.
        text_runs: Where text has which positions; None for models that count tokens.
        pads: For each row, the filler tokens before its own; None where rows have none.
    """

    def __init__(
        self, num_layers: int, *, mesh: SPMesh | None = None, pager: Pager | None = None
    ) -> None:
        self.shards = [ShardLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.shards))
        self.mesh, self.pager = mesh, pager
        for layer in self.shards:
            layer.longest_tail = None if pager is None else pager.block_tokens
        self.num_ranks = 1 if mesh is None else mesh.sp_size
        self.rank = 0 if mesh is None else mesh.sp_rank
        self.group = None if mesh is None or mesh.sp_size == 1 else mesh.sp_group
        self.held = [0] * self.num_ranks
        self.input_ids: Tensor | None = None
        self.logits: Tensor | None = None
        self.text_runs: TextRuns | None = None
        self.pads: tuple[int, ...] | None = None
        #: Tokens that all rows share; None while there is one row.
        self._shared: int | None = None
        self._arrivals: list[Dealt | Given] = []
        self._arriving: Dealt | Given | None = None

    # ---- steps

    @contextmanager
    def receiving(
        self, layout: SequenceLayout, total: int, *, behind: bool = False
    ) -> Iterator[None]:
        """Let the layers of a sequence-parallel prefill write their local tokens.

        Args:
            layout: Who holds which token.
            total: Tokens of the prompt, or of the chunk; later ones are filler and not kept.
            behind: Whether they follow tokens that are there, and go to the tail.

        Raises:
            ValueError: If the cache holds tokens already, or the layout is for other ranks.
        """
        if any(self.held) and not behind:
            raise ValueError(
                f"a sequence-parallel prefill needs an empty cache, this one holds {sum(self.held)}"
                " tokens; read what follows a prefix with decode"
            )
        if layout.sp_size != self.num_ranks:
            raise ValueError(f"a layout of {layout.sp_size} ranks, a cache of {self.num_ranks}")
        with self._arrive(Dealt(total, layout, behind)):
            yield

    @contextmanager
    def appending(self, tokens: int, *, pads: tuple[int, ...] | None = None) -> Iterator[int]:
        """Let the layers of a step write new tokens, which every rank has, on one rank.

        Args:
            tokens: T.
            pads: For each row, how many of them are filler that comes first.

        Yields:
            The rank that keeps them: the one with the fewest, of these the first.
        """
        owner = self.next_owner
        if pads is not None and self.pads is not None:
            raise ValueError("the rows of this cache are padded already; fork their prefix")
        with self._arrive(Given(tokens, owner, self.num_ranks, pads)):
            yield owner
        if pads is not None:
            self.pads = pads

    @property
    def next_owner(self) -> int:
        """The rank that keeps the tokens of the next step."""
        return min(range(self.num_ranks), key=lambda rank: (self.held[rank], rank))

    @contextmanager
    def _arrive(self, arrival: Dealt | Given) -> Iterator[None]:
        if self._arriving is not None:
            raise RuntimeError("a step of this cache is under way; fork it for another reader")
        self._arriving = arrival
        try:
            yield
        except BaseException:
            # Layers before the failure have the new tokens, layers after it have not.
            for layer in self.shards:
                layer.drop(layer.num_local_tokens - self.held[self.rank])
            raise
        finally:
            self._arriving = None
        self._arrivals.append(arrival)
        self._count(arrival.counts(arrival.total), 1)
        self._page_out(self.shards)

    def _page_out(self, layers: Sequence[ShardLayer]) -> None:
        if self.pager is not None:
            budget = self.pager.budget_bytes // len(self.shards)
            for layer in layers:
                layer.page_out(self.pager, budget)

    def walk(self) -> Walk | None:
        """Return a pass over what is on the host; None if nothing is."""
        if self.pager is None or not any(layer.paged for layer in self.shards):
            return None
        return Walk(self.pager, [layer.paged for layer in self.shards])

    def _count(self, counts: Sequence[int], sign: int) -> None:
        self.held = [n + sign * more for n, more in zip(self.held, counts, strict=True)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep this rank's part of new keys and values, and return all of the new ones.

        Args:
            key_states: ``(B, K, T, D)``, or ``(1, K, L, D)`` in a sequence-parallel prefill.
            value_states: As ``key_states``.
            layer_idx: Which layer.
            *args: Not used.
            **kwargs: Not used.

        Returns:
            What was given; attention reads the rest from the layer.

        Raises:
            RuntimeError: Outside of a step: the model's own attention would see nothing else.

        Comm: None.
        """
        arriving = self._arriving
        if arriving is None:
            raise RuntimeError(
                "a ShardedCache was given to a model that does not attend over it; read it with "
                "longvila.inference.engine.Engine of this model"
            )
        layer = self.shards[layer_idx]
        self._note_rows(key_states.shape[0])
        if isinstance(arriving, Dealt):
            own = arriving.counts(arriving.total)[self.rank]
            if not arriving.appended:
                layer.place(key_states, value_states, own)
                self._page_out([layer])
            elif own:
                layer.append(key_states[:, :, :own], value_states[:, :, :own])
        elif arriving.owner == self.rank:
            layer.append(key_states, value_states, starts=arriving.pads)
        return key_states, value_states

    def extend(self, rows: int, tokens: int) -> None:
        """Count T new tokens of B rows that a step writes into room made for them."""
        arriving = self._arriving
        assert isinstance(arriving, Given)
        self._note_rows(rows)
        if arriving.owner == self.rank:
            for layer in self.shards:
                layer.used += tokens

    def _note_rows(self, rows: int) -> None:
        if rows > 1 and self._shared is None:
            self._shared = sum(self.held)

    # ---- the whole

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return S, the tokens over all ranks, without those of a step under way."""
        return sum(self.held)

    def intervals(self, rank: int) -> list[tuple[int, int]]:
        """Return which tokens of the sequence a rank holds, in the order it holds them."""
        found: list[tuple[int, int]] = []
        base = 0
        for arrival in self._arrivals:
            for start, stop in arrival.intervals(rank):
                if found and found[-1][1] == base + start:
                    found[-1] = (found[-1][0], base + stop)
                else:
                    found.append((base + start, base + stop))
            base += arrival.total
        return found

    def reserve(self, tokens: int) -> None:
        """Allocate for so many tokens of this rank at once when the next ones come."""
        for layer in self.shards:
            layer.reserve(tokens)

    def fork(self) -> ShardedCache:
        """Return a cache that begins with the same tokens and goes its own way.

        Comm: None.

        Memory: Nothing but what either writes from now on.
        """
        other = ShardedCache(len(self.shards), mesh=self.mesh, pager=self.pager)
        other.shards = [layer.shared() for layer in self.shards]
        other.layers = list(other.shards)
        other.held, other._arrivals = list(self.held), list(self._arrivals)
        other.input_ids, other.logits = self.input_ids, self.logits
        other.text_runs = self.text_runs
        other.pads, other._shared = self.pads, self._shared
        return other

    def remember(self) -> Callable[[], None]:
        """Return what makes the cache again what it is now; it must not have been cut and refilled.

        Buffers are not copied: what is written later is behind the tokens that they hold now.
        """
        whole = {**vars(self), "held": list(self.held), "_arrivals": list(self._arrivals)}
        layers = [
            {**vars(each), "paged": list(each.paged), "segments": list(each.segments)}
            for each in self.shards
        ]

        def restore() -> None:
            vars(self).update(whole)
            for each, before in zip(self.shards, layers, strict=True):
                vars(each).update(before)

        return restore

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: Minus the number of tokens to forget, as transformers has it.

        Raises:
            ValueError: If it is positive, or more than there are.

        Comm: None.
        """
        remove = -int(tokens_to_remove)  # older generation counts matches in tensors
        if not 0 <= remove <= sum(self.held):
            raise ValueError(
                f"crop takes minus the tokens to forget, of {sum(self.held)}; got "
                f"{tokens_to_remove}"
            )
        if self.text_runs is not None:
            self.text_runs = self.text_runs.cut(sum(self.held) - remove)
        before = self.held[self.rank]
        while remove:
            last = self._arrivals.pop()
            take = min(remove, last.total)
            self._count(last.counts(last.total), -1)
            if left := last.total - take:
                kept = (
                    Dealt(left, last.layout, last.appended)
                    if isinstance(last, Dealt)
                    else Given(left, last.owner, last.num_ranks)
                )
                self._arrivals.append(kept)
                self._count(kept.counts(left), 1)
            remove -= take
        for layer in self.shards:
            layer.drop(before - self.held[self.rank])
        length = sum(self.held)
        if self.input_ids is not None:
            self.input_ids = self.input_ids[:, :length]
        if self._shared is not None and length <= self._shared:
            self.pads = self._shared = None
            self.input_ids = None if self.input_ids is None else self.input_ids[:1]
        self.logits = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search."""
        for layer in self.shards:
            layer.select(beam_idx)
        if self.pads is not None:
            self.pads = take_rows(self.pads, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows; what has one row serves any number of them."""
        rows = max((part[0].shape[0] for part in self.shards[0].parts()), default=1)
        if rows > 1:
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.held, self._arrivals = [0] * self.num_ranks, []
        self.input_ids = self.logits = self.pads = self._shared = None
        self.text_runs = None if self.text_runs is None else TextRuns()

    @property
    def local_bytes(self) -> int:
        """Bytes of keys and values that this rank holds, shared ones counted in."""
        return self.host_bytes + sum(
            k.numel() * k.element_size() + v.numel() * v.element_size()
            for layer in self.shards
            for k, v in layer.parts()
        )

    @property
    def host_bytes(self) -> int:
        """Those of them that are on the host."""
        return sum(block.num_bytes for layer in self.shards for block in layer.paged)
