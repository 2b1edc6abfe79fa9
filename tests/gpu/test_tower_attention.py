"""A vision tower's units in one packed call, in the types and head dims of real towers."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from longvila.parallel.tower_attention import unit_attention_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYER = torch.nn.Identity()


@pytest.mark.parametrize("head_dim", [72, 80], ids=["qwen3-vl", "qwen2.5-vl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_units_and_their_gradients_are_those_of_sdpa(head_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [64] * 40 + [16, 1024, 4]
    tokens = sum(lengths)
    # As towers make them: one product for all three, values a strided view of it.
    made = torch.randn(tokens, 3, 16, head_dim, generator=generator, device="cuda", dtype=dtype)
    leaves = [x.clone().requires_grad_() for x in made.unbind(1)]
    q, k, v = (x.transpose(0, 1)[None] for x in leaves)
    edges = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    out, _ = unit_attention_forward(
        LAYER, q, k, v, None, cu_seq_lens_q=edges, max_length_q=max(lengths), is_causal=False
    )
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    sdpa = AttentionInterface()["sdpa"]
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    expected = torch.cat([sdpa(LAYER, *part, None, is_causal=False)[0] for part in parts], dim=1)
    wanted = torch.autograd.grad(expected.float().square().sum(), leaves)
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-4
    pairs = zip((out.detach(), *grads), (expected.detach(), *wanted), strict=True)
    for got, want in pairs:
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert float(error) < limit
