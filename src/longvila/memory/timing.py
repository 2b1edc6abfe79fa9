"""How long a training step, or reading a prompt, takes on a rank, by part.

    tower and projector          operations of the busiest rank / rate of a whole tower
    text matrices, head          operations of the busiest rank / rate of wide products; the head
                                 also 50 bytes a logit
    attention                    operations / the kernel's own rate, times what uneven heads cost
    elementwise                  bytes that norms, rotations, activations and residuals move / rate
                                 of device memory
    heads exchanged              bytes / rate of the link; nothing else runs meanwhile, except with
                                 head chunks
    ring                         a block: what a transfer takes longer than the block it hides
                                 behind (two transfers in backward: k, v and dk, dv)
    parameters copied            copies out of gathers and into reductions / rate of device memory
    parameters                   gathers and reductions of a layer, what exceeds its computation;
                                 the group outside the layers, in full
    offload                      copies of a layer's checkpoint, what exceeds its computation
    optimizer                    40 bytes a tuned parameter / rate of device memory

Rates are measured ones (`longvila.memory.rates`); there is no constant that was chosen to make a
time come out. So a prediction is a bound from parts: launch gaps, jitter between ranks, waiting for
data and a loaded network are not in it.

Bytes of the elementwise part, a token and layer, with two bytes a value. Forward: a norm as
transformers writes it reads and writes 36 M, a residual 6 M, a rotation 20 (H + K) D, the MLP's
activation and product 10 I. Backward: 90 M, 4 M, 30 (H + K) D and 18 I. Compiled norms and MLPs
pass over memory once: 4 M and 6 I, 10 M and 12 I.

Letters: M model dim, I MLP dim, H query heads, K kv heads, D head dim, U Ulysses ranks, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from longvila.memory.activations import (
    checkpoint_bytes,
    exchanged_kv_heads,
    layer_activation_bytes,
)
from longvila.memory.operations import Load, Operations, Tuned, training_operations
from longvila.memory.rates import Gpu
from longvila.memory.settings import Ranks, Settings
from longvila.memory.sizes import ModelSize, TextSize

#: Bytes that the cross-entropy moves a logit: the product's result, the logarithm of sums, softmax
#: in place, the gradient's cast (`longvila.memory.cross_entropy`).
_LOGIT_BYTES = 50.0


@dataclass(frozen=True, kw_only=True)
class Links:
    """Links between nodes.

    Attributes:
        rate: Bytes a second that one link carries in one direction.
        per_node: Links of a node; one a GPU if None.
    """

    rate: float = 50e9
    per_node: int | None = None


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        parts: Seconds by part, in the order of the module's text.
        operations: Operations of one data-parallel group.
        notes: Where a rate stands in for another.
    """

    parts: Mapping[str, float]
    operations: Operations
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())


def elementwise_bytes(
    text: TextSize, compute_bytes: int, *, compiled: bool = False
) -> tuple[float, float]:
    """Return bytes that a layer's other operations move a token, forward and backward."""
    scale = compute_bytes / 2
    rotated = (text.heads + text.kv_heads) * text.head_dim
    if compiled:
        forward = 20 * text.width + 20 * rotated + 6 * text.mlp_width
        backward = 28 * text.width + 30 * rotated + 12 * text.mlp_width
    else:
        forward = 84 * text.width + 20 * rotated + 10 * text.mlp_width
        backward = 188 * text.width + 30 * rotated + 18 * text.mlp_width
    if text.qk_norm:
        forward += (4 if compiled else 36) * rotated
        backward += (10 if compiled else 90) * rotated
    return scale * forward, scale * backward


