"""The registered attention: with a context over the mesh, without one exactly SDPA."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.utils import _apply_to_tensors
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from longvila.parallel.hf_attention import (
    NAME,
    SPStep,
    check_calls,
    sentinel_mask,
    sp_attention_forward,
)
from longvila.sp.context import SPContext, make_context
from longvila.sp.mesh import SPMesh
from longvila.testing.asserts import assert_close


class Layer(nn.Module):
    """What an attention layer of transformers shows to its attention function."""

    num_key_value_groups = 2
    is_causal = True
    layer_idx = 0


def qkv(tokens: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, tokens, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]


def context_of(*lengths: int) -> SPContext:
    return make_context(SPMesh(), lengths)


def test_the_name_is_registered_for_attention_and_masks() -> None:
    # A compiled model puts a wrapper around it that the compiler leaves alone.
    assert inspect.unwrap(AttentionInterface()[NAME]) is sp_attention_forward
    assert AttentionMaskInterface()[NAME] is AttentionMaskInterface()["sdpa"]


def test_without_a_context_it_is_sdpa() -> None:
    q, k, v = qkv()
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    mask[..., 0] = False
    mask[:, :, 0, 0] = True
    for given in (None, mask):
        expected = AttentionInterface()["sdpa"](Layer(), q, k, v, given, scaling=0.3)[0]
        assert torch.equal(sp_attention_forward(Layer(), q, k, v, given, scaling=0.3)[0], expected)


def test_with_a_context_documents_are_apart_and_scaled() -> None:
    q, k, v = qkv()
    step = SPStep(context_of(3, 4))
    out, weights = sp_attention_forward(
        Layer(), q, k, v, sentinel_mask(q.device), scaling=0.3, sp_context=step
    )
    parts = [
        sp_attention_forward(Layer(), *(x[:, :, cut] for x in (q, k, v)), None, scaling=0.3)[0]
        for cut in (slice(0, 3), slice(3, 7))
    ]
    assert_close(out, torch.cat(parts, dim=1))
    assert weights is None and step.calls == 1


def test_a_bare_context_is_taken_too() -> None:
    q, k, v = qkv()
    step = SPStep(context_of(7))
    expected = sp_attention_forward(Layer(), q, k, v, None, sp_context=step)[0]
    bare = sp_attention_forward(Layer(), q, k, v, None, sp_context=step.context)[0]
    assert torch.equal(bare, expected)


def test_fsdp_does_not_rebuild_the_step() -> None:
    """It rebuilds dataclasses among arguments to cast tensors in them; counts would be lost."""
    step = SPStep(context_of(7))
    assert not dataclasses.is_dataclass(step)
    assert _apply_to_tensors(lambda x: x, {"sp_context": step})["sp_context"] is step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "wants attention dropout 0.1"),
        ({"sliding_window": 5}, "window of 5 tokens, but a document has 7"),
        ({"softcap": 30.0}, "passes softcap"),
        ({"s_aux": torch.zeros(4)}, "passes s_aux"),
        ({"is_causal": False}, "is not causal"),
    ],
)
def test_what_sequence_parallelism_lacks_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sp_attention_forward(Layer(), *qkv(), None, sp_context=context_of(7), **options)


def test_a_window_longer_than_every_document_is_no_window() -> None:
    out = sp_attention_forward(Layer(), *qkv(), None, sliding_window=7, sp_context=context_of(7))[0]
    assert torch.equal(
        out, sp_attention_forward(Layer(), *qkv(), None, sp_context=context_of(7))[0]
    )


def test_a_mask_beside_a_context_is_refused() -> None:
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 1, 7, 7\) beside an sp_context"):
        sp_attention_forward(Layer(), *qkv(), mask, sp_context=context_of(7))


def test_counts_that_differ_are_named() -> None:
    check_calls(3, expected=3, implementation=NAME)
    with pytest.raises(RuntimeError, match=r"1 of 3 attention layers .* says 'sdpa'"):
        check_calls(1, expected=3, implementation="sdpa")
