"""Low-rank adapters in the language model (and the tower), and what is trained beside them.

LongLoRA's finding is that low-rank attention alone does not learn a longer context, but does so
when embeddings and norms are trained as well. PEFT's usual ways leave room for mistakes there: a
name that matches nothing is silent, and what is tuned without being PEFT's is not saved.

1. `adapt` puts adapters on linear layers of the language model and tunes whole groups (embeddings,
   norms, head) as themselves, not as copies: no memory for a second embedding, and a tied head
   stays tied. Names are looked up; one that finds nothing is an error.
2. `complete_adapter` adds those groups to a folder that PEFT wrote, as ``modules_to_save``: PEFT
   alone then loads all that was trained. `load_in_full` reads them back into a model of `adapt`.
3. `merge_adapter` folds adapters into the weights beside them, on plain tensors, so that sharded
   training ends with an ordinary state dict: ``W + alpha / rank * B A``, in float32.

It neither trains nor shards.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from longvila.errors import CheckpointError
from longvila.log import get_logger
from longvila.parallel.families import find_family
from longvila.train.stages import Adapter, StageError

_LOG = get_logger(__name__)
_PREFIX = "base_model.model."
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapt(model: PreTrainedModel, adapter: Adapter) -> nn.Module:
    """Put adapters on a language model and tune what shall be tuned in full beside them.

    What is trainable before, outside of the language model, stays trainable.

    Args:
        model: A model of a known family, not yet on a mesh, its language model frozen.
        adapter: What to put where.

    Returns:
        PEFT around the model.

    Raises:
        StageError: If a name finds nothing, or PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as fault:
        raise StageError(
            "the stage has an adapter, which needs peft (pip install longvila[train]); "
            "--set adapter=null trains the language model in full"
        ) from fault
    text = find_family(model).text_model(model)
    prefix = next(name for name, module in model.named_modules() if module is text)
    linear = {
        f"{prefix}.{name}" if prefix else name
        for name, module in text.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in adapter.targets
    }
    absent = set(adapter.targets) - {name.rsplit(".", 1)[-1] for name in linear}
    if absent:
        raise StageError(
            f"adapter.targets names {sorted(absent)}, which no linear layer of "
            f"{type(text).__name__} is called"
        )
    if adapter.tower_targets:
        linear |= _tower_layers(model, adapter.tower_targets)
    if adapter.folded and adapter.dropout:
        raise StageError(
            f"adapter.folded adds the update to the weight; adapter.dropout {adapter.dropout} "
            "has no input of its own there. Set adapter.dropout=0"
        )
    groups = {name: _group(model, text, name) for name in adapter.also_tune}
    outside = [p for p in model.parameters() if p.requires_grad]
    settings = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        bias="none",
        target_modules=sorted(linear),
    )
    with warnings.catch_warnings():
        # PEFT asks transformers by a name that is on its way out; nothing here can change that.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    # PEFT freezes all it finds; what is tuned in full is tuned as itself, not as a copy.
    for parameter in [*outside, *(p for group in groups.values() for p in group)]:
        parameter.requires_grad_(True)
    if adapter.folded:
        _fold(wrapped)
    for name, group in groups.items():
        _LOG.info("tuned in full: %s, %d parameters", name, sum(p.numel() for p in group))
    return wrapped


def _fold(wrapped: nn.Module) -> None:
    """Let adapted layers multiply once, by the sum of weight and update."""
    from peft.tuners.lora import Linear

    for module in wrapped.modules():
        if isinstance(module, Linear):
            # An attribute of the object goes before its class's method; nothing else of PEFT moves.
            module.forward = functools.partial(_folded_forward, module)  # type: ignore[method-assign]


def _folded_forward(module: Any, x: Tensor) -> Tensor:
    """``x (W + s B A)^T + b``; the sum is in the type that the layer computes in."""
    name = module.active_adapters[0]
    low, high = module.lora_A[name].weight, module.lora_B[name].weight
    weight = torch.addmm(module.base_layer.weight, high, low, alpha=module.scaling[name])
    return nn.functional.linear(x, weight, module.base_layer.bias)


def _tower_layers(model: PreTrainedModel, targets: Sequence[str]) -> set[str]:
    """Names of the linear layers of the vision tower that are called one of some names."""
    family = find_family(model)
    projector = {id(p) for p in family.projector_parameters(model)}
    tower = {id(p) for p in family.media_parameters(model)} - projector
    found = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and id(module.weight) in tower
        and name.rsplit(".", 1)[-1] in targets
    }
    absent = set(targets) - {name.rsplit(".", 1)[-1] for name in found}
    if absent:
        raise StageError(
            f"adapter.tower_targets names {sorted(absent)}, which no linear layer of the vision "
            "tower is called"
        )
    return found


