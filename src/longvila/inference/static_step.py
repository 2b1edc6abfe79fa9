"""A step of few tokens with fixed shapes, replayed from a captured CUDA graph.

A step of one token is some thousand small kernels that a host launches one by one, however long the
cache. Their arguments are the same from token to token but for where keys and values are, so

1. the text model runs on buffers that are written in place: ids, positions, and for the cache a
   `longvila.ops.kv_table.KVTable` of addresses and lengths;
2. each layer writes the new keys and values where the table ends, on the rank that keeps them, and
   attends over the table by a kernel split over the keys (`longvila.ops.decode`);
3. partial results of ranks are gathered and merged as in `longvila.inference.decode`, in the same
   form, so that a rank that cannot take this way still fits with those that do;
4. what was launched is captured once for a number of rows and tokens and replayed afterwards, for
   any cache: forks, turns and other videos are other contents of the table. The collectives are
   captured with it.

A captured step gives the same bits as an uncaptured one: it is the same launches. Capturing runs
the step twice on an empty table first, waits for the device, and gives unused memory back to the
driver, once for each shape; it costs the time of some steps, so a shape is captured when it comes
for the third time. A graph holds the activations of one step.

What the step cannot take goes the general way, and the reason is logged once: keys and values on
the host, other types than half precision, no Triton, gradients, autocast, parameters that are
spread over devices or ranks, a cache in too many segments.

Letters: B rows, T new tokens, V vocabulary, K kv heads, D head dim.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from longvila.inference.cache import Segment, ShardedCache, ShardLayer
from longvila.log import log_once
from longvila.ops.decode import (
    MAX_NEW_TOKENS,
    append_tokens,
    attend_tables,
    decode_refusal,
    merge_parts,
)
from longvila.ops.kv_table import KVTable
from longvila.parallel.families import Family
from longvila.parallel.hf_attention import AttentionStep, check_calls, sentinel_mask
from longvila.sp.mesh import SPMesh

Mode = Literal["auto", "uncaptured", "off"]

#: Most queries of a step, all rows together.
_MOST_QUERIES = 64
#: A shape is captured when it comes for this time.
_WORTH_CAPTURING = 3
#: Shapes that are captured; assisted decoding and batches bring a few each.
_MOST_GRAPHS = 16


class _PassingCache(ShardedCache):
    """What the text model is given for a cache: attention itself knows the real one."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return what was given."""
        return key_states, value_states


class _TableStep(AttentionStep):
    """Appends to a table and attends over it; travels as ``sp_context``."""

    def __init__(self, step: StaticStep) -> None:
        super().__init__(longest=0)  # windows are looked at by `StaticSteps`
        self.step = step

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None
    ) -> Tensor:
        """Return attention over all ranks.

        Comm: One all-gather of ``B * T * H * (D + 1)`` float32 (float64) elements a rank.
        """
        from longvila.inference.decode import gather_equal

        step = self.step
        append_tokens(k, v, step.own, layer)
        if step.places.num_ranks == 1:
            return attend_tables(q, step.tables, layer, softmax_scale=softmax_scale)
        own = attend_tables(q, step.tables, layer, softmax_scale=softmax_scale, packed=True)
        gathered = gather_equal(own, step.places)
        dim = q.shape[-1]
        return merge_parts(gathered[..., :dim], gathered[..., dim], dtype=q.dtype)[0]


def _buffers(layer: ShardLayer) -> list[Segment]:
    """What a layer has on the device, oldest first, the tail with the room behind it."""
    if layer.keys is None or layer.values is None:
        return list(layer.segments)
    return [*layer.segments, (layer.keys, layer.values)]


def _filler(layer: ShardLayer, rows: int) -> list[tuple[int, int]] | None:
    """Where the filler is among the tokens of the parts of so many rows."""
    if layer.padded is None:
        return None
    number, starts = layer.padded
    parts = layer.parts()
    if parts[number][0].shape[0] != rows:
        return None
    first = sum(keys.shape[1] for keys, _ in parts[:number] if keys.shape[0] == rows)
    return [(first, first + start) for start in starts]


