"""Floating-point operations of a training step or of reading a prompt, by part.

An operation is an addition or a multiplication; softmax, norms and activations are not counted.

    text matrices   2 * weights * tokens      forward; the same again for the gradient of the
                                              input, and again for that of the weights
    attention       4 * H * D * pairs         forward, a layer: scores and their product with v,
                                              over pairs of a token and one it sees;
                    10 * H * D * pairs        backward: scores again, dv, dp, dq, dk
    head            2 * V * M * targets       rows without a target never reach it; two more
                                              products behind
    tower           2 * weights * patches, 4 * C * patches ** 2 a layer and frame (or frames whose
                    patches attend to each other), as above
    projector       2 * weights * rows

Recomputed: with checkpoints the layers' matrices once more, attention once more unless its output
is kept, the tower and the projector once more. A tiled MLP runs its tiles again in backward, in
place of the second run that a checkpoint would give it.

Sources: the counts are those of FlashAttention-2 (arXiv 2307.08691, section 4.1: backward is 2.5
times forward) and of PaLM's appendix B (2 and 4 operations a weight and token).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from longvila.memory.sizes import ModelSize, PlanError

#: Backward of attention over its forward.
ATTENTION_BACKWARD = 2.5
PARTS = ("tower", "projector", "text_matrices", "attention", "head")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one step (of one data-parallel group) or one prompt holds.

    Attributes:
        tokens: S, tokens of a packed row, those of frames included.
        frames: Frames of all its videos.
        targets: Tokens with a loss.
        documents: Lengths of the packed documents; one of all tokens if empty.
        micro_batches: Rows one after the other before the optimiser's step.
    """

    tokens: int
    frames: int = 0
    targets: int = 0
    documents: tuple[int, ...] = ()
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.frames < 0 or not 0 <= self.targets <= self.tokens:
            raise PlanError(
                f"a row needs tokens, no negative frames and at most one target a token; got "
                f"{self.tokens} tokens, {self.frames} frames, {self.targets} targets"
            )
        if self.documents and sum(self.documents) != self.tokens:
            raise PlanError(
                f"documents add up to {sum(self.documents)} tokens, the row has {self.tokens}"
            )
        if self.micro_batches < 1:
            raise PlanError(f"a step has at least one micro-batch, got {self.micro_batches}")

    @property
    def pairs(self) -> int:
        """Pairs of a token and one it sees, itself included."""
        return sum(n * (n + 1) // 2 for n in self.documents or (self.tokens,))

    @classmethod
    def of_video(
        cls, size: ModelSize, frames: int, *, text_tokens: int, targets: int, micro_batches: int = 1
    ) -> Load:
        """Return the load of one video with text around it.

        Args:
            size: Its tower says how many tokens a frame has.
            frames: Frames.
            text_tokens: Further tokens: prompt and answer.
            targets: Tokens with a loss.
            micro_batches: Such rows a step.

        Raises:
            PlanError: If there are frames and no tower.
        """
        if frames and size.tower is None:
            raise PlanError(f"{size.name} has no vision tower; plan it with tokens alone")
        media = 0 if size.tower is None else frames * size.tower.tokens
        return cls(
            tokens=media + text_tokens, frames=frames, targets=targets, micro_batches=micro_batches
        )


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Which parts have gradients.

    Attributes:
        tower: Whether the tower is tuned.
        projector: Whether the projector is.
        text: Whether the language model's weights are.
        adapter_parameters: Parameters of adapters in the language model.
        text_parameters: Parameters of the language model that are tuned where not all are
            (embeddings and norms beside an adapter).
    """

    tower: bool = True
    projector: bool = True
    text: bool = True
    adapter_parameters: int = 0
    text_parameters: int = 0

    @property
    def through_text(self) -> bool:
        """Whether gradients pass through the text layers."""
        return self.text or self.projector or self.tower or self.adapter_parameters > 0

    def parameters(self, size: ModelSize) -> int:
        """Return the number of tuned parameters."""
        total = self.adapter_parameters + self.text_parameters
        if self.text:
            total += size.text.parameters
        if size.tower is not None:
            total += self.tower * size.tower.parameters
            total += self.projector * size.tower.projector_parameters
        return total


@dataclass(frozen=True, kw_only=True)
class Operations:
    """Operations over all ranks, by part.

    Attributes:
        forward: In the forward pass.
        backward: In the backward pass, without what runs again.
        recompute: What runs again.
    """

    forward: Mapping[str, float] = field(default_factory=dict)
    backward: Mapping[str, float] = field(default_factory=dict)
    recompute: Mapping[str, float] = field(default_factory=dict)

    @property
    def needed(self) -> float:
        """Operations that a step needs: forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def total(self) -> float:
        """Operations that run."""
        return self.needed + sum(self.recompute.values())


def forward_operations(size: ModelSize, load: Load, *, head_rows: int) -> dict[str, float]:
    """Count a forward pass by part; see the module's text.

    Args:
        size: The model.
        load: One row.
        head_rows: Rows that reach the head.
    """
    text, tower = size.text, size.tower
    counts = dict.fromkeys(PARTS, 0.0)
    if tower is not None and load.frames:
        patches = load.frames * tower.patches
        counts["tower"] = 2.0 * tower.matrices * patches
        seen = tower.together * tower.patches
        counts["tower"] += 4.0 * tower.layers * tower.width * seen * patches
        counts["projector"] = 2.0 * tower.projector_matrices * load.frames * tower.projector_rows
    counts["text_matrices"] = 2.0 * text.layers * text.layer_matrices * load.tokens
    counts["attention"] = 4.0 * text.layers * text.heads * text.head_dim * load.pairs
    counts["head"] = 2.0 * text.embedding_parameters * head_rows
    return counts


def training_operations(
    size: ModelSize,
    load: Load,
    *,
    tuned: Tuned | None = None,
    checkpointing: bool,
    keep_attention: bool,
    tiled_mlp: bool = False,
    plain_layers: int = 0,
) -> Operations:
    """Count one training step of one data-parallel group, all its micro-batches together.

    Args:
        size: The model.
        load: What a micro-batch holds.
        tuned: Which parts have gradients; all if None.
        checkpointing: Whether layers and frames run again in backward.
        keep_attention: Whether attention does not.
        tiled_mlp: Whether the MLP runs in tiles.
        plain_layers: Layers that do not run again though others do.

    Returns:
        Operations over all ranks of the group.
    """
    tuned = tuned or Tuned()
    one = forward_operations(size, load, head_rows=load.targets)
    rows = load.micro_batches
    forward = {part: rows * count for part, count in one.items()}
    # Gradients of inputs and of weights: as many operations as forward each.
    weight = {
        "tower": 2.0 * tuned.tower,
        "projector": float(tuned.projector) + float(tuned.tower),
        "text_matrices": float(tuned.through_text) + float(tuned.text),
        "attention": ATTENTION_BACKWARD * tuned.through_text,
        "head": float(tuned.through_text) + float(tuned.text),
    }
    backward = {part: weight[part] * count for part, count in forward.items()}
    recompute = dict.fromkeys(PARTS, 0.0)
    layers = size.text.layers
    again = max(layers - plain_layers, 0) / layers if checkpointing else 0.0
    mlp = size.text.mlp_matrices / size.text.layer_matrices
    # Where a layer, or a tile, runs again nobody wants its result: the last product is left out.
    last = mlp / 3
    if tuned.through_text:
        recompute["text_matrices"] = again * (1 - last) * forward["text_matrices"]
        if not keep_attention:
            recompute["attention"] = again * forward["attention"]
        if tiled_mlp:
            # Tiles run again in any layer; a checkpointed layer's second run ends before them.
            recompute["text_matrices"] += (1 - again) * (mlp - last) * forward["text_matrices"]
    if checkpointing:
        if tuned.tower:
            recompute["tower"] = forward["tower"]
        if tuned.tower or tuned.projector:
            recompute["projector"] = forward["projector"]
    return Operations(forward=forward, backward=backward, recompute=recompute)
