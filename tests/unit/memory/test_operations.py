"""Operations by part equal those that torch's own counter sees, and add up by hand."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from longvila.memory.operations import Load, Tuned, forward_operations, training_operations
from longvila.memory.sizes import ModelSize, PlanError, TextSize, preset
from longvila.parallel.sizes import size_of
from longvila.testing.tiny import tiny_inputs, tiny_labels, tiny_model


def test_matrices_equal_what_torch_counts() -> None:
    model = tiny_model().train()
    # Eager attention is two plain products over the whole square, in tower and text alike.
    model.set_attn_implementation("eager")
    inputs = tiny_inputs(model.config, videos=(3,))
    labels = tiny_labels(model.config, inputs)
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(**inputs, labels=labels).loss
    forward = counter.get_total_flops()
    with counter:
        loss.backward()
    backward = counter.get_total_flops()
    size = size_of(model)
    tokens = inputs["input_ids"].shape[1]
    load = Load(tokens=tokens, frames=3)
    counts = forward_operations(size, load, head_rows=tokens)
    text = size.text
    square = 4.0 * text.layers * text.heads * text.head_dim * tokens**2
    planned = sum(counts.values()) - counts["attention"] + square
    # A convolution counts its bias as nothing; rotary angles are a product of 2 * D / 2 a token.
    assert forward == pytest.approx(planned, rel=0.002)
    # Twice the forward, but for the patch embedding, whose pixels have no gradient.
    assert backward == pytest.approx(2 * planned, rel=0.02)


def test_causal_attention_by_hand() -> None:
    text = TextSize.gated(
        layers=2, width=8, mlp_width=16, heads=2, kv_heads=1, vocabulary=10, head_dim=4
    )
    size = ModelSize(name="t", text=text)
    whole, packed = Load(tokens=6), Load(tokens=6, documents=(4, 2))
    assert (whole.pairs, packed.pairs) == (21, 13)
    counts = training_operations(size, packed, checkpointing=True, keep_attention=False)
    assert counts.forward["attention"] == 2 * 4 * 2 * 4 * 13
    assert counts.backward["attention"] == 2.5 * counts.forward["attention"]
    assert counts.recompute["attention"] == counts.forward["attention"]
    # All of a layer's products but the last: q, k, v; the output; the MLP's three.
    share = 1 - 16 * 8 / (8 * 16 + 8 * 8 + 3 * 8 * 16)
    assert counts.recompute["text_matrices"] == pytest.approx(
        share * counts.forward["text_matrices"]
    )


def test_what_runs_again() -> None:
    size, load = preset("7B"), Load(tokens=4096, frames=8, targets=100)
    kept = training_operations(size, load, checkpointing=True, keep_attention=True)
    assert kept.recompute["attention"] == 0
    assert kept.recompute["tower"] == kept.forward["tower"] > 0
    none = training_operations(size, load, checkpointing=False, keep_attention=True)
    assert none.total == none.needed == kept.needed
    half = training_operations(size, load, checkpointing=True, keep_attention=True, plain_layers=14)
    assert half.recompute["text_matrices"] == pytest.approx(kept.recompute["text_matrices"] / 2)
    # Tiles take the place of a second run, or are one where there is none.
    tiled = training_operations(size, load, checkpointing=True, keep_attention=True, tiled_mlp=True)
    assert tiled.recompute == kept.recompute
    alone = training_operations(
        size, load, checkpointing=False, keep_attention=True, tiled_mlp=True
    )
    share = 2 / 3 * size.text.mlp_matrices / size.text.layer_matrices
    assert alone.recompute["text_matrices"] == pytest.approx(share * alone.forward["text_matrices"])


def test_frozen_parts_cost_no_weight_gradients() -> None:
    size, load = preset("7B"), Load(tokens=4096, frames=8, targets=100, micro_batches=3)
    projector = Tuned(tower=False, projector=True, text=False)
    counts = training_operations(
        size, load, tuned=projector, checkpointing=True, keep_attention=True
    )
    one = forward_operations(size, load, head_rows=100)
    assert counts.forward["head"] == 3 * one["head"]
    assert counts.backward["tower"] == 0 and counts.recompute["tower"] == 0
    assert counts.backward["projector"] == counts.forward["projector"]
    assert counts.backward["text_matrices"] == counts.forward["text_matrices"]
    assert projector.parameters(size) == 29376512
    nothing = Tuned(tower=False, projector=False, text=False)
    counts = training_operations(size, load, tuned=nothing, checkpointing=True, keep_attention=True)
    assert sum(counts.backward.values()) + sum(counts.recompute.values()) == 0


def test_loads() -> None:
    size = preset("7B")
    load = Load.of_video(size, 2048, text_tokens=512, targets=256)
    assert load.tokens == 2048 * 197 + 512
    text = ModelSize(name="text", text=size.text)
    with pytest.raises(PlanError, match="no vision tower"):
        Load.of_video(text, 1, text_tokens=1, targets=1)
    with pytest.raises(PlanError, match="at most one target"):
        Load(tokens=4, targets=5)
    with pytest.raises(PlanError, match="add up to 3 tokens, the row has 4"):
        Load(tokens=4, documents=(1, 2))
    with pytest.raises(PlanError, match="at least one micro-batch"):
        Load(tokens=4, micro_batches=0)
