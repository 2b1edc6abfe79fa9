"""Which models the two-stage forward can drive, and where their seams are.

A `Family` (`longvila.parallel.families.base`) says, for one kind of model, where its parts live and
how its media become rows. The two-stage forward (`longvila.parallel.mmsp`) knows nothing else about
a model, and ``longvila.sp`` nothing at all. To add one, write an entry and `register_family` it;
``docs/guides/add-a-family.md`` does it from end to end.

Only families that were tested are listed: a model outside is refused by name, since nothing else
would notice that, say, a recurrent layer mixes tokens without passing through attention.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longvila.errors import ModelError
from longvila.parallel.families.base import Family, MediaKind, MediaUnits
from longvila.parallel.families.causal_lm import CAUSAL_LM
from longvila.parallel.families.internvl import INTERNVL
from longvila.parallel.families.llava_onevision import LLAVA_ONEVISION
from longvila.parallel.families.longvila import LONGVILA
from longvila.parallel.families.qwen_vl import QWEN2_5_VL, QWEN3_VL

__all__ = [
    "CAUSAL_LM",
    "FAMILIES",
    "INTERNVL",
    "LLAVA_ONEVISION",
    "LONGVILA",
    "QWEN2_5_VL",
    "QWEN3_VL",
    "Family",
    "MediaKind",
    "MediaUnits",
    "base_model",
    "family_of",
    "find_family",
    "register_family",
]

#: The known families; `register_family` adds to them.
FAMILIES: list[Family] = [
    LONGVILA,
    LLAVA_ONEVISION,
    INTERNVL,
    QWEN2_5_VL,
    QWEN3_VL,
    CAUSAL_LM,
]

#: Rotary embeddings whose angles depend on the longest position of the call, which differs
#: between ranks.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def register_family(family: Family) -> None:
    """Add a family, so that `parallelize` and `plan_media` know its models.

    Args:
        family: The entry.

    Raises:
        ValueError: If another family covers one of its model types.
    """
    taken = {name: known.name for known in FAMILIES for name in known.model_types}
    for name in family.model_types:
        if name in taken:
            raise ValueError(f"model_type {name!r} belongs to the family {taken[name]!r} already")
    FAMILIES.append(family)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside, if adapters (PEFT) stand around it.

    Raises:
        TypeError: If there is none.
    """
    inner = getattr(model, "get_base_model", None)
    found = inner() if callable(inner) else model
    if not isinstance(found, PreTrainedModel):
        raise TypeError(
            "longvila.parallel needs a transformers model (or PEFT around one), got "
            f"{type(model).__name__}; parallelize before DDP or compile wrap it"
        )
    return found


def family_of(config: Any) -> Family:
    """Return the family of a model with this configuration.

    Args:
        config: A model's configuration.

    Raises:
        ModelError: If no family covers its model type.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    parts = ["the text model and the embedding"]
    for kind in ("image", "video"):
        ids = [f"{kind}_token_id", f"{kind}_token_index"]
        if any(getattr(config, name, None) is not None for name in ids):
            parts.append(f"for each {kind} its placeholders, units, costs and encoder")
    raise ModelError(
        f"model_type {config.model_type!r} is of no known family ({known}); missing is an entry "
        f"that names {', and '.join(parts)}: write one and pass it to "
        "longvila.parallel.families.register_family"
    )


def find_family(model: PreTrainedModel) -> Family:
    """Return the family of a model, after checking that its parts are what the forward needs.

    Args:
        model: A model with a language-model head.

    Raises:
        TypeError: If the model is of no known family, or has no head; the message names what is
            missing.
        ValueError: If its configuration asks for something that sequence parallelism lacks.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    family = family_of(config)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"{type(model).__name__} needs a linear language-model head for the tiled loss, got "
            f"{type(head).__name__}; load the ...ForCausalLM or ...ForConditionalGeneration class, "
            "without an adapter on the head"
        )
    _check_text(family.text_model(model).config)
    return family


def _check_text(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"rotary embeddings of type {rope['rope_type']!r} depend on the longest position of a "
            "call, which differs between ranks; use a fixed rope_theta, linear or yarn"
        )
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layers of type {sorted(layer_types - {'full_attention', 'sliding_attention'})} mix "
            "tokens outside attention and cannot be sharded over the sequence"
        )
    if getattr(config, "attention_dropout", 0.0):
        raise ValueError(
            f"attention_dropout is {config.attention_dropout}; sequence parallelism has none: set "
            "it to 0 in the text configuration"
        )
