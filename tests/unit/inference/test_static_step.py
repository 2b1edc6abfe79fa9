"""The step of fixed shapes, launched anew each time, gives what the general way gives."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from longvila.inference.engine import Engine
from longvila.inference.paging import Pager
from longvila.inference.static_step import StaticStep, StaticSteps
from longvila.ops.kv_table import MAX_SEGMENTS

from .cases import greedy, language_model, prompt, video_model, video_prompt


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Shapes of the static steps that ran."""
    shapes: list[tuple[int, int]] = []
    before = StaticStep.__call__

    def counted(self: StaticStep) -> Any:
        shapes.append((self.rows, self.tokens))
        return before(self)

    monkeypatch.setattr(StaticStep, "__call__", counted)
    return shapes


def static(model: Any, **options: Any) -> Engine:
    return Engine(model, decode_graphs="uncaptured", **options)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_tokens_are_those_of_generate(name: str, ran: list[tuple[int, int]]) -> None:
    model, inputs = language_model(name), prompt(41)
    # More than the first capacity of a tail, which moves as it grows.
    expected = greedy(model, inputs, 100)
    with static(model, chunk_tokens=16) as engine:
        out = engine.generate(inputs, max_new_tokens=100, do_sample=False)
    assert out[0].tolist() == expected
    assert ran == [(1, 1)] * 100


def test_a_film_and_its_forks(ran: list[tuple[int, int]]) -> None:
    model = video_model()
    inputs = video_prompt(model, videos=(5,))
    question = prompt(9, seed=4)["input_ids"] % 20 + 1
    with Engine(model, decode_graphs="off") as engine:
        film = engine.prefill(inputs)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        want = [engine.generate(engine.fork(film), question, **options) for _ in range(2)]
        again = engine.generate(film, question[:, :3], **options)
    assert not ran
    with static(model) as engine:
        film = engine.prefill(inputs)
        found = [engine.generate(engine.fork(film), question, **options) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
        assert torch.equal(engine.generate(film, question[:, :3], **options), again)
    assert set(ran) == {(1, 1), (1, 3)}


def test_logits_of_several_tokens_and_of_rows_that_share_a_prefix() -> None:
    model = language_model()
    ids = prompt(60)["input_ids"]
    rows = torch.cat([prompt(4, seed=n)["input_ids"] for n in range(3)])
    found: dict[str, list[torch.Tensor]] = {}
    for mode in ("off", "uncaptured"):
        with Engine(model, decode_graphs=mode) as engine:  # type: ignore[arg-type]
            cache = engine.prefill({"input_ids": ids})
            found[mode] = [engine.decode(cache, rows[:1, :3]), engine.decode(cache, rows[:1, 3:])]
            fork = engine.fork(cache)
            for step in (rows[:, :2], rows[:, 2:3], rows[:, 3:]):
                found[mode].append(engine.decode(fork, step))
            fork.crop(-2)
            fork.reorder_cache(torch.tensor([2, 0, 0]))
            found[mode].append(engine.decode(fork, rows[:, :1]))
            assert cache.get_seq_length() == 64
    for want, got in zip(found["off"], found["uncaptured"], strict=True):
        torch.testing.assert_close(got, want)


def test_questions_of_different_lengths(ran: list[tuple[int, int]]) -> None:
    model = language_model()
    questions = [prompt(n, seed=n)["input_ids"] for n in (1, 5, 3)]
    answers = []
    for mode in ("off", "uncaptured"):
        with Engine(model, decode_graphs=mode) as engine:  # type: ignore[arg-type]
            film = engine.prefill(prompt(30))
            answers.append(engine.generate_many(film, questions, max_new_tokens=7, do_sample=False))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert ran and set(ran) == {(3, 1)}


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0},
        {"prompt_lookup_num_tokens": 3},
        {"logits_processor": LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])},
    ],
)
def test_generation_of_every_kind(options: dict[str, Any], ran: list[tuple[int, int]]) -> None:
    model = language_model()
    outs = []
    for mode in ("off", "uncaptured"):
        with Engine(model, decode_graphs=mode) as engine:  # type: ignore[arg-type]
            film = engine.prefill(prompt(40))
            outs.append(
                engine.generate(
                    engine.fork(film),
                    prompt(2, seed=3)["input_ids"],
                    max_new_tokens=12,
                    seed=1,
                    **{"do_sample": False, **options},
                )
            )
        if mode == "off":
            assert not ran
    assert ran and torch.equal(*outs)


