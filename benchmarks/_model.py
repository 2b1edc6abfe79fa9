"""The model that benchmarks measure: LongVILA-7B's shape, random weights, any part of it smaller.

Without options it is Qwen2-7B (28 layers of 3584, 28 query and 4 kv heads, an MLP of 18944) behind
SigLIP-so400m (27 layers of 1152, 384 pixels in patches of 14) and the projector ``mlp_downsample``.
A script takes the options of the parts it runs (`add_tower_options`, `add_text_options`), builds
the configuration from them (`model_config`), and draws the weights where they are used (`draw`).

    parser = argparse.ArgumentParser()
    add_tower_options(parser)
    add_text_options(parser, layers=4)
    options = parser.parse_args()
    config = model_config(options)
    model = draw(lambda: LongVILAForConditionalGeneration(config), device, options.dtype)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

#: SigLIP-so400m at 384 pixels, and Qwen2-7B, by the options' names.
TOWER = {
    "image_size": 384, "patch_size": 14, "width": 1152, "mlp_width": 4304, "vision_layers": 27,
    "vision_heads": 16,
}  # fmt: skip
TEXT = {
    "model_dim": 3584, "text_mlp": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "vocab": 152064,
}  # fmt: skip


def add_tower_options(parser: argparse.ArgumentParser, **other: int) -> None:
    """Add an option for each number of `TOWER`; ``other`` are defaults of this script's own."""
    _add(parser, TOWER | other)


def add_text_options(parser: argparse.ArgumentParser, **other: int) -> None:
    """Add an option for each number of `TEXT`; ``other`` are defaults of this script's own."""
    _add(parser, TEXT | other)


def _add(parser: argparse.ArgumentParser, defaults: dict[str, int]) -> None:
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)


def rows_per_frame(options: argparse.Namespace) -> int:
    """Tokens of a frame behind a projector that halves each side."""
    side = -(-(options.image_size // options.patch_size) // 2)
    return side * side


def tower_config(options: argparse.Namespace, **other: Any) -> Any:
    """A SigLIP configuration of the options; ``other`` are further keywords, which win."""
    from transformers import SiglipVisionConfig

    words = {
        "hidden_size": options.width,
        "intermediate_size": options.mlp_width,
        "num_hidden_layers": options.vision_layers,
        "num_attention_heads": options.vision_heads,
        "image_size": options.image_size,
        "patch_size": options.patch_size,
    }
    return SiglipVisionConfig(**words | other)


def text_config(options: argparse.Namespace, **other: Any) -> Any:
    """A Qwen2 configuration of the options; ``other`` are further keywords, which win."""
    from transformers import Qwen2Config

    layers = other.get("num_hidden_layers", options.layers)
    words = {
        "hidden_size": options.model_dim,
        "intermediate_size": options.text_mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "vocab_size": options.vocab,
        "max_position_embeddings": 2**21,
        "rope_theta": 1e9,
        "layer_types": ["full_attention"] * layers,
        "tie_word_embeddings": False,
    }
    return Qwen2Config(**words | other)


def model_config(
    options: argparse.Namespace, *, vision: Any = None, text: Any = None, **other: Any
) -> Any:
    """A LongVILA configuration; its last two vocabulary rows stand for an image and a video."""
    from longvila.model.configuration_longvila import LongVILAConfig

    text = text_config(options) if text is None else text
    words = {
        "vision_config": tower_config(options) if vision is None else vision,
        "text_config": text,
        "image_token_id": text.vocab_size - 2,
        "video_token_id": text.vocab_size - 1,
    }
    return LongVILAConfig(**words | other)


def draw(make: Callable[[], Any], device: torch.device, dtype: str) -> Any:
    """The model that ``make`` builds, drawn on the device in its type, the same on every rank."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return make()
    finally:
        torch.set_default_dtype(before)
