"""A tower's units in one call: the sums of unit-by-unit SDPA, put on and taken back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from family_cases import QWEN2_5_VL, QWEN3_VL, Case

from longvila.parallel.apply import ParallelPlan, parallelize, unparallelize
from longvila.parallel.tower_attention import NAME, attend_in_units, unit_attention_forward
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
