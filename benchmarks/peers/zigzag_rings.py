"""The two zigzag rings written against flash-attn 2: ring-flash-attn, and yunchang's USP.

Both run their own algorithm, unchanged, over :mod:`benchmarks.peers.flash_attn_shim`: with the
flash kernel as they would ship here, with cuDNN or flash-attn-4 to separate algorithm from kernel.

ring-flash-attn 0.1.8 does not import beside Transformers 5 because of its Hugging Face adapter,
which the ring does not use; the adapter is left out. yunchang at P ranks runs Ulysses 2 x ring P/2
where P is at least four, else Ulysses 1 x ring P.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks._case import Case
from benchmarks._cluster import Cluster
from benchmarks.peers import flash_attn_shim
from benchmarks.peers._method import About, Method, Runner, layout_tokens

MODULES = {"ring-flash-attn": "ring_flash_attn", "yunchang": "yunchang"}
SHORT = {"ring-flash-attn": "ringflash_zigzag", "yunchang": "usp_zigzag"}


class ZigzagRing(Method):
    """A package's zigzag ring over one of the shim's kernels."""

    kind = "peer"

    def __init__(self, package: str, kernel: str) -> None:
        self.package = package
        self.kernel = kernel
        self.name = f"{SHORT[package]}_{kernel}"
        self.about = About(
            kernel,
            "zigzag",
            package,
            shipped=False,
            limits="through a flash_attn shim over other kernels; tokens % (2 * ranks) == 0",
        )

    def unavailable(self, case: Case, cluster: Cluster) -> str | None:
        if importlib.util.find_spec(MODULES[self.package]) is None:
            return f"{self.package} is not installed"
        if cluster.world_size < 2:
            return "needs two ranks"
        if self.kernel == "exact" and cluster.is_cuda:
            return "for the CPU only"
        return flash_attn_shim.unavailable(self.kernel, cluster.device)

    def setup(self, case: Case, cluster: Cluster) -> Runner:
        flash_attn_shim.install()
        if self.package == "ring-flash-attn":
            return _ZigzagRunner(case, cluster, self.kernel, _ring_flash_attn())
        ulysses = 2 if cluster.world_size >= 4 and case.kv_heads % 2 == 0 else 1
        return _ZigzagRunner(case, cluster, self.kernel, _yunchang(cluster, ulysses), ulysses)


class _ZigzagRunner(Runner):
    def __init__(
        self,
        case: Case,
        cluster: Cluster,
        kernel: str,
        call: Callable[..., Tensor],
        ulysses: int = 1,
    ) -> None:
        super().__init__(case, cluster)
        self.kernel = kernel
        self.ulysses = ulysses
        self.call = call

    def tokens(self) -> Tensor:
        ring_rank, part = divmod(self.cluster.rank, self.ulysses)
        ring_size = self.cluster.world_size // self.ulysses
        tokens = layout_tokens("zigzag", self.case.tokens, ring_rank, ring_size)
        return tokens.chunk(self.ulysses)[part]

    @contextmanager
    def active(self) -> Iterator[None]:
        with flash_attn_shim.kernel(self.kernel):
            yield

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.call(q, k, v, causal=True, softmax_scale=self.case.head_dim**-0.5)


def _ring_flash_attn() -> Callable[..., Tensor]:
    if "ring_flash_attn" not in sys.modules:
        adapters = types.ModuleType("ring_flash_attn.adapters")
        adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
        sys.modules[adapters.__name__] = adapters
    from ring_flash_attn import zigzag_ring_flash_attn_func

    return zigzag_ring_flash_attn_func


def _yunchang(cluster: Cluster, ulysses: int) -> Callable[..., Tensor]:
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.globals import PROCESS_GROUP
    from yunchang.kernels import AttnType

    ring = cluster.world_size // ulysses
    if PROCESS_GROUP.RING_PG is None or (
        torch.distributed.get_world_size(PROCESS_GROUP.RING_PG) != ring
    ):
        set_seq_parallel_pg(ulysses, ring, cluster.rank, cluster.world_size)
    return LongContextAttention(ring_impl_type="zigzag", attn_type=AttnType.FA)


def zigzag_methods() -> list[Method]:
    return [
        ZigzagRing("ring-flash-attn", "flash"),
        ZigzagRing("ring-flash-attn", "cudnn"),
        ZigzagRing("ring-flash-attn", "fa4"),
        ZigzagRing("yunchang", "flash"),
        ZigzagRing("yunchang", "cudnn"),
        ZigzagRing("yunchang", "fa4"),
        ZigzagRing("ring-flash-attn", "exact"),
        ZigzagRing("yunchang", "exact"),
    ]
