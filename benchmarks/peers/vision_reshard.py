"""How other systems bring encoded frames to the ranks that own their tokens.

Each function takes this rank's encoded rows, (n, M) in the order of the media, and returns the
rows of the tokens this rank holds, differentiable as the system it stands for makes it.

- `all_reduce_reshard`: LongVILA's. The rows go into a zero buffer of the *whole* sequence, the
  buffer is summed over ranks in place, and each rank slices its part. The in-place sum is not an
  autograd operation: backward reaches only those rows that a rank both encoded and kept.
- `all_reduce_with_gradients`: the same movement with the gradients it should have: backward puts
  the rows' gradients into a zero buffer of the whole sequence, sums it, and takes the rank's own.
- `all_gather_reshard`: NeMo Automodel's way. A differentiable all-gather of all rows on every
  rank, then the slice; backward sums the gradients of all ranks and keeps the rank's own.

Source: LongVILA ``llava_arch.py`` (``repack_multimodal_data``), without its barriers, length
gathers and host reads, so that only the data movement is compared. Written out here anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_reshard(
    rows: Tensor, counts: list[int], rank: int, wanted: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Sum a zero-padded whole buffer over ranks, then take the wanted rows.

    Args:
        rows: (n, M), this rank's.
        counts: Rows of every rank.
        rank: This rank.
        wanted: Numbers of the rows (over all media) this rank's tokens need.
        group: The ranks.
    """
    start = sum(counts[:rank])
    buffer = rows.new_zeros((sum(counts), rows.shape[1]))
    buffer[start : start + counts[rank]] = rows
    dist.all_reduce(buffer, group=group)
    return buffer.index_select(0, wanted)


class _ReduceRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        counts: list[int],
        rank: int,
        wanted: Tensor,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.save_for_backward(wanted)
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        return all_reduce_reshard(rows, counts, rank, wanted, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (wanted,) = ctx.saved_tensors
        whole = grads[0].new_zeros((sum(ctx.counts), grads[0].shape[1]))
        whole[wanted] = grads[0]
        dist.all_reduce(whole, group=ctx.group)
        start = sum(ctx.counts[: ctx.rank])
        return whole[start : start + ctx.counts[ctx.rank]], None, None, None, None


def all_reduce_with_gradients(
    rows: Tensor, counts: list[int], rank: int, wanted: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """As `all_reduce_reshard`, with right gradients; arguments as above."""
    return _ReduceRows.apply(rows, counts, rank, wanted, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: list[int], rank: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        longest = max(counts)
        padded = torch.nn.functional.pad(rows, (0, 0, 0, longest - counts[rank]))
        gathered = rows.new_empty((longest * len(counts), rows.shape[1]))
        dist.all_gather_into_tensor(gathered, padded.contiguous(), group=group)
        if min(counts) == longest:
            return gathered
        parts = gathered.split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        start = sum(ctx.counts[: ctx.rank])
        return grad[start : start + ctx.counts[ctx.rank]], None, None, None


def all_gather_reshard(
    rows: Tensor, counts: list[int], rank: int, wanted: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Gather all rows everywhere, then take the wanted ones; arguments as above."""
    return _GatherRows.apply(rows, counts, rank, group).index_select(0, wanted)