class StaticStep:
    """One pass of T new tokens of B rows, with buffers that stay where they are.

    Args:
        steps: The model and what all shapes share.
        rows: B.
        tokens: T.
        keep: How many of the last tokens logits are wanted of.
        in_3d: Whether positions are ``(3, B, T)``.

    Attributes:
        graph: What is replayed; None before it is captured.
        uses: How often the shape came.
    """

    def __init__(self, steps: StaticSteps, rows: int, tokens: int, keep: int, in_3d: bool) -> None:
        self.steps, self.rows, self.tokens, self.keep = steps, rows, tokens, keep
        self.device = steps.device
        shape = (rows, tokens)
        self.ids = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.positions = torch.zeros(
            (3, *shape) if in_3d else shape, dtype=torch.int64, device=self.device
        )
        make = (steps.kv_heads, steps.head_dim, steps.dtype, self.device)
        self.own = KVTable(steps.num_layers, rows, *make)
        self.shared = KVTable(steps.num_layers, 1, *make) if rows > 1 else None
        self.tables = [self.own] if self.shared is None else [self.own, self.shared]
        self.like = torch.empty(
            (rows, tokens, steps.kv_heads, steps.head_dim), dtype=steps.dtype, device=self.device
        )
        self.places = _PassingCache(steps.num_layers, mesh=steps.mesh)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        self.uses = 0

    def load(self, cache: ShardedCache) -> str | None:
        """Make room for the new tokens, and write where a cache's segments are.

        Args:
            cache: What was read.

        Returns:
            Why that cannot be, or None.
        """
        first = cache.shards[0]
        if first.is_initialized and first.dtype != self.like.dtype:
            return f"keys and values are {first.dtype}, the model is {self.like.dtype}"
        if cache.next_owner == cache.rank:
            for layer in cache.shards:
                layer.make_room(self.like)
        own: list[list[Segment]] = []
        shared: list[list[Segment]] = []
        for layer in cache.shards:
            parts = _buffers(layer)
            if self.shared is None:
                own.append(parts)
            else:
                own.append([part for part in parts if part[0].shape[0] != 1])
                shared.append([part for part in parts if part[0].shape[0] == 1])
        reason = self.own.load(own)
        if reason is None and self.shared is not None:
            reason = self.shared.load(shared)
        return reason

    def prepare(self, cache: ShardedCache, owner: int) -> None:
        """Write lengths, those of a step of the cache that is under way.

        Args:
            cache: Extended by the tokens already.
            owner: The rank that keeps them.
        """
        layer = cache.shards[0]
        parts = layer.parts()
        shared = 0
        if self.shared is not None:
            shared = sum(keys.shape[1] for keys, _ in parts if keys.shape[0] == 1)
            filler = _filler(layer, 1)
            self.shared.step(shared, 0, filler)
        total = sum(keys.shape[1] for keys, _ in parts)
        newest = self.tokens if owner == cache.rank else 0
        self.own.step(total - shared, newest, _filler(layer, self.rows))

    def run(self) -> Tensor:
        """Return ``(B, keep, V)`` logits of what is in the buffers, launch by launch.

        Comm: A layer one all-gather; one broadcast of the logits.
        """
        from longvila.inference.decode import shared_logits

        steps = self.steps
        embeds = steps.family.embed(steps.model, self.ids.flatten()).view(
            self.rows, self.tokens, -1
        )
        attention = _TableStep(self)
        hidden = steps.text(
            inputs_embeds=embeds,
            attention_mask=sentinel_mask(self.device),
            position_ids=self.positions,
            past_key_values=self.places,
            use_cache=True,
            sp_context=attention,
        ).last_hidden_state
        check_calls(
            attention.calls,
            expected=steps.num_layers,
            implementation=steps.text.config._attn_implementation,
        )
        logits = steps.model.get_output_embeddings()(hidden[:, -self.keep :])
        return shared_logits(logits, self.places)

    def capture(self) -> None:
        """Capture the step, on an empty table.

        Comm: As two steps, so that kernels are compiled and communicators exist.
        """
        for table in self.tables:
            table.clear()
        current = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's own thread asks for the state of earlier work all the time.
        with torch.cuda.graph(graph, pool=self.steps.pool, capture_error_mode="thread_local"):
            self.logits = self.run()
        self.graph = graph

    def release(self) -> None:
        """Destroy the graph, whoever still refers to this step."""
        if self.graph is not None:
            self.graph.reset()
        self.graph = self.logits = None

    def __call__(self) -> Tensor:
        """Return the logits, replayed where that was captured."""
        if self.graph is None:
            return self.run()
        assert self.logits is not None
        self.graph.replay()
        # Graphs share their memory; the next replay writes over it.
        return self.logits.clone()


