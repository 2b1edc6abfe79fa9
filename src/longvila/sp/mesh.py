"""Which ranks work on which part: data parallel x ring x Ulysses, and over which links they talk.

Ranks are numbered so that Ulysses neighbours are neighbours in the machine::

    rank = (dp_rank * ring_size + ring_rank) * ulysses_size + ulysses_rank

    16 ranks, 8 a node, sp 16 = ring 4 x ulysses 4      u = one Ulysses group, columns are rings
    node 0   [u u u u] [u u u u]        ring ranks 0 1
    node 1   [u u u u] [u u u u]        ring ranks 2 3

:func:`plan_mesh` decides sizes from integers alone; :func:`build_mesh` adds the torch
``DeviceMesh`` and its process groups. The default, when nothing but the degree is given:

1. Ulysses moves every head of every token, so it stays inside a node: its degree divides both the
   sequence-parallel degree and the ranks of a node.
2. Of those degrees the largest is taken that keeps the query heads balanced (the busiest rank has
   at most ``1 / MIN_HEAD_BALANCE`` of the mean), or, where the length is given, leaves ranks idle
   for less than a ring costs. Heads that do not divide are legal, only slower.
3. The rest is the ring axis, which moves only K and V. Inside a node all blocks are fetched at once
   (``gather``: fewest kernel calls); across nodes one block is fetched while another is computed
   (``p2p``: two blocks of memory).

Every choice can be overruled. What it does not do: measure links; it knows only nodes.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longvila.sp.layout import LayoutKind

RingType = Literal["ring_varlen", "zigzag_ring_varlen", "gather"]
KVExchange = Literal["p2p", "gather"]

#: Mean over maximum of query heads a rank, below which a Ulysses degree is not chosen by default.
MIN_HEAD_BALANCE = 0.95
#: What a ring inside a node costs a rank in a layer, forward and backward, in the operations that
#: its kernel does meanwhile: about 2.5 ms of an H200, at 32K tokens as at 128K.
RING_OPERATIONS = 1.5e12

_LAYOUT_OF: dict[str, LayoutKind] = {
    "ring_varlen": "contiguous",
    "zigzag_ring_varlen": "zigzag",
    "gather": "zigzag",
}


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """Sizes of the axes and why; no process group.

    Attributes:
        dp_size: Data-parallel degree.
        ring_size: Ranks that share a sequence.
        ulysses_size: Ranks that share the heads of one ring rank's sequence.
        ranks_per_node: Ranks joined by fast links.
        layout_kind: How the ring deals tokens.
        kv_exchange: ``gather`` fetches the K and V of all ring ranks at once, ``p2p`` one rank's at
            a time.
        reasons: One sentence a decision.
    """

    dp_size: int = 1
    ring_size: int = 1
    ulysses_size: int = 1
    ranks_per_node: int = 1
    layout_kind: LayoutKind = "zigzag"
    kv_exchange: KVExchange = "gather"
    reasons: tuple[str, ...] = ()

    @property
    def sp_size(self) -> int:
        """Sequence-parallel degree."""
        return self.ring_size * self.ulysses_size

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_size * self.sp_size

    def axis_groups(self, axis: Literal["dp", "ring", "ulysses"]) -> Iterator[tuple[int, ...]]:
        """Yield the ranks of every group along one axis."""
        size, stride = {
            "dp": (self.dp_size, self.sp_size),
            "ring": (self.ring_size, self.ulysses_size),
            "ulysses": (self.ulysses_size, 1),
        }[axis]
        for first in range(self.world_size):
            if first // stride % size == 0:
                yield tuple(first + i * stride for i in range(size))

    def crosses_nodes(self, axis: Literal["dp", "ring", "ulysses"]) -> bool:
        """Return whether some group along an axis has ranks in more than one node."""
        return any(
            len({rank // self.ranks_per_node for rank in group}) > 1
            for group in self.axis_groups(axis)
        )

    def explain(self) -> str:
        """Return the mesh, the links each axis crosses and the reasons, as text of a few lines."""
        lines = [
            f"{self.world_size} ranks = dp {self.dp_size} x ring {self.ring_size} x ulysses "
            f"{self.ulysses_size}, {self.ranks_per_node} a node"
        ]
        moves = {
            "ulysses": "moves q, k, v and out of every token, twice a layer and direction",
            "ring": f"moves k and v, {self.kv_exchange}, {self.layout_kind} layout",
            "dp": "moves gradients once a step",
        }
        for axis in ("ulysses", "ring", "dp"):
            size = {"dp": self.dp_size, "ring": self.ring_size, "ulysses": self.ulysses_size}[axis]
            if size == 1:
                link = "off"
            elif self.crosses_nodes(axis):  # type: ignore[arg-type]
                link = f"crosses nodes; {moves[axis]}"
            else:
                link = f"inside a node; {moves[axis]}"
            lines.append(f"  {axis:<8}{size:>4}  {link}")
        return "\n".join(lines + [f"  - {reason}" for reason in self.reasons])


def head_balance(num_heads: int, ulysses_size: int) -> float:
    """Return mean over maximum of query heads a rank: 1 if they divide evenly."""
    return num_heads / (ulysses_size * -(-num_heads // ulysses_size))


def idle_operations(num_tokens: int, width: int, balance: float, sp_size: int) -> float:
    """Return what the busiest rank's attention does more than the mean, in a layer.

    Args:
        num_tokens: Tokens of a row, taken as one causal document.
        width: Query heads times head dim.
        balance: As of `head_balance`.
        sp_size: Ranks that share the row.

    Returns:
        Operations, forward (2 S² M) and backward (5 S² M).
    """
    return 7.0 * num_tokens**2 * width / sp_size * (1 / balance - 1)


def plan_mesh(
    world_size: int,
    seq_parallel_size: int = -1,
    ring_size: int = -1,
    *,
    ulysses_size: int = -1,
    ring_type: RingType = "zigzag_ring_varlen",
    kv_exchange: KVExchange | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    num_tokens: int | None = None,
    head_dim: int = 128,
    ranks_per_node: int | None = None,
) -> MeshPlan:
    """Return the sizes of the mesh; host-only.

    Args:
        world_size: Number of ranks.
        seq_parallel_size: Ranks that share a sample; -1 or 1 for none.
        ring_size: Ring degree; -1 to choose.
        ulysses_size: Ulysses degree; -1 to choose.
        ring_type: ``ring_varlen`` (contiguous), ``zigzag_ring_varlen``, or ``gather`` (zigzag, K
            and V fetched at once wherever the ranks are).
        kv_exchange: Overrules how K and V travel; None for what the links suggest.
        num_heads: Query heads of the model, if known.
        num_kv_heads: Its kv heads, if known.
        num_tokens: Tokens of a row, if known: where it is short, heads that do not divide cost
            less than a ring.
        head_dim: Width of a head.
        ranks_per_node: Ranks joined by fast links; None for all.

    Raises:
        ValueError: If the sizes do not multiply up; the message names both numbers.
    """
    if ring_type not in get_args(RingType):
        raise ValueError(f"unknown ring_type {ring_type!r}; known: {', '.join(get_args(RingType))}")
    if kv_exchange is not None and kv_exchange not in get_args(KVExchange):
        raise ValueError(
            f"unknown kv_exchange {kv_exchange!r}; known: {', '.join(get_args(KVExchange))}"
        )
    numbers = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "num_tokens": num_tokens}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if num_heads is not None and num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} kv heads")
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    sp = 1 if seq_parallel_size == -1 else seq_parallel_size
    if sp < 1:
        raise ValueError(f"seq_parallel_size must be -1 or at least 1, got {seq_parallel_size}")
    if world_size % sp:
        raise ValueError(
            f"seq_parallel_size {sp} does not divide the world size {world_size}: every rank must "
            "belong to one sequence-parallel group"
        )
    node = world_size if ranks_per_node is None else ranks_per_node
    if node < 1:
        raise ValueError(f"ranks_per_node must be at least 1, got {node}")
    reasons: list[str] = []

    def idle(degree: int) -> float:
        if num_tokens is None or num_heads is None:
            return math.inf
        balance = head_balance(num_heads, degree)
        return idle_operations(num_tokens, num_heads * head_dim, balance, sp)

    ring, ulysses = _factors(sp, ring_size, ulysses_size, node, num_heads, idle, reasons)
    plan = MeshPlan(
        dp_size=world_size // sp,
        ring_size=ring,
        ulysses_size=ulysses,
        ranks_per_node=node,
        layout_kind=_LAYOUT_OF[ring_type],
    )
    exchange: KVExchange
    if kv_exchange is not None:
        exchange, why = kv_exchange, "as asked"
    elif ring_type == "gather":
        exchange, why = "gather", "as ring_type asks"
    elif plan.crosses_nodes("ring"):
        exchange, why = "p2p", "the ring crosses nodes: fetch one block while computing another"
    else:
        exchange, why = "gather", "the ring stays inside a node: fetch all blocks at once"
    if ring > 1:
        reasons.append(f"k and v travel by {exchange}: {why}")
    if ulysses > 1 and num_kv_heads is not None and num_kv_heads < ulysses:
        reasons.append(
            f"{num_kv_heads} kv heads on {ulysses} ulysses ranks: a kv head goes to each rank "
            "whose query heads read it"
        )
    if num_heads is not None and num_heads < ulysses:
        reasons.append(f"{ulysses - num_heads} ulysses ranks have no heads and idle in attention")
    if plan.crosses_nodes("ulysses"):
        reasons.append("ulysses crosses nodes, which is slow: consider a smaller ulysses degree")
    return replace(plan, kv_exchange=exchange, reasons=tuple(reasons))


def _factors(
    sp: int,
    ring: int,
    ulysses: int,
    node: int,
    heads: int | None,
    idle: Callable[[int], float],
    reasons: list[str],
) -> tuple[int, int]:
    """Split the sequence-parallel degree into ring x ulysses."""
    for name, size in (("ring_size", ring), ("ulysses_size", ulysses)):
        if size != -1 and size < 1:
            raise ValueError(f"{name} must be -1 or at least 1, got {size}")
        if size != -1 and sp % size:
            raise ValueError(f"{name} {size} does not divide seq_parallel_size {sp}")
    if ring != -1 and ulysses != -1 and ring * ulysses != sp:
        raise ValueError(
            f"ring_size {ring} x ulysses_size {ulysses} is {ring * ulysses}, but "
            f"seq_parallel_size is {sp}"
        )
    if ring != -1 or ulysses != -1:
        ring = sp // ulysses if ring == -1 else ring
        if sp > 1:
            reasons.append(f"ring {ring} x ulysses {sp // ring} as asked")
        return ring, sp // ring
    if sp == 1:
        return 1, 1
    near = [u for u in range(1, sp + 1) if sp % u == 0 and node % u == 0]
    if heads is None:
        best = max(near)
        reasons.append(f"ulysses {best}: the largest degree inside a node (heads unknown)")
        return sp // best, best
    even = [u for u in near if u == 1 or head_balance(heads, u) >= MIN_HEAD_BALANCE]
    best = max({*even, *(u for u in near if idle(u) < RING_OPERATIONS)})
    why = f"that keeps {heads} heads balanced ({head_balance(heads, best):.0%})"
    if best not in even:
        why = f"at which {heads} heads idle for less than a ring would cost in so short a row"
    reasons.append(f"ulysses {best}: the largest degree inside a node {why}")
    if best < max(near):
        reasons.append(
            f"ulysses {max(near)} would balance them to {head_balance(heads, max(near)):.0%}"
        )
    return sp // best, best


@dataclass(frozen=True, kw_only=True, eq=False)
class SPMesh:
    """A planned mesh with its process groups, and where this rank stands in it.

    Compared and hashed by identity. Without ``torch.distributed`` initialised it is a mesh of one
    rank, whose groups are None.

    Attributes:
        plan: Sizes and reasons.
        device_mesh: Axes ``dp``, ``ring``, ``ulysses``.
        sp_mesh: ``ring`` and ``ulysses`` flattened, axis ``sp``.
        dp_sp_mesh: All axes flattened, axis ``dp_sp``: what parameters are sharded over.
        rank: Global rank.
    """

    plan: MeshPlan = field(default_factory=MeshPlan)
    device_mesh: DeviceMesh | None = None
    sp_mesh: DeviceMesh | None = None
    dp_sp_mesh: DeviceMesh | None = None
    rank: int = 0

    @property
    def dp_size(self) -> int:
        """Data-parallel degree."""
        return self.plan.dp_size

    @property
    def ring_size(self) -> int:
        """Ring degree."""
        return self.plan.ring_size

    @property
    def ulysses_size(self) -> int:
        """Ulysses degree."""
        return self.plan.ulysses_size

    @property
    def sp_size(self) -> int:
        """Sequence-parallel degree, ring times Ulysses."""
        return self.plan.sp_size

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.plan.world_size

    @property
    def dp_rank(self) -> int:
        """Which samples this rank works on."""
        return self.rank // self.sp_size

    @property
    def sp_rank(self) -> int:
        """Rank within the sequence-parallel group."""
        return self.rank % self.sp_size

    @property
    def ring_rank(self) -> int:
        """Coordinate on the ring axis."""
        return self.sp_rank // self.ulysses_size

    @property
    def ulysses_rank(self) -> int:
        """Coordinate on the Ulysses axis."""
        return self.sp_rank % self.ulysses_size

    @property
    def dp_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same part of different samples."""
        return None if self.device_mesh is None else self.device_mesh.get_group("dp")

    @property
    def ring_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold different tokens for the same heads."""
        return None if self.device_mesh is None else self.device_mesh.get_group("ring")

    @property
    def ulysses_group(self) -> dist.ProcessGroup | None:
        """Ranks that exchange tokens for heads."""
        return None if self.device_mesh is None else self.device_mesh.get_group("ulysses")

    @property
    def sp_group(self) -> dist.ProcessGroup | None:
        """Ranks that share a sample, in the order of ``sp_rank``."""
        return None if self.sp_mesh is None else self.sp_mesh.get_group()

    @property
    def dp_sp_group(self) -> dist.ProcessGroup | None:
        """All ranks."""
        return None if self.dp_sp_mesh is None else self.dp_sp_mesh.get_group()

    def explain(self) -> str:
        """Return the mesh, the links each axis crosses and the reasons, as text of a few lines."""
        return self.plan.explain()

    def describe_rank(self) -> str:
        """Return this rank's coordinates, for error messages."""
        return (
            f"rank {self.rank} (dp {self.dp_rank}, ring {self.ring_rank}, ulysses "
            f"{self.ulysses_rank})"
        )


