"""Tokens as transformers chooses them, and text that leaves only when it is certain."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from longvila.inference.serving.sampling import (
    Sampler,
    Sampling,
    TextStream,
    check_generation_config,
    stop_tokens,
)
from longvila.testing import tiny

TOKENIZER = tiny.tiny_tokenizer()
PLAIN = GenerationConfig()


def sampler(config: Any = PLAIN, **options: Any) -> Sampler:
    return Sampler(Sampling(9, **options), config, torch.device("cpu"))


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0]])
    assert sampler().choose(logits, torch.tensor([[0]])) == 1
    assert logits.tolist() == torch.tensor([[0.1, 2.0, -1.0]]).tolist(), "logits were changed"
    penal = GenerationConfig(repetition_penalty=50.0)
    assert sampler(penal).choose(logits, torch.tensor([[1]])) == 0
    placeholders = torch.tensor([[1, 7, 7]])  # no entries of the vocabulary
    assert sampler(penal).choose(logits, placeholders) == 0


def test_seeds_and_bounds() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0]])

    def draw(n: int = 40, **options: Any) -> list[int]:
        one = sampler(temperature=1.3, **options)
        return [one.choose(logits, ids) for _ in range(n)]

    assert draw(seed=3) == draw(seed=3) != draw(seed=4)
    assert draw() != draw(), "no seed, another answer each time"
    likeliest = logits[0].argsort(descending=True).tolist()
    assert set(draw(400, seed=1, top_k=3)) == set(likeliest[:3])
    mass = (logits[0] / 1.3).softmax(-1)[likeliest].cumsum(0)
    most = int((mass < 0.3).sum()) + 1
    assert set(draw(400, seed=1, top_p=0.3)) == set(likeliest[:most])


def test_a_seed_is_not_disturbed_by_others() -> None:
    logits, ids = torch.randn(1, 50), torch.tensor([[0]])
    alone = sampler(temperature=1.0, seed=1)
    expected = [alone.choose(logits, ids) for _ in range(10)]
    one, other, found = sampler(temperature=1.0, seed=1), sampler(temperature=1.0, seed=2), []
    state = torch.random.get_rng_state()
    for _ in range(10):
        other.choose(logits, ids)
        found.append(one.choose(logits, ids))
    assert found == expected and torch.equal(state, torch.random.get_rng_state())


def said(text: str, *stop: str, chunks: list[str] | None = None) -> tuple[str, bool]:
    stream, whole = TextStream(TOKENIZER, stop), ""
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        piece = stream.push(token)
        if chunks is not None:
            chunks.append(piece)
        whole += piece
        if stream.stopped:
            break
    return whole + stream.finish(), stream.stopped


def test_characters_wait_for_their_bytes() -> None:
    chunks: list[str] = []
    assert said("aé漢🎬!", chunks=chunks) == ("aé漢🎬!", False)
    assert not any("\N{REPLACEMENT CHARACTER}" in chunk for chunk in chunks)
    assert len(chunks) > len("aé漢🎬!")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), ("one ", True)),
        ("one two three", ("three", "two t"), ("one ", True)),
        ("one twx three", ("two",), ("one twx three", False)),
        ("one tw", ("two",), ("one tw", False)),
        ("ababac", ("abac",), ("ab", True)),
        ("aaab", ("aab",), ("a", True)),
        ("stop", ("stop",), ("", True)),
        ("x\n\ny", ("\n\n",), ("x", True)),
    ],
)
def test_stop_sequences(text: str, stop: tuple[str, ...], expected: tuple[str, bool]) -> None:
    assert said(text, *stop) == expected


def test_what_may_become_a_stop_sequence_is_not_sent() -> None:
    stream = TextStream(TOKENIZER, ("end!",))
    sent = [stream.push(token) for token in TOKENIZER("x en")["input_ids"]]
    assert "".join(sent) == "x " and stream.finish() == "en"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 255), max_size=30), st.integers(0, 3))
def test_pieces_are_the_whole_for_any_bytes(tokens: list[int], stops: int) -> None:
    """Random tokens are mostly no text at all; the pieces still add up."""
    whole = TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    chance = random.Random(len(tokens))
    stop = tuple(chance.choice(["qq", "zzz", "~!"]) for _ in range(stops))
    if any(each in whole for each in stop):
        return
    stream = TextStream(TOKENIZER, stop)
    assert "".join(stream.push(token) for token in tokens) + stream.finish() == whole


def test_the_model_s_settings() -> None:
    check_generation_config(PLAIN)
    check_generation_config(GenerationConfig(repetition_penalty=1.2, temperature=0.5, top_k=3))
    for name, value in (("bad_words_ids", [[3]]), ("min_new_tokens", 4), ("guidance_scale", 2.0)):
        with pytest.raises(ValueError, match=name):
            check_generation_config(SimpleNamespace(**{name: value}))


def test_stop_tokens() -> None:
    for stops, expected in ((None, {9}), (3, {3, 9}), ([3, 4], {3, 4, 9})):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=stops))
        assert stop_tokens(model, SimpleNamespace(eos_token_id=9)) == expected
