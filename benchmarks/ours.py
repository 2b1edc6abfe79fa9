"""This package's sequence parallelism as methods of the attention benchmark.

Placements of the parallel degree R, each over each kernel::

    ulysses          all of it to heads, exchanged at once
    ulysses_chunked  the same with the heads in two parts, one under the other's arithmetic
    ring, gather     all of it to the ring axis: K and V hop by p2p, or are gathered
    2d, 2d_gather    Ulysses among neighbours (inside a host), the ring axis across
    2d_crossed       Ulysses across hosts, the ring axis among neighbours

The public entry is what is timed: ``sp_attention`` with a context made once, as a training step
makes it once a batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks._case import Case
from benchmarks._cluster import Cluster
from benchmarks.peers._method import About, Method, Runner
from benchmarks.peers.ideal import has_flash_attn_4


@dataclass(frozen=True)
class Placement:
    """Where the parallel degree goes.

    Attributes:
        heads_over: Ranks that share the heads: all, none, neighbours, or one of each host.
        kv_exchange: How keys travel on the ring axis.
        head_chunks: Parts in which heads are exchanged.
    """

    heads_over: Literal["all", "none", "near", "far"]
    kv_exchange: Literal["p2p", "gather"]
    head_chunks: int = 1

    def ulysses(self, cluster: Cluster) -> int:
        """Ulysses degree; the ring has the rest."""
        ranks = cluster.world_size
        near = cluster.ranks_per_host if cluster.hosts > 1 else max(ranks // 2, 1)
        return {"all": ranks, "none": 1, "near": near, "far": ranks // near}[self.heads_over]


PLACEMENTS = {
    "ulysses": Placement("all", "gather"),
    "ulysses_chunked": Placement("all", "gather", head_chunks=2),
    "ring": Placement("none", "p2p"),
    "gather": Placement("none", "gather"),
    "2d": Placement("near", "p2p"),
    "2d_gather": Placement("near", "gather"),
    "2d_crossed": Placement("far", "gather"),
}


class LongVILA(Method):
    """``longvila.sp.sp_attention`` on one mesh with one kernel."""

    kind = "ours"

    def __init__(self, placement: str, backend: str) -> None:
        self.placement = PLACEMENTS[placement]
        self.backend = backend
        self.name = f"longvila_{placement}_{backend}"
        contiguous = self.placement.heads_over == "all"
        layout: Any = "contiguous" if contiguous else "zigzag"
        self.about = About(backend, layout, "longvila", shipped=True)

    def unavailable(self, case: Case, cluster: Cluster) -> str | None:
        ulysses = self.placement.ulysses(cluster)
        if self.placement.heads_over in ("near", "far") and ulysses in (1, cluster.world_size):
            return f"{cluster.world_size} ranks on {cluster.hosts} hosts have no two axes"
        if self.backend == "cpu":
            return "for the CPU only" if cluster.is_cuda else None
        if not cluster.is_cuda:
            return f"{self.backend} needs a CUDA device"
        if self.backend == "fa4" and not has_flash_attn_4():
            return "flash-attn-4 is not installed"
        return None

    def head_bound(self, case: Case, cluster: Cluster) -> float:
        ulysses = self.placement.ulysses(cluster)
        return -(-case.heads // ulysses) * ulysses / case.heads

    def setup(self, case: Case, cluster: Cluster) -> Runner:
        return _LongVILARunner(case, cluster, self)


class _LongVILARunner(Runner):
    def __init__(self, case: Case, cluster: Cluster, method: LongVILA) -> None:
        super().__init__(case, cluster)
        from longvila.sp import make_context

        self.backend = method.backend
        placement = method.placement
        mesh = make_mesh(
            placement.ulysses(cluster), placement.kv_exchange, placement.heads_over == "far",
            cluster.device.type,
        )  # fmt: skip
        self.context = make_context(mesh, [case.tokens], head_chunks=placement.head_chunks)

    def tokens(self) -> Tensor:
        return self.context.token_indices()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from longvila.sp import sp_attention

        return sp_attention(q, k, v, self.context, causal=True, backend=self.backend)


@functools.cache
def make_mesh(ulysses: int, kv_exchange: Any, crossed: bool, device_type: str) -> Any:
    """The mesh of a placement, made once, since each makes communicators.

    ``crossed`` numbers the ranks the other way round: ring neighbours are neighbours, and what
    attention needs of a mesh is all that it then has.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from longvila.sp import SPMesh, build_mesh, plan_mesh

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if not crossed:
        return build_mesh(
            ranks, ulysses_size=ulysses, kv_exchange=kv_exchange, device_type=device_type
        )
    plan = plan_mesh(ranks, ranks, ulysses_size=ulysses, kv_exchange=kv_exchange)
    order = torch.arange(ranks).view(ulysses, plan.ring_size).T.contiguous()
    mesh = SPMesh(
        plan=plan,
        device_mesh=DeviceMesh(device_type, order[None], mesh_dim_names=("dp", "ring", "ulysses")),
        rank=order.flatten().tolist().index(dist.get_rank()),
    )
    if device_type == "cuda":  # as build_mesh does: all ranks in a communicator's first call
        for group in (mesh.ring_group, mesh.ulysses_group):
            dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    return mesh


def default_placement(case: Case, cluster: Cluster) -> tuple[str, str]:
    """The placement that `build_mesh` chooses on these ranks and hosts by itself, and its plan."""
    from longvila.sp import plan_mesh

    plan = plan_mesh(
        cluster.world_size,
        cluster.world_size,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        ranks_per_node=cluster.ranks_per_host,
    )
    for name, placement in PLACEMENTS.items():
        same = placement.ulysses(cluster) == plan.ulysses_size and placement.heads_over != "far"
        if same and (plan.ring_size == 1 or placement.kv_exchange == plan.kv_exchange):
            return name, plan.explain()
    return f"ring {plan.ring_size} x ulysses {plan.ulysses_size}", plan.explain()


def our_methods() -> list[Method]:
    kernels = ("fa4", "cudnn", "flash", "cpu")
    return [LongVILA(placement, kernel) for kernel in kernels for placement in PLACEMENTS]
