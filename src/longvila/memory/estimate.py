"""How much memory a training step or a long prompt takes on a rank, by part and moment.

A step's peak is not the sum of its largest tensors, since they do not exist together. So the bytes
of every part are written down for each moment that can be the peak, and the largest moment wins:

    tower forward    pixels and one micro-batch, before the text model runs
    loss             every layer's checkpoint, a tile of logits, the head's float32 gradient
    MLP backward     checkpoints, one layer's recomputed tensors, three gradients as wide as its MLP
    norm backward    the same layer after its MLP (or its tiles) is done
    attention backward   the exchanged q, k, v, out, their gradients, the kernel's scratch
    tower backward   one micro-batch with its graph; the text model's checkpoints are gone
    tower gradients  those of a micro-batch, and the float32 sums of all
    root reduction   gradients of everything outside the text layers, in both precisions
    optimizer        parameters, gradients, states

Backward moments are taken at the last layer, at the one before it and at the first: checkpoints
shrink from one to the next while reduced gradients grow, so that one of the ends is the highest.

Bytes a local token and layer are those of `longvila.memory.activations`; the MLP's backward is
widest at ``6 c I``: three of its saved tensors and three gradients.

What it does not count: the CUDA context and NCCL's buffers, which are outside torch's allocator;
fragmentation; cuBLAS workspaces (some MiB). A caller compares with what the device can give torch.

Letters: L tokens of a rank, M model dim, I MLP dim, H query heads, K kv heads, D head dim, V
vocabulary, R ranks that share parameters, U Ulysses ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from longvila.memory.activations import (
    MLP_SAVED,
    MLP_WIDEST,
    NORM_PRODUCTS,
    SCRATCH,
    checkpoint_bytes,
    exchanged_kv_heads,
    layer_activation_bytes,
    norm_bytes,
    out_bytes,
    qk_norm_bytes,
    qkv_bytes,
)
from longvila.memory.operations import Load, Tuned
from longvila.memory.settings import STATE_BYTES, Ranks, Settings
from longvila.memory.sizes import ModelSize

#: What stays allocated on a GPU between steps beside parameters and states: workspaces of cuBLAS
#: and the like. Source: between_steps_gib of every case in
#: benchmarks/results/2026-11-22_memory_plan_1xh200.json, minus 12 bytes a parameter.
LIBRARY_BYTES = 0.132 * 2**30

#: Rows of the head's gradient that are added at a time (`longvila.memory.cross_entropy`).
_GRADIENT_ROWS = 16384
#: Both moments of the pieces under way while they are on the host (`longvila.train.host_adamw`).
_STAGED_BYTES = 3 * 2 * 4 * 2**26
#: Regions whose copies to the host may be under way (four tensors, two or three a layer).
_LAYERS_IN_FLIGHT = 2


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a rank needs at the most.

    Attributes:
        moments: Bytes by part, for each moment.
        host_bytes: Pinned host memory of the rank.
    """

    moments: Mapping[str, Mapping[str, float]]
    host_bytes: float = 0.0

    @property
    def moment(self) -> str:
        """Name of the moment that needs the most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> Mapping[str, float]:
        """Bytes by part at that moment, the largest first."""
        parts = self.moments[self.moment]
        return dict(sorted(parts.items(), key=lambda item: -item[1]))

    @property
    def bytes(self) -> float:
        """Bytes at that moment."""
        return sum(self.moments[self.moment].values())


# ---- training ------------------------------------------------------------------------------------


class _Step:
    """The parts of one training step, from which moments are put together."""

    def __init__(
        self, size: ModelSize, load: Load, ranks: Ranks, settings: Settings, tuned: Tuned
    ) -> None:
        self.size, self.load, self.ranks, self.settings = size, load, ranks, settings
        self.tuned, self.text = tuned, size.text
        self.c = settings.compute_bytes
        self.local = ranks.local_tokens(load.tokens)
        self.shards = ranks.shards if settings.fsdp else 1
        # Rows of media and targets lie anywhere; a rank holds its share of them.
        self.targets = -(-load.targets // ranks.sp)
        self.frames = ranks.local_frames(load.frames) if size.tower is not None else 0
        self.layer_tuned = self._layer_tuned()
        # A step without media leaves tower and projector without gradients.
        with_gradients = tuned.parameters(size)
        if size.tower is not None and not load.frames:
            with_gradients -= tuned.tower * size.tower.parameters
            with_gradients -= tuned.projector * size.tower.projector_parameters
        self.root_tuned = with_gradients - size.text.layers * self.layer_tuned

    def _layer_tuned(self) -> float:
        if self.tuned.text:
            return float(self.text.layer_parameters)
        return self.tuned.adapter_parameters / self.text.layers

    # ---- what is there all the time

    def steady(self, *, gradient_layers: float, root_gradients: bool) -> dict[str, float]:
        """Parameters, states, and the gradients that have been reduced so far."""
        size, settings, shards = self.size, self.settings, self.shards
        tuned = self.tuned.parameters(size)
        if self.load.micro_batches > 1:
            gradient_layers, root_gradients = self.text.layers, True
        own = gradient_layers * self.layer_tuned
        if root_gradients:
            own += self.root_tuned
        adapters = self.tuned.adapter_parameters
        return {
            "parameters": settings.parameter_bytes * (size.parameters + adapters) / shards,
            "optimizer states": STATE_BYTES[settings.optimizer] * tuned / shards,
            "gradients": settings.parameter_bytes * own / shards,
        }

    def root(self) -> float:
        """The gathered group outside of the text layers."""
        return float(self.c * self.size.root_parameters) if self.settings.fsdp else 0.0

    def head_gradient(self) -> float:
        """The head's whole gradient, from the loss to the end of backward."""
        if not self.tuned.text:
            return 0.0
        if self.settings.fsdp:
            return float(self.c * self.text.embedding_parameters)
        # It goes into the one of the micro-batches before, which `steady` counts.
        first = self.load.micro_batches == 1
        return float(self.settings.parameter_bytes * self.text.embedding_parameters * first)

    def gathered(self, *, first: bool, last_processed: bool) -> float:
        """A layer's parameters, the next one's, and the reduction under way, in backward.

        Source: torch's fully_shard: while a layer runs, the next one's flat gather buffer exists,
        and the float32 input of the last reduction until the next one begins.
        """
        if not self.settings.fsdp:
            return 0.0
        n = self.text.layer_parameters
        total = float(self.c * n)
        if self.shards > 1 and not last_processed:
            total += self.c * n
        if not first:
            total += self.settings.reduce_bytes * self.layer_tuned
        return total

    def media(self) -> float:
        """What waits until frames run again: their pixels, or features of a frozen tower."""
        tower = self.size.tower
        if tower is None or not self.frames:
            return 0.0
        if self.tuned.tower:
            return float(self.c * self.frames * tower.pixels)
        if self.tuned.projector:
            return float(self.c * self.frames * tower.patches * tower.width)
        return 0.0

    def rows_in_place(self) -> float:
        """Received rows, which putting them among the embeddings keeps for its backward."""
        tower = self.size.tower
        if tower is None or not (self.tuned.tower or self.tuned.projector):
            return 0.0
        return float(self.c * self.frames * tower.rows * self.text.width)

    # ---- checkpoints

    def checkpoints(self, layers: int, *, running: bool) -> tuple[float, float]:
        """Bytes on the device and on the host of the first so many layers.

        Args:
            layers: How many are left.
            running: Whether the last of them is in its backward pass; else all wait for it.
        """
        settings, text = self.settings, self.text
        if not self.tuned.through_text:
            return 0.0, 0.0
        full = self.local * layer_activation_bytes(
            text, compute_bytes=self.c, ulysses=self.ranks.ulysses, compiled=settings.compiled
        )
        if settings.mlp_tile_rows is not None and settings.mlp_tile_rows < self.local:
            # A tiled MLP keeps its input, which the norm before it keeps already.
            full -= self.mlp_saved * self.local
        small = self.local * checkpoint_bytes(
            text, compute_bytes=self.c, keep_attention=settings.keep_attention
        )
        first_plain = text.layers - settings.plain_layers if settings.checkpointing else 0
        per = [small if layer < first_plain else full for layer in range(layers)]
        moved, host = self._moved(small, full, first_plain)
        # Coming back in time: the layer that runs backward, and the one before it.
        back = range(layers - 2, layers) if running else range(moved - _LAYERS_IN_FLIGHT, moved)
        device = sum(size for layer, size in enumerate(per) if layer >= moved or layer in back)
        return device, host

    def _moved(self, small: float, full: float, first_plain: int) -> tuple[int, float]:
        """How many layers go to the host, from the first on, and their bytes."""
        settings, host = self.settings, 0.0
        for layer in range(self.text.layers - settings.keep_last):
            size = small if layer < first_plain else full
            if host + size > settings.offload_bytes:
                # Single tensors of this layer may still fit.
                return layer, host
            host += size
        return max(self.text.layers - settings.keep_last, 0), host

    def plain(self, layer: int) -> bool:
        """Whether a layer keeps what its backward needs."""
        settings = self.settings
        first = self.text.layers - settings.plain_layers if settings.checkpointing else 0
        return layer >= first

    # ---- moments of a layer's backward

    def norm_saved(self, *, input_counts: bool) -> float:
        """Saved by a norm, a token."""
        return norm_bytes(
            self.text, self.c, input_counts=input_counts, compiled=self.settings.compiled
        )

    def norm_products(self) -> float:
        """Made by a norm's backward, a token; compiled, its gradient alone."""
        compiled = self.settings.compiled
        return (self.c if compiled else NORM_PRODUCTS * 4.0) * self.text.width

    @property
    def mlp_saved(self) -> float:
        """Saved by an MLP, a token."""
        return MLP_SAVED[self.settings.compiled] * self.c * self.text.mlp_width

    def layer_saved(self) -> float:
        """What the second run of a layer leaves for its MLP's backward, without the MLP."""
        c, text = self.c, self.text
        total = self.norm_saved(input_counts=False) + self.norm_saved(input_counts=True)
        total += qk_norm_bytes(text, c) + qkv_bytes(text, c)
        if not (self.settings.checkpointing and self.settings.keep_attention):
            total += out_bytes(text, c)
        return total * self.local

    def mlp(self, plain: bool) -> dict[str, float]:
        """Backward of the MLP: its product's two gradients are the widest point."""
        text, c, local = self.text, self.c, self.local
        tile = self.settings.mlp_tile_rows
        rows = local if tile is None else min(tile, local)
        gradient = c * text.mlp_matrices / 3 if self.tuned.text else 0.0
        wide = MLP_WIDEST[self.settings.compiled] * c * text.mlp_width * rows
        parts = {"gradient of hidden states": float(c * text.width * local)}
        if rows < local:
            # x and dx whole; a tile's gradients; the sums of all tiles in float32
            parts["gradient of hidden states"] += c * text.width * local
            wide += 2.0 * c * text.width * rows
            gradient = (4.0 + c) * text.mlp_matrices if self.tuned.text else 0.0
        parts["MLP of one layer"] = wide
        parts["weight gradients of one layer"] = gradient
        if not plain:
            parts["recomputed layer"] = self.layer_saved()
        elif rows == local:
            # Saved tensors are among the activations.
            parts["MLP of one layer"] = wide - self.mlp_saved * local
        return parts

    def norm(self, plain: bool) -> dict[str, float]:
        """Backward of the norm before the MLP."""
        text, c, local = self.text, self.c, self.local
        parts = {
            "gradient of hidden states": float(c * text.width * local),
            "products of one norm": self.norm_products() * local,
        }
        if self.tuned.text:
            parts["weight gradients of one layer"] = float(c * text.mlp_matrices)
        if not plain:
            gone = c * text.width if self.settings.compiled else 2 * c * text.width
            parts["recomputed layer"] = self.layer_saved() - gone * local
        else:
            # What the MLP and the norm itself saved is among the activations, and gone.
            tile = self.settings.mlp_tile_rows
            if tile is None or tile >= local:
                parts["products of one norm"] -= self.mlp_saved * local
            parts["products of one norm"] -= c * text.width * local * (2 - self.settings.compiled)
        return parts

    def attention(self, plain: bool) -> dict[str, float]:
        """Backward of attention, kernel and exchanges."""
        text, c, local, ranks = self.text, self.c, self.local, self.ranks
        d = text.head_dim
        heads, kv = float(text.heads), float(text.kv_heads)
        exchanged_kv = exchanged_kv_heads(text, ranks.ulysses)
        gradients = c * (heads + 2 * kv) * d
        parts = {
            "gradient of hidden states": float(c * text.width * local + c * heads * d * local),
            "gradients of q, k, v": gradients * local,
        }
        per_head, per_kv, per_row = SCRATCH[self.settings.backend]
        grouped = text.kv_heads < text.heads
        if not grouped:
            per_kv = 0.0
            per_head = min(per_head, 4.0)
        scratch = per_head * heads * d + per_kv * exchanged_kv * d + per_row * heads
        if self.settings.backend == "cpu" and not grouped:
            scratch = 0.0
        parts["attention kernel"] = scratch * local
        if ranks.ulysses > 1:
            chunks = self.settings.head_chunks
            share = min(1.0, 2.0 / chunks)
            arrived = c * (3 * heads + 2 * exchanged_kv) * d
            if plain:
                arrived = c * heads * d  # dout alone; the rest was saved
            own = c * (heads + 2 * exchanged_kv) * d
            parts["heads exchanged"] = (arrived * share + 2 * own * share) * local
            parts["attention kernel"] /= chunks
        if ranks.ring > 1:
            visiting = 2 * c * exchanged_kv * d
            blocks = ranks.ring - 1 if ranks.kv_exchange == "gather" else 2
            total = visiting * (1 + 2 * blocks)
            if ranks.ring > 2 or ranks.kv_exchange == "gather":
                total += 4.0 * heads * d
            parts["keys and values of other ranks"] = total * local
        if self.tuned.text:
            parts["weight gradients of one layer"] = float(
                c * (text.mlp_matrices + text.heads * d * text.width)
            )
        if not plain:
            saved = self.norm_saved(input_counts=False) + qkv_bytes(text, c)
            saved += qk_norm_bytes(text, c)
            if not self.settings.keep_attention:
                saved += out_bytes(text, c)
            parts["recomputed layer"] = saved * local
        return parts

    # ---- moments

    def moments(self) -> dict[str, dict[str, float]]:
        """All moments, with their parts."""
        found = self._moments()
        if self.settings.backend != "cpu":
            for parts in found.values():
                parts["workspaces of libraries"] = LIBRARY_BYTES
        return found

    def _moments(self) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        text = self.text
        base = self.steady(gradient_layers=0, root_gradients=False)
        always = {
            "gathered outside the layers": self.root(),
            "pixels or features": self.media(),
            "media rows in place": self.rows_in_place(),
            # rotary tables of the step, ids, labels and indices
            "positions and ids": self.local * (2.0 * self.c * text.head_dim + 40),
        }
        if self.frames:
            found["tower forward"] = {**base, **always, **self._tower_forward()}
        found["loss"] = {**base, **always, **self._loss()}
        if self.tuned.through_text:
            found["last norm backward"] = {**base, **always, **self._last_norm()}
            for name, own in (
                ("MLP backward", self.mlp),
                ("norm backward", self.norm),
                ("attention backward", self.attention),
            ):
                found |= self._at_layers(name, own, always)
        if self.frames and (self.tuned.tower or self.tuned.projector):
            done = self.steady(gradient_layers=text.layers, root_gradients=False)
            found["tower backward"] = {**done, **always, **self._tower_backward()}
            found["tower gradients"] = {**done, **always, **self._tower_gradients()}
        whole = self.steady(gradient_layers=text.layers, root_gradients=True)
        found["root reduction"] = {**whole, **self._root_reduction()}
        staged = {"moments passing through": float(_STAGED_BYTES)}
        found["optimizer"] = whole | (staged if self.settings.optimizer == "adamw-host" else {})
        return found

    def _at_layers(
        self,
        name: str,
        own: Callable[[bool], dict[str, float]],
        always: dict[str, float],
    ) -> dict[str, dict[str, float]]:
        layers, plain = self.text.layers, self.settings.plain_layers
        found = {}
        ends = {0, 1, layers - 1, plain if self.settings.checkpointing else 0}
        for processed in sorted(each for each in ends if each < layers):
            where = f"{name}, layer {layers - processed} of {layers}"
            device, _ = self.checkpoints(layers - processed, running=True)
            found[where] = {
                **self.steady(gradient_layers=processed, root_gradients=False),
                **always,
                self._waiting_name: device,
                "gathered layers": self.gathered(
                    first=processed == 0, last_processed=processed == layers - 1
                ),
                "gradient of the head": self.head_gradient(),
                **own(self.plain(layers - processed - 1)),
            }
        return found

    @property
    def _waiting_name(self) -> str:
        return "checkpoints" if self.settings.checkpointing else "activations"

    def _waiting(self) -> dict[str, float]:
        """What all layers left for backward."""
        device, _ = self.checkpoints(self.text.layers, running=False)
        return {self._waiting_name: device}

    def _loss(self) -> dict[str, float]:
        text, c, local = self.text, self.c, self.local
        rows = min(self.settings.loss_tile_rows, max(self.targets, 1))
        tiles = -(-self.targets // rows)
        weight = 4.0 * text.embedding_parameters if self.tuned.text else 0.0
        part = 4.0 * text.width * min(_GRADIENT_ROWS, text.vocabulary) if tiles > 1 else 0.0
        logits = rows * text.vocabulary
        # Logits twice while the logarithm of their sum is taken; then beside them their gradient
        # in the type of the products (which the CPU casts back for each of them).
        products = 4 + c + (4 if self.settings.backend == "cpu" and c < 4 else 0)
        taken = 8.0 * logits + (weight if tiles > 1 else 0.0)
        multiplied = float(products * logits) + weight + (part if self.tuned.text else 0.0)
        parts = {
            **self._waiting(),
            "last norm": self.norm_saved(input_counts=True) * local,
            "gradient of hidden states": float(c * text.width * local),
            "logits of one tile, gradient of the head": max(taken, multiplied),
        }
        if self.settings.fsdp:
            # The last layer's buffer goes only with the next copy out of one.
            held = self.c * text.layer_parameters if self.shards > 1 else 0
            parts["gathered layers"] = float(held)
        return parts

    def _last_norm(self) -> dict[str, float]:
        text = self.text
        kept = (self.c if self.settings.compiled else 4.0) * text.width
        return {
            **self._waiting(),
            "products of one norm": (kept + self.norm_products()) * self.local,
            "gradient of the head": self.head_gradient(),
        }

    def _tower_saved(self) -> float:
        """Bytes of a frame at the widest point of its backward.

        A layer keeps two norms' results, q, k, v, attention's out, two residuals and its MLP's two
        tensors. Beside them there is what the projector saved, or the MLP's gradients of a layer.
        """
        tower = self.size.tower
        assert tower is not None
        c = self.c
        layer = 8.0 * c * tower.width + 2.0 * c * tower.mlp_width + 4 * tower.heads + 16
        rows = tower.projector_rows * (c * tower.joined_width * 2 + 4.0 * c * self.text.width)
        widest = tower.patches * c * (tower.mlp_width + 2.0 * tower.width)
        return tower.patches * tower.layers * layer + max(rows, widest)

    def _tower_call(self) -> int:
        tower = self.size.tower
        assert tower is not None
        return min(tower.frames_per_call or self.frames, self.frames)

    def _tower_forward(self) -> dict[str, float]:
        tower = self.size.tower
        assert tower is not None
        c, text = self.c, self.text
        rows = self.frames * tower.rows * c * text.width
        if self.tuned.tower and not self.settings.checkpointing:
            return {"tower": self.frames * self._tower_saved(), "media rows": float(rows)}
        wide = c * tower.patches * (2.0 * tower.mlp_width + 3.0 * tower.width)
        parts = {"tower": self._tower_call() * wide, "media rows": float(2 * rows)}
        if not self.tuned.tower:
            parts["pixels"] = float(c * self.frames * tower.pixels)
        return parts

    def _tower_backward(self) -> dict[str, float]:
        tower, tuned, c = self.size.tower, self.tuned, self.c
        assert tower is not None
        frames = self._tower_call() if self.settings.checkpointing else self.frames
        parameters = tuned.tower * tower.parameters + tuned.projector * tower.projector_parameters
        parts = {
            "media rows": float(c * self.frames * tower.rows * self.text.width),
            "gradient of the head": self.head_gradient(),
            "gradient of hidden states": float(c * self.text.width * self.local),
        }
        if tuned.tower:
            parts["tower"] = frames * self._tower_saved()
        else:
            width = 2 * tower.joined_width + 4 * self.text.width
            parts["tower"] = float(c * self._tower_call() * tower.projector_rows * width)
        if self.settings.checkpointing and frames < self.frames:
            parts["sums of the tower's gradients"] = 4.0 * parameters
        if self.settings.fsdp:
            parts["gathered layers"] = self.settings.reduce_bytes * self.layer_tuned
        return parts

    def _tower_gradients(self) -> dict[str, float]:
        """The last micro-batch's gradients beside the float32 sums of all."""
        tower, tuned = self.size.tower, self.tuned
        assert tower is not None
        parameters = tuned.tower * tower.parameters + tuned.projector * tower.projector_parameters
        wide = 4.0 if self.settings.checkpointing and tuned.tower else 0.0
        return {
            "gradient of the head": self.head_gradient(),
            "tower gradients": (self.c + wide) * parameters,
            "gathered layers": self.settings.reduce_bytes * self.layer_tuned
            if self.settings.fsdp
            else 0.0,
        }

    def _root_reduction(self) -> dict[str, float]:
        """Beside the reduced gradients, or before they exist beside the unreduced ones."""
        if not self.settings.fsdp:
            return {}
        settings = self.settings
        tuned = self.root_tuned
        flat = settings.reduce_bytes * tuned
        before = flat + self.c * tuned - settings.parameter_bytes * tuned / self.shards
        return {"gradients outside the layers": max(float(flat), before)}


def training_peak(
    size: ModelSize,
    load: Load,
    *,
    ranks: Ranks | None = None,
    settings: Settings | None = None,
    tuned: Tuned | None = None,
) -> Peak:
    """Predict the most memory that a rank needs in a training step.

    Args:
        size: The model.
        load: One micro-batch of a data-parallel group.
        ranks: How it is dealt; one rank if None.
        settings: What is switched on; the defaults if None.
        tuned: Which parts have gradients; all if None.

    Returns:
        The moments; the largest is the peak.

    Memory: See the module's text; ``(4 + 4 + 8) N / R`` for parameters, gradients and states.
    """
    step = _Step(size, load, ranks or Ranks(), settings or Settings(), tuned or Tuned())
    _, host = step.checkpoints(size.text.layers, running=False)
    if step.settings.optimizer == "adamw-host":
        host += STATE_BYTES["adamw"] * step.tuned.parameters(size) / step.shards
    return Peak(moments=step.moments(), host_bytes=host)
