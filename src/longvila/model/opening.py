"""A checkpoint and its processor in one call, on a device and in a precision that suit it.

1. What the name means is found out first; see `longvila.model.source`.
2. The original's three-folder layout is found out by looking: the Auto classes would take its
   config.json for another model's.
3. Weights that a checkpoint lacks, or that have another shape than the model, are an error that
   names them; ``from_pretrained`` alone would draw the lacking ones at random and go on.

It costs one look at a folder, or one request, beside loading. Weights that the model has no place
for are left out, as ``from_pretrained`` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from longvila.errors import CheckpointError, LongVILAError
from longvila.log import get_logger
from longvila.model.source import check_source
from longvila.model.vila.layout import is_vila

_LOG = get_logger(__name__)
_SHOWN = 5


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
        CheckpointError: If there is no such checkpoint, or it cannot be read or is not whole.
    """
    if dtype == "auto":
        dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    model_class: Any = AutoModelForImageTextToText
    processor_class: Any = AutoProcessor
    what = f"{label} {source}"
    check_source(source, label=label)
    with loading(what):
        if is_vila(source):
            from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
            from longvila.model.processing_longvila import LongVILAProcessor

            model_class, processor_class = LongVILAForConditionalGeneration, LongVILAProcessor
        else:
            _check_sees(source, label)
        processor = processor_class.from_pretrained(source)
        _check_generation(Path(source) / "generation_config.json")
        model, found = model_class.from_pretrained(
            source,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that all are known; none is accepted
        )
    check_whole(found, what)
    return model.to(device).eval(), processor


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn whatever libraries make of a damaged checkpoint into one error that names it.

    Args:
        what: The checkpoint, for the message.

    Raises:
        CheckpointError: If what is done inside fails, unless for lack of memory.
    """
    try:
        yield
    except (LongVILAError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as fault:
        raise CheckpointError(
            f"{what}: a weight file is damaged or cut off ({fault}); fetch or copy it again"
        ) from fault
    except json.JSONDecodeError as fault:
        raise CheckpointError(
            f"{what}: one of its .json files is damaged or cut off ({fault}); fetch or copy it "
            "again"
        ) from fault
    except (OSError, ImportError, ValueError) as fault:
        raise CheckpointError(f"{what}: {_first_words(fault)}") from fault
    except Exception as fault:  # A wrong value in a file comes out as anything, anywhere.
        _LOG.debug("%s cannot be loaded", what, exc_info=True)
        raise CheckpointError(
            f"{what}: cannot be loaded ({type(fault).__name__}: {fault}); is one of its .json "
            "files damaged, or of another checkpoint?"
        ) from fault


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


def _check_generation(file: Path) -> None:
    """Refuse a damaged file, which ``from_pretrained`` would take for an absent one.

    Raises:
        ValueError: If it is there and holds no JSON object.
    """
    if file.is_file() and not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
        raise ValueError(f"{file} holds no JSON object")


def check_whole(found: dict[str, Any], what: str) -> None:
    """Refuse a model some of whose weights did not come from its checkpoint.

    Args:
        found: What ``from_pretrained`` returns for ``output_loading_info``.
        what: The checkpoint, for the message.

    Raises:
        CheckpointError: If weights are missing or have another shape; the message names them.
    """
    mismatched = sorted(found.get("mismatched_keys", ()))
    if mismatched:
        shown = [f"{name} {tuple(has)}, not {tuple(wants)}" for name, has, wants in mismatched]
        raise CheckpointError(
            f"{what}: {_count(shown)} another shape than config.json says: {_list(shown)}; "
            "do weights and configuration belong together?"
        )
    missing = sorted(found.get("missing_keys", ()))
    if missing:
        raise CheckpointError(
            f"{what}: {_count(missing)} no weights in the files: {_list(missing)}; is the "
            "checkpoint whole, and does config.json belong to it?"
        )


def _count(names: Sequence[str]) -> str:
    return "1 tensor has" if len(names) == 1 else f"{len(names)} tensors have"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _first_words(fault: Exception) -> str:
    """A message without the list of every configuration that transformers knows."""
    return str(fault).partition("\nModel type should be one of")[0]