def _ranks_per_node(world_size: int, device_type: str) -> int:
    # torchrun's word first: with one process a GPU it is also right when some GPUs are hidden.
    launched = os.environ.get("LOCAL_WORLD_SIZE")
    if launched is not None:
        return int(launched)
    if device_type != "cuda":
        return world_size
    # A rank of Slurm may see its own GPU alone, or more GPUs than its node has ranks.
    hosts = _everyones(socket.gethostname(), device_type)
    return math.gcd(*(len(list(ranks)) for _, ranks in groupby(hosts)))


def _everyones(value: Any, device_type: str) -> list[Any]:
    if device_type == "cuda" and not torch.cuda.is_initialized():
        # NCCL takes objects through the current GPU; DeviceMesh would choose one later, like this.
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        torch.cuda.set_device(local % torch.cuda.device_count())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _check_same(plan: MeshPlan, device_type: str) -> None:
    """Refuse ranks that planned different meshes: they would wait for each other for ever."""
    plans = _everyones(plan, device_type)
    for rank, theirs in enumerate(plans):
        if theirs != plans[0]:
            raise ValueError(
                f"ranks planned different meshes.\nrank 0: {plans[0].explain()}\n"
                f"rank {rank}: {theirs.explain()}\nGive build_mesh the same arguments on every "
                "rank; ranks_per_node too, where nodes differ"
            )


