"""Reading a prompt: its cache to the byte, chunks on one rank, shares on many."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from longvila.inference.engine import Engine
from longvila.memory.operations import Load
from longvila.memory.prompts import cache_bytes, prompt_peak, prompt_time
from longvila.memory.rates import GPUS
from longvila.memory.settings import Ranks
from longvila.memory.sizes import preset
from longvila.parallel.sizes import size_of
from longvila.sp import build_mesh
from longvila.testing.live_bytes import LiveBytes
from longvila.testing.ranks import Rank, run_ranks
from longvila.testing.tiny import tiny_inputs, tiny_model

SEVEN = preset("7B")


def test_the_cache_is_as_large_as_a_real_one() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model.config)
    with Engine(model) as engine:
        cache = engine.prefill(inputs)
    tokens = inputs["input_ids"].shape[1]
    size = size_of(model)
    assert cache_bytes(size, tokens, compute_bytes=4) == cache.local_bytes


def test_a_chunk_bounds_what_is_beside_the_cache() -> None:
    peaks = [
        prompt_peak(SEVEN, Load(tokens=tokens), chunk_tokens=8192) for tokens in (2**16, 2**18)
    ]
    beside = [peak.bytes - peak.parts["keys and values"] for peak in peaks]
    assert beside[0] == beside[1]
    assert peaks[1].parts["keys and values"] == cache_bytes(SEVEN, 2**18)
    more = prompt_peak(SEVEN, Load(tokens=2**18), chunk_tokens=32768)
    assert more.bytes > peaks[1].bytes


def test_ranks_share_cache_and_activations() -> None:
    load = Load(tokens=2**19, frames=2048)
    two, eight = (prompt_peak(SEVEN, load, ranks=Ranks(ulysses=u)) for u in (2, 8))
    assert two.moments["layers"]["keys and values"] == pytest.approx(
        4 * eight.moments["layers"]["keys and values"]
    )
    assert two.parts["parameters"] == 2 * SEVEN.parameters
    # A chunk is what a rank reads at once on several ranks as well: the rest is its shard.
    longer = prompt_peak(SEVEN, Load(tokens=2**20, frames=2048), ranks=Ranks(ulysses=2))
    beside = [peak.bytes - peak.parts["keys and values"] for peak in (two, longer)]
    assert beside[0] == pytest.approx(beside[1])
    paged = prompt_peak(SEVEN, load, ranks=Ranks(ulysses=2), offload_bytes=2**33)
    assert two.bytes - paged.bytes == pytest.approx(2**33)
    assert paged.host_bytes == 2**33


@pytest.mark.parametrize("mlp_width", [128, 1024], ids=["attention", "mlp"])
def test_peaks_are_those_of_live_tensors(mlp_width: int) -> None:
    read_and_compare(None, mlp_width, 2048)
    run_ranks(read_and_compare, 2, mlp_width, 4096)


def read_and_compare(rank: Rank | None, mlp_width: int, tokens: int) -> None:
    """Count the bytes that are alive while a prompt is read, on one process or on each rank."""
    count = 1 if rank is None else rank.world_size
    torch.manual_seed(0)
    # As many kv heads as heads: PyTorch's kernel for the CPU would have fewer repeated.
    config = Qwen2Config(
        hidden_size=128, intermediate_size=mlp_width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=100, max_position_embeddings=2 * tokens,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    mesh = None
    if rank is not None:
        mesh = build_mesh(count, num_heads=4, num_kv_heads=4, device_type="cpu")
    live = LiveBytes(model.parameters())
    with Engine(model, mesh, chunk_tokens=512) as engine, live:
        engine.prefill({"input_ids": torch.randint(100, (1, tokens))})
    planned = prompt_peak(
        size_of(model), Load(tokens=tokens), ranks=Ranks(ring=count), chunk_tokens=512,
        compute_bytes=4, library_bytes=0,
    )  # fmt: skip
    assert planned.bytes == pytest.approx(live.peak_bytes, rel=0.06), live.peak_parts


def test_times() -> None:
    load, gpu = Load(tokens=403_456, frames=2048), GPUS["h200"]
    one, four = (prompt_time(SEVEN, load, gpu=gpu, ranks=Ranks(ulysses=u)) for u in (1, 4))
    assert one.parts["attention"] == pytest.approx(4 * four.parts["attention"])
    assert one.parts["tower and projector"] == pytest.approx(4 * four.parts["tower and projector"])
    assert four.parts["queries sent"] > one.parts["queries sent"] == 0
    reads = 2 * SEVEN.text.parameters + cache_bytes(SEVEN, 403_456)
    assert one.per_token == pytest.approx(reads / gpu.memory_rate)
    assert four.seconds < one.seconds / 3.5
    assert prompt_time(SEVEN, load, gpu=GPUS["a100"]).notes
