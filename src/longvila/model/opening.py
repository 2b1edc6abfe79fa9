"""A checkpoint and its processor in one call, on a device and in a precision that suit it.

The original's three-folder layout is found out by looking: the Auto classes would take its
config.json for another model's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from longvila.errors import CheckpointError
from longvila.model.vila.loading import is_vila


def open_checkpoint(
    source: str, *, device: str | torch.device, dtype: str = "auto", label: str = "checkpoint"
) -> tuple[Any, Any]:
    """Load a model in evaluation mode and its processor.

    Args:
        source: Folder or hub id.
        device: Where the model goes; no ``"auto"``.
        dtype: Precision, as torch names it; ``"auto"`` is bfloat16 on a GPU, float32 elsewhere.
        label: What the source is called in messages, for instance an option's name.

    Returns:
        The model and its processor.

    Raises:
        CheckpointError: If there is no such checkpoint, or it cannot be read.
    """
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    model_class: Any = AutoModelForImageTextToText
    processor_class: Any = AutoProcessor
    try:
        if is_vila(source):
            from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
            from longvila.model.processing_longvila import LongVILAProcessor

            model_class, processor_class = LongVILAForConditionalGeneration, LongVILAProcessor
        else:
            _check_sees(source, label)
        processor = processor_class.from_pretrained(source)
        model = model_class.from_pretrained(source, dtype=getattr(torch, dtype))
    except CheckpointError:
        raise
    except (OSError, ImportError, ValueError) as fault:
        raise CheckpointError(f"{label} {source}: {fault}") from fault
    return model.to(device).eval(), processor


def _check_sees(source: str, label: str) -> None:
    """Refuse language models, of which the Auto classes would say only that they do not know them.

    Raises:
        CheckpointError: If the model's configuration has no vision tower.
    """
    config: Any = AutoConfig.from_pretrained(source)
    if not hasattr(config, "vision_config"):
        raise CheckpointError(
            f"{label} {source}: {config.model_type} is a language model and sees no images or "
            "videos; name a model that does (LongVILA, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, "
            "InternVL)"
        )
