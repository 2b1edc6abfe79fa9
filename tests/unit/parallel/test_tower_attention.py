"""A tower's units in one call: the sums of unit-by-unit SDPA, put on and taken back."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from transformers import AttentionInterface

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from family_cases import QWEN2_5_VL, QWEN3_VL, Case

from longvila.parallel.apply import ParallelPlan, parallelize, unparallelize
from longvila.parallel.families import qwen_vl
from longvila.parallel.tower_attention import (
    NAME,
    attend_in_units,
    compile_around_units,
    unit_attention_forward,
)
from longvila.sp.mesh import SPMesh
from longvila.testing.asserts import assert_close

BOTH = pytest.mark.parametrize("case", [QWEN2_5_VL, QWEN3_VL], ids=["2.5", "3"])
LAYER = torch.nn.Identity()


def test_units_do_not_see_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    edges = torch.tensor([0, 4, 5, 9])
    out, weights = unit_attention_forward(
        LAYER, q, k, v, None, cu_seq_lens_q=edges, max_length_q=4, scaling=0.3, is_causal=False
    )
    sdpa = AttentionInterface()["sdpa"]
    alone = [
        sdpa(LAYER, *(x[:, :, a:b] for x in (q, k, v)), None, scaling=0.3, is_causal=False)[0]
        for a, b in ((0, 4), (4, 5), (5, 9))
    ]
    assert weights is None
    assert_close(out, torch.cat(alone, dim=1))


@BOTH
def test_rows_and_gradients_are_those_of_the_tower_as_it_is(case: Case) -> None:
    batch = case.batches["mixed"](torch.float64)
    found = []
    for packed in (False, True):
        model = case.model(torch.float64)
        calls: list[int] = []
        if packed:
            attend_in_units(model.model.visual)
            layer = model.model.visual.blocks[0].attn.proj
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        rows = model.model.get_video_features(
            batch["pixel_values_videos"], batch["video_grid_thw"], return_dict=True
        ).pooler_output
        rows = torch.cat(list(rows))
        rows.square().sum().backward()
        gradients = {n: p.grad for n, p in model.model.visual.named_parameters()}
        found.append((rows, gradients))
        assert len(calls) == packed
    assert_close(found[1][0], found[0][0], tolerance=1e-6)
    for name, gradient in found[0][1].items():
        if gradient is not None:
            assert_close(found[1][1][name], gradient, name=name, tolerance=1e-5)


def test_it_is_put_on_and_taken_back() -> None:
    model = QWEN3_VL.model(torch.float32)
    config = model.model.visual.config
    plan = ParallelPlan(fsdp=False, two_stage=True)
    parallelize(model, SPMesh(), plan)
    assert config._attn_implementation == NAME
    unparallelize(model)
    assert config._attn_implementation == "sdpa"
    config._attn_implementation = "eager"
    parallelize(model, SPMesh(), plan)
    assert config._attn_implementation == "eager"


def test_what_a_kernel_has_not_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 8)
    edges = torch.tensor([0, 2])
    with pytest.raises(ValueError, match="mask or dropout"):
        unit_attention_forward(
            LAYER, q, q, q, None, cu_seq_lens_q=edges, max_length_q=2, dropout=0.1
        )


# The compiler itself looks at .grad of what it traces.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@BOTH
def test_compiled_towers_round_differently_and_compile_once(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of several sizes, encoded without gradients and again with them."""
    graphs: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op != "placeholder"]
        names = " ".join(str(node.target) for node in nodes)
        for kind, sign in (("attention", "permute"), ("norm", "rsqrt"), ("mlp", "silu")):
            graphs[kind] += sign in names
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    for kind in qwen_vl._MEDIA:
        monkeypatch.setitem(vars(kind), "frames_per_call", lambda config: 40)
    batch, found = case.batches["mixed"](torch.float32), []
    before: Counter[str] = Counter()
    for compiled in (False, True):
        model = case.model(torch.float32)
        plan = ParallelPlan(fsdp=False, two_stage=True)
        parallelize(model, SPMesh(), plan)
        if compiled:
            for module, forward in compile_around_units(model.model.visual):
                monkeypatch.setitem(vars(module), "forward", torch.compile(forward, dynamic=True))
        for _ in range(1 + compiled):
            before = Counter(graphs)
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1])
    assert before == graphs, "a second step compiled again"
    # With and without gradients, whatever the sizes; torch makes each twice: the compiler starts
    # anew at the packed call, and does not reuse the first graph of a norm.
    assert 2 <= graphs["attention"] <= 4
    for kind in ("norm", "mlp"):
        assert graphs[kind] <= 4 and (graphs[kind] > 0) == (case is QWEN2_5_VL)


@BOTH
def test_what_is_compiled_in_a_tower(case: Case) -> None:
    tower = case.model(torch.float32).model.visual
    assert compile_around_units(tower) == []  # attention unit by unit would be a graph for each
    attend_in_units(tower)
    names = Counter(type(module).__name__ for module, _ in compile_around_units(tower))
    if case is QWEN2_5_VL:
        assert names == {"Qwen2_5_VLVisionAttention": 3, "Qwen2_5_VLMLP": 3, "Qwen2_5_VLRMSNorm": 7}
    else:
        assert names == {"Qwen3VLVisionAttention": 3}
