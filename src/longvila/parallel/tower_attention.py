"""One attention call for all units of a vision tower.

Towers that take patches of any resolution attend within units (frames, or windows of them), and
transformers' models hand all units to an attention function in one packed call only where its name
says "flash"; any other is called unit by unit. A windowed tower has 64 patches a window, so a video
of 128K tokens would be a quarter of a million small calls a pass. So the tower is given a name
of ours that has the word in it and leads to `longvila.ops.attention`, packed: the same sums, in
one kernel, without a package of kernels to install.

Only a tower on transformers' default, SDPA, is changed; who chose another attention keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from longvila.ops.attention import attention
from longvila.parallel.families import Family
from longvila.parallel.hf_attention import lowered
from longvila.parallel.products import align_mlps, embed_patches_as_rows

NAME = "longvila_flash_units"


def unit_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each unit.

    Args:
        module: The attention layer that calls.
        query: ``(1, H, T, D)`` of all units.
        key: As ``query``.
        value: As ``query``.
        attention_mask: None.
        cu_seq_lens_q: ``(units + 1,)`` where units begin and end, of queries and keys alike.
        max_length_q: Patches of the longest unit.
        dropout: Must be zero.
        scaling: Softmax scale, None for ``D ** -0.5``.
        **kwargs: What else the tower passes.

    Returns:
        ``(1, T, H, D)`` outputs, and None for the weights.

    Raises:
        ValueError: If the tower asks for a mask or dropout.
    """
    if attention_mask is not None or dropout:
        raise ValueError(
            f"{type(module).__name__} asks for a mask or dropout ({dropout}) in units; set the "
            "tower's attention to 'sdpa' after parallelize"
        )
    # (1, H, T, D) -> (T, H, D), a view.
    q, k, v = (lowered(x)[0].transpose(0, 1) for x in (query, key, value))
    half = q.dtype in (torch.bfloat16, torch.float16)
    places: dict[str, Any] = {"cu_seqlens_q": cu_seq_lens_q.to(torch.int32)}
    if q.is_cuda and half:
        # Named, so that a pass without gradients and its second run take one kernel.
        places |= {"max_seqlen_q": int(max_length_q), "backend": "flash"}
    elif q.is_cuda:
        places |= {"lengths_q": cu_seq_lens_q.diff().tolist()}
    out, _ = attention(q, k, v, softmax_scale=scaling, **places)
    return out[None], None


def attend_in_units(tower: PreTrainedModel) -> Callable[[], None]:
    """Give a tower the packed attention, and return what takes it back.

    Args:
        tower: A vision tower whose attention layers pass ``cu_seq_lens_q`` to flash attention.
    """
    config: Any = tower.config
    before = config._attn_implementation
    if before != "sdpa":
        return lambda: None
    # Not set_attn_implementation, which looks for a package behind every name with "flash" in it.
    config._attn_implementation = NAME

    def undo() -> None:
        config._attn_implementation = before

    return undo


def prepare_towers(family: Family, model: PreTrainedModel) -> list[Callable[[], None]]:
    """Let the towers of a model that encodes, and is not trained, run fast; return what undoes it.

    Args:
        family: Where its towers are.
        model: The model.
    """
    undo = [change(tower) for tower in family.unit_towers(model) for change in UNIT_TOWER]
    return [*undo, align_mlps(family.vision_modules(model))]


def compile_around_units(tower: PreTrainedModel) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return modules of a tower that are worth compiling, and what of them to compile.

    Rotary embeddings and root-mean-square norms are written as six to a dozen passes over float32
    copies of what they change, which take about as long as the layer's products; gated MLPs keep
    two tensors more than their backward needs. Attention is compiled up to the call that is packed,
    and behind it. Norms of torch's own and MLPs without a gate are few passes already, and stay.

    Args:
        tower: As for `attend_in_units`; a tower that kept another attention has nothing to compile.
    """
    config: Any = tower.config
    if config._attn_implementation != NAME:
        return []
    # Kernels are launched, not traced.
    AttentionInterface.register(NAME, torch.compiler.disable(unit_attention_forward))
    found: list[tuple[nn.Module, Callable[..., Any]]] = []
    for module in tower.modules():
        name = type(module).__name__
        if name.endswith("Attention"):
            found.append((module, module.forward))
        elif name.endswith("Norm") and not type(module).__module__.startswith("torch."):
            found.append((module, _norm(module.forward)))
        elif hasattr(module, "gate_proj"):
            found.append((module, _mlp(module.forward)))
    return found


# Code of their own: the compiler keeps a limited number of graphs for a function's code, and a text
# model may have norms and MLPs of the same classes.


def _norm(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def norm(x: Tensor) -> Tensor:
        return forward(x)

    return norm


def _mlp(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def mlp(x: Tensor) -> Tensor:
        return forward(x)

    return mlp


#: What is done to a tower that attends in units; each returns what takes it back.
UNIT_TOWER = (attend_in_units, embed_patches_as_rows)

AttentionInterface.register(NAME, unit_attention_forward)
