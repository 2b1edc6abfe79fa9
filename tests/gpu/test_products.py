"""Padded MLPs and flattened patches in the shapes of Qwen2.5-VL's tower: values, and time."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VLMLP,
)

from longvila.parallel.products import align_mlps, embed_patches_as_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
ROWS = 8192


def mlp(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(vision_config={"hidden_size": 1280, "intermediate_size": 3420})
    return Qwen2_5_VLMLP(config.vision_config, bias=True).to("cuda", dtype)


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Result, gradient of the input where it has one, and gradients of all parameters."""
    y = module(x)
    leaves = [*([x] if x.requires_grad else []), *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def milliseconds(call: Callable[[], object]) -> float:
    """Median of a call, forward and backward."""
    found = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found[2:])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_padded_mlp_has_the_values_of_the_plain_one_and_is_faster() -> None:
    exact, plain, padded = mlp(torch.float64), mlp(torch.bfloat16), mlp(torch.bfloat16)
    exact.load_state_dict(plain.state_dict())
    align_mlps([padded])
    x = torch.randn(ROWS, 1280, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = run(exact, x.detach().double().requires_grad_())
    for got, before, want in zip(run(padded, x), run(plain, x), wanted, strict=True):
        assert got.shape == want.shape
        # No further from the sums in float64 than the products it replaces.
        assert relative(got, want) < 1.2 * relative(before, want) + 1e-4
    took = [milliseconds(lambda m=m: run(m, x)) for m in (plain, padded)]
    print(f"3420 wide: plain {took[0]:.3f} ms, padded {took[1]:.3f} ms")
    assert took[1] < took[0]


def test_flattened_patches_have_the_values_of_the_convolution_and_are_no_slower() -> None:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return Qwen2_5_VisionPatchEmbed(14, 2, 3, 1280).to("cuda", torch.bfloat16)

    plain, rows = make(), make()
    embed_patches_as_rows(rows)
    x = torch.randn(ROWS, 3 * 2 * 14 * 14, device="cuda", dtype=torch.bfloat16)
    for got, want in zip(run(rows, x), run(plain, x), strict=True):
        assert got.shape == want.shape and relative(got, want) < 1e-2
    took = [milliseconds(lambda m=m: run(m, x)) for m in (plain, rows)]
    print(f"patches: convolution {took[0]:.3f} ms, product {took[1]:.3f} ms")
    assert took[1] < 1.1 * took[0]
