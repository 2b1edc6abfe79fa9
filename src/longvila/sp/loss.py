"""One loss for the whole mesh: the sum over all ranks over the number of targets on all ranks.

Every rank holds some tokens and so some of the targets, possibly none.

1. Each rank sums the losses of its own targets (``memory.tiled_cross_entropy`` does this).
2. One all-reduce of two numbers, that sum and the rank's target count, gives both totals.
3. Every rank returns ``total_sum / total_count``: the value one process would have computed.
4. Backward is local, since each rank's parameters receive only what its own targets cause; the
   communication inside the model carries the rest. The local gradient is ``1 / count`` where the
   parameter gradients will be *summed* over ranks, and ``ranks / count`` where they will be
   *averaged* (FSDP and DDP by default).

Ranks without targets take part and contribute zero; if nobody has a target, the loss and every
gradient are zero. A token mean built from per-rank means is wrong whenever ranks hold different
numbers of targets, and NaN where a rank holds none; nothing here ever divides by a local count.

Cost: one all-reduce of 16 bytes, no host synchronisation. It does not compute the cross-entropy.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

GradientReduction = Literal["mean", "sum"]
IGNORE_INDEX = -100


class _GlobalMean(torch.autograd.Function):
    """Forward: the global mean on every rank. Backward: this rank's share of its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        local_sum: Tensor,
        local_count: Tensor,
        num_items: Tensor | None,
        group: dist.ProcessGroup | None,
        scale: float,
    ) -> Tensor:
        # float64 keeps the count exact beyond 2**24 targets and rides in the same message.
        totals = torch.stack([local_sum.detach().double(), local_count.double()])
        if group is not None:
            dist.all_reduce(totals, group=group)
        denominator = totals[1] if num_items is None else num_items.double()
        # Without any target the numerator is zero, so any positive denominator gives zero.
        inverse = 1.0 / denominator.clamp(min=1.0)
        ctx.save_for_backward(inverse)
        ctx.scale = scale
        ctx.dtype = local_sum.dtype
        return (totals[0] * inverse).to(local_sum.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inverse,) = ctx.saved_tensors
        local = (grads[0].double() * inverse * ctx.scale).to(ctx.dtype)
        return local, None, None, None, None


def count_targets(targets: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the number of targets this rank holds, as an int64 scalar on ``targets``' device.

    Args:
        targets: Shifted labels, any shape, possibly empty.
        ignore_index: The value that marks a row without a target.
    """
    return (targets != ignore_index).sum()


def check_num_items(
    num_items: float | Tensor | None, *, group: dist.ProcessGroup | None, device: torch.device
) -> None:
    """Refuse ranks that divide one sum by different numbers, as where each counts its own targets.

    Args:
        num_items: As for `global_mean`.
        group: As for `global_mean`.
        device: Where to communicate.

    Raises:
        ValueError: On every rank, with the lowest and the highest number.

    Comm: One all-reduce of 2 float64, and the host waits for it.
    """
    if group is None:
        return
    mine = -1.0 if num_items is None else float(num_items)
    ends = torch.tensor([mine, -mine], dtype=torch.float64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    highest, lowest = ends[0].item(), -ends[1].item()
    if highest != lowest:
        found = [f"{n:.0f}" if n >= 0 else "none" for n in (lowest, highest)]
        raise ValueError(
            f"num_items_in_batch must be the same on all ranks, the targets of the whole step over "
            f"all groups; got {found[0]} to {found[1]}"
        )


def global_mean(
    local_sum: Tensor,
    local_count: Tensor,
    *,
    group: dist.ProcessGroup | None,
    gradient_reduction: GradientReduction,
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Return the mean loss over all targets of all ranks, the same value on every rank.

    Args:
        local_sum: Scalar, the sum of this rank's losses. It must hang on the model's graph on
            every rank, also where it is zero: other ranks' gradients pass through this one.
        local_count: Scalar, this rank's number of targets.
        group: All ranks whose targets share the denominator (data and sequence parallel
            together); None for one process.
        gradient_reduction: How parameter gradients will be combined over ``group`` afterwards.
        num_items: Global number of targets of the optimiser step, over all its micro-batches;
            replaces the count of this call when gradients accumulate.

    Returns:
        A scalar in ``local_sum``'s dtype.

    Raises:
        ValueError: If ``gradient_reduction`` is neither "mean" nor "sum", an argument holds more
            than one number, or ``num_items`` is a negative number; a tensor is not read.

    Comm: One all-reduce of 2 float64.
    """
    if gradient_reduction not in ("mean", "sum"):
        raise ValueError(
            f'gradient_reduction must be "mean" or "sum", got {gradient_reduction!r}: it says how '
            "the parameter gradients will be combined over ranks after backward"
        )
    if local_sum.dim() or local_count.dim():
        raise ValueError(
            "local_sum and local_count must be scalars, got shapes "
            f"{tuple(local_sum.shape)} and {tuple(local_count.shape)}"
        )
    if isinstance(num_items, int | float):
        if num_items < 0:
            raise ValueError(f"num_items must not be negative, got {num_items}")
        num_items = torch.tensor(num_items, device=local_sum.device)
    elif num_items is not None:
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
        num_items = num_items.to(local_sum.device).reshape(())
    world = 1 if group is None else dist.get_world_size(group)
    scale = float(world) if gradient_reduction == "mean" else 1.0
    count = local_count.to(local_sum.device)
    return cast(Tensor, _GlobalMean.apply(local_sum, count, num_items, group, scale))
