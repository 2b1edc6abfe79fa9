"""Sizes read from models: every parameter is counted, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from longvila.memory.operations import Load, forward_operations
from longvila.memory.sizes import PlanError, TextSize
from longvila.parallel.families import find_family
from longvila.parallel.sizes import load_size, size_of
from longvila.testing.tiny import save_tiny, tiny_config, tiny_model
from longvila.train.parts import tune
from longvila.train.stages import Adapter, Rates


def check_whole(model: nn.Module) -> Any:
    size = size_of(model)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    return size


def test_longvila() -> None:
    model = tiny_model()
    size = check_whole(model)
    config = tiny_config()
    tower = size.tower
    assert tower.rows == config.tokens_per_frame
    assert (tower.layers, tower.patches, tower.separators) == (config.num_vision_layers, 25, 1)
    assert (tower.pixels, tower.frames_per_call) == (3 * 20 * 20, 4)
    assert tower.joined_width == 4 * 32
    text = size.text
    expected = TextSize.gated(
        layers=2, width=32, mlp_width=48, heads=4, kv_heads=2, qkv_bias=True,
        vocabulary=text.vocabulary,
    )  # fmt: skip
    assert text == expected


def test_pooled_videos_have_fewer_rows() -> None:
    pooled = size_of(tiny_model(pool_sizes=[[2, 1, 1]])).tower
    whole = size_of(tiny_model()).tower
    assert pooled is not None and whole is not None
    assert pooled.rows == whole.rows // 2


def test_a_text_model_with_a_tied_head() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, vocab_size=77, tie_word_embeddings=True,
    )  # fmt: skip
    size = check_whole(LlamaForCausalLM(config))
    assert size.tower is None and size.text.tied and size.text.head_parameters == 0


def qwen_vl(kind: str, *, device: str = "meta") -> Any:
    """A small Qwen VL."""
    import transformers

    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 2,
        "out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": 14,
    }  # fmt: skip
    if kind == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [2], "window_size": 56}
    else:
        vision |= {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text)
    with torch.device(device):
        return getattr(transformers, f"{name}ForConditionalGeneration")(config)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_vl(kind: str) -> None:
    model = qwen_vl(kind)
    assert find_family(model).name.startswith("Qwen")
    size = size_of(model, frame_side=280)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    tower = size.tower
    assert tower is not None
    # 280 pixels are 20 patches; two frames are one step, 2 x 2 patches one row
    assert (tower.patches, tower.rows) == (200, 50)
    assert size.text.qk_norm == (kind == "qwen3_vl")


def planned_and_counted(model: Any, frames: int, side: int, encode: Any) -> tuple[float, float]:
    """Operations of tower and projector by the plan, and by torch's own counter."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encode()
    load = Load(tokens=1, frames=frames)
    counts = forward_operations(size_of(model, frame_side=side), load, head_rows=0)
    return counts["tower"] + counts["projector"], counter.get_total_flops()


def test_operations_of_a_tower_that_joins_frames() -> None:
    """Mergers see a row for four patches; the patches of two frames see each other."""
    model = qwen_vl("qwen3_vl", device="cpu")
    steps, across = 3, 8
    pixels = torch.randn(steps * across**2, 3 * 2 * 14 * 14)
    grid = torch.tensor([[steps, across, across]])
    planned, counted = planned_and_counted(
        model, 2 * steps, 14 * across, lambda: model.model.get_video_features(pixels, grid)
    )
    assert planned == counted
    tower = size_of(model).tower
    assert tower is not None
    projector = sum(p.numel() for p in find_family(model).projector_parameters(model))
    assert tower.projector_parameters == projector > 0


def test_operations_of_a_projector_before_the_pooling() -> None:
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4,
        "vision_use_head": False,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 40, "vocab_size": 99,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text)
    model = LlavaOnevisionForConditionalGeneration(config)
    pixels = torch.randn(1, 3, 3, 12, 12)
    planned, counted = planned_and_counted(
        model, 3, 12, lambda: model.model.get_video_features(pixels)
    )
    assert planned == counted
    tower = size_of(model).tower
    assert tower is not None and (tower.rows, tower.projector_rows) == (4, 9)


def test_layers_of_different_sizes_are_refused() -> None:
    model = tiny_model()
    model.model.language_model.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(PlanError, match="dense layers of one size"):
        size_of(model)


def test_a_folder_or_a_preset(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    size = load_size(str(folder))
    assert size.name == "tiny"
    assert size.parameters == sum(p.numel() for p in tiny_model().parameters())
    assert load_size("7B").name == "7B"
    with pytest.raises(PlanError, match="and no folder of that name"):
        load_size(str(tmp_path / "nothing"))


def test_adapters_are_not_counted() -> None:
    pytest.importorskip("peft")
    before = size_of(tiny_model())
    model = tune(tiny_model(), Rates(language_model=1e-4), Adapter(rank=2))
    assert size_of(model) == before
