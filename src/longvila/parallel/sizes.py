"""The plain numbers of a model, read from the model or from its configuration.

Parameters are counted one by one, on a model that may live on the meta device (no memory, a second
for any size); widths and depths come from the configurations. What comes out
(`longvila.memory.sizes.ModelSize`) is all that the planner knows of a model.

Frames of families whose pictures have any resolution are taken to be of a size that the caller
gives. Vision attention in windows is counted as if it were full: an upper bound.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from longvila.memory.sizes import ModelSize, PlanError, TextSize, TowerSize, preset
from longvila.model.vila.layout import is_vila
from longvila.parallel.families import Family, base_model, find_family
from longvila.parallel.families.base import patches_per_tile

#: Side of a frame in pixels where the model takes any.
FRAME_SIDE = 448


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _matrices(module: nn.Module) -> dict[int, int]:
    """Weights of each linear layer and convolution, by the identity of their tensor."""
    return {
        id(each.weight): each.weight.numel()
        for each in module.modules()
        if isinstance(each, nn.Linear | nn.Conv2d | nn.Conv3d)
    }


def size_of(model: nn.Module, *, frame_side: int = FRAME_SIDE) -> ModelSize:
    """Return the size of a model.

    Args:
        model: A model of a known family, sharded or not, on any device; or PEFT around one, whose
            adapters are not counted.
        frame_side: Pixels along a side of a frame, where the model takes any.

    Raises:
        TypeError: If the model is of no known family.
        PlanError: If its layers differ, as in a mixture of experts.
    """
    base = base_model(model)
    family = find_family(base)
    text = _text_size(base, family)
    tower = _tower_size(base, family, frame_side) if family.vision_modules(base) else None
    return ModelSize(name=str(base.config.model_type), text=text, tower=tower)


def _without_adapters(module: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in module.named_parameters() if ".lora_" not in name]


def _text_size(base: PreTrainedModel, family: Family) -> TextSize:
    config: Any = family.text_model(base).config
    layers = list(family.layers(base))
    sizes = {_count(_without_adapters(layer)) for layer in layers}
    if len(sizes) != 1 or getattr(config, "num_experts", None):
        raise PlanError(
            f"layers of {type(base).__name__} have {sorted(sizes)} parameters; a plan needs dense "
            "layers of one size"
        )
    linear = {
        name: each.weight.numel()
        for name, each in layers[0].named_modules()
        if isinstance(each, nn.Linear) and ".lora_" not in name
    }
    head: Any = base.get_output_embeddings()
    table: Any = base.get_input_embeddings()
    tied = head.weight is table.weight
    outside = {id(p) for p in family.media_parameters(base)} | {id(head.weight), id(table.weight)}
    outside |= {id(p) for layer in layers for p in layer.parameters()}
    other = [p for p in base.parameters() if id(p) not in outside]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    names = {name.rsplit(".", 1)[-1] for name, _ in layers[0].named_modules()}
    return TextSize(
        layers=len(layers),
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=head.weight.shape[0],
        layer_parameters=sizes.pop(),
        layer_matrices=sum(linear.values()),
        mlp_matrices=sum(n for name, n in linear.items() if "mlp" in name),
        other_parameters=_count(other),
        tied=tied,
        qk_norm="q_norm" in names,
    )


def _tower_size(base: PreTrainedModel, family: Family, frame_side: int) -> TowerSize:
    config: Any = base.config
    vision: Any = config.vision_config
    modules = family.vision_modules(base)
    # The projector of some families is a part of the tower's module.
    projector = family.projector_parameters(base)
    shared = {id(p) for p in projector}
    tower = [p for p in modules[0].parameters() if id(p) not in shared]
    matrices = {key: n for module in modules for key, n in _matrices(module).items()}
    projector_matrices = sum(n for key, n in matrices.items() if key in shared)
    width = vision.hidden_size
    merge = getattr(vision, "spatial_merge_size", None)
    if merge is not None and hasattr(vision, "temporal_patch_size"):
        side = frame_side // vision.patch_size // merge * merge
        # A step of the tower takes several frames together.
        every = vision.temporal_patch_size
        patches, rows = side * side // every, side * side // merge**2 // every
        pixels, joined, layers = 3 * (side * vision.patch_size) ** 2, merge**2 * width, vision.depth
        per_call = family.media[-1].frames_per_call(config)
        calls = None if per_call is None else max(per_call // max(patches, 1), 1)
        separators, projected = 0, None
    else:
        every = 1
        layers = getattr(config, "num_vision_layers", None) or vision.num_hidden_layers
        patches = patches_per_tile(vision)
        size = vision.image_size
        height, across = (size, size) if isinstance(size, int) else size
        pixels, calls = 3 * height * across, family.media[-1].frames_per_call(config)
        rows = _rows_of_a_frame(config, family)
        separators = 1 if getattr(config, "frame_separator", "") else 0
        linear = [each for part in modules[1:] for each in part.modules()]
        joined = next((e.in_features for e in linear if isinstance(e, nn.Linear)), width)
        projected = getattr(config, "tokens_per_frame", None)  # ours, pooled behind
        features = getattr(config, "vision_feature_layer", -1)
        read = len(features) if isinstance(features, list | tuple) else 1
        if projected is None and joined == read * width:  # it reads patches one by one
            projected = patches
    heads: int = getattr(vision, "num_attention_heads", None) or vision.num_heads
    return TowerSize(
        layers=layers,
        width=width,
        mlp_width=vision.intermediate_size,
        heads=heads,
        patches=patches,
        pixels=pixels,
        matrices=sum(n for key, n in matrices.items() if key not in shared),
        parameters=_count(tower),
        rows=rows,
        separators=separators,
        together=every,
        projected=projected,
        joined_width=joined,
        projector_matrices=projector_matrices,
        projector_parameters=_count(projector),
        frames_per_call=calls,
        adjustable=hasattr(config, "vision_batch_size"),
    )


def _rows_of_a_frame(config: Any, family: Family) -> int:
    """Rows of one frame among many, by what the family itself says of eight."""
    kind = next((each for each in family.media if each.name == "video"), family.media[0])
    frames = math.lcm(*(int(size[0]) for size in getattr(config, "pool_sizes", None) or [[1]])) * 8
    units = kind.units(config, [frames])
    return max(sum(units.rows) // sum(units.frames), 1)


def load_size(name: str, *, frame_side: int = FRAME_SIDE) -> ModelSize:
    """Return the size of a model by its folder, or of a preset.

    Args:
        name: Folder of a checkpoint, ours or in the original's layout, or a preset's name.
        frame_side: As for `size_of`.

    Raises:
        PlanError: If there is neither.
    """
    folder = Path(name)
    original = is_vila(folder)
    if not original and not (folder / "config.json").is_file():
        return preset(name)
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    import longvila.model.auto as auto

    auto.load_models()
    config: Any
    if original:
        from longvila.model.vila.plan import plan_conversion  # reads headers, no weights

        config = plan_conversion(folder).config
    else:
        config = AutoConfig.from_pretrained(folder)
    media = hasattr(config, "vision_config")
    kind: Any = AutoModelForImageTextToText if media else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    return replace(size_of(model, frame_side=frame_side), name=folder.name or str(folder))
