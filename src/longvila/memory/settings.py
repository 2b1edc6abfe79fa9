"""How a step is dealt over ranks and what is switched on, as plain numbers for a plan.

`Ranks` are the numbers of a mesh, `Settings` those of a run. Neither builds anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longvila.memory.activations import SCRATCH
from longvila.memory.sizes import PlanError

OptimizerKind = Literal["adamw", "adamw-8bit", "adamw-host"]

#: Device bytes of optimiser states a tuned parameter. 8 bit: two bytes and a float32 scale for
#: every 256 values of each moment.
STATE_BYTES: dict[str, float] = {
    "adamw": 8.0,
    "adamw-8bit": 2.0 + 2 * 4 / 256,
    "adamw-host": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How a step is dealt; the numbers of `longvila.sp.mesh.MeshPlan`.

    Attributes:
        dp: Data-parallel degree.
        ring: Ring degree.
        ulysses: Ulysses degree.
        per_node: Ranks joined by fast links.
        kv_exchange: How K and V travel on the ring.
        replicate: Whether parameters are sharded within a sequence-parallel group only.
    """

    dp: int = 1
    ring: int = 1
    ulysses: int = 1
    per_node: int = 8
    kv_exchange: Literal["p2p", "gather"] = "gather"
    replicate: bool = False

    @property
    def sp(self) -> int:
        """Sequence-parallel degree."""
        return self.ring * self.ulysses

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.sp

    @property
    def shards(self) -> int:
        """R, ranks that share a parameter."""
        return self.sp if self.replicate else self.world

    def local_tokens(self, tokens: int) -> int:
        """L of the busiest rank; rows are filled to twice the degree."""
        if self.sp == 1:
            return tokens
        filled = -(-tokens // (2 * self.sp)) * 2 * self.sp
        return filled // self.sp

    def local_frames(self, frames: int) -> int:
        """Frames of the busiest rank."""
        return -(-frames // self.sp)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is switched on.

    Attributes:
        fsdp: Whether parameters, gradients and states are sharded, and layers gathered.
        parameter_bytes: Of a value of the parameters and gradients that the optimiser sees.
        compute_bytes: Of a value that layers compute in.
        reduce_bytes: Of a gradient on its way between ranks.
        optimizer: Where and how states are kept: ``adamw-host`` keeps the moments on the host.
        checkpointing: Whether layers and frames run again in backward.
        keep_attention: Whether attention's output is kept across that.
        plain_layers: Layers, the last ones, that do not run again.
        offload_bytes: Host memory of a rank in which checkpoints, and what other layers save, wait.
        keep_last: Layers whose checkpoints never move.
        mlp_tile_rows: Rows of the MLP computed at once; None for all.
        compiled: Whether norms and MLPs of the text model go through ``torch.compile``.
        loss_tile_rows: Rows of head and loss computed at once.
        head_chunks: Parts in which attention exchanges heads.
        backend: Attention's back end.
    """

    fsdp: bool = True
    parameter_bytes: int = 4
    compute_bytes: int = 2
    reduce_bytes: int = 4
    optimizer: OptimizerKind = "adamw"
    checkpointing: bool = True
    keep_attention: bool = True
    plain_layers: int = 0
    offload_bytes: int = 0
    keep_last: int = 1
    mlp_tile_rows: int | None = None
    compiled: bool = False
    loss_tile_rows: int = 4096
    head_chunks: int = 1
    backend: str = "fa4"

    def __post_init__(self) -> None:
        if self.optimizer not in STATE_BYTES:
            raise PlanError(f"optimizer is one of {sorted(STATE_BYTES)}, got {self.optimizer!r}")
        if self.backend not in SCRATCH:
            raise PlanError(f"backend is one of {sorted(SCRATCH)}, got {self.backend!r}")
        tile = self.mlp_tile_rows
        if self.loss_tile_rows < 1 or self.head_chunks < 1 or (tile is not None and tile < 1):
            raise PlanError("tile rows and head chunks must be at least 1")
        if self.plain_layers < 0:
            raise PlanError(f"plain_layers must not be negative, got {self.plain_layers}")
        if self.offload_bytes < 0:
            raise PlanError(f"offload_bytes must not be negative, got {self.offload_bytes}")
