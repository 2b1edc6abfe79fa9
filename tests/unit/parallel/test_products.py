"""Padded MLPs and flattened patches: the same values and gradients, parameters untouched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from family_cases import QWEN2_5_VL

from longvila.inference.engine import Engine
from longvila.parallel import products, tower_attention
from longvila.parallel.apply import ParallelPlan, parallelize, unparallelize
from longvila.sp.mesh import SPMesh, build_mesh
from longvila.testing import Rank
from longvila.testing.asserts import TOLERANCE, assert_close
from longvila.testing.ranks import run_ranks

#: 20 is no multiple of the 8 elements that 16 bytes hold.
OUTER, INNER = 16, 20
PLAN = ParallelPlan(
    fsdp=False, two_stage=True, pad_mlps=True,
    parameter_dtype=None, compute_dtype=None, reduce_dtype=None,
)  # fmt: skip


class Gated(nn.Module):
    def __init__(self, inner: int = INNER, bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(OUTER, inner, bias=bias)
        self.up_proj = nn.Linear(OUTER, inner, bias=bias)
        self.down_proj = nn.Linear(inner, OUTER, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result


class Plain(nn.Module):
    def __init__(self, inner: int = INNER) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(OUTER, inner), nn.Linear(inner, OUTER)
        self.activation_fn: nn.Module = nn.Sigmoid()  # not zero at zero

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.activation_fn(self.fc1(x)))
        return result


@contextmanager
def weights_seen() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the weights that products run on."""
    seen: list[tuple[int, ...]] = []
    linear = nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(tuple(weight.shape))
        return linear(x, weight, bias)

    with mock.patch.object(nn.functional, "linear", watched):
        yield seen


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Result, gradient of the input, and gradients of all parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def qwen(dtype: torch.dtype) -> PreTrainedModel:
    """Qwen2.5-VL with unaligned MLPs, in the tower and in the text model."""
    case = replace(QWEN2_5_VL, config=_unaligned)
    return case.model(dtype)


def _unaligned() -> Any:
    config = QWEN2_5_VL.config()
    config.vision_config.intermediate_size = INNER
    config.text_config.intermediate_size = 36
    return config


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    loss = model(**batch).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


@pytest.mark.parametrize("make", [Gated, lambda: Gated(bias=False), Plain])
def test_values_and_gradients_are_those_of_the_module(make: Any) -> None:
    torch.manual_seed(0)
    mlp = make().double()
    x = torch.randn(2, 5, OUTER, dtype=torch.float64)
    expected, before = run(mlp, x), [dict(vars(each)) for each in mlp.modules()]
    undo = products.align_mlps([mlp], always=True)
    with weights_seen() as seen:
        found = run(mlp, x)
    assert set(seen) == {(64, OUTER), (OUTER, 64)}
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert_close(got, want)
    undo()
    assert [dict(vars(each)) for each in mlp.modules()] == before


def test_what_has_nothing_to_gain_is_left_alone() -> None:
    with_norm = Plain()
    with_norm.activation_fn = nn.LayerNorm(INNER)
    odd_outer = Gated()
    odd_outer.gate_proj = nn.Linear(OUTER, 12)
    for module in (Gated(inner=24), Plain(inner=32), with_norm, odd_outer, nn.Linear(OUTER, INNER)):
        products.align_mlps([module], always=True)
        assert not any("forward" in vars(each) for each in module.modules())


def test_few_rows_and_other_devices_do_without() -> None:
    mlp = Gated()
    products.align_mlps([mlp])
    with weights_seen() as seen:
        mlp(torch.randn(products.MIN_ROWS, OUTER))
    assert set(seen) == {(INNER, OUTER), (OUTER, INNER)}
    cases = ((511, "cuda"), (512, "cuda"), (512, "cpu"))
    for dtype, expected in (
        (torch.bfloat16, [False, True, False]),
        (torch.float32, [False, False, False]),  # 20 elements are 80 bytes
    ):
        linear = mlp.gate_proj.to(dtype)
        gains = [products._gains(linear, _Shaped(*case)) for case in cases]  # type: ignore[arg-type]
        assert gains == expected


class _Shaped:
    """What is asked of an input, on a device that is not here."""

    def __init__(self, rows: int, device: str) -> None:
        self.shape, self.device = (rows, OUTER), torch.device(device)

    def numel(self) -> int:
        return self.shape[0] * OUTER


