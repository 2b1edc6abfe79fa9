"""FSDP2 in the groups that the two-stage forward needs, and what a sharded model does otherwise.

Each text layer is a group; everything else is the root group, which stays gathered from a forward
pass to its backward pass (`longvila.parallel.apply` says why). A pass without a backward one frees
it at once, ``generate`` gathers it once around all its passes, and ``save_pretrained`` wants the
gathered weights.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from longvila.sp.mesh import SPMesh

if TYPE_CHECKING:
    from longvila.parallel.apply import ParallelPlan

_GENERATING = "_longvila_generating"
#: On groups made here; whoever makes others may leave parameters out of them.
_OURS = "_longvila_sharded"


def sharded_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that are FSDP groups.

    Args:
        model: Any module.
    """
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def shard(model: nn.Module, layers: Iterable[nn.Module], mesh: SPMesh, plan: ParallelPlan) -> None:
    """Shard a model's parameters over all ranks, or within each group, in place.

    Args:
        model: The model, or PEFT around it.
        layers: Its text layers, each of which becomes a group.
        mesh: A mesh of more than one rank.
        plan: Types, and whether groups hold replicas.

    Comm: That of ``fully_shard``.
    """
    assert mesh.dp_sp_mesh is not None
    over = mesh.dp_sp_mesh
    if plan.fsdp_replicate:
        # Its own mesh: torch deprecates slicing flattened axes out of a larger one.
        sizes = (mesh.dp_size, mesh.sp_size)
        over = init_device_mesh(over.device_type, sizes, mesh_dim_names=("dp", "sp"))
    policy = MixedPrecisionPolicy(param_dtype=plan.compute_dtype, reduce_dtype=plan.reduce_dtype)
    for module in (*layers, model):
        if plan.parameter_dtype is not None:
            for parameter in module.parameters():
                if parameter.is_floating_point() and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(plan.parameter_dtype)
        reshard = module is not model and not plan.keep_gathered
        fully_shard(module, mesh=over, mp_policy=policy, reshard_after_forward=reshard)
        vars(module)[_OURS] = True
    model.register_forward_hook(_free_after_evaluation)
    if hasattr(model, "generate"):
        vars(model)["generate"] = _generate_gathered(model)
    if hasattr(model, "save_pretrained"):
        vars(model)["save_pretrained"] = _save_gathered(model)


def refuse_late_parameters(layers: Iterable[nn.Module]) -> None:
    """Refuse parameters that came into a sharded layer afterwards, as adapters do.

    Args:
        layers: Text layers, not gathered at the moment.

    Raises:
        ValueError: With the first of them; nobody would shard it or combine its gradients.
    """
    for layer in (each for each in layers if _OURS in vars(each)):
        named = dict(layer.named_parameters())
        late = [name for name, each in named.items() if not isinstance(each, DTensor)]
        if 0 < len(late) < len(named):
            raise ValueError(
                f"{late[0]} came into {type(layer).__name__} after FSDP sharded it: add adapters "
                "first (get_peft_model, then parallelize), or pass fsdp=False"
            )


def _free_after_evaluation(model: nn.Module, inputs: Any, outputs: Any) -> None:
    """Free the root group where no backward pass will.

    While it is gathered, ``parameters()`` are copies that neither freezing, averaging nor clipping
    may touch, and a later pass would not see what was written to the shards meanwhile.
    """
    if not torch.is_grad_enabled() and not vars(model).get(_GENERATING, False):
        model.reshard()  # type: ignore[operator]


def _generate_gathered(model: nn.Module) -> Callable[..., Any]:
    """Return a sharded model's ``generate`` with its root group gathered around it.

    Media are encoded before the first forward pass, and adapters go past that of the root.
    """
    original: Any = model.generate
    vars(model)["_gather"] = types.MethodType(lambda _: None, model)
    register_fsdp_forward_method(model, "_gather")

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model._gather()  # type: ignore[operator]
        vars(model)[_GENERATING] = True
        try:
            # A rank that is done goes on until all are: layers are gathered by all together.
            return original(*args, **{"synced_gpus": True, **kwargs})
        finally:
            del vars(model)[_GENERATING]
            model.reshard()  # type: ignore[operator]

    return generate


def _save_gathered(model: nn.Module) -> Callable[..., Any]:
    """Return a sharded model's ``save_pretrained``, which asks for the gathered weights.

    Of shards transformers writes none: on one rank it waits for the others, on all it fails.
    """
    original: Any = model.save_pretrained

    @functools.wraps(original)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(each, Mapping) for each in (*args, kwargs.get("state_dict"))):
            raise ValueError(
                "FSDP shards the model, and no rank has whole weights to save: on all ranks, state "
                "= torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
                "StateDictOptions(full_state_dict=True, cpu_offload=True)); then on rank 0, "
                "model.save_pretrained(folder, state_dict=state)"
            )
        return original(*args, **kwargs)

    return save_pretrained
