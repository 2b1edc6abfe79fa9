"""Reading a prompt: its cache to the byte, chunks on one rank, shares on many."""

from __future__ import annotations

import pytest

from longvila.inference.engine import Engine
from longvila.memory.operations import Load
from longvila.memory.prompts import cache_bytes, prompt_peak, prompt_time
from longvila.memory.rates import GPUS
from longvila.memory.settings import Ranks
from longvila.memory.sizes import preset
from longvila.parallel.sizes import size_of
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
    paged = prompt_peak(SEVEN, load, ranks=Ranks(ulysses=2), offload_bytes=2**33)
    assert two.bytes - paged.bytes == pytest.approx(2**33)
    assert paged.host_bytes == 2**33


def test_times() -> None:
    load, gpu = Load(tokens=403_456, frames=2048), GPUS["h200"]
    one, four = (prompt_time(SEVEN, load, gpu=gpu, ranks=Ranks(ulysses=u)) for u in (1, 4))
    assert one.parts["attention"] == pytest.approx(4 * four.parts["attention"])
    assert one.parts["tower and projector"] == pytest.approx(4 * four.parts["tower and projector"])
    assert four.parts["heads exchanged"] > one.parts["heads exchanged"] == 0
    reads = 2 * SEVEN.text.parameters + cache_bytes(SEVEN, 403_456)
    assert one.per_token == pytest.approx(reads / gpu.memory_rate)
    assert four.seconds < one.seconds / 3.5
    assert prompt_time(SEVEN, load, gpu=GPUS["a100"]).notes
