"""Sequence-parallel attention under a name that transformers models can be told to use.

``AttentionInterface.register("longvila_sp", ...)`` adds a name; a model uses it only where its own
(text) configuration says so, so a vision tower keeps the kernel it has. Which attention a call
gets is decided by what the call carries, not by any state:

* with ``sp_context=`` among the keywords of the model call, q, k, v are one rank's tokens of a
  packed sequence, and `longvila.sp.attention.sp_attention` attends over all ranks; key-value heads
  are handed over as they are, never repeated;
* with an `AttentionStep` there, the step attends itself (`longvila.inference`, over its cache);
* without it (generation, evaluation, a call on one rank), the call goes to transformers' own SDPA
  path with the mask that transformers made for it.

Masks: under ``sp_context`` the documents are in the context, and a mask of the local tokens would
be wrong as well as quadratic. The two-stage forward passes `sentinel_mask`, which transformers
hands through untouched because it is 4-dim; anything else that arrives beside an ``sp_context`` is
refused. Without a context the name has SDPA's mask function.

A model that ignores the name would silently attend within each rank's tokens. So every call is
counted (`SPStep`), and the two-stage forward compares the count with the number of layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from longvila.sp.attention import sp_attention
from longvila.sp.context import SPContext

NAME = "longvila_sp"


def sentinel_mask(device: torch.device) -> Tensor:
    """Return the empty 4-dim mask that says: documents are in the context, build no mask."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


class SPStep:
    """A step's context, and the number of attention calls that used it.

    Not a dataclass on purpose: FSDP2 looks for tensors inside the dataclasses among a layer's
    arguments and rebuilds them, context and mesh included, in every layer.

    Args:
        context: Layout and mesh of the step.
    """

    __slots__ = ("calls", "context")

    def __init__(self, context: SPContext) -> None:
        self.context = context
        self.calls = 0


class AttentionStep(ABC):
    """A step of a model that attends in its own way; travels as ``sp_context``.

    Args:
        longest: Most tokens that a query may see, for the check against sliding windows.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.calls = 0

    @abstractmethod
    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None
    ) -> Tensor:
        """Return the attention of one layer.

        Args:
            layer: Which layer calls.
            q: ``(B, T, H, D)`` queries.
            k: ``(B, T, K, D)``, what the cache's ``update`` returned.
            v: As ``k``.
            softmax_scale: Factor on the scores; None for ``D ** -0.5``.

        Returns:
            ``(B, T, H, D)``.
        """


#: Keywords with which models ask for more than plain causal attention.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


def lowered(x: Tensor) -> Tensor:
    """Return a tensor in the type that autocast, where it is on, gives to matrix products.

    Autocast knows torch's attention, not ours; rotated queries would be wider than values.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def sp_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sp_context: SPContext | SPStep | AttentionStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend, over all ranks if the call carries an ``sp_context``.

    Args:
        module: The attention layer that calls.
        query: ``(1, H, L, D)`` local queries (``(B, H, S, D)`` without a context).
        key: ``(1, K, L, D)``; K divides H.
        value: As ``key``.
        attention_mask: `sentinel_mask` with a context, transformers' SDPA mask without.
        dropout: Attention dropout; must be zero with a context.
        scaling: Softmax scale, None for ``D ** -0.5``.
        sliding_window: Tokens a query may look back; must not be shorter than the documents.
        sp_context: This step's layout and mesh, or the step itself; all but a bare context count
            the call.
        **kwargs: What else the model passes; refused with a context where it changes the result.

    Returns:
        ``(1, L, H, D)`` outputs, and None for the weights.

    Raises:
        ValueError: If the layer asks for attention that is not plain and causal.

    Comm: With a context that of `sp_attention`, else none.
    """
    if sp_context is None:
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    # (1, H, L, D) -> (1, L, H, D), a view; sp_attention packs it for the exchange in one copy.
    q, k, v = (lowered(x).transpose(1, 2) for x in (query, key, value))
    if isinstance(sp_context, AttentionStep):
        sp_context.calls += 1
        _check_plain(module, attention_mask, dropout, sliding_window, sp_context.longest, kwargs)
        layer = module.layer_idx
        assert isinstance(layer, int)
        return sp_context.attend(layer, q, k, v, softmax_scale=scaling), None
    context = sp_context
    if isinstance(sp_context, SPStep):
        context = sp_context.context
        sp_context.calls += 1
    assert isinstance(context, SPContext)
    longest = max(context.layout.document_lengths)
    _check_plain(module, attention_mask, dropout, sliding_window, longest, kwargs)
    return sp_attention(q, k, v, context, softmax_scale=scaling), None


def _check_plain(
    module: nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    sliding_window: int | None,
    longest: int,
    kwargs: dict[str, Any],
) -> None:
    name = type(module).__name__
    if attention_mask is not None and attention_mask.numel() > 0:
        raise ValueError(
            f"{name} got a mask of shape {tuple(attention_mask.shape)} beside an sp_context; "
            "sequence-parallel attention knows documents only: give position_ids that restart"
        )
    if dropout:
        raise ValueError(
            f"{name} wants attention dropout {dropout}; it is not supported with sequence "
            "parallelism: set attention_dropout to 0 in the text configuration"
        )
    if sliding_window is not None and sliding_window < longest:
        raise ValueError(
            f"{name} attends to a window of {sliding_window} tokens, but a document has {longest}; "
            "sliding windows are not supported with sequence parallelism"
        )
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise ValueError(f"{name} is not causal; only causal attention is sequence-parallel")
    for keyword in _UNSUPPORTED:
        if kwargs.get(keyword) is not None:
            raise ValueError(f"{name} passes {keyword}, which sequence parallelism does not have")


def check_calls(calls: int, *, expected: int, implementation: str | None) -> None:
    """Raise if a forward pass did not go through sequence-parallel attention in every layer.

    Args:
        calls: Attention calls that used the step's context.
        expected: Attention layers of the text model.
        implementation: What the text configuration names now, for the message.

    Raises:
        RuntimeError: If the numbers differ.
    """
    if calls != expected:
        raise RuntimeError(
            f"{calls} of {expected} attention layers used {NAME!r} (the text configuration "
            f"says {implementation!r}); without it each rank attends to its own tokens only and "
            "the result is wrong. Was set_attn_implementation called after parallelize, or does "
            "the model bypass the attention interface?"
        )


def cut_compiled_layers_here() -> None:
    """Keep ``torch.compile`` out of attention: planning and communication are not to be traced.

    A compiled attention module becomes one graph up to the call and one behind it. Not done at
    import, because naming the compiler loads it.
    """
    AttentionInterface.register(NAME, torch.compiler.disable(sp_attention_forward))


AttentionInterface.register(NAME, sp_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
