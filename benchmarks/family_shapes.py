"""Shapes of the models of `family_step`, one video each, and the operations that it needs.

Shapes are those of the public configurations of Qwen2.5-VL-7B-Instruct, Qwen3-VL-8B-Instruct and
LongVILA-7B; weights are random. A sample is a prompt, one video that makes it at least as long as
asked for, and an answer, which alone has a loss. Frames have the size at which a step of the Qwen
towers (two frames) is 32 x 32 patches and 256 rows; LongVILA's are 27 x 27 patches and 196 rows.

Operations (an operation is an addition or a multiplication), forward; three times that for a step,
recomputation not counted:

    text matrices    2 * weights * tokens
    text attention   2 * H * D * tokens ** 2 a layer, causal
    head             2 * V * M * targets: what needs no logits gets none
    tower matrices   2 * weights * patches, without layers behind the one that features come from
    tower attention  4 * C * sum of squares of what attends together: a frame, or in Qwen2.5-VL's
                     windowed layers each window, those cut by the frame's edge included
    projector        2 * weights * rows: merger, and the mergers of deepstack features
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: Ids of the Qwen vocabularies.
IMAGE_ID, VIDEO_ID, START_ID, END_ID = 151655, 151656, 151652, 151653
PROMPT_TOKENS = 32
#: Tokens of a step's time in Qwen3-VL's prompts, "<12.5 seconds>".
TIME_TOKENS = 7
#: Frames that differ; a longer video repeats them.
DISTINCT = 16


@dataclass(frozen=True)
class Batch:
    """One sample: what the model's call gets, and what the operations are counted from.

    Attributes:
        inputs: Keywords of the model's forward.
        units: Patches (height, width) of each thing that a tower attends within.
        rows: Rows of all media.
        targets: Tokens with a loss.
    """

    inputs: dict[str, Tensor]
    units: list[tuple[int, int]]
    rows: int
    targets: int

    @property
    def tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]


@dataclass(frozen=True)
class Shape:
    """One family.

    Attributes:
        name: For rows.
        make: The model, unsharded, from the options.
        batch: A sample of at least so many tokens.
        layers: Names of the layers that transformers' Trainer is to wrap.
    """

    name: str
    make: Callable[[argparse.Namespace], nn.Module]
    batch: Callable[[Any, int, argparse.Namespace], Batch]
    layers: tuple[str, ...] = ()


# ---- models ------------------------------------------------------------------------------------


def _qwen2_5_vl(options: argparse.Namespace) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2**20,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
        },
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }  # fmt: skip
    if options.tiny:
        text |= _tiny_text([2, 3, 3])
        vision |= {
            "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
            "out_hidden_size": 64, "patch_size": 4, "window_size": 16,
            "fullatt_block_indexes": [2],
        }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_ids(options))
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(options: argparse.Namespace) -> nn.Module:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2**20,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
        "out_hidden_size": 4096, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    if options.tiny:
        text |= _tiny_text([4, 2, 2]) | {"head_dim": 16}
        vision |= {
            "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2,
            "out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_ids(options))
    return Qwen3VLForConditionalGeneration(config)


def _tiny_text(sections: list[int]) -> dict[str, Any]:
    return {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": sections,
        },
    }  # fmt: skip


def _ids(options: argparse.Namespace) -> dict[str, Any]:
    ids = (250, 251, 252, 253) if options.tiny else (IMAGE_ID, VIDEO_ID, START_ID, END_ID)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {**dict(zip(names, ids, strict=True)), "tie_word_embeddings": False}


def _longvila(options: argparse.Namespace) -> nn.Module:
    from transformers import Qwen2Config, SiglipVisionConfig

    from longvila.model.configuration_longvila import LongVILAConfig
    from longvila.model.modeling_longvila import LongVILAForConditionalGeneration

    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
    }  # fmt: skip
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    if options.tiny:
        vision |= {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 7,
        }  # fmt: skip
        text |= {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
        }  # fmt: skip
    config = LongVILAConfig(
        vision_config=SiglipVisionConfig(**vision),
        text_config=Qwen2Config(
            **text,
            max_position_embeddings=2**20,
            rope_theta=1e6,
            layer_types=["full_attention"] * text["num_hidden_layers"],
            tie_word_embeddings=False,
        ),
        vision_batch_size=options.frame_batch,
        image_token_id=text["vocab_size"] - 2,
        video_token_id=text["vocab_size"] - 1,
    )
    return LongVILAForConditionalGeneration(config)


# ---- samples -----------------------------------------------------------------------------------


def _sample(
    video: Tensor, inputs: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Tensor]:
    """Ids and labels around the ids of a video."""
    generator = torch.Generator().manual_seed(7)
    words = 200 if options.tiny else 150_000
    prompt = torch.randint(2, words, (PROMPT_TOKENS,), generator=generator)
    answer = torch.randint(2, words, (options.answer,), generator=generator)
    ids = torch.cat([prompt, video, answer])
    labels = torch.full_like(ids, -100)
    labels[-options.answer :] = answer
    return {"input_ids": ids[None], "labels": labels[None], **inputs}


def _repeated(number: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random pixels of some frames, the first ones again where there are many."""
    generator = torch.Generator().manual_seed(8)
    distinct = min(number, DISTINCT)
    few = torch.randn((distinct, *size), generator=generator).to(dtype)
    return few.repeat(-(-number // distinct), *(1 for _ in size))[:number]


def _qwen_batch(config: Any, tokens: int, options: argparse.Namespace, *, timed: bool) -> Batch:
    vision = config.vision_config
    side = options.grid_side
    rows = side * side // vision.spatial_merge_size**2
    per_step = rows + (TIME_TOKENS + 2 if timed else 0)
    around = PROMPT_TOKENS + options.answer + (0 if timed else 2)
    steps = -(-max(tokens - around, 1) // per_step)
    pads = torch.full((steps, rows), config.video_token_id)
    start = torch.tensor([config.vision_start_token_id])
    end = torch.tensor([config.vision_end_token_id])
    if timed:
        words = torch.arange(2, 2 + TIME_TOKENS)
        edges = torch.cat([words, start]).expand(steps, -1), end.expand(steps, 1)
        video = torch.cat([edges[0], pads, edges[1]], dim=1).flatten()
    else:
        video = torch.cat([start, pads.flatten(), end])
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = _repeated(steps, (side * side, values), getattr(torch, options.dtype)).flatten(0, 1)
    inputs = {
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[steps, side, side]]),
    }
    if not timed:
        inputs["second_per_grid_ts"] = torch.tensor([1.0])
    inputs = _sample(video, inputs, options)
    inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == config.video_token_id).long()
    return Batch(inputs, [(side, side)] * steps, steps * rows, options.answer)


