"""The tiled head and loss against a full softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longvila.memory import cross_entropy
from longvila.memory.cross_entropy import tiled_cross_entropy
from longvila.testing.asserts import assert_close
from longvila.testing.oracles import cross_entropy_oracle


def problem(
    rows: int, has_target: list[bool] | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(11, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, 11, (rows,), generator=generator)
    if has_target is not None:
        targets[~torch.tensor(has_target, dtype=torch.bool)] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets


@given(has_target=st.lists(st.booleans(), max_size=14), tile_rows=st.integers(1, 16))
@settings(deadline=None, max_examples=60)
def test_loss_and_every_gradient_whatever_the_tiles(has_target: list[bool], tile_rows: int) -> None:
    hidden, weight, bias, targets = problem(len(has_target), has_target)
    loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=tile_rows, bias=bias)
    expected = cross_entropy_oracle(hidden, weight, targets, bias=bias)
    assert_close(loss, expected)
    inputs = (hidden, weight, bias)
    # an upstream gradient that is not one
    actual = torch.autograd.grad(loss * 0.37, inputs)
    for a, b in zip(actual, torch.autograd.grad(expected * 0.37, inputs), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_inputs_give_a_float32_loss_and_gradients_of_their_own(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = problem(40, dtype=dtype)
    loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=7, bias=bias)
    assert loss.dtype == torch.float32
    # logits are not rounded to the narrow dtype, so the loss keeps float32 accuracy
    expected = cross_entropy_oracle(hidden, weight, targets, bias=bias)
    assert_close(loss, expected, tolerance=1e-5)
    inputs = (hidden, weight, bias)
    for a, b in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert a.dtype == dtype
        assert_close(a, b)


def test_the_weight_gradient_is_summed_in_float32_over_tiles() -> None:
    """1024 equal contributions in bf16 would stop growing at 256 of them."""
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(1024, dtype=torch.int64)
    tiled_cross_entropy(hidden, weight, targets, tile_rows=1).backward()
    assert weight.grad is not None and weight.grad.tolist() == [[-512.0], [512.0]]


def test_weights_in_another_dtype_get_their_gradient_in_it() -> None:
    hidden, weight, _, targets = problem(9, dtype=torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    tiled_cross_entropy(hidden, master, targets, tile_rows=4).backward()
    expected = cross_entropy_oracle(hidden, weight, targets)
    assert master.grad is not None and master.grad.dtype == torch.float32
    assert_close(master.grad, torch.autograd.grad(expected, weight)[0], tolerance=1.5e-2)


def test_gradcheck() -> None:
    hidden, weight, bias, targets = problem(5, [True, False, True, True, False])
    torch.autograd.gradcheck(
        lambda h, w, b: tiled_cross_entropy(h, w, targets, tile_rows=2, bias=b),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("rows", [0, 3])
def test_no_targets_is_a_zero_loss_with_zero_gradients(rows: int) -> None:
    """Ranks without a target are ordinary: they still take part in the backward pass."""
    hidden, weight, bias, targets = problem(rows, [False] * rows)
    loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=2, bias=bias)
    loss.backward()
    assert loss.item() == 0
    for x in (hidden, weight, bias):
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()


def test_rows_without_a_target_never_reach_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a NaN in them matters, and the products have only the other rows."""
    hidden, weight, _, targets = problem(6, [True, False, False, True, False, True])
    hidden.data[targets == -100] = float("nan")
    products = []
    original = cross_entropy._product

    def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        products.append(a.shape[0])
        return original(a, b, dtype)

    monkeypatch.setattr(cross_entropy, "_product", product)
    loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=2)
    loss.backward()
    assert products[0] == 2 and sum(n for n in products if n <= 2) == 3
    assert loss.isfinite() and hidden.grad is not None and weight.grad is not None
    assert weight.grad.isfinite().all() and not hidden.grad[targets == -100].any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_have_no_gradient_and_the_others_keep_theirs(frozen: str) -> None:
    names = ("hidden", "weight", "bias")
    *inputs, targets = problem(7)
    tensors = dict(zip(names, inputs, strict=True))
    tensors[frozen] = tensors[frozen].detach()
    wanted = [tensors[n] for n in names if n != frozen]
    loss = tiled_cross_entropy(
        tensors["hidden"], tensors["weight"], targets, tile_rows=3, bias=tensors["bias"]
    )
    expected = cross_entropy_oracle(
        tensors["hidden"], tensors["weight"], targets, bias=tensors["bias"]
    )
    for a, b in zip(
        torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        assert_close(a, b)


def test_a_frozen_head_makes_no_weight_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = problem(7)
    calls = []
    original = cross_entropy._product
    monkeypatch.setattr(
        cross_entropy, "_product", lambda *a: (calls.append(a[0].shape), original(*a))[1]
    )
    tiled_cross_entropy(hidden, weight.detach(), targets, tile_rows=7)
    assert calls == [(7, 6)]


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, _, targets = problem(7)
    with torch.no_grad():
        loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=3)
    assert not loss.requires_grad
    assert_close(loss, cross_entropy_oracle(hidden, weight, targets).detach())


def test_rows_given_by_the_caller() -> None:
    hidden, weight, _, targets = problem(8, [True, False] * 4)
    plain = tiled_cross_entropy(hidden, weight, targets, tile_rows=3)
    rows = torch.tensor([0, 2, 4, 6])
    assert torch.equal(
        plain, tiled_cross_entropy(hidden, weight, targets, tile_rows=3, target_rows=rows)
    )


def test_a_backward_pass_twice_gives_the_same_gradients() -> None:
    hidden, weight, _, targets = problem(8)
    loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=3)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_around_it_changes_nothing() -> None:
    """Products have the type of their inputs, which the caller chose."""
    hidden, weight = (torch.randn(n, 8, requires_grad=True) for n in (10, 50))
    targets, results = torch.arange(10), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=3)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_another_ignore_index() -> None:
    hidden, weight, _, targets = problem(8)
    loss = tiled_cross_entropy(hidden, weight, targets, tile_rows=3, ignore_index=9)
    assert_close(loss, cross_entropy_oracle(hidden, weight, targets, ignore_index=9))
    assert (targets == 9).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tile_rows": 0}, ValueError, "tile_rows must be at least 1"),
        ({"hidden": torch.zeros(2, 4, 6)}, ValueError, "flatten the batch first"),
        ({"weight": torch.zeros(11, 5)}, ValueError, "with one M"),
        ({"targets": torch.zeros(7, dtype=torch.int64)}, ValueError, r"targets must be \(8,\)"),
        ({"targets": torch.zeros(8)}, TypeError, "targets must be int64"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(11,\)"),
        ({"hidden": torch.zeros(8, 6, dtype=torch.int32)}, TypeError, "hidden must be floating"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, _, targets = problem(8)
    arguments: dict[str, Any] = {
        "hidden": hidden, "weight": weight, "targets": targets, "tile_rows": 2,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        tiled_cross_entropy(**(arguments | change))