def head_imbalance(heads: int, ulysses: int) -> float:
    """Return the busiest rank's query heads over their mean."""
    return -(-heads // ulysses) * ulysses / heads


class _Clock:
    """Times of one micro-batch on the busiest rank."""

    def __init__(
        self,
        size: ModelSize,
        load: Load,
        ranks: Ranks,
        settings: Settings,
        tuned: Tuned,
        gpu: Gpu,
        links: Links,
    ) -> None:
        self.size, self.load, self.ranks, self.settings = size, load, ranks, settings
        self.tuned, self.gpu, self.links, self.text = tuned, gpu, links, size.text
        self.c = settings.compute_bytes
        self.local = ranks.local_tokens(load.tokens)
        self.operations = training_operations(
            size,
            load,
            tuned=tuned,
            checkpointing=settings.checkpointing,
            keep_attention=settings.keep_attention,
            tiled_mlp=settings.mlp_tile_rows is not None and settings.mlp_tile_rows < self.local,
            plain_layers=settings.plain_layers,
        )

    # ---- computation

    def compute(self) -> tuple[dict[str, float], dict[str, float], tuple[str, ...]]:
        """Seconds forward and backward (with what runs again) of all micro-batches."""
        gpu, sp = self.gpu, self.ranks.sp
        kernel, note = gpu.attention_rates(self.settings.backend)
        uneven = head_imbalance(self.text.heads, self.ranks.ulysses)
        counts = self.operations
        times: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for way, (found, passes) in enumerate(
            zip(times, ((counts.forward,), (counts.backward, counts.recompute)), strict=True)
        ):
            for part in counts.forward:
                total = sum(each[part] for each in passes)
                if part == "attention":
                    # What runs again runs at the forward's rate.
                    again = counts.recompute[part] if way else 0.0
                    found[part] = uneven / sp * ((total - again) / kernel[way] + again / kernel[0])
                elif part in ("tower", "projector"):
                    found["tower"] = found.get("tower", 0.0) + total / sp / gpu.tower
                else:
                    found[part] = total / sp / gpu.matrices[way]
        forward, backward = elementwise_bytes(self.text, self.c, compiled=self.settings.compiled)
        again_bytes = forward if self.settings.checkpointing else 0.0
        moved = self.local * self.text.layers * self.load.micro_batches / gpu.memory_rate
        times[0]["elementwise"] = forward * moved
        times[1]["elementwise"] = (
            (backward + again_bytes) * moved if self.tuned.through_text else 0.0
        )
        return times[0], times[1], () if note is None else (note,)

    def loss(self) -> float:
        """Seconds of the passes over logits, and over the head's gradient, of all micro-batches."""
        targets, text = -(-self.load.targets // self.ranks.sp), self.text
        number = _LOGIT_BYTES * targets * text.vocabulary
        tiles = -(-targets // self.settings.loss_tile_rows)
        if self.tuned.text and tiles > 1:
            number += 16.0 * tiles * text.embedding_parameters
        return self.load.micro_batches * number / self.gpu.memory_rate

    def copies(self) -> float:
        """Seconds of copies out of gathers and into reductions, of all micro-batches."""
        if not self.settings.fsdp:
            return 0.0
        gathered = 4.0 * self.c * self.size.parameters
        reduced = (self.c + self.settings.reduce_bytes) * self.tuned.parameters(self.size)
        return self.load.micro_batches * (gathered + reduced) / self.gpu.memory_rate

    # ---- communication

    def _crosses(self, size: int, stride: int) -> bool:
        return size > 1 and size * stride > self.ranks.per_node

    def _between_nodes(self) -> float:
        """Bytes a second of one GPU to another node, when all of a node's GPUs send."""
        per_node = self.ranks.per_node
        links = per_node if self.links.per_node is None else self.links.per_node
        return self.links.rate * min(1.0, links / per_node)

    def exchange(self) -> float:
        """Seconds in which heads are exchanged, all layers."""
        u, text = self.ranks.ulysses, self.text
        if u == 1:
            return 0.0
        kv = exchanged_kv_heads(text, u)
        h = text.heads
        values = (h + 2 * kv) + h  # q, k, v there, out back
        if self.tuned.through_text:
            there = 3 * h + 2 * kv if self.settings.checkpointing else h
            values += there + (h + 2 * kv)
        number = self.c * text.head_dim * values * self.local * (u - 1) / u
        rate = self._between_nodes() if self._crosses(u, 1) else self.gpu.all_to_all
        return text.layers * number / rate / self.settings.head_chunks

    def ring(self, forward: float, backward: float) -> float:
        """Seconds by which transfers outlast the blocks they hide behind, all layers.

        Args:
            forward: Seconds of one layer's attention on this rank, forward.
            backward: The same backward.
        """
        ranks, text = self.ranks, self.text
        r = ranks.ring
        if r == 1:
            return 0.0
        kv = exchanged_kv_heads(text, ranks.ulysses) / ranks.ulysses
        block = 2 * self.c * kv * text.head_dim * self.local * ranks.ulysses
        crosses = self._crosses(r, ranks.ulysses)
        if crosses:
            # Neighbours on the ring are whole Ulysses groups apart; of a node's ranks as many
            # talk to another node as a Ulysses group has.
            talking = min(ranks.ulysses, ranks.per_node)
            links = ranks.per_node if self.links.per_node is None else self.links.per_node
            rate = self.links.rate * min(1.0, links / talking)
        else:
            rate = self.gpu.ring if ranks.kv_exchange == "p2p" else self.gpu.gather
        step = block / rate
        exposed = 0.0
        for transfers, compute in ((1, forward), (2, backward)):
            if compute == 0.0:
                continue
            own = compute / r
            if ranks.kv_exchange == "p2p":
                exposed += (r - 1) * max(0.0, transfers * step - own)
            else:
                exposed += max(0.0, transfers * (r - 1) * step - own)
        return text.layers * exposed

    def _collective(self, number: float) -> float:
        """Seconds of an all-gather (or reduce-scatter) of so many bytes over all shards."""
        r = self.ranks.shards
        if r == 1:
            return 0.0
        inside = number * (r - 1) / r / self.gpu.gather
        nodes = -(-r // self.ranks.per_node)
        if nodes == 1:
            return inside
        links = self.ranks.per_node if self.links.per_node is None else self.links.per_node
        return max(inside, number * (nodes - 1) / nodes / (links * self.links.rate))

    def parameters(self, forward_layer: float, backward_layer: float) -> float:
        """Seconds of gathers and reductions that no computation hides.

        Args:
            forward_layer: Seconds of one layer forward.
            backward_layer: The same backward.
        """
        if not self.settings.fsdp or self.ranks.shards == 1:
            return 0.0
        text, settings = self.text, self.settings
        gather = self._collective(self.c * text.layer_parameters)
        tuned = text.layer_parameters if self.tuned.text else 0
        tuned += self.tuned.adapter_parameters // text.layers
        reduce = self._collective(settings.reduce_bytes * tuned)
        exposed = text.layers * max(0.0, gather - forward_layer)
        if self.tuned.through_text:
            exposed += text.layers * max(0.0, gather + reduce - backward_layer)
        outside = self.tuned.parameters(self.size) - text.layers * tuned
        root = self._collective(self.c * self.size.root_parameters)
        return exposed + root + self._collective(settings.reduce_bytes * outside)

    def media(self) -> float:
        """Seconds in which media rows go to their tokens and gradients back."""
        tower = self.size.tower
        if tower is None or not self.load.frames or self.ranks.sp == 1:
            return 0.0
        rows = self.ranks.local_frames(self.load.frames) * tower.rows
        number = 2 * self.c * rows * self.text.width
        rate = self.gpu.all_to_all
        if self.ranks.sp > self.ranks.per_node:
            rate = self._between_nodes()
        return number / rate

    def offload(self, forward_layer: float, backward_layer: float) -> float:
        """Seconds in which copies to and from the host outlast the layers."""
        settings, text = self.settings, self.text
        if settings.offload_bytes == 0:
            return 0.0
        if settings.checkpointing:
            per = self.local * checkpoint_bytes(
                text, compute_bytes=self.c, keep_attention=settings.keep_attention
            )
        else:
            per = self.local * layer_activation_bytes(
                text, compute_bytes=self.c, ulysses=self.ranks.ulysses
            )
        layers = min(settings.offload_bytes / per, max(text.layers - settings.keep_last, 0))
        copy = per / self.gpu.host_rate
        late = max(0.0, copy - forward_layer) + max(0.0, copy - backward_layer)
        return layers * late

    def optimizer(self) -> float:
        """Seconds of clipping and AdamW."""
        tuned = self.tuned.parameters(self.size) / (self.ranks.shards if self.settings.fsdp else 1)
        if self.settings.optimizer == "adamw-host":
            return 8.0 * tuned / self.gpu.host_rate
        return 40.0 * tuned / self.gpu.memory_rate


def training_time(
    size: ModelSize,
    load: Load,
    *,
    gpu: Gpu,
    ranks: Ranks | None = None,
    settings: Settings | None = None,
    tuned: Tuned | None = None,
    links: Links | None = None,
) -> StepTime:
    """Predict the seconds of one training step.

    Args:
        size: The model.
        load: A micro-batch of one data-parallel group, and how many there are.
        gpu: The device's rates.
        ranks: How it is dealt; one rank if None.
        settings: What is switched on; the defaults if None.
        tuned: Which parts have gradients; all if None.
        links: Links between nodes.

    Returns:
        Seconds by part.

    Comm: Counted, not done.
    """
    clock = _Clock(
        size, load, ranks or Ranks(), settings or Settings(), tuned or Tuned(), gpu,
        links or Links(),
    )  # fmt: skip
    forward, backward, notes = clock.compute()
    rows, layers = load.micro_batches, size.text.layers
    per_layer = [
        sum(way[part] for part in ("text_matrices", "attention", "elementwise")) / layers / rows
        for way in (forward, backward)
    ]
    attention = [way["attention"] / layers / rows for way in (forward, backward)]
    parts = {
        "tower and projector": forward["tower"] + backward["tower"],
        "text matrices": forward["text_matrices"] + backward["text_matrices"],
        "attention": forward["attention"] + backward["attention"],
        "elementwise": forward["elementwise"] + backward["elementwise"],
        "head and loss": forward["head"] + backward["head"] + clock.loss(),
        "heads exchanged": rows * clock.exchange(),
        "ring, not hidden": rows * clock.ring(attention[0], attention[1]),
        "parameters copied": clock.copies(),
        "parameters, not hidden": rows * clock.parameters(per_layer[0], per_layer[1]),
        "media rows exchanged": rows * clock.media(),
        "offload, not hidden": rows * clock.offload(per_layer[0], per_layer[1]),
        "optimizer": clock.optimizer(),
    }
    return StepTime(parts=parts, operations=clock.operations, notes=notes)
