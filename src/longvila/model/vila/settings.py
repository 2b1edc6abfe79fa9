"""The original's settings as ours, and back; each decision that is not a plain copy has its reason.

* Frames: ``BasicVideoEncoder``/``TSPVideoEncoder`` (JSON text, dict, or absent) become pool sizes
  and the text after a frame. Start tokens, and images framed unlike videos, are refused: the
  official checkpoints have none.
* Order of tokens: before December 2024 ``mlp_downsample`` wrote the tokens of a frame column by
  column. Nothing in a checkpoint says so outright; see `decide_token_order`.
* ``fps``: ignored by the code the checkpoints were released with, so ours samples
  ``num_video_frames``.
* Several scales (``s2``, ``dynamic_s2``, ``ps3``), tiled frames and towers that are resized at load
  are refused.
* Precision, learning rates, which parts were tuned, ``chat_template`` and training paths have no
  effect on the model and are left out, as the original does.

On the way back, values that still mean what the original file meant keep its spelling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from longvila.errors import CheckpointError
from longvila.model.configuration_longvila import LongVILAConfig
from longvila.model.vila.layout import VilaCheckpoint

_ENCODERS = "llava.model.encoders."
_NOISE = frozenset(
    {
        "_name_or_path",
        "_attn_implementation_autoset",
        "architectures",
        "attn_implementation",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
    }
)
_SCALES = ("s2", "dynamic_s2", "ps3")
_ALIASES = {"mlp_downsample_fix": "mlp_downsample_2x2_fix"}
_OLD_TRANSFORMERS = "4.36."
_OLD_FAMILIES = ("vila1.5", "llama-3-longvila", "llama-3-vila")
_FEATURES = {"cls_patch": "full", "patch": "patch"}
#: Our setting, and the keys of the original's config.json that decide it.
_KEYS: dict[str, tuple[str, ...]] = {
    "vision_feature_layer": ("mm_vision_select_layer",),
    "vision_feature_select": ("mm_vision_select_feature",),
    "pool_sizes": ("video_encoder",),
    "pool_separator": ("video_encoder",),
    "frame_separator": ("image_encoder", "video_encoder"),
    "image_aspect_ratio": ("image_aspect_ratio",),
    "min_tiles": ("min_tiles",),
    "max_tiles": ("max_tiles",),
    "num_video_frames": ("num_video_frames",),
    "video_fps": ("fps",),
}


@dataclass(frozen=True)
class Settings:
    """Our settings read from the original's.

    Args:
        values: Arguments of `LongVILAConfig`, without token ids.
        notes: Decisions, for the user.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]


def decide_token_order(
    config: Mapping[str, Any], projector_type: str, folder: str, asked: str | None = None
) -> tuple[str, str]:
    """Decide in which order the projector of a checkpoint emits the tokens of a frame.

    Only ``mlp_downsample`` changed its order. It is taken to be column-major only where something
    speaks for that: files written by transformers 4.36, which the old code was bound to, or the
    name of one of the families trained with it. The absence of newer keys proves nothing.

    Args:
        config: The original's config.json.
        projector_type: Its projector.
        folder: Name of the checkpoint's folder.
        asked: What the user asked for.

    Returns:
        ``row`` or ``column``, and why.

    Raises:
        CheckpointError: If the user asked for anything else.
    """
    if asked is not None:
        if asked not in ("row", "column"):
            raise CheckpointError(f"token order must be row or column, got {asked!r}")
        return asked, "as asked"
    if projector_type != "mlp_downsample":
        return "row", f"{projector_type} always was row-major"
    version = str(config.get("transformers_version") or "")
    if version.startswith(_OLD_TRANSFORMERS):
        return "column", f"written by transformers {version}, from before the order was changed"
    if version:
        return "row", f"written by transformers {version}"
    for family in _OLD_FAMILIES:
        if family in folder.lower():
            return "column", f"the name has {family!r}, a family trained before the order changed"
    return "row", "nothing speaks for the old column-major order"