def build_mesh(
    seq_parallel_size: int = -1,
    ring_size: int = -1,
    ring_type: RingType = "zigzag_ring_varlen",
    *,
    ulysses_size: int = -1,
    kv_exchange: KVExchange | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    num_tokens: int | None = None,
    head_dim: int = 128,
    ranks_per_node: int | None = None,
    device_type: str | None = None,
) -> SPMesh:
    """Return the mesh of this job; every rank must call it with the same arguments.

    Args:
        seq_parallel_size: Ranks that share a sample; -1 or 1 for none.
        ring_size: Ring degree; -1 to choose.
        ring_type: See :func:`plan_mesh`, as for the other arguments.
        ulysses_size: Ulysses degree; -1 to choose.
        kv_exchange: Overrules how K and V travel.
        num_heads: Query heads of the model, if known.
        num_kv_heads: Its kv heads, if known.
        num_tokens: Tokens of a row, if known.
        head_dim: Width of a head.
        ranks_per_node: Ranks joined by fast links; None for what torchrun says, or on GPUs the
            names of the ranks' hosts.
        device_type: ``cuda`` or ``cpu``; None for what the process group suggests.

    Raises:
        ValueError: If the sizes do not multiply up, or ranks come to different meshes.
        RuntimeError: If a degree above one is asked for before ``torch.distributed`` runs.

    Comm: One or two all-gathers of objects; creates the process groups; on NCCL one all-reduce of
        one element on each axis, since the first point-to-point batch of a communicator must
        otherwise have all ranks in it.
    """
    distributed = dist.is_initialized()
    if seq_parallel_size > 1 and not distributed:
        raise RuntimeError(
            f"seq_parallel_size {seq_parallel_size} needs torch.distributed: launch with "
            "torchrun and call torch.distributed.init_process_group first"
        )
    world_size = dist.get_world_size() if distributed else 1
    if device_type is None:
        device_type = "cuda" if distributed and "nccl" in dist.get_backend() else "cpu"
    if ranks_per_node is None:
        ranks_per_node = _ranks_per_node(world_size, device_type) if distributed else 1
    plan = plan_mesh(
        world_size,
        seq_parallel_size,
        ring_size,
        ulysses_size=ulysses_size,
        ring_type=ring_type,
        kv_exchange=kv_exchange,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_tokens=num_tokens,
        head_dim=head_dim,
        ranks_per_node=ranks_per_node,
    )
    if not distributed:
        return SPMesh(plan=plan)
    _check_same(plan, device_type)
    device_mesh = init_device_mesh(
        device_type,
        (plan.dp_size, plan.ring_size, plan.ulysses_size),
        mesh_dim_names=("dp", "ring", "ulysses"),
    )
    mesh = SPMesh(
        plan=plan,
        device_mesh=device_mesh,
        sp_mesh=device_mesh["ring", "ulysses"]._flatten("sp"),
        dp_sp_mesh=device_mesh._flatten("dp_sp"),
        rank=dist.get_rank(),
    )
    if device_type == "cuda":
        ready = torch.zeros(1, device="cuda")
        for group in (mesh.ring_group, mesh.ulysses_group):
            dist.all_reduce(ready, group=group)
    return mesh
