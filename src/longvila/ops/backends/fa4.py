"""FlashAttention-4 (``flash-attn-4``, CuTe DSL): the fastest kernel on Hopper and Blackwell.

The raw forward and backward of ``flash_attn.cute.interface`` are called, not its autograd
functions, so that the backward can take out and lse from outside. Layouts and lse are already
ours: ``(B, S, H, D)`` or packed ``(T, H, D)``; lse ``(B, H, S)`` or ``(H, T)``. Causal is aligned
at the bottom right; GQA is native. Kernels are compiled at first use, some seconds a combination
of head dim, group size, causal and packed; lengths do not enter.

Installed by the extra ``hopper``. A package named ``flash_attn`` without ``cute`` in it is
FlashAttention-2 and does not count.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

from torch import Tensor

from longvila.ops.backends.base import (
    AttentionSpec,
    Packing,
    half_precision_refusal,
    head_dim_refusal,
)
from longvila.ops.backends.seen import dense_backward_of_seen, dense_forward_of_seen

#: Head dims whose gradients agree with the oracle in 4.0.0b36 on an H200. At 72 dq is wrong, at 80
#: dq, dk and dv are; the forward is right at all of them.
RIGHT_BACKWARD = (64, 128)
#: How CUTLASS begins to say that a name of its own has moved.
OLDER_NAMES = r"(cutlass|warpgroup|tcgen05)\.\S+ is deprecated"


@functools.cache
def _load() -> ModuleType | str:
    """Return the interface module, or why it cannot be had."""
    # Looking for the folder first avoids importing FlashAttention-2 for nothing.
    spec = importlib.util.find_spec("flash_attn")
    folders = [] if spec is None else spec.submodule_search_locations or []
    if not any((Path(folder) / "cute").is_dir() for folder in folders):
        return "flash_attn.cute is not installed (pip install 'longvila[hopper]')"
    try:
        with warnings.catch_warnings():
            # It names things by their older names; under -W error that would end the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        return f"flash_attn.cute is installed but does not import: {error}"
    # Each compilation says of an optional argument that it was passed as it is, and uses older
    # names of CUTLASS, in generated code, too, so that no module tells them apart.
    warnings.filterwarnings("ignore", "Argument .* cannot be converted to a JitArgument")
    warnings.filterwarnings("ignore", OLDER_NAMES, DeprecationWarning)
    return module


class Fa4Backend:
    """FlashAttention-4; see the module."""

    name = "fa4"

    def refusal(self, spec: AttentionSpec) -> str | None:
        """Return None for bf16/fp16 on Hopper or newer with flash-attn-4 installed."""
        reason = half_precision_refusal(spec) or head_dim_refusal(spec, 128)
        if reason is not None:
            return reason
        if spec.capability is not None and spec.capability < (9, 0):
            return f"needs compute capability 9.0 or newer, got {spec.capability}"
        if spec.needs_backward and spec.head_dim not in RIGHT_BACKWARD:
            return (
                f"its backward was measured wrong on Hopper for head dims other than "
                f"{RIGHT_BACKWARD}, got {spec.head_dim}"
            )
        module = _load()
        return module if isinstance(module, str) else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``out, lse``."""

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse, *_ = _interface()._flash_attn_fwd(
                q,
                k,
                v,
                softmax_scale=softmax_scale,
                causal=causal,
                return_lse=True,
                **_places(packing),
            )
            return out, lse

        if packing is not None:
            return kernel(q, k, v)
        return dense_forward_of_seen(kernel, q, k, v, causal)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        softmax_scale: float,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``dq, dk, dv``."""

        def kernel(
            dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = _interface()._flash_attn_bwd(
                q,
                k,
                v,
                out.contiguous(),
                dout.contiguous(),
                lse.contiguous(),
                softmax_scale=softmax_scale,
                causal=causal,
                **_places(packing),
            )
            return dq, dk, dv

        if packing is not None:
            return kernel(dout, q, k, v, out, lse)
        return dense_backward_of_seen(kernel, dout, q, k, v, out, lse, causal)


def _interface() -> ModuleType:
    module = _load()
    if isinstance(module, str):
        raise RuntimeError(f"the fa4 back end was called although {module}")
    return module


def _places(packing: Packing | None) -> dict[str, Tensor | int]:
    if packing is None:
        return {}
    return {
        "cu_seqlens_q": packing.cu_seqlens_q,
        "cu_seqlens_k": packing.cu_seqlens_k,
        "max_seqlen_q": packing.max_seqlen_q,
        "max_seqlen_k": packing.max_seqlen_k,
    }
