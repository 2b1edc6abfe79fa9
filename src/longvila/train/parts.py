"""The parts of a model: which parameters are whose, what is tuned, and the adapter beside it.

    projector       what makes rows of features: the family says which modules these are
    vision_tower    what else serves media only
    language_model  everything else: embeddings, layers, norms, head

1. `tune` freezes what a stage gives no rate; a rate for a part that the model has not is said and
   left, as long as another part is tuned. With an adapter, only the adapter and the groups that
   it names (embeddings, norms, head) are tuned in the language model, and in the tower too if it
   has targets there; they are looked up in the model, and a name that finds nothing is an error.
2. `set_context` gives a language model its new rotary base and context.
3. `export_state` and `save_plain` write what was trained as an ordinary model, adapters folded into
   the weights beside them (`longvila.train.lora`).

It does not shard anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longvila.log import get_logger
from longvila.parallel.families import find_family
from longvila.train.lora import adapt
from longvila.train.lora import merge_adapter as merge_adapter
from longvila.train.stages import Adapter, Context, Rates, StageError

PARTS = ("vision_tower", "projector", "language_model")
_LOG = get_logger(__name__)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside, if adapters stand around it.

    Raises:
        TypeError: If it is no transformers model.
    """
    inner = getattr(model, "get_base_model", None)
    found = inner() if callable(inner) else model
    if not isinstance(found, PreTrainedModel):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}")
    return found


def named_parts(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the named parameters of each part; every parameter is in one of them.

    Args:
        model: A model of a known family, or PEFT around one.
    """
    base = base_model(model)
    family = find_family(base)
    projector = {id(p) for p in family.projector_parameters(base)}
    tower = {id(p) for p in family.media_parameters(base)} - projector
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        key = id(parameter)
        part = PARTS[0] if key in tower else PARTS[1] if key in projector else PARTS[2]
        parts[part].append((name, parameter))
    return parts


def tune(model: PreTrainedModel, rates: Rates, adapter: Adapter | None = None) -> nn.Module:
    """Freeze what has no rate, and put the adapter in place.

    Args:
        model: A model of a known family, not yet on a mesh.
        rates: Rate of each part; None freezes it.
        adapter: Low-rank adapters for the language model.

    Returns:
        The model, or PEFT around it.

    Raises:
        StageError: If nothing that a rate is given for is there, or the adapter names what is not.
    """
    parts = named_parts(model)
    wanted = [part for part in parts if getattr(rates, part) is not None]
    absent = [part for part in wanted if not parts[part]]
    if absent == wanted:
        raise StageError(
            f"rates.{', rates.'.join(absent)} tune nothing: {type(model).__name__} has no such part"
        )
    if absent:
        _LOG.info("%s has no %s; the rest is tuned", type(model).__name__, " and no ".join(absent))
    for part, parameters in parts.items():
        rate = getattr(rates, part)
        adapted = adapter is not None and (
            part == "language_model" or (part == "vision_tower" and bool(adapter.tower_targets))
        )
        tuned = rate is not None and not adapted
        for _, parameter in parameters:
            parameter.requires_grad_(tuned)
    return model if adapter is None else adapt(model, adapter)


def set_context(model: PreTrainedModel, context: Context) -> None:
    """Give a language model a rotary base and a context, in place.

    Args:
        model: A model of a known family, not yet trained on.
        context: Base and context.

    Raises:
        StageError: If positions are rescaled, the model keeps no rotary base in its config, or its
            context is longer already.
    """
    text = find_family(model).text_model(model)
    config: Any = text.config
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, Mapping) or "rope_theta" not in rope:
        raise StageError(f"{type(config).__name__} keeps no rope_theta; its context stays as it is")
    if rope.get("rope_type", "default") != "default":
        raise StageError(
            f"positions are rescaled by rope_type {rope['rope_type']!r}; a new base does not add "
            "to that. Begin from a model without scaling"
        )
    if config.max_position_embeddings > context.max_position_embeddings:
        raise StageError(
            f"the model's context is {config.max_position_embeddings} already, the stage would "
            f"make it {context.max_position_embeddings}"
        )
    changed: dict[str, Any] = {**rope, "rope_theta": context.rope_theta}
    if context.yarn_factor is not None:
        changed |= {
            "rope_type": "yarn",
            "factor": float(context.yarn_factor),
            "original_max_position_embeddings": config.max_position_embeddings,
        }
    config.rope_parameters = changed
    config.max_position_embeddings = context.max_position_embeddings
    rotary = [name for name, m in text.named_modules() if hasattr(m, "inv_freq")]
    if not rotary:
        raise StageError(f"{type(text).__name__} has no rotary embedding to give the base to")
    for name in rotary:
        owner, _, child = name.rpartition(".")
        parent = text.get_submodule(owner)
        fresh = type(getattr(parent, child))(config=config)
        setattr(parent, child, fresh.to(text.get_input_embeddings().weight.device))


def export_state(
    model: nn.Module, adapter: Adapter | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gather a model's weights, adapters merged, on rank 0.

    Args:
        model: The model, sharded or not, or PEFT around it.
        adapter: What its adapters were made with.
        dtype: Type of the floating-point tensors.

    Returns:
        Full tensors on the host under the names of the plain model; empty on other ranks.

    Comm: With FSDP, every parameter once to every rank, one at a time.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state: Mapping[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if not state:
        return {}
    if adapter is not None:
        state = merge_adapter(state, adapter)
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def save_plain(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a model without mesh and adapters, for ``from_pretrained``.

    Args:
        model: The trained model; its configuration and settings of generation are kept.
        state: From `export_state`, on rank 0.
        folder: Where to.
    """
    base = base_model(model)
    with torch.device("meta"):
        plain = type(base)(base.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    if base.generation_config is not None:
        # As it is: older releases of transformers refuse to save some of what they load.
        text = base.generation_config.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