def _encoder(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    default = f"Basic{kind.capitalize()}Encoder"
    value = config.get(f"{kind}_encoder") or {"_target_": _ENCODERS + default}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{kind}_encoder is no JSON object: {value!r}") from error
    if not isinstance(value, dict) or "_target_" not in value:
        raise CheckpointError(f"{kind}_encoder has no _target_: {value!r}")
    encoder = dict(value)
    name = str(encoder.pop("_target_")).rpartition(".")[2]
    known = ("BasicVideoEncoder", "TSPVideoEncoder") if kind == "video" else (default,)
    if name not in known:
        raise CheckpointError(f"{kind}_encoder {name!r} is not known; known: {', '.join(known)}")
    allowed = {"start_tokens", "end_tokens"}
    if name.startswith("TSP"):
        allowed |= {"pool_sizes", "sep_tokens"}
    unknown = sorted(set(encoder) - allowed - {"parent"})
    if unknown:
        raise CheckpointError(f"{kind}_encoder has options that are not known: {unknown}")
    if encoder.get("start_tokens"):
        raise CheckpointError(
            f"{kind}_encoder puts {encoder['start_tokens']!r} before each frame, which LongVILA "
            "has no place for"
        )
    return encoder


def _end_tokens(encoder: Mapping[str, Any]) -> str:
    return str(encoder.get("end_tokens", "\n") or "")


def _frames(config: Mapping[str, Any]) -> dict[str, Any]:
    image, video = _encoder(config, "image"), _encoder(config, "video")
    ends = _end_tokens(image), _end_tokens(video)
    if ends[0] != ends[1]:
        raise CheckpointError(
            f"images end with {ends[0]!r} and video frames with {ends[1]!r}; LongVILA has one "
            "separator for both"
        )
    sizes = video.get("pool_sizes")
    return {
        "pool_sizes": [[int(n) for n in size] for size in sizes] if sizes else None,
        "pool_separator": str(video.get("sep_tokens") or ""),
        "frame_separator": ends[1],
    }


def read_settings(
    checkpoint: VilaCheckpoint, *, folder: str, token_order: str | None = None
) -> Settings:
    """Read our settings from a checkpoint.

    Args:
        checkpoint: The checkpoint.
        folder: Name of the folder the user gave; families are told by it.
        token_order: ``row`` or ``column`` to decide it, None to have it decided.

    Returns:
        The settings.

    Raises:
        CheckpointError: If the checkpoint needs something this model does not do.
    """
    config = checkpoint.config
    for key in _SCALES:
        if config.get(key):
            raise CheckpointError(
                f"config.json asks for {key}: towers run at several scales are not supported"
            )
    notes = list(checkpoint.notes)
    projector = checkpoint.part_config("mm_projector").get("mm_projector_type")
    if not isinstance(projector, str):
        raise CheckpointError("mm_projector/config.json has no mm_projector_type")
    projector = _ALIASES.get(projector, projector)
    order, reason = decide_token_order(config, projector, folder, token_order)
    notes.append(f"token order: {order} ({reason})")
    values = _read_values(config, notes)
    if values["image_aspect_ratio"] not in ("resize", "pad", "dynamic"):
        notes.append(
            f"image_aspect_ratio {values['image_aspect_ratio']!r} becomes 'resize', which is what "
            "the image processor does by itself"
        )
        values["image_aspect_ratio"] = "resize"
    values.update(projector_type=projector, token_order=order)
    values["text_config"] = _part_settings(checkpoint.part_config("llm"))
    tower = checkpoint.part_config("vision_tower")
    values["vision_config"] = _part_settings(tower.get("vision_config", tower))
    own, asked = values["vision_config"].get("image_size"), config.get("vision_resolution") or -1
    if asked not in (-1, own):
        raise CheckpointError(
            f"config.json asks for vision_resolution {asked}, at which the original resizes the "
            f"position table of a tower of {own} pixels when it loads; save a resized tower"
        )
    if int(config.get("video_max_tiles") or 1) > 1 and values["image_aspect_ratio"] == "dynamic":
        raise CheckpointError(
            f"config.json asks for video_max_tiles {config['video_max_tiles']}: frames of a video "
            "are not cut into tiles here; 1 takes them whole"
        )
    if "quantization_config" in values["text_config"]:
        raise CheckpointError("the language model is quantised; convert the original weights")
    return Settings(values, tuple(notes))


def _read_values(config: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    select = config.get("mm_vision_select_feature") or "cls_patch"
    if select not in _FEATURES:
        raise CheckpointError(f"mm_vision_select_feature {select!r} is not known")
    layer = config.get("mm_vision_select_layer")
    values = {
        "vision_feature_layer": -2 if layer is None else int(layer),
        "vision_feature_select": _FEATURES[select],
        "image_aspect_ratio": config.get("image_aspect_ratio") or "resize",
        "video_fps": 0.0,
        **_frames(config),
    }
    for key, default in (("min_tiles", 1), ("max_tiles", 12), ("num_video_frames", 8)):
        value = config.get(key)
        values[key] = default if value is None else int(value)
    if config.get("fps"):
        notes.append(
            f"fps {config['fps']} is ignored, as by the code the checkpoint was released with: "
            f"{values['num_video_frames']} frames are sampled"
        )
    return values


def _part_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config.get("model_type"):
        raise CheckpointError("a part's config.json has no model_type")
    return {key: value for key, value in config.items() if key not in _NOISE}


# ---- back


def write_settings(config: LongVILAConfig, origin: Mapping[str, Any] | None) -> dict[str, Any]:
    """Write our settings as the original's top-level config.json, without the three parts.

    Args:
        config: Our settings.
        origin: The config.json the model was read from, if it is known.

    Returns:
        The content.

    Raises:
        CheckpointError: If the original has no place for a setting.
    """
    fresh = _fresh(config)
    if origin is None:
        return fresh
    result = {k: v for k, v in origin.items() if k not in ("_name_or_path", "resume_path")}
    before = _read_values(origin, [])
    if before["image_aspect_ratio"] not in ("resize", "pad", "dynamic"):
        before["image_aspect_ratio"] = "resize"
    for ours, keys in _KEYS.items():
        if before[ours] != getattr(config, ours):
            result.update({key: fresh[key] for key in keys})
    order, _ = decide_token_order(result, config.projector_type, "")
    if order != config.token_order:
        result["transformers_version"] = fresh["transformers_version"]
    result["hidden_size"], result["mm_hidden_size"] = fresh["hidden_size"], fresh["mm_hidden_size"]
    return result


def _fresh(config: LongVILAConfig) -> dict[str, Any]:
    if config.frame_separator != "\n" or config.pool_sizes:
        video: dict[str, Any] = {"end_tokens": config.frame_separator or None}
    else:
        video = {}
    image = {"_target_": _ENCODERS + "BasicImageEncoder", **video}
    if config.pool_sizes:
        video["pool_sizes"] = [list(size) for size in config.pool_sizes]
        video["sep_tokens"] = config.pool_separator or None
        video["_target_"] = _ENCODERS + "TSPVideoEncoder"
    else:
        video["_target_"] = _ENCODERS + "BasicVideoEncoder"
    features = {ours: theirs for theirs, ours in _FEATURES.items()}
    column = config.token_order == "column"
    if column and config.projector_type != "mlp_downsample":
        raise CheckpointError(
            f"the original has no column-major {config.projector_type}; only mlp_downsample had one"
        )
    return {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "fps": config.video_fps,
        "hidden_size": config.text_config.hidden_size,
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_encoder": json.dumps(image),
        "video_encoder": json.dumps(video),
        "interpolate_mode": "linear",
        "max_tiles": config.max_tiles,
        "min_tiles": config.min_tiles,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": features[config.vision_feature_select],
        "mm_vision_select_layer": config.vision_feature_layer,
        "num_video_frames": config.num_video_frames,
        "s2": False,
        "dynamic_s2": False,
        "transformers_version": "4.36.2" if column else "4.46.0",
        "vision_resolution": -1,
    }


def write_part(config: Any, origin: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Write a part's configuration as transformers 4 reads it.

    Args:
        config: The part's configuration.
        origin: The config.json the part was read from, if it is known.
        dtype: Type of its weights, as ``bfloat16``.

    Returns:
        The content: that of ``origin`` where nothing was changed.
    """
    ours = _legacy(config.to_dict())
    if origin is None:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        if config.model_type.endswith("_vision_model"):
            stem = config.model_type.removesuffix("_vision_model")
            name = f"{stem.capitalize()}VisionModel".replace("Clip", "CLIP")
        return {**ours, "architectures": [name] if name else [], "torch_dtype": dtype}
    known = {k: v for k, v in origin.items() if k != "_name_or_path"}
    read = type(config)(**{k: v for k, v in origin.items() if k not in _NOISE | {"model_type"}})
    before = _legacy(read.to_dict())
    known.update({k: v for k, v in ours.items() if before.get(k) != v})
    return known


def _legacy(values: dict[str, Any]) -> dict[str, Any]:
    """Spell what transformers 5 renamed the way version 4 did, and drop what it does not know."""
    kept = {k: v for k, v in values.items() if k not in _NOISE and k != "layer_types"}
    rope = kept.pop("rope_parameters", None)
    if rope:
        kept["rope_theta"] = rope["rope_theta"]
        scaled = {k: v for k, v in rope.items() if k != "rope_theta"}
        kept["rope_scaling"] = None if scaled.get("rope_type") == "default" else scaled
    return kept