def test_adapters_before_and_after() -> None:
    options = LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    x = torch.randn(3, OUTER)
    for late in (False, True):
        torch.manual_seed(1)
        holder = nn.ModuleDict({"mlp": Gated()})
        if late:
            products.align_mlps([holder], always=True)
        inject_adapter_in_model(options, holder)
        expected = holder["mlp"](x)
        undo = products.align_mlps([holder], always=True)
        with weights_seen() as seen:
            assert torch.equal(holder["mlp"](x), expected)
        assert (64, OUTER) not in seen
        undo()


@pytest.mark.parametrize("bias", [False, True])
def test_patches_are_rows(bias: bool) -> None:
    torch.manual_seed(2)
    tower = nn.Sequential(nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=bias)).double()
    x = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64)
    larger = torch.randn(1, 3, 4, 8, 8, dtype=torch.float64)
    expected, whole = run(tower, x), tower(larger)
    undo = products.embed_patches_as_rows(tower)
    with weights_seen() as seen:
        found = run(tower, x)
    assert seen == [(8, 96)]
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert_close(got, want)
    assert torch.equal(tower(larger), whole)  # more than a patch stays a convolution
    undo()
    assert "forward" not in vars(tower[0])


def test_overlapping_patches_stay_convolutions() -> None:
    for options in ({"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "groups": 2}):
        tower = nn.Sequential(nn.Conv3d(2, 4, 2, **options))
        products.embed_patches_as_rows(tower)
        assert "forward" not in vars(tower[0])


def test_a_model_keeps_its_loss_gradients_and_names() -> None:
    batch = QWEN2_5_VL.batches["mixed"](torch.float64)
    expected = unpadded(batch)
    model = qwen(torch.float64)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for more in ({}, {"mlp_tile_rows": 10}):
        parallelize(model, SPMesh(), replace(PLAN, **more))
        with weights_seen() as seen:
            found = gradients(model, batch)
        assert {(64, 16), (16, 64), (64, 32), (32, 64)} <= set(seen)
        assert not {(INNER, 16), (36, 32)} & set(seen)
        compare(found, expected)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        unparallelize(model)
        model.zero_grad()
    assert list(model.state_dict()) == list(state)
    assert not any("forward" in vars(module) for module in model.modules())


def unpadded(batch: dict[str, Any]) -> dict[str, Tensor]:
    """In one process; the model's own loss would be float32."""
    model = qwen(torch.float64)
    with weights_seen() as seen:
        found = gradients(parallelize(model, SPMesh(), replace(PLAN, pad_mlps=False)), batch)
    assert (INNER, 16) in seen and (64, 16) not in seen
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(each.norm()) for each in expected.values())
    for name, want in expected.items():
        # Norms and rotary embeddings compute in float32 whatever the weights are; a key's bias
        # has a gradient of rounding alone.
        limit = 20 * TOLERANCE[torch.float64] * max(float(want.norm()), 1e-3 * scale)
        assert float((found[name] - want).norm()) <= limit, name


def check_sharded(rank: Rank) -> None:
    """Each rank encodes its units, of parameters that FSDP gathered."""
    batch = QWEN2_5_VL.batches["mixed"](torch.float64)
    expected = unpadded(batch)
    model = qwen(torch.float64)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    parallelize(model, build_mesh(2, 1, ulysses_size=2), replace(PLAN, fsdp=True))
    with weights_seen() as seen:
        found = gradients(model, batch)
    assert {(64, 16), (64, 32)} <= set(seen) and (INNER, 16) not in seen
    compare(found, expected)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_sharded_over_two_ranks() -> None:
    run_ranks(check_sharded, 2, timeout_s=240)


def test_engines_pad_towers_where_it_helps() -> None:
    model = qwen(torch.float32).eval()
    with Engine(model):
        mlps = [block.mlp for block in model.model.visual.blocks]
        assert all("forward" in vars(mlp.gate_proj) for mlp in mlps)
        assert "forward" in vars(model.model.visual.patch_embed.proj)
        assert "forward" not in vars(model.model.language_model.layers[0].mlp.gate_proj)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_compiler_takes_one_graph_for_all_layers() -> None:
    """Or its limit is reached after a few layers, and the others run uncompiled."""
    mlps = nn.ModuleList([Gated() for _ in range(3)])
    x = torch.randn(9, OUTER)
    expected = [mlp(x) for mlp in mlps]
    products.align_mlps([mlps], always=True)
    first, *others = [
        torch.compile(tower_attention._mlp(mlp.forward), dynamic=True, backend="eager")
        for mlp in mlps
    ]
    assert_close(first(x), expected[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for compiled, out in zip(others, expected[1:], strict=True):
            assert_close(compiled(x), out)
