"""The ceiling: each device runs the kernel alone on H/R heads over the whole sequence.

No communication, and all devices busy at once, since a loaded host and shared power slow them.
Where kv heads do not split over the ranks, each device runs the query heads of one kv head, and the
time counts by the share of H/R in them.
"""

from __future__ import annotations

import importlib.util

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._case import Case
from benchmarks._cluster import Cluster
from benchmarks.peers._method import About, Method, Runner, layout_tokens

SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def has_flash_attn_4() -> bool:
    """Whether ``flash_attn.cute`` can be imported (looked up, not imported)."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


class Ideal(Method):
    """One kernel without communication."""

    kind = "ideal"

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.name = f"ideal_{kernel}"
        package = {"fa4": "flash-attn-4", "cpu": "torch"}.get(kernel, "torch")
        self.about = About(kernel, "heads", package, shipped=True)

    def unavailable(self, case: Case, cluster: Cluster) -> str | None:
        if self.kernel == "cpu":
            return "for the CPU only" if cluster.is_cuda else None
        if not cluster.is_cuda:
            return f"{self.kernel} needs a CUDA device"
        if self.kernel == "fa4" and not has_flash_attn_4():
            return "flash-attn-4 is not installed"
        return None

    def setup(self, case: Case, cluster: Cluster) -> Runner:
        return _IdealRunner(case, cluster, self.kernel)


class _IdealRunner(Runner):
    def __init__(self, case: Case, cluster: Cluster, kernel: str) -> None:
        super().__init__(case, cluster)
        self.kernel = kernel
        self.parts = (
            cluster.world_size if case.kv_heads % cluster.world_size == 0 else case.kv_heads
        )
        self.time_share = self.parts / cluster.world_size

    def tokens(self) -> Tensor:
        return layout_tokens("heads", self.case.tokens, 0, 1)

    def heads(self) -> tuple[slice, slice]:
        part = self.cluster.rank % self.parts
        q, kv = self.case.heads // self.parts, self.case.kv_heads // self.parts
        return slice(part * q, (part + 1) * q), slice(part * kv, (part + 1) * kv)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kernel == "fa4":
            from flash_attn.cute import flash_attn_func

            return flash_attn_func(q, k, v, causal=True)[0]
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        if self.kernel == "cpu":
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        else:
            with sdpa_kernel(SDPA[self.kernel]):
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, enable_gqa=True
                )
        return out.transpose(1, 2)


def ideal_methods() -> list[Method]:
    return [Ideal("fa4"), Ideal("cudnn"), Ideal("flash"), Ideal("cpu")]
