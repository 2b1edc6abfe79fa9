"""Encode many frames with the memory of a few, and add up their gradients in float32.

1. Forward: units go through the encoder a micro-batch at a time, without a graph; pixels and rows
   are all that is left of them.
2. Backward: each micro-batch runs again with a graph, is differentiated at once, and its parameter
   gradients are added to float32 sums (float64 for float64). One gradient a parameter leaves, in
   the parameter's dtype.

Recomputing by checkpoints would need as little memory, but there autograd adds the micro-batches'
gradients in the parameters' dtype. In bfloat16 every addition rounds at 1/256 of the running sum,
so the tower's gradient gets worse with every micro-batch, that is with longer videos.

Cost: the encoder's forward twice, its backward once; one float32 copy of the trained encoder
parameters during backward. Random numbers and autocast of the second run are those of the first.
It does not differentiate pixels, and not twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Rows of some units from their pixels and what is known of each unit: its frames, or its shape.
Encode = Callable[[Tensor, Sequence[Any]], Tensor]


@dataclass(frozen=True)
class _Random:
    """The generators' states when a micro-batch first ran."""

    host: Tensor
    device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _Random:
        on_gpu = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None)

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        with torch.random.fork_rng(devices=[] if self.device is None else [device]):
            torch.set_rng_state(self.host)
            if self.device is not None:
                torch.cuda.set_rng_state(self.device, device)
            yield


def micro_batches(
    pixels: Tensor,
    unit_frames: Sequence[int],
    frames_per_call: int | None,
    unit_shapes: Sequence[Any] | None = None,
) -> list[tuple[Tensor, tuple[Any, ...]]]:
    """Cut frames into micro-batches of whole units.

    Args:
        pixels: ``(F, ...)`` frames of all units.
        unit_frames: Frames of each unit; they add up to F.
        frames_per_call: Frames to have at most in a micro-batch of several units; None for all.
        unit_shapes: What the encoder is told of each unit; None for its frames.

    Returns:
        Pixels (views) and the units' shapes of each micro-batch.
    """
    groups: list[list[int]] = []
    for frames in unit_frames:
        full = frames_per_call is not None and groups and sum(groups[-1]) + frames > frames_per_call
        if full or not groups:
            groups.append([])
        groups[-1].append(frames)
    parts = pixels.split([sum(group) for group in groups]) if groups else ()
    shapes = iter(unit_frames if unit_shapes is None else unit_shapes)
    return [
        (part, tuple(islice(shapes, len(group)))) for part, group in zip(parts, groups, strict=True)
    ]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        encode: Encode,
        batches: list[tuple[Tensor, tuple[Any, ...]]],
        *parameters: Tensor,
    ) -> Tensor:
        device = batches[0][0].device
        ctx.encode, ctx.batches, ctx.parameters, ctx.device = encode, batches, parameters, device
        ctx.autocast = {
            "device_type": device.type,
            "dtype": torch.get_autocast_dtype(device.type),
            "enabled": torch.is_autocast_enabled(device.type),
        }
        ctx.random, rows = [], []
        for pixels, frames in batches:
            ctx.random.append(_Random.now(device))
            rows.append(encode(pixels, frames))
        ctx.counts = [each.shape[0] for each in rows]
        return torch.cat(rows)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        parts = zip(ctx.batches, ctx.random, grad.split(ctx.counts), strict=True)
        for (pixels, frames), random, grad_rows in parts:
            with torch.enable_grad(), random.again(ctx.device), torch.autocast(**ctx.autocast):
                rows = ctx.encode(pixels, frames)
            grads = torch.autograd.grad(rows, ctx.parameters, grad_rows, allow_unused=True)
            for index, (total, each) in enumerate(zip(sums, grads, strict=True)):
                if each is None:
                    continue
                if total is None:
                    wide = torch.float64 if each.dtype == torch.float64 else torch.float32
                    # A copy: two parameters' gradients may be views of one tensor.
                    sums[index] = each.to(wide, copy=True)
                else:
                    total += each
            # Before the next micro-batch runs.
            del rows, grads, each
        narrow = (
            None if total is None else total.to(parameter.dtype)
            for total, parameter in zip(sums, ctx.parameters, strict=True)
        )
        return (None, None, *narrow)


def encode_recomputed(
    encode: Encode,
    pixels: Tensor,
    unit_frames: Sequence[int],
    *,
    frames_per_call: int | None,
    parameters: Sequence[Tensor],
    unit_shapes: Sequence[Any] | None = None,
) -> Tensor:
    """Return the rows of some units; backward runs the encoder again, micro-batch by micro-batch.

    Args:
        encode: Rows ``(n, M)`` of a micro-batch; called again in backward with the same arguments.
        pixels: ``(F, ...)`` frames of all units, at least one.
        unit_frames: Frames of each unit.
        frames_per_call: Frames to have at most in a micro-batch of several units; None for all.
        parameters: Every trained parameter that ``encode`` uses; none to keep what autograd saves.
        unit_shapes: What the encoder is told of each unit; None for its frames.

    Returns:
        ``(N, M)`` rows of all units, in order.

    Memory: Pixels and rows of all frames, activations of one micro-batch.
    """
    batches = micro_batches(pixels, unit_frames, frames_per_call, unit_shapes)
    if not torch.is_grad_enabled() or not parameters:
        return torch.cat([encode(*batch) for batch in batches])
    return cast(Tensor, _Recomputed.apply(encode, batches, *parameters))  # type: ignore[no-untyped-call]
