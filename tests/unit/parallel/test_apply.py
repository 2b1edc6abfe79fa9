"""What parallelize changes on a model, that it can be undone, and what it refuses."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from longvila.memory import tiled as tiled_module
from longvila.memory.offload import Offload
from longvila.parallel import apply
from longvila.parallel.apply import (
    ParallelPlan,
    is_parallelized,
    last_step_plan,
    parallelize,
    reduce_gradients,
    unparallelize,
)
from longvila.parallel.hf_attention import NAME
from longvila.sp.mesh import SPMesh, plan_mesh
from longvila.testing.asserts import assert_close
from longvila.testing.tiny import TINY_VIDEO_ID, tiny_model

PLAN = ParallelPlan(fsdp=False, two_stage=True)


def test_only_this_model_and_only_its_text_part_change() -> None:
    model, other = tiny_model(), tiny_model()
    kind, names = type(model), list(model.state_dict())
    parallelize(model, SPMesh(), PLAN)
    assert is_parallelized(model) and not is_parallelized(other)
    assert type(model) is kind and list(model.state_dict()) == names
    assert model.model.language_model.config._attn_implementation == NAME
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert other.model.language_model.config._attn_implementation == "sdpa"
    assert "forward" in vars(model) and "forward" not in vars(other)
    assert kind.forward is type(other).forward
    assert inspect.signature(model.forward) == inspect.signature(other.forward)


def test_undoing_leaves_no_trace() -> None:
    model = tiny_model()
    before = dict(vars(model))
    layers = [dict(vars(layer)) for layer in model.model.language_model.layers]
    ids = torch.arange(9)[None]
    expected = model(input_ids=ids).logits
    assert unparallelize(parallelize(model, SPMesh(), PLAN)) is model
    assert vars(model) == before
    vars(model)["forward"] = before["forward"] = functools.partial(type(model).forward, model)
    assert vars(unparallelize(parallelize(model, SPMesh(), PLAN))) == before  # another's stays
    assert [vars(layer) for layer in model.model.language_model.layers] == layers
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(model(input_ids=ids).logits, expected)
    parallelize(model, SPMesh(), PLAN)


def test_calls_without_labels_take_the_models_own_forward() -> None:
    model = tiny_model()
    ids = torch.arange(9)[None]
    expected = model(input_ids=ids)
    parallelize(model, SPMesh(), PLAN)
    output = model(input_ids=ids)
    assert type(output) is type(expected) and torch.equal(output.logits, expected.logits)


def test_checkpointing_changes_memory_not_numbers() -> None:
    """Layers and frames are recomputed, with or without host memory: gradients are the same."""
    ids = torch.cat([torch.full((18,), TINY_VIDEO_ID), torch.arange(9)])[None]
    batch = {
        "input_ids": ids, "labels": ids.masked_fill(ids == TINY_VIDEO_ID, -100),
        "pixel_values_videos": torch.randn(2, 3, 20, 20),
    }  # fmt: skip
    gradients = []
    for plan in (
        ParallelPlan(fsdp=False, two_stage=True, activation_checkpointing=False),
        PLAN,
        ParallelPlan(
            fsdp=False, two_stage=True, offload=Offload(budget_bytes=1 << 20, min_bytes=0)
        ),
    ):
        model = parallelize(tiny_model().train(), SPMesh(), plan)
        layers = model.model.language_model.layers
        recompute = plan.activation_checkpointing
        assert all(bool(each.gradient_checkpointing) == recompute for each in layers)
        model(**batch).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        if plan.offload is not None:
            assert plan.offload.moved_bytes > 0
    for wanted, *others in zip(*gradients, strict=True):
        assert all(torch.equal(other, wanted) for other in others)


def test_a_model_that_is_trained_generates_as_it_does_elsewhere() -> None:
    """Layers that are recomputed would go without the cache."""
    inputs = {"input_ids": torch.arange(9)[None], "max_new_tokens": 6, "do_sample": False}
    expected = tiny_model().generate(**inputs)
    model = parallelize(tiny_model().train(), SPMesh(), PLAN)
    assert torch.equal(model.generate(**inputs), expected)


def test_a_second_time_is_refused_and_so_is_undoing_nothing() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="was not parallelized"):
        unparallelize(model)
    for each in (reduce_gradients, last_step_plan):
        with pytest.raises(ValueError, match="was not parallelized"):
            each(model)
    parallelize(model, SPMesh(), PLAN)
    with pytest.raises(ValueError, match="parallelized before; undo with unparallelize"):
        parallelize(model, SPMesh(), PLAN)


def test_a_model_that_is_refused_is_left_as_it_was() -> None:
    model = tiny_model()
    model.model.language_model.config.attention_dropout = 0.5
    before = dict(vars(model))
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.5"):
        parallelize(model, SPMesh(), PLAN)
    assert vars(model) == before
    model.model.language_model.config.attention_dropout = 0.0
    model.model.language_model.layers.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear cannot be checkpointed"):
        parallelize(model, SPMesh(), PLAN)
    assert not is_parallelized(model) and "forward" not in vars(model)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_what_is_not_a_model_or_a_mesh_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a transformers model .* got Linear"):
        parallelize(nn.Linear(2, 2), SPMesh())
    with pytest.raises(TypeError, match="build_mesh, got int"):
        parallelize(tiny_model(), 2)  # type: ignore[arg-type]


def test_sequence_parallelism_needs_the_two_stage_forward() -> None:
    mesh = SPMesh(plan=plan_mesh(2, 2, num_heads=4))
    plan = ParallelPlan(fsdp=False, two_stage=False)
    with pytest.raises(ValueError, match="2 sequence-parallel ranks, which only the two-stage"):
        parallelize(tiny_model(), mesh, plan)


def test_one_process_needs_no_process_group() -> None:
    """Off by default: the plan's FSDP has nothing to shard over, and forward stays."""
    model = parallelize(tiny_model().train(), SPMesh())
    assert "forward" not in vars(model)
    ids = torch.arange(9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    reduce_gradients(model)


# PEFT 0.21 reads an attribute that transformers 5.23 calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_around_a_model_stay_outside() -> None:
    peft = pytest.importorskip("peft")
    pattern = r".*language_model.*\.(q_proj|v_proj)"
    lora = peft.LoraConfig(r=2, target_modules=pattern, init_lora_weights=False)
    ids = torch.arange(9)[None]
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model().train(), lora)
    expected = model(input_ids=ids, labels=ids).loss
    assert parallelize(model, SPMesh(), PLAN) is model
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.allclose(loss, expected, rtol=1e-5)
    loss.backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora" in n for n in trained)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=ids, labels=ids).loss, expected)


