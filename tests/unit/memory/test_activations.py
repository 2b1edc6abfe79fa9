"""Bytes that autograd keeps of a layer, counted by hooks, equal the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from longvila.memory.activations import (
    SCRATCH,
    checkpoint_bytes,
    exchanged_kv_heads,
    layer_activation_bytes,
)
from longvila.memory.sizes import TextSize
from longvila.parallel.apply import ParallelPlan, parallelize
from longvila.sp.mesh import build_mesh
from longvila.sp.ulysses import plan_heads

TOKENS = 96
SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}


def kept_bytes(model: Any) -> int:
    """Bytes of the distinct storages that the graph of a step refers to, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            storages[address] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    ids = torch.randint(0, 50, (1, TOKENS))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(storages.values())


def model_of(
    kind: str, layers: int, dtype: torch.dtype, *, checkpointing: bool, **options: Any
) -> Any:
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    extra = {"head_dim": 8} if kind == "qwen3" else {}
    config = config_class(
        **SHAPE, **extra, num_key_value_heads=2, num_hidden_layers=layers, vocab_size=50
    )
    model = model_class(config).to(dtype).train()
    plan = ParallelPlan(
        fsdp=False, two_stage=True, activation_checkpointing=checkpointing, **options
    )
    return parallelize(model, build_mesh(1), plan)


def text_of(kind: str) -> TextSize:
    return TextSize.gated(
        layers=1, width=48, mlp_width=80, heads=6, kv_heads=2, vocabulary=50, head_dim=8,
        qk_norm=kind == "qwen3",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_without_checkpoints(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one, three = (
        kept_bytes(model_of(kind, layers, dtype, checkpointing=False)) for layers in (1, 3)
    )
    measured = (three - one) / 2 / TOKENS
    planned = layer_activation_bytes(text_of(kind), compute_bytes=dtype.itemsize)
    # Two numbers a row and norm, and float32 layers share what the formula counts in each.
    assert measured == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_checkpointed_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    one, three = (
        kept_bytes(model_of("qwen2", layers, dtype, checkpointing=True)) for layers in (1, 3)
    )
    measured = (three - one) / 2 / TOKENS
    # Hooks see the layer's input; attention's results are kept beside the graph.
    planned = checkpoint_bytes(text_of("qwen2"), compute_bytes=dtype.itemsize, keep_attention=False)
    assert measured == pytest.approx(planned, rel=1e-6)


def test_kept_attention_is_out_and_lse() -> None:
    text = text_of("qwen2")
    kept = checkpoint_bytes(text, compute_bytes=2, keep_attention=True)
    assert kept == 2 * 48 + 2 * 6 * 8 + 4 * 6


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ulysses"), [(28, 4, 1), (28, 4, 2), (28, 4, 7), (28, 4, 8), (6, 2, 4)]
)
def test_exchanged_kv_heads_are_those_of_the_exchange(
    heads: int, kv_heads: int, ulysses: int
) -> None:
    text = TextSize.gated(
        layers=1, width=8, mlp_width=8, heads=heads, kv_heads=kv_heads, vocabulary=8, head_dim=8
    )
    shares = plan_heads(heads, kv_heads, ulysses).shares
    assert exchanged_kv_heads(text, ulysses) == sum(share.num_kv_heads for share in shares)


def test_scratch_is_what_the_kernels_were_seen_to_take() -> None:
    """The figures of the result file: 131072 tokens of 14 query and 2 kv heads of 128."""
    tokens, heads, kv_heads, dim = 131072, 14, 2, 128
    for backend, measured in (("fa4", 2.146), ("cudnn", 2.765), ("flash", 2.764)):
        head, kv, row = SCRATCH[backend]
        scratch = (head * heads * dim + kv * kv_heads * dim + row * heads) * tokens
        results = 2 * (2 * heads + 2 * kv_heads) * dim * tokens + 4 * heads * tokens
        assert (scratch + results) / 2**30 == pytest.approx(measured, rel=0.01), backend