def _longvila_batch(config: Any, tokens: int, options: argparse.Namespace) -> Batch:
    rows = config.tokens_per_frame
    frames = -(-max(tokens - PROMPT_TOKENS - options.answer, 1) // (rows + 1))
    video = torch.full((frames, rows + 1), config.video_token_id)
    video[:, -1] = 1
    size = (3, *config.image_size)
    inputs = {
        "pixel_values_videos": _repeated(frames, size, getattr(torch, options.dtype)),
        "video_num_frames": torch.tensor([frames]),
    }
    inputs = _sample(video.flatten(), inputs, options)
    vision = config.vision_config
    patches = vision.image_size // vision.patch_size
    return Batch(inputs, [(patches, patches)] * frames, frames * rows, options.answer)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("longvila-7b", _longvila, _longvila_batch),
        Shape(
            "qwen2.5-vl-7b",
            _qwen2_5_vl,
            lambda config, tokens, options: _qwen_batch(config, tokens, options, timed=False),
            ("Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"),
        ),
        Shape(
            "qwen3-vl-8b",
            _qwen3_vl,
            lambda config, tokens, options: _qwen_batch(config, tokens, options, timed=True),
            ("Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"),
        ),
    )
}


# ---- operations --------------------------------------------------------------------------------


def _weights(modules: Sequence[nn.Module]) -> float:
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    inside = [each for module in modules for each in module.modules() if isinstance(each, kinds)]
    return float(sum(each.weight.numel() for each in inside))


def windows(height: int, width: int, side: int) -> list[int]:
    """Patches of each window of a frame: whole ones, and what the edges leave."""

    def cut(length: int) -> list[int]:
        return [min(side, length - start) for start in range(0, length, side)]

    return [a * b for a in cut(height) for b in cut(width)]


def operations(model: Any, batch: Batch) -> dict[str, float]:
    """Operations of a step over all GPUs, by part; see the module's text.

    Args:
        model: The model, not yet sharded.
        batch: The sample.
    """
    from longvila.parallel.families import find_family

    family = find_family(model)
    text, vision = family.text_model(model).config, model.config.vision_config
    tokens, heads = batch.tokens, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    head = model.get_output_embeddings().weight.numel()
    patches = sum(height * width for height, width in batch.units)
    squares = float(sum((height * width) ** 2 for height, width in batch.units))
    if hasattr(model.model, "visual"):
        tower = model.model.visual
        projector = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
        encoder = [tower.patch_embed, *tower.blocks]
        depth = len(tower.blocks)
        full = len(getattr(vision, "fullatt_block_indexes", tower.blocks))
    else:  # it was built without the layers behind its features
        projector, encoder = [model.model.multi_modal_projector], [model.model.vision_tower]
        depth = full = model.config.num_vision_layers
    attended = full * squares
    if full < depth:
        # Windows are laid over merged patches.
        merge = vision.spatial_merge_size
        side = vision.window_size // vision.patch_size // merge * merge
        inside = {unit: sum(n * n for n in windows(*unit, side)) for unit in set(batch.units)}
        attended += (depth - full) * float(sum(inside[unit] for unit in batch.units))
    forward = {
        "text_matrices": 2.0 * _weights(list(family.layers(model))) * tokens,
        "text_attention": 2.0 * text.num_hidden_layers * heads * head_dim * float(tokens) ** 2,
        "head": 2.0 * head * batch.targets,
        "tower_matrices": 2.0 * _weights(encoder) * patches,
        "tower_attention": 4.0 * vision.hidden_size * attended,
        "projector": 2.0 * _weights(projector) * batch.rows,
    }
    return {part: 3.0 * count for part, count in forward.items()}