BATCH = {
    "input_ids": torch.cat([torch.full((18,), TINY_VIDEO_ID), torch.arange(9)])[None],
    "labels": torch.cat([torch.full((18,), -100), torch.arange(9)])[None],
    "pixel_values_videos": torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)),
}


def _gradients(**options: Any) -> list[torch.Tensor]:
    model = parallelize(tiny_model().train(), SPMesh(), replace(PLAN, **options))
    loss = model(**BATCH).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_memory_settings_change_no_bit() -> None:
    """Layers that keep what they save, here or on the host; an MLP in a single tile."""
    expected = _gradients()
    for options in (
        {"plain_layers": 1},
        {"plain_layers": 1, "offload": Offload(budget_bytes=1 << 20, min_bytes=0)},
        {"activation_checkpointing": False, "offload": Offload(budget_bytes=1 << 20, keep_last=0)},
        {"mlp_tile_rows": 27},
    ):
        actual = _gradients(**options)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), options


# The compiler itself looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_tiles_and_the_compiler_change_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs are cut as on a GPU, and run by torch itself instead of generated code.
    compiled = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    expected = _gradients()
    for options in (
        {"mlp_tile_rows": 10},
        {"compile_modules": True},
        {"compile_modules": True, "mlp_tile_rows": 10, "plain_layers": 1},
    ):
        # Together: the gradient of a key's bias is zero but for rounding.
        actual = _gradients(**options)
        assert_close(actual[0], expected[0])
        assert_close(*(torch.cat([g.flatten() for g in each]) for each in (actual, expected)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(("plain_layers", "tile"), [(0, None), (1, None), (0, 4)])
def test_a_second_run_leaves_out_the_last_product(
    monkeypatch: pytest.MonkeyPatch, plain_layers: int, tile: int | None
) -> None:
    """The compiled MLP ends before it where the layer is recomputed, and holds it elsewhere."""
    linear, whole = nn.functional.linear, Counter[str]()

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape == (32, 48):
            whole["products"] += 1
        return linear(x, weight, bias)

    monkeypatch.setattr(tiled_module.torch.nn.functional, "linear", counted)
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        if any("silu" in name for name in names):
            products.append(sum("linear" in name for name in names))
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = tiny_model().train()
    layers = model.model.language_model.layers
    calls = [Counter[str]() for _ in layers]
    for layer, seen in zip(layers, calls, strict=True):
        if tile is None:
            monkeypatch.setattr(layer.mlp.down_proj, "forward", _counted(layer.mlp.down_proj, seen))
    plan = replace(PLAN, compile_modules=True, plain_layers=plain_layers, mlp_tile_rows=tile)
    parallelize(model, SPMesh(), plan)
    ids = torch.arange(9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    if tile is not None:
        assert whole["products"] == len(layers) * 3, "three tiles, forward only"
        assert set(products) == {2}
        return
    recomputed = len(layers) - plain_layers
    for seen in calls[:recomputed]:
        # Twice begun, once ended: the second run ends where the product's input is saved.
        assert seen == {"begun": 2, "ended": 1}
    assert sorted(products) == ([2, 3] if plain_layers else [2])
    unparallelize(model)


def _counted(module: nn.Module, seen: Counter[str]) -> Any:
    forward = module.forward

    def counted(x: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            seen["begun"] += 1
        y = forward(x)
        if not torch.compiler.is_compiling():
            seen["ended"] += 1
        return y

    return counted


def test_undoing_memory_settings_leaves_no_trace() -> None:
    model = tiny_model()
    before = [dict(vars(module)) for module in model.modules()]
    plan = replace(PLAN, compile_modules=True, mlp_tile_rows=4, plain_layers=1)
    parallelize(model, SPMesh(), plan)
    assert "forward" in vars(model.model.language_model.layers[0].mlp)
    unparallelize(model)
    assert [vars(module) for module in model.modules()] == before


def test_errors_of_memory_settings() -> None:
    for options, message in (
        ({"plain_layers": 9}, "plain_layers must be 0 to 2, got 9"),
        ({"mlp_tile_rows": 0}, "mlp_tile_rows must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize(tiny_model(), SPMesh(), replace(PLAN, **options))


def test_gradients_travel_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "_BUCKET_BYTES", 64)
    sizes = [8, 8, 1, 40, 4, 4]
    gradients = [torch.zeros(n) for n in sizes]
    gradients.insert(5, torch.zeros(2, dtype=torch.float64))
    cut = [[x.numel() for x in bucket] for bucket in apply._buckets(gradients)]
    # Full; larger than a bucket; a neighbour of another type.
    assert cut == [[8, 8], [1], [40], [4], [2], [4]]
    assert [x for bucket in apply._buckets(gradients) for x in bucket] == gradients
    assert list(apply._buckets([])) == []
