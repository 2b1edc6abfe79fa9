"""Matrix products of a model in the shapes that fast kernels take; the sums stay what they are.

**Inner widths.** cuBLAS reads and writes 16 bytes at a time. Where the rows of a matrix are no
multiple of that long, it takes other kernels, which are slower. Qwen2.5-VL's tower is the case: its
MLPs are 3420 wide, 6840 bytes in bfloat16, in two thirds of the tower's operations. So:

1. Find MLPs: one or two linear maps in, an activation, one linear map out, nothing else. The inner
   width is odd (no multiple of 16 bytes in a 16-bit type), the outer one is not.
2. In each call, the maps into the inner width run on copies with zero rows added, and zeros behind
   their biases, up to a multiple of :data:`PADDED_TO`; the map out runs on a copy with as many zero
   columns. The model's own code runs between them.
3. What is added is ``act(0)``, times ``0`` where there is a gate, and meets zero columns: it adds
   nothing. Autograd cuts the copies' gradients back to the parameters' shapes.

Cost: a copy of the MLP's weights a call. A gated one's reads and writes ``6 * M * N`` elements
beside ``6 * T * M * N`` operations, tens of microseconds beside hundreds at 8192 rows. Calls of
few rows do without. Parameters keep names and shapes, so nothing that saves, loads, shards or
counts them is concerned, and they are read at the call, when a sharding wrapper has gathered them.
MLPs with adapters (LoRA) are left alone, whenever these came.

**Patches.** A convolution whose kernel is its stride, on input of the kernel's size, is a matrix
product of flattened patches, and runs as one: convolution libraries serve thousands of inputs of
one output each badly.

It does not pad outer widths, which would copy activations, nor convolutions over whole pictures.

Dimensions: T rows, M outer width, N inner width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Elements that a padded inner width is a multiple of: whole tiles of a kernel.
PADDED_TO = 64
#: Bytes that kernels move at once.
ALIGNMENT = 16
#: Rows from which a copy of the weights costs little beside the products.
MIN_ROWS = 512

#: Names of the maps into the inner width, and of the one out of it.
_NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("linear_fc1",), "linear_fc2"),
)
_HALF_BYTES = 2


def align_mlps(modules: Iterable[nn.Module], *, always: bool = False) -> Callable[[], None]:
    """Let MLPs of an unaligned inner width run on padded copies; return what takes it back.

    Args:
        modules: Where to look, themselves included.
        always: Whether to pad on any device and any number of rows; else on CUDA, from
            :data:`MIN_ROWS`.
    """
    undo: list[Callable[[], None]] = []
    for mlp in {id(each): each for module in modules for each in module.modules()}.values():
        maps = _maps(mlp)
        if not maps:
            continue
        *into, out = maps.values()
        if out.in_features * _HALF_BYTES % ALIGNMENT == 0:
            continue
        for linear in into:
            undo.append(_set_forward(linear, _widened(mlp, tuple(maps), linear, always)))
        undo.append(_set_forward(out, _narrowed(out)))
    return functools.partial(_call_all, undo)


def embed_patches_as_rows(tower: nn.Module) -> Callable[[], None]:
    """Let convolutions over single patches run as matrix products; return what takes it back.

    Args:
        tower: Whose convolutions to look at.
    """
    undo: list[Callable[[], None]] = []
    for module in tower.modules():
        if type(module) is nn.Conv3d and "forward" not in vars(module) and _is_product(module):
            undo.append(_set_forward(module, functools.partial(_patch_rows, module)))
    return functools.partial(_call_all, undo)


def padded_width(width: int) -> int:
    """Return the next multiple of :data:`PADDED_TO`."""
    return -(-width // PADDED_TO) * PADDED_TO


# ---- MLPs --------------------------------------------------------------------------------------


def _maps(mlp: nn.Module) -> dict[str, nn.Linear]:
    """The linear maps of an MLP by name, the last one out of it; none for any other module."""
    children = dict(mlp.named_children())
    for names, last in _NAMES:
        if not {*names, last} <= set(children):
            continue
        found = {name: children.pop(name) for name in (*names, last)}
        maps = {name: each for name, each in found.items() if type(each) is nn.Linear}
        # An activation may be a module; what has parameters is more than that.
        more = [each for other in children.values() for each in other.parameters()]
        if len(maps) < len(found) or more:
            return {}
        *into, out = maps.values()
        shape = (out.out_features, out.in_features)
        fits = all((each.in_features, each.out_features) == shape for each in into)
        aligned = out.out_features * _HALF_BYTES % ALIGNMENT == 0
        return maps if fits and aligned else {}
    return {}


# Closures, not partials: the compiler tells closures apart by their code, and would compile a
# partial of each layer anew.


def _widened(
    mlp: nn.Module, names: tuple[str, ...], linear: nn.Linear, always: bool
) -> Callable[[Tensor], Tensor]:
    """A map into the inner width, with zeros behind where that is faster."""

    def forward(x: Tensor) -> Tensor:
        weight, bias = linear.weight, linear.bias
        # Adapters that came later add their own results, of the unpadded width.
        plain = all(type(getattr(mlp, name)) is nn.Linear for name in names)
        if not (plain and (always or _gains(linear, x))):
            return functional.linear(x, weight, bias)
        more = padded_width(linear.out_features) - linear.out_features
        wide = None if bias is None else functional.pad(bias, (0, more))
        return functional.linear(x, functional.pad(weight, (0, 0, 0, more)), wide)

    return forward


def _narrowed(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The map out of the inner width, which is as wide as the maps into it made it."""

    def forward(x: Tensor) -> Tensor:
        weight = linear.weight
        if x.shape[-1] == padded_width(linear.in_features):
            weight = functional.pad(weight, (0, x.shape[-1] - linear.in_features))
        return functional.linear(x, weight, linear.bias)

    return forward


def _gains(linear: nn.Linear, x: Tensor) -> bool:
    device, dtype = x.device.type, linear.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    unaligned = linear.out_features * dtype.itemsize % ALIGNMENT != 0
    return device == "cuda" and unaligned and x.numel() >= MIN_ROWS * x.shape[-1]


# ---- patches -----------------------------------------------------------------------------------


def _is_product(convolution: nn.Conv3d) -> bool:
    return (
        convolution.kernel_size == convolution.stride
        and convolution.padding in ((0, 0, 0), "valid")
        and convolution.dilation == (1, 1, 1)
        and convolution.groups == 1
    )


def _patch_rows(convolution: nn.Conv3d, x: Tensor) -> Tensor:
    if x.dim() != 5 or tuple(x.shape[2:]) != convolution.kernel_size:
        return nn.Conv3d.forward(convolution, x)
    weight = convolution.weight.flatten(1)
    rows = functional.linear(x.flatten(1), weight, convolution.bias)
    return rows[:, :, None, None, None]


# ---- overriding --------------------------------------------------------------------------------


def _set_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    before = vars(module).get("forward")
    vars(module)["forward"] = forward

    def undo() -> None:
        if before is None:
            vars(module).pop("forward")
        else:
            vars(module)["forward"] = before

    return undo


def _call_all(calls: list[Callable[[], Any]]) -> None:
    while calls:
        calls.pop()()