#: Everything of this process that may hold graphs.
_HOLDERS: weakref.WeakSet[StaticSteps] = weakref.WeakSet()


def release_graphs() -> None:
    """Destroy all captured steps of this process; shapes that come again are captured again.

    To be called before process groups are destroyed: NCCL waits there, without end, for graphs in
    which calls of a communicator were captured (pytorch issue 115388).
    """
    for steps in list(_HOLDERS):
        steps.clear()


class StaticSteps:
    """The static steps of one model, by shape.

    Args:
        model: The model.
        family: Where its parts are.
        mesh: Ranks that share a sequence.
        mode: ``"auto"`` captures on a GPU and leaves a CPU to the general way; ``"uncaptured"``
            launches the same step anew every time, anywhere; ``"off"`` leaves all to the general
            way.

    Raises:
        ValueError: If the mode is unknown.
    """

    def __init__(
        self, model: PreTrainedModel, family: Family, mesh: SPMesh | None, mode: Mode
    ) -> None:
        if mode not in ("auto", "uncaptured", "off"):
            raise ValueError(f"decode_graphs must be 'auto', 'uncaptured' or 'off', got {mode!r}")
        self.model, self.family, self.mesh, self.mode = model, family, mesh, mode
        self.text = family.text_model(model)
        config = self.text.config
        self.num_layers: int = config.num_hidden_layers
        self.kv_heads: int = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None)
        self.head_dim: int = head_dim or config.hidden_size // config.num_attention_heads
        self.pool: Any = None
        self.failed = False
        self._steps: dict[tuple[int, int, int, bool], StaticStep] = {}
        self._weights: tuple[int, ...] = ()
        self._last: weakref.ref[ShardedCache] | None = None
        self._reason: str | None = None
        self._compiling: threading.Thread | None = None
        _HOLDERS.add(self)

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        device: torch.device = self.model.get_output_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        dtype: torch.dtype = self.text.dtype
        return dtype

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Rows and tokens of what was captured."""
        return [key[:2] for key, step in self._steps.items() if step.graph is not None]

    def clear(self) -> None:
        """Forget all steps, and give their memory back.

        To be called when what the model computes has changed without its parameters having moved:
        another adapter, a hook.
        """
        for step in self._steps.values():
            step.release()
        self._steps, self.failed, self.pool = {}, False, None
        self._weights, self._last, self._reason = (), None, None

    def compile_ahead(self) -> None:
        """Begin to compile the kernels of a step of one token, while a prompt is being read."""
        if self._compiling is not None or self.mode == "off" or self.device.type != "cuda":
            return
        if decode_refusal(self.dtype, self.head_dim, self.device) is None:
            self._compiling = threading.Thread(target=self._compile, daemon=True)
            self._compiling.start()

    def _compile(self) -> None:
        """Run the kernels once on nothing, with arguments like those of a step."""
        device = self.device
        try:
            with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
                shape = (self.kv_heads, self.head_dim)
                table = KVTable(1, 1, *shape, self.dtype, device)
                heads = self.text.config.num_attention_heads
                q = torch.zeros((1, 1, heads, self.head_dim), dtype=self.dtype, device=device)
                k = torch.zeros((1, 1, *shape), dtype=self.dtype, device=device)
                append_tokens(k, k, table, 0)
                several = self.mesh is not None and self.mesh.sp_size > 1
                attend_tables(q, [table], 0, packed=several)
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:  # the step itself will meet it again, where it can be handled
            log_once(__name__, logging.WARNING, f"compiling ahead of decoding failed: {error}")

    def try_step(
        self, cache: ShardedCache, ids: Tensor, positions: Tensor, keep: int
    ) -> Tensor | None:
        """Read new tokens, if this way can.

        Args:
            cache: Extended.
            ids: ``(B, T)``.
            positions: ``(B, T)``, ``(1, T)``, or ``(3, B, T)``.
            keep: How many of the last tokens logits are wanted of.

        Returns:
            ``(B, keep, V)`` logits, the same on every rank; None if the general way has to be
            taken, with the cache as it was.

        Comm: As `StaticStep.run`.
        """
        rows, tokens = ids.shape
        if tokens > MAX_NEW_TOKENS or rows * tokens > _MOST_QUERIES:
            return None  # enough queries for kernels that cut queries
        reason = self._refusal(cache, tokens)
        if reason is not None:
            level = logging.WARNING if self.device.type == "cuda" else logging.DEBUG
            log_once(__name__, level, f"decoding without a captured graph: {reason}")
            return None
        if self._compiling is not None:
            self._compiling.join()
        step = self._find((rows, tokens, keep, positions.dim() == 3))
        reason = step.load(cache)
        if reason is not None:
            log_once(__name__, logging.WARNING, f"decoding without a captured graph: {reason}")
            return None
        with cache.appending(tokens) as owner:
            cache.extend(rows, tokens)
            step.prepare(cache, owner)
            step.ids.copy_(ids, non_blocking=True)
            step.positions.copy_(positions, non_blocking=True)
            return step()

    def _refusal(self, cache: ShardedCache, tokens: int) -> str | None:
        """Why a cache cannot be read this way."""
        if self.mode == "off" or (self.mode == "auto" and self.device.type != "cuda"):
            return "switched off" if self.mode == "off" else "there is no GPU"
        if cache.pager is not None:
            return "keys and values are paged to the host"
        if torch.is_grad_enabled():
            return "gradients are on"
        if torch.is_autocast_enabled(self.device.type):
            return "autocast is on"
        window = self._window
        if window is not None and window < cache.get_seq_length() + tokens:
            return f"a window of {window} tokens is shorter than the sequence"
        if self.device.type == "cuda":
            reason = decode_refusal(self.dtype, self.head_dim, self.device)
            if reason is not None:
                return f"the split kernel {reason}"
        self._look_at_weights(cache)
        return self._reason

    @property
    def _window(self) -> int | None:
        config = self.text.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and "sliding_attention" not in kinds:
            return None
        window: int | None = getattr(config, "sliding_window", None)
        return window

    def _look_at_weights(self, cache: ShardedCache) -> None:
        """Forget what was captured if parameters have moved; asked once for each cache."""
        if self._last is not None and self._last() is cache:
            return
        self._last = weakref.ref(cache)
        head = self.model.get_output_embeddings().weight
        parameters = [*self.text.parameters(), head]
        places = tuple(p.data_ptr() for p in parameters)
        if places == self._weights:
            return
        self.clear()
        self._last, self._weights = weakref.ref(cache), places
        if any(isinstance(p, DTensor) for p in parameters):
            self._reason = "parameters are sharded over ranks"
        elif len(devices := {p.device for p in parameters}) > 1:
            self._reason = f"parameters are on {len(devices)} devices"

    def _find(self, key: tuple[int, int, int, bool]) -> StaticStep:
        """The step of a shape, captured if it is worth it."""
        if key not in self._steps:
            with torch.inference_mode(False):  # the buffers outlive the caller's mode
                self._steps[key] = StaticStep(self, *key)
        step = self._steps[key]
        step.uses += 1
        if step.graph is None and step.uses >= _WORTH_CAPTURING and self.mode == "auto":
            reason = self._capture_refusal()
            if reason is None:
                self._capture(step)
            else:
                log_once(__name__, logging.WARNING, f"decoding steps are not captured: {reason}")
        return step

    def _capture_refusal(self) -> str | None:
        """Why a step is launched each time although it could be captured; the same on all ranks."""
        if self.failed:
            return "one could not be"
        if len(self.captured) >= _MOST_GRAPHS:
            return f"there are {_MOST_GRAPHS} already"
        names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
        expandable = any("expandable_segments:True" in os.environ.get(name, "") for name in names)
        several = self.mesh is not None and self.mesh.sp_size > 1
        if several and expandable and os.environ.get("NCCL_GRAPH_REGISTER") != "0":
            # NCCL would register buffers of the graph whose mappings the allocator may change.
            return "expandable_segments over ranks needs NCCL_GRAPH_REGISTER=0 in the environment"
        return None

    def _capture(self, step: StaticStep) -> None:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.device(self.device):
                step.capture()
        except RuntimeError as error:
            # A model with an operation that cannot be captured is no error of the caller's.
            self.failed = True
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            log_once(__name__, logging.WARNING, f"decoding without a captured graph: {first}")
            return
        log_once(
            __name__, logging.INFO,
            f"captured a decoding step of {step.rows} rows and {step.tokens} tokens",
        )  # fmt: skip
