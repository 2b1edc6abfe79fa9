"""A new model out of a language model, a vision tower and a fresh projector.

1. The two parts are loaded as whatever ``AutoModel`` makes of them; a tower inside a two-part
   encoder (SigLIP, CLIP) is taken out of it.
2. Another picture size resizes the tower's table of positions by bicubic interpolation.
3. The media tokens join the tokenizer. No embedding rows are added: placeholders are never
   looked up.
4. Weights are moved into a `LongVILAForConditionalGeneration` whose projector is drawn from a seed:
   the same arguments give the same file. This is where stage 1 of the recipe starts.

Cost: both parts in memory twice for a moment. Not done: training anything.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from longvila.errors import CheckpointError
from longvila.model.configuration_longvila import LongVILAConfig, downsample_factor
from longvila.model.dinov2 import resize_positions
from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
from longvila.model.processing_longvila import LongVILAProcessor, add_media_tokens


def load_tower(source: str | Path, image_size: int | None) -> PreTrainedModel:
    """Load a vision tower, resized to a picture size.

    Args:
        source: A folder or a hub id.
        image_size: Side of the pictures in pixels; the tower's own if None.

    Returns:
        The tower, in float32.

    Raises:
        ValueError: If the size is no multiple of the patch.
        CheckpointError: If it is no vision tower, or has no table of positions to resize.
    """
    config = AutoConfig.from_pretrained(source)
    vision_config = getattr(config, "vision_config", config)
    needed = ("image_size", "patch_size", "num_hidden_layers", "hidden_size")
    if not all(hasattr(vision_config, name) for name in needed):
        raise CheckpointError(
            f"{source} is no vision tower: {config.model_type} has no {', '.join(needed)}"
        )
    tower: Any = AutoModel.from_pretrained(source, dtype=torch.float32)
    if vision_config is not config:
        if not hasattr(tower, "vision_model"):
            raise CheckpointError(
                f"{source} is no vision tower, and no pair of encoders that has one: its type is "
                f"{config.model_type!r}"
            )
        tower = tower.vision_model
    if image_size is None or image_size == vision_config.image_size:
        return tower
    patch = int(vision_config.patch_size)
    if image_size < 1 or image_size % patch:
        near = max(round(image_size / patch), 1) * patch
        raise ValueError(
            f"--image-size {image_size} is no multiple of the patch {patch}; try {near}"
        )
    vision_config.image_size = image_size
    resized: PreTrainedModel = AutoModel.from_config(vision_config, dtype=torch.float32)
    state, target = tower.state_dict(), resized.state_dict()
    for name, value in target.items():
        if name not in state or state[name].shape == value.shape:
            continue
        if "position" not in name or state[name].ndim != 2:
            raise CheckpointError(
                f"{name} is {tuple(state[name].shape)} in {source} and {tuple(value.shape)} at "
                f"{image_size} pixels; only a plain table of positions can be resized"
            )
        state[name] = resize_table(state[name], value.shape[0])
    resized.load_state_dict(state)
    return resized


def read_pixel_statistics(source: str | Path) -> dict[str, list[float]]:
    """Read the mean and deviation of the channels from a tower's folder, where it has them.

    Args:
        source: A folder or a hub id.

    Returns:
        ``image_mean`` and ``image_std``, or nothing.
    """
    file = cached_file(
        source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
    )
    if file is None:
        return {}
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    return {key: values[key] for key in ("image_mean", "image_std") if key in values}


def resize_table(table: Tensor, rows: int) -> Tensor:
    """Resize a table of positions of a square grid; a class token's row in front is kept.

    Args:
        table: Shape (P, C), or (1 + P, C) with a class token.
        rows: Rows of the new table.

    Returns:
        Shape (rows, C).
    """
    extra = 0 if math.isqrt(len(table)) ** 2 == len(table) else 1
    new = math.isqrt(rows - extra)
    return torch.cat([table[:extra], resize_positions(table[extra:][None], new)])


def _move(part: nn.Module, target: nn.Module, name: str) -> None:
    """Copy weights; the target may lack what the tower is cut of, nothing else."""
    state = part.state_dict()
    wanted = set(target.state_dict())
    missing = sorted(wanted - set(state))
    if missing:
        raise CheckpointError(f"{name} has no weights for {', '.join(missing[:5])}")
    target.load_state_dict({key: state[key] for key in wanted})


def assemble(
    llm: str | Path,
    vision: str | Path,
    *,
    projector_type: str,
    image_size: int | None = None,
    vision_feature_layer: int = -2,
    seed: int = 0,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    timestamps: bool = False,
    **options: Any,
) -> tuple[LongVILAForConditionalGeneration, LongVILAProcessor]:
    """Build a model with a fresh projector.

    Args:
        llm: Folder or hub id of a causal language model.
        vision: Folder or hub id of a vision encoder.
        projector_type: A name listed in `longvila.model.projector`.
        image_size: Side of the pictures in pixels; the tower's own if None.
        vision_feature_layer: Which hidden state of the tower is the feature.
        seed: Seed of the projector.
        image_mean: Mean of each channel that the tower was trained with; read from its folder if
            None, and 0.5 where that says nothing.
        image_std: Deviation of each channel, likewise.
        timestamps: Whether the processor writes each frame's time before it.
        **options: Further values of `LongVILAConfig`.

    Returns:
        The model, in float32 and evaluation mode, and its processor.

    Raises:
        ValueError: If no projector has this name, or a size does not fit.
        CheckpointError: If a part is not what it is to be.
    """
    downsample_factor(projector_type)
    text_config = AutoConfig.from_pretrained(llm)
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{llm} is no language model: its type is {text_config.model_type!r}")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    image_id, video_id = add_media_tokens(tokenizer)
    tower = load_tower(vision, image_size)
    language = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    config = LongVILAConfig(
        vision_config=tower.config.to_dict(),
        text_config=language.config.to_dict(),
        projector_type=projector_type,
        vision_feature_layer=vision_feature_layer,
        image_token_id=image_id,
        video_token_id=video_id,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LongVILAForConditionalGeneration(config)
    _move(tower, model.model.vision_tower, str(vision))
    _move(language.base_model, model.model.language_model, str(llm))
    if getattr(language.get_output_embeddings(), "bias", None) is not None:
        raise CheckpointError(f"{llm}: its head has a bias, which LongVILA's has no place for")
    if not config.tie_word_embeddings:
        _move(language.get_output_embeddings(), model.lm_head, str(llm))
    model.tie_weights()
    pixels: dict[str, Any] = {**read_pixel_statistics(vision)}
    if image_mean is not None:
        pixels["image_mean"] = image_mean
    if image_std is not None:
        pixels["image_std"] = image_std
    processor = LongVILAProcessor.from_config(config, tokenizer, timestamps=timestamps, **pixels)
    return model.float().eval(), processor
