"""Apply a token-wise function in tiles of the sequence, forward and backward.

An MLP holds two or three tensors several times as wide as its input. Over a long sequence they are
the peak of a layer, and no token's row depends on another's. So:

1. Forward: run the function tile by tile without a graph; keep only the input.
2. Backward: run a tile again with a graph, take its gradients, drop it; add the parameters'
   gradients over the tiles, in float32 for narrower parameters.

With a single tile the function is simply called: same bits, no recomputation.

Inside a checkpointed layer the function would run three times, if it ran in the second pass over
the layer as well. It need not: only its input is wanted there. So the input is remembered by a node
of its own in front of the loop; where the layer's MLP comes last, that is the last tensor the
second pass is asked for, and torch's checkpoint ends the pass there, before the loop.

When a tile runs again, its result is not wanted either, only the graph that leads to it. A
projection that comes last in the function can leave its product out then, as
:func:`linear_unless_unwanted` in its place does. That is checked for every tile: a result that is
not that projection's own is computed after all.

Cost: one more forward of the function in the backward pass, checkpointed or not, less that product.
The function must be token-wise along the tiled dim and give the same result twice: no dropout, no
batch statistics.

Dimensions: T tokens along ``dim``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Function = Callable[[Tensor], Tensor]


class _Running(threading.local):
    """Of this thread: autograd runs a backward pass in threads of its own."""

    unwanted = False
    last: Tensor | None = None


_RUNNING = _Running()


def linear_unless_unwanted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``; zeros where a tile runs again for its graph alone.

    Args:
        x: ``(..., M)``.
        weight: ``(N, M)``.
        bias: ``(N,)`` or None.

    Returns:
        ``(..., N)``; its gradients are those of the product in either case.
    """
    # Autocast would cast what the function below takes as it is.
    if not _RUNNING.unwanted or torch.is_autocast_enabled(x.device.type):
        return torch.nn.functional.linear(x, weight, bias)
    result = cast(Tensor, _WithoutProduct.apply(x, weight, bias))  # type: ignore[no-untyped-call]
    _RUNNING.last = result
    return result


class _WithoutProduct(torch.autograd.Function):
    """A linear map whose result nobody reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = dy.flatten(0, -2)
        return (
            dy @ weight if wants_x else None,
            rows.T @ x.flatten(0, -2) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


def _for_its_graph(function: Function, tile: Tensor) -> Tensor:
    """Run a function of which only the graph is wanted."""
    _RUNNING.unwanted = True
    try:
        part = function(tile)
    finally:
        _RUNNING.unwanted, last = False, _RUNNING.last
        _RUNNING.last = None
    # Something came after the projection and may have read what it left out.
    return part if last is None or part is last else function(tile)


def tiled_apply(
    function: Function,
    x: Tensor,
    *,
    tile_rows: int,
    dim: int = -2,
    parameters: Iterable[Tensor] | None = None,
) -> Tensor:
    """Return ``function(x)``, computed a few rows at a time.

    Args:
        function: Maps a slice of x along ``dim`` to the same slice of the result.
        x: Any shape with T tokens along ``dim``.
        tile_rows: Tokens in a tile; the last one may be shorter.
        dim: The dimension that is cut.
        parameters: Tensors the function reads that may need a gradient. None takes
            ``function.parameters()``, for a module; a function without parameters says ``()``.

    Returns:
        What one call would return; equal to it up to the rounding of tiled products, and bit by
        bit with one tile.

    Raises:
        ValueError: If ``tile_rows`` is not positive, or a tile's result does not have the tile's
            length along ``dim``.
        TypeError: If parameters are not given and the function is not a module.

    Memory:
        The function's intermediates for ``tile_rows`` tokens in place of T; x is kept. Float32
        sums of the parameters' gradients during the backward pass.
    """
    if tile_rows < 1:
        raise ValueError(f"tile_rows must be at least 1, got {tile_rows}")
    if x.shape[dim] <= tile_rows:
        return function(x)
    if parameters is None:
        if not isinstance(function, torch.nn.Module):
            raise TypeError(
                "give the parameters of a function that is not a torch.nn.Module; their gradients "
                "would be lost otherwise"
            )
        parameters = function.parameters()
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    memory = None
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        x = _Remember.apply(x)  # type: ignore[no-untyped-call]
        memory = x.grad_fn
    result: Tensor = _TiledApply.apply(function, tile_rows, dim, memory, x, *wanted)  # type: ignore[no-untyped-call]
    return result


class _Remember(torch.autograd.Function):
    """Saves a tensor and passes it on; what comes after reads it from this node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


class _TiledApply(torch.autograd.Function):
    """The loop over tiles; parameters are inputs so that autograd delivers their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Function,
        tile_rows: int,
        dim: int,
        memory: Any,
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        result: Tensor | None = None
        start = 0
        for tile in x.split(tile_rows, dim):
            part = function(tile)
            rows = tile.shape[dim]
            if part.dim() != x.dim() or part.shape[dim] != rows:
                raise ValueError(
                    f"the function turned a tile {tuple(tile.shape)} into {tuple(part.shape)}; a "
                    f"token-wise one keeps {rows} along dim {dim}"
                )
            if result is None:
                shape = list(part.shape)
                shape[dim] = x.shape[dim]
                result = part.new_empty(shape)
            result.narrow(dim, start, rows).copy_(part)
            start += rows
        assert result is not None
        ctx.memory = memory
        if memory is None:
            ctx.save_for_backward(x)
        # Not saved as tensors: a sharding wrapper may swap their storage in between.
        ctx.parameters = parameters
        ctx.call = (function, tile_rows, dim)
        kind = x.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_result: Tensor) -> tuple[Tensor | None, ...]:
        # The node before this one has not run yet, so what it saved is still there.
        source = ctx if ctx.memory is None else ctx.memory
        (x,) = source.saved_tensors
        function, tile_rows, dim = ctx.call
        parameters = ctx.parameters
        wants_x = ctx.needs_input_grad[4]
        dx = torch.empty_like(x) if wants_x else None
        sums: list[Tensor | None] = [None] * len(parameters)
        start = 0
        for tile in x.split(tile_rows, dim):
            rows = tile.shape[dim]
            tile = tile.detach().requires_grad_(wants_x)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                part = _for_its_graph(function, tile)
            inputs = [tile, *parameters] if wants_x else list(parameters)
            grads = list(
                torch.autograd.grad(
                    part, inputs, d_result.narrow(dim, start, rows), allow_unused=True
                )
            )
            if dx is not None:
                d_tile = grads.pop(0)
                piece = dx.narrow(dim, start, rows)
                piece.zero_() if d_tile is None else piece.copy_(d_tile)
            for i, grad in enumerate(grads):
                sums[i] = _add(sums[i], grad)
            start += rows
        d_parameters = [
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, parameters, strict=True)
        ]
        return (None, None, None, None, dx, *d_parameters)


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return total
    wide = grad.dtype if grad.dtype == torch.float64 else torch.float32
    if total is None:
        return grad.to(wide, copy=True)
    return total.add_(grad)
