"""Sizes from formulas equal the parameters of models that transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config, SiglipVisionConfig

from longvila.memory.sizes import (
    ModelSize,
    PlanError,
    TextSize,
    TowerSize,
    preset,
    preset_names,
)
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration


def build(config: LongVILAConfig) -> Any:
    with torch.device("meta"):
        return LongVILAForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("text_class", "flags", "tied"),
    [
        (Qwen2Config, {"qkv_bias": True}, False),
        (Qwen2Config, {"qkv_bias": True}, True),
        (Qwen3Config, {"qk_norm": True, "head_dim": 24}, False),
    ],
)
def test_parameters_of_a_built_model(text_class: Any, flags: dict[str, Any], tied: bool) -> None:
    head_dim = {"head_dim": flags["head_dim"]} if "head_dim" in flags else {}
    text = text_class(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=111, tie_word_embeddings=tied, **head_dim,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        image_size=70, patch_size=14,
    )  # fmt: skip
    model = build(LongVILAConfig(text_config=text, vision_config=vision))
    size = ModelSize(
        name="small",
        text=TextSize.gated(
            layers=3, width=64, mlp_width=96, heads=4, kv_heads=2, vocabulary=111, tied=tied,
            **flags,
        ),
        tower=TowerSize.siglip(
            text_width=64, layers=4, width=32, mlp_width=48, heads=2, image_size=70
        ),
    )  # fmt: skip
    assert size.parameters == sum(p.numel() for p in model.parameters())
    tower = size.tower
    assert tower is not None
    parts = model.model
    assert tower.parameters == sum(p.numel() for p in parts.vision_tower.parameters())
    assert tower.projector_parameters == sum(
        p.numel() for p in parts.multi_modal_projector.parameters()
    )
    layer = parts.language_model.layers[0]
    assert size.text.layer_parameters == sum(p.numel() for p in layer.parameters())
    assert size.text.layer_matrices == sum(
        each.weight.numel() for each in layer.modules() if isinstance(each, torch.nn.Linear)
    )
    assert tower.rows == model.config.tokens_per_frame == 9
    assert tower.patches == 25
    outside = size.parameters - 3 * size.text.layer_parameters
    assert size.root_parameters == outside


def test_the_largest_preset_that_is_cheap_to_build() -> None:
    text = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=384, patch_size=14,
    )  # fmt: skip
    model = build(LongVILAConfig(text_config=text, vision_config=vision))
    assert preset("7B").parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "text_parameters"),
    # as the model cards give them
    [("1.5B", 1.54e9), ("7B", 7.62e9), ("8B", 8.03e9), ("13B", 13.02e9), ("34B", 34.39e9)],
)
def test_presets_have_the_published_sizes(name: str, text_parameters: float) -> None:
    size = preset(name)
    assert size.text.parameters == pytest.approx(text_parameters, rel=0.003)
    assert size.tower is not None
    assert size.tower.tokens == 197


def test_names() -> None:
    assert preset("Efficient-Large-Model/qwen2-7b-longvila-1M").name == "7B"
    assert preset("LongVILA-7B-256f").tower == preset("7B-448").tower
    large = preset("7b-448").tower
    assert large is not None and large.tokens == 257
    assert set(preset_names()) >= {"1.5B", "7B", "8B", "13B", "34B"}
    with pytest.raises(PlanError, match="did you mean 7b"):
        preset("7bb")


def test_frames_per_call() -> None:
    size = preset("7B")
    fewer = size.with_frames_per_call(4)
    assert fewer.tower is not None and fewer.tower.frames_per_call == 4
    assert fewer.parameters == size.parameters
    text = ModelSize(name="text", text=size.text)
    assert text.with_frames_per_call(4) is text