def test_a_failing_layer_leaves_the_cache_as_it_was() -> None:
    model = language_model()
    with static(model) as engine:
        cache = engine.prefill(prompt(20))
        token = prompt(1)["input_ids"]
        want = engine.decode(engine.fork(cache), token)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.decode(cache, token)
        handle.remove()
        assert cache.get_seq_length() == 20 == cache.shards[0].num_local_tokens
        torch.testing.assert_close(engine.decode(cache, token), want)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_offload": Pager(torch.device("cpu"), 0)}, "paged"),
        ({"decode_graphs": "off"}, "switched off"),
        ({"decode_graphs": "auto"}, "no GPU"),
    ],
)
def test_what_goes_the_general_way_says_why(
    options: dict[str, Any], reason: str, ran: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr(
        "longvila.inference.static_step.log_once", lambda name, level, text: said.append(text)
    )
    with Engine(language_model(), **{"decode_graphs": "uncaptured", **options}) as engine:
        engine.generate(prompt(9), max_new_tokens=2, do_sample=False)
    assert said and all(reason in text for text in said)
    assert not ran


def test_a_cache_in_too_many_pieces_goes_the_general_way(
    ran: list[tuple[int, int]], caplog: pytest.LogCaptureFixture
) -> None:
    model = language_model()
    ids = prompt(MAX_SEGMENTS + 3)["input_ids"]
    with static(model) as engine, caplog.at_level(logging.WARNING):
        cache = engine.prefill({"input_ids": ids[:, :1]})
        for n in range(1, ids.shape[1] - 1):
            engine.fork(cache)
            engine.decode(cache, ids[:, n : n + 1])
        logits = engine.decode(cache, ids[:, -1:])
    assert len(ran) < ids.shape[1] - 1
    assert f"more than {MAX_SEGMENTS}" in caplog.text
    torch.testing.assert_close(logits[0], model(input_ids=ids).logits[0, -1])


def test_steps_are_forgotten_when_weights_move_or_the_engine_closes() -> None:
    model = language_model()
    engine = static(model)
    first = engine.prefill(prompt(5))
    engine.decode(first, prompt(1)["input_ids"])
    steps = engine.static._steps
    assert len(steps) == 1
    engine.decode(engine.fork(first), prompt(1)["input_ids"])
    assert engine.static._steps is steps
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    engine.decode(engine.fork(first), prompt(1)["input_ids"])
    assert engine.static._steps is not steps
    engine.close()
    assert not engine.static._steps


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="decode_graphs must be"):
        Engine(language_model(), decode_graphs="fast")  # type: ignore[arg-type]


def test_windows_are_those_of_the_layers_that_have_them() -> None:
    model = language_model()
    steps = StaticSteps(model, Engine(model).family, None, "uncaptured")
    assert steps._window is None
    steps.text.config.sliding_window = 7
    assert steps._window is None
    steps.text.config.layer_types = ["full_attention", "sliding_attention"]
    assert steps._window == 7


@pytest.mark.parametrize(
    ("ranks", "environment", "captured"),
    [
        (1, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, True),
        (2, {}, True),
        (2, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, False),
        (2, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "NCCL_GRAPH_REGISTER": "0"},
         True),
    ],
)  # fmt: skip
def test_graphs_over_ranks_and_expandable_segments(
    ranks: int, environment: dict[str, str], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "NCCL_GRAPH_REGISTER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = language_model()
    steps = StaticSteps(model, Engine(model).family, None, "auto")
    steps.mesh = SimpleNamespace(sp_size=ranks)  # type: ignore[assignment]
    reason = steps._capture_refusal()
    assert reason is None if captured else "NCCL_GRAPH_REGISTER=0" in str(reason)
    steps.failed = True
    assert steps._capture_refusal() == "one could not be"