def _group(model: PreTrainedModel, text: PreTrainedModel, name: str) -> list[nn.Parameter]:
    modules: list[nn.Module | None]
    if name == "embeddings":
        modules = [text.get_input_embeddings()]
    elif name == "head":
        modules = [model.get_output_embeddings()]
    else:
        modules = [
            module
            for module in text.modules()
            if "norm" in type(module).__name__.lower() and not list(module.children())
        ]
    found = [p for module in modules if module is not None for p in module.parameters()]
    if not found:
        raise StageError(f"adapter.also_tune names {name!r}, but the language model has none")
    return found


# ---- saved and loaded ------------------------------------------------------------------------


def tuned_in_full(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of a PEFT model that PEFT does not save itself, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and ".modules_to_save." not in name
    }


def complete_adapter(folder: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Add what was tuned in full to an adapter's folder, so that PEFT loads it too.

    Where the head is tied to tuned embeddings, PEFT is told to tie it again.

    Args:
        folder: What PEFT's ``save_pretrained`` wrote.
        model: The model of `adapt`.
        state: Full tensors by the names of the model's parameters.

    Raises:
        CheckpointError: If the folder has no adapter.
    """
    tuned = list(tuned_in_full(model))
    if not tuned:
        return
    weights, config = folder / _WEIGHTS, folder / _CONFIG
    if not weights.is_file() or not config.is_file():
        raise CheckpointError(f"{folder} has no {_WEIGHTS} and {_CONFIG} to complete")
    owners = {name.rpartition(".")[0] for name in tuned}
    # PEFT copies a module whole, so one inside another must not be listed.
    outer = {o for o in owners if not any(o.startswith(f"{other}.") for other in owners)}
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    places = {id(module): name for name, module in model.named_modules()}
    tied = head is not None and head.weight is embeddings.weight
    tied = tied and places[id(embeddings)] in outer
    written = {*outer, places[id(head)]} if tied else outer
    tensors = safetensors.torch.load_file(weights)
    for name, tensor in state.items():
        if any(name.startswith(f"{owner}.") for owner in written):
            # The format refuses one tensor under two names.
            tensors[name] = tensor.detach().cpu().clone().contiguous()
    modules = sorted(owner.removeprefix(_PREFIX) for owner in outer)
    settings = json.loads(config.read_text(encoding="utf-8"))
    if tied:
        settings["ensure_weight_tying"] = True
    settings["modules_to_save"] = sorted({*(settings.get("modules_to_save") or []), *modules})
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def load_in_full(model: nn.Module, folder: Path) -> list[str]:
    """Read what `complete_adapter` wrote back into a model of `adapt`.

    Args:
        model: The model, sharded or not.
        folder: The adapter's folder.

    Returns:
        The names of the parameters that were read.

    Raises:
        CheckpointError: If a tuned parameter is not there, or has another shape.
    """
    tuned = tuned_in_full(model)
    if not tuned:
        return []
    weights = folder / _WEIGHTS
    tensors = safetensors.torch.load_file(weights) if weights.is_file() else {}
    absent = [name for name in tuned if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} parameters that are tuned beside the adapter "
            f"({absent[0]}, ...); it was saved with another lora_also_tune, or by PEFT alone"
        )
    with torch.no_grad():
        for name, parameter in tuned.items():
            value = tensors[name]
            if value.shape != parameter.shape:
                raise CheckpointError(
                    f"{name} is {tuple(value.shape)} in {folder}, {tuple(parameter.shape)} here"
                )
            value = value.to(parameter.device, parameter.dtype)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)
    return list(tuned)


# ---- merged ----------------------------------------------------------------------------------


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter around a model, None if there is none.

    Raises:
        StageError: If it is not plain LoRA, which alone is merged here.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    config = next(iter(configs.values()))
    unlike = [
        name
        for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
        if getattr(config, name, None)
    ]
    if len(configs) > 1 or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        unlike.append(f"adapters {sorted(configs)} of type {config.peft_type}")
    if unlike:
        raise StageError(
            f"only one plain LoRA adapter is merged here, this one has {', '.join(unlike)}; save "
            "the adapter and merge it with PEFT's merge_and_unload"
        )
    return Adapter(rank=config.r, alpha=config.lora_alpha)


def merge_adapter(state: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Fold low-rank adapters into the weights of a state dict.

    Args:
        state: Full tensors under the names that PEFT gives them.
        adapter: What the adapters were made with.

    Returns:
        Full tensors under the names of the model without PEFT; merged weights in float32.

    Raises:
        CheckpointError: If an adapter stands beside no weight.
    """
    merged: dict[str, Tensor] = {}
    low: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        name = name.removeprefix(_PREFIX)
        owner, found, kind = name.partition(".lora_")
        if found:
            low.setdefault(f"{owner}.weight", {})[kind[0]] = tensor
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    for name, pair in low.items():
        if name not in merged or set(pair) != {"A", "B"}:
            raise CheckpointError(f"an adapter for {name} has {sorted(pair)} and no weight beside")
        delta = pair["B"].float() @ pair["A"].float()
        merged[name] = merged[name].float() + delta * (adapter.alpha / adapter.rank)
    return merged
