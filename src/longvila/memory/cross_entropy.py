"""Language-model head and cross-entropy in tiles, over the rows that have a target.

In video fine-tuning almost every token is a picture or a prompt, and the logits of a row without a
target are never looked at. At a vocabulary of 150 K they are also the largest tensor of a step.

1. Rows without a target are dropped before the head.
2. The remaining rows go through in tiles: a tile's logits are made, turned into its loss and, in
   the same place, into the gradient of the loss in the logits; two more products add the
   gradients of hidden and weight. The logits of a tile never meet those of another.
3. The backward pass multiplies the stored gradients by the incoming scalar.

Products take the inputs' dtype (bf16) and accumulate in float32; softmax, loss and the sum of the
weight's gradient over tiles are float32 (float64 for float64 inputs).

Cost: exactly the three products of an untiled head, on fewer rows; nothing is recomputed. The
weight's gradient is held in float32 from forward to backward; a frozen weight has none.

What it does not do: average (the caller divides by a token count that only it knows), shift
labels, soften or reweight targets, second derivatives.

Dimensions: T tokens, N tokens with a target, M model dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tile_rows: int,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    target_rows: Tensor | None = None,
) -> Tensor:
    """Return the sum of the cross-entropy over all rows that have a target.

    Args:
        hidden: ``(T, M)`` final hidden states; their dtype is that of the products.
        weight: ``(V, M)`` of the head; cast to hidden's dtype where it differs.
        targets: ``(T,)`` int64 below V, already shifted, ``ignore_index`` where there is none.
        tile_rows: Rows whose logits exist at a time.
        ignore_index: Marks rows without a target.
        bias: ``(V,)`` of the head, or None.
        target_rows: Indices of the rows with a target on hidden's device, if the caller has them;
            without, a call on a GPU waits for it once.

    Returns:
        Scalar, float32 (float64 for float64 inputs); 0 with zero gradients if no row has a target.

    Raises:
        ValueError: If shapes do not belong together or ``tile_rows`` is not positive.
        TypeError: If targets are not int64, or hidden is not floating-point.

    Memory:
        ``tile_rows * V * (8 + itemsize)`` for a tile; ``N * M * itemsize`` for the gradient of
        hidden and ``V * M * 4`` for that of the weight, until the backward pass.
    """
    _check(hidden, weight, targets, bias, tile_rows)
    if target_rows is None:
        target_rows = (targets != ignore_index).nonzero().flatten()
    # It chooses types itself: narrow factors, wide sums.
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, target_rows, tile_rows
        )
    return loss


class _TiledCrossEntropy(torch.autograd.Function):
    """Loss and gradients in one pass over the tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        tile_rows: int,
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(hidden.dtype)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if wants_hidden else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None
        loss = hidden.new_zeros((), dtype=wide)
        for tile in rows.split(tile_rows) if rows.shape[0] else ():
            x, target = hidden[tile], targets[tile].unsqueeze(1)
            logits = _product(x, head.T, wide)
            if bias is not None:
                logits += bias
            logits = logits.log_softmax(1)  # one kernel; the logits themselves are gone
            loss -= logits.gather(1, target).sum()
            if not any((wants_hidden, wants_weight, wants_bias)):
                del logits
                continue
            # softmax minus one-hot, in the memory of its logarithm
            logits.exp_()
            logits.scatter_add_(1, target, logits.new_full((), -1.0).expand_as(target))
            if d_bias is not None:
                d_bias += logits.sum(0)
            d_logits = logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[tile] = d_logits @ head
            if wants_weight:
                if d_weight is None:
                    d_weight = _product(d_logits.T, x, wide)
                else:
                    _add_product(d_weight, d_logits.T, x)
            # Before the next tile's exist: they are the largest tensors of a step.
            del logits, d_logits
        if wants_weight and d_weight is None:
            d_weight = torch.zeros_like(weight, dtype=wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None
            if grad is None
            else torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype))
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a @ b``, accumulated and kept in the wider dtype."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)  # tensor cores, result not rounded to bf16
    return a.to(dtype) @ b.to(dtype)


#: Rows of the weight's gradient added at a time, so that a product of its size needs no copy.
_GRADIENT_ROWS = 16384


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to a wider total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    parts = zip(total.split(_GRADIENT_ROWS), a.split(_GRADIENT_ROWS), strict=True)
    for part, rows in parts:
        part += _product(rows, b, total.dtype)


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, tile_rows: int
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (T, M) and weight (V, M) with one M, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; flatten the batch first"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets must be ({hidden.shape[0]},), one a row of hidden, got {tuple(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if not hidden.dtype.is_floating_point:
        raise TypeError(f"hidden must be floating, got {hidden.dtype}")
    if tile_rows < 1:
        raise ValueError(f"tile_rows must be at least 1, got {tile_rows}")
