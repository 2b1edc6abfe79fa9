"""A token-wise function in tiles equals one call, forward and for every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longvila.memory.checkpoint import checkpoint
from longvila.memory.tiled import linear_unless_unwanted, tiled_apply
from longvila.testing.asserts import assert_close


class Mlp(nn.Module):
    """A gated MLP with a norm, as in the language model."""

    def __init__(self, dtype: torch.dtype = torch.float64, width: int = 6, out: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.gate = nn.Linear(width, 13, bias=False, dtype=dtype)
        self.up = nn.Linear(width, 13, dtype=dtype)
        self.down = nn.Linear(13, out, dtype=dtype)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    seed = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=seed, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, inputs, dy)


@given(tokens=st.integers(1, 20), tile_rows=st.integers(1, 21))
@settings(deadline=None, max_examples=40)
def test_tiles_of_any_size_with_a_ragged_last_one(tokens: int, tile_rows: int) -> None:
    mlp = Mlp(out=4)
    x = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *mlp.parameters())
    tiled = tiled_apply(mlp, x, tile_rows=tile_rows)
    plain = mlp(x)
    assert_close(tiled, plain)
    for a, b in zip(gradients(tiled, *inputs), gradients(plain, *inputs), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("after", [False, True])
def test_the_last_product_is_left_out_of_the_second_run(
    monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Unless something comes after it, which is then found out and computed."""
    mlp = Mlp()
    products: list[int] = []
    linear = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(weight.shape[1])
        return linear(x, weight, bias)

    def last(x: Tensor) -> Tensor:
        y = linear_unless_unwanted(x, mlp.down.weight, mlp.down.bias)
        return y.sigmoid() if after else y

    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *mlp.parameters())
    monkeypatch.setattr(mlp.down, "forward", last)
    expected = gradients(mlp(x), *inputs)
    monkeypatch.setattr(nn.functional, "linear", counted)
    tiled = tiled_apply(mlp, x, tile_rows=4)
    actual = gradients(tiled, *inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
    assert products.count(13) == (6 if after else 3), "three tiles, forward and at times again"


def test_frozen_weights_of_a_product_left_out() -> None:
    mlp = Mlp()
    mlp.down.weight.requires_grad_(False)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, mlp.gate.weight, mlp.down.bias)
    expected = gradients(mlp(x), *inputs)
    vars(mlp.down)["forward"] = lambda h: linear_unless_unwanted(h, mlp.down.weight, mlp.down.bias)
    actual = gradients(tiled_apply(mlp, x, tile_rows=4), *inputs)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def test_one_tile_is_the_plain_call_bit_for_bit() -> None:
    mlp = Mlp(torch.float32)
    x = torch.randn(2, 9, 6, requires_grad=True)
    inputs = (x, *mlp.parameters())
    tiled = tiled_apply(mlp, x, tile_rows=9)
    assert len(mlp.calls) == 1
    plain = mlp(x)
    assert torch.equal(tiled, plain)
    for a, b in zip(gradients(tiled, *inputs), gradients(plain, *inputs), strict=True):
        assert torch.equal(a, b)
    assert len(mlp.calls) == 2, "one tile recomputes nothing"


def test_no_call_sees_more_than_a_tile() -> None:
    mlp = Mlp()
    x = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)
    tiled_apply(mlp, x, tile_rows=4).sum().backward()
    assert [shape[1] for shape in mlp.calls] == [4, 4, 2] * 2


def test_another_dim() -> None:
    mlp = Mlp()
    x = torch.randn(10, 3, 6, dtype=torch.float64, requires_grad=True)
    tiled = tiled_apply(mlp, x, tile_rows=4, dim=0)
    for a, b in zip(gradients(tiled, x), gradients(mlp(x), x), strict=True):
        assert_close(a, b)


def test_frozen_and_unused_parameters() -> None:
    mlp = Mlp()
    mlp.gate.weight.requires_grad_(False)
    mlp.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    x = torch.randn(1, 10, 6, dtype=torch.float64)
    tiled_apply(mlp, x, tile_rows=4).sum().backward()
    expected = {n: p.grad for n, p in mlp.named_parameters()}
    mlp.zero_grad()
    mlp(x).sum().backward()
    for name, parameter in mlp.named_parameters():
        if name in ("gate.weight", "idle"):
            assert parameter.grad is None and expected[name] is None
        else:
            assert_close(expected[name], parameter.grad, name=name)


def test_parameter_gradients_are_summed_in_float32() -> None:
    """1024 ones in bf16 would stop growing at 256."""
    scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    x = torch.ones(1024, 1, dtype=torch.bfloat16)
    tiled_apply(lambda t: t * scale, x, tile_rows=1, dim=0, parameters=[scale]).sum().backward()
    assert scale.grad is not None and scale.grad.item() == 1024


def test_nothing_needs_a_gradient() -> None:
    mlp = Mlp()
    x = torch.randn(1, 10, 6, dtype=torch.float64)
    with torch.no_grad():
        assert_close(tiled_apply(mlp, x, tile_rows=3), mlp(x))


def test_autocast_is_the_same_in_both_runs() -> None:
    mlp = Mlp(torch.float32)
    x = torch.randn(1, 10, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        tiled, plain = tiled_apply(mlp, x, tile_rows=4), mlp(x)
    assert tiled.dtype == plain.dtype == torch.bfloat16
    inputs = (x, *mlp.parameters())
    for a, b in zip(gradients(tiled, *inputs), gradients(plain, *inputs), strict=True):
        assert_close(a, b, tolerance=1.5e-2)


@pytest.mark.filterwarnings("default")  # the compiler's own, which differ between versions
def test_inside_a_compiled_function() -> None:
    module, results = Mlp(), []
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    leaves = (x, *module.parameters())

    def function(x: Tensor) -> Tensor:
        return tiled_apply(module, 2 * x, tile_rows=2).square().sum()

    for call in (function, torch.compile(function, backend="aot_eager")):
        results.append(torch.autograd.grad(call(x), leaves))
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager)


def test_errors() -> None:
    x = torch.zeros(1, 10, 6)
    with pytest.raises(ValueError, match="tile_rows must be at least 1, got 0"):
        tiled_apply(Mlp(), x, tile_rows=0)
    with pytest.raises(TypeError, match=r"not a torch.nn.Module; their gradients"):
        tiled_apply(lambda t: t, x, tile_rows=4)
    with pytest.raises(ValueError, match="a token-wise one keeps 4 along dim -2"):
        tiled_apply(lambda t: t.sum(-2), x, tile_rows=4, parameters=())


def test_under_a_checkpoint_tiles_run_once_forward_and_once_backward() -> None:
    """The second pass over the layer ends before the tiles: only their input is wanted there."""
    mlp, norm = Mlp(), nn.LayerNorm(6, dtype=torch.float64)

    def layer(x: Tensor) -> Tensor:
        return x + tiled_apply(mlp, norm(x), tile_rows=4)

    x = torch.randn(1, 10, 6, dtype=torch.float64, requires_grad=True)
    inputs = (x, *norm.parameters(), *mlp.parameters())
    expected = gradients(x + mlp(norm(x)), *inputs)
    mlp.calls.clear()
    actual = gradients(checkpoint(layer, x), *inputs)
    assert mlp.calls == 2 * [(1, 4, 6), (1, 4, 6), (1, 2, 6)]
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)
