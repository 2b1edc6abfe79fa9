"""Decoding on a GPU: the split kernel against the oracle, and captured steps against uncaptured.

Run with ``pytest -m gpu tests/gpu/test_decode.py``.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from longvila.inference.engine import Engine
from longvila.inference.paging import Pager
from longvila.ops.decode import Tuning, decode_attention, decode_refusal
from longvila.testing.asserts import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore", "error:.*cuDNN SDPA.*:UserWarning"),
]

HALF = (torch.bfloat16, torch.float16)


def _cases() -> ModuleType:
    """The cases that the interpreter runs too."""
    path = Path(__file__).parents[1] / "unit" / "ops" / "decode_cases.py"
    spec = importlib.util.spec_from_file_location("decode_cases", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _cases()


# ---- the kernel --------------------------------------------------------------------------------


def test_the_kernel_can_be_had() -> None:
    assert decode_refusal(torch.bfloat16, 128, torch.device("cuda")) is None


@pytest.mark.parametrize("dtype", HALF)
def test_small_cases(dtype: torch.dtype) -> None:
    cases.small("cuda", dtype, None)


@pytest.mark.parametrize("tokens", [1, 15, 64, 65, 4097, 70_001, 200_000])
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(4, 7, 128), (8, 1, 64), (2, 3, 80)])
def test_lengths(tokens: int, new: int, kv_heads: int, group: int, dim: int) -> None:
    cases.dense(
        "cuda", torch.bfloat16, batch=1, new=new, tokens=max(tokens, new), causal=True,
        kv_heads=kv_heads, group=group, dim=dim,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [2, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_rows_of_their_own_lengths_and_rows_that_share(batch: int, new: int) -> None:
    shape = {"kv_heads": 4, "group": 7, "dim": 128, "tokens": 9001}
    lengths = [9001, 17, 4096, 8000][:batch]
    for dtype in HALF:
        cases.dense("cuda", dtype, batch=batch, new=new, lengths=lengths, causal=True, **shape)
        cases.dense("cuda", dtype, batch=batch, new=new, shared=True, **shape)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_by_table(dim: int) -> None:
    shape = {"kv_heads": 2, "group": 7, "dim": dim}
    run = cases.by_table
    run("cuda", torch.bfloat16, batch=1, new=1, shared=[], own=[70_000, 33, 0], **shape)
    run("cuda", torch.bfloat16, batch=4, new=1, shared=[30_000, 77], own=[19], **shape)
    run("cuda", torch.float16, batch=2, new=3, shared=[501], own=[20, 6], keeps=False, **shape)
    run(
        "cuda", torch.bfloat16, batch=2, new=1, shared=[3000], own=[120, 5],
        hidden=[(0, 0), (0, 99)], **shape,
    )  # fmt: skip


@pytest.mark.parametrize("tuning", [Tuning(32, 4, 4, 2), Tuning(128, 8, 3, 1), Tuning(64, 8, 2, 4)])
def test_tunings_change_bits_at_most(tuning: Tuning) -> None:
    cases.dense(
        "cuda", torch.bfloat16, batch=1, new=2, tokens=33_333, causal=True, kv_heads=4, group=7,
        dim=128, tuning=tuning,
    )  # fmt: skip


def test_a_call_is_the_same_to_the_bit_every_time() -> None:
    q, k, v = (
        torch.randn(1, n, h, 128, device="cuda", dtype=torch.bfloat16)
        for n, h in ((1, 28), (50_000, 4), (50_000, 4))
    )
    first = decode_attention(q, k, v)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, decode_attention(q, k, v), strict=True))


# ---- captured steps ----------------------------------------------------------------------------


def build(name: str) -> Any:
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }[name]
    config = config_class(
        hidden_size=896, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=7,
        num_key_value_heads=1, vocab_size=500, max_position_embeddings=65536, eos_token_id=None,
        bos_token_id=None, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return model_class(config).to("cuda", torch.bfloat16).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return build("qwen2")


def ids(tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 500, (1, tokens), generator=generator).cuda()


GREEDY = {"max_new_tokens": 150, "do_sample": False}


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_captured_tokens_and_logits_are_those_of_uncaptured_steps(name: str) -> None:
    model = build(name)
    prompt, question = ids(5000), ids(6, seed=2)
    found: dict[str, list[torch.Tensor]] = {}
    for mode in ("uncaptured", "auto"):
        with Engine(model, chunk_tokens=1024, decode_graphs=mode) as engine:  # type: ignore[arg-type]
            film = engine.prefill({"input_ids": prompt})
            outs = [engine.generate(engine.fork(film), **GREEDY)]
            # Another fork, another cache and the same graph; then what a beam needs.
            outs.append(engine.generate(engine.fork(film), question, **GREEDY))
            other = engine.prefill({"input_ids": ids(777, seed=3)})
            outs.append(engine.generate(other, **GREEDY))
            outs.append(engine.generate(film, question, num_beams=3, **GREEDY))
            outs.append(engine.generate(engine.fork(film), prompt_lookup_num_tokens=3, **GREEDY))
            outs.append(
                engine.generate(
                    engine.fork(film), question, **{**GREEDY, "do_sample": True}, seed=5
                )
            )
            outs += engine.generate_many(film, [ids(2), ids(9), ids(5)], **GREEDY)
            fork = engine.fork(film)
            outs += [engine.decode(fork, ids(1, seed=n)) for n in range(80)]
            fork.crop(-70)
            outs += [engine.decode(fork, ids(1, seed=n)) for n in range(5)]
            found[mode] = outs
            assert bool(engine.static.captured) == (mode == "auto")
            if mode == "auto":
                assert {(1, 1), (3, 1)} <= set(engine.static.captured)
    for want, got in zip(found["uncaptured"], found["auto"], strict=True):
        assert torch.equal(want, got)


def test_logits_are_those_of_one_forward(model: Any) -> None:
    prompt = ids(5040)
    with torch.no_grad():
        expected = model(input_ids=prompt, logits_to_keep=40).logits[0].float()
    with Engine(model, chunk_tokens=1024) as engine:
        film = engine.prefill({"input_ids": prompt[:, :5001]})
        found = [film.logits[0].float()]  # type: ignore[index]
        found += [engine.decode(film, prompt[:, n : n + 1])[0].float() for n in range(5001, 5040)]
        assert engine.static.captured == [(1, 1)]
    assert relative_error(torch.stack(found), expected) < 3e-2


def test_kernels_are_compiled_while_a_prompt_is_read(model: Any) -> None:
    with Engine(model, chunk_tokens=1024) as engine:
        assert engine.static._compiling is None
        film = engine.prefill({"input_ids": ids(300)})
        thread = engine.static._compiling
        assert thread is not None
        engine.decode(film, ids(1))
        assert not thread.is_alive()


def test_new_weights_are_seen(model: Any) -> None:
    with Engine(model, chunk_tokens=1024) as engine:
        film = engine.prefill({"input_ids": ids(300)})
        for _ in range(4):
            before = engine.decode(engine.fork(film), ids(1))
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
        after = engine.decode(engine.fork(film), ids(1))
    assert relative_error(after.float(), 2 * before.float()) < 1e-2


def test_the_general_way_is_taken_with_a_reason(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pager = Pager(torch.device("cuda"), 0, block_tokens=512)
    with (
        caplog.at_level(logging.WARNING),
        Engine(model, chunk_tokens=1024, kv_offload=pager) as engine,
    ):
        film = engine.prefill({"input_ids": ids(3000)})
        for _ in range(4):
            engine.decode(film, ids(1))
        assert not engine.static.captured
    assert "paged to the host" in caplog.text
