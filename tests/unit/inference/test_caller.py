"""Callers: what is sent, what is tried again, what is not, and a local model's answers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path += [
    str(Path(__file__).parents[1] / "datagen"),
    str(Path(__file__).parents[2] / "integration"),
]
from endpoint import Endpoint, Says, numbers_of, text_of
from family_files import needs_torchvision, save_family

from longvila.inference.caller import (
    CallError,
    EmptyAnswer,
    EndpointCaller,
    LocalCaller,
    Prompt,
    Reply,
    ask_until,
)
from longvila.media.synthetic import numbered_frame
from longvila.testing.tiny import tiny_model, tiny_processor, tiny_tokenizer


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as served:
        yield served


def caller(endpoint: Endpoint, **options: Any) -> tuple[EndpointCaller, list[float]]:
    pauses: list[float] = []
    return EndpointCaller(endpoint.url, "name", sleep=pauses.append, **options), pauses


def in_turn(endpoint: Endpoint, *says: Says) -> None:
    answers = iter(says)
    endpoint.script = lambda body: next(answers)


def test_what_was_said_before_is_sent_in_order(endpoint: Endpoint) -> None:
    caller(endpoint)[0](Prompt("Again?", system="Judge.", turns=(("Well?", "Four!"),)))
    said = [(m["role"], m["content"]) for m in endpoint.bodies[0]["messages"]]
    assert said == [
        ("system", "Judge."), ("user", "Well?"), ("assistant", "Four!"), ("user", "Again?"),
    ]  # fmt: skip


def test_text_and_pictures_are_sent(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret\n")  # as a file has it
    ask, _ = caller(endpoint, key_variable="MY_KEY", longest_side=64)
    pictures = tuple(numbered_frame(n, 96, 128) for n in (7, 9))
    reply = ask(Prompt("What?", pictures, "Be short.", max_new_tokens=5))
    assert reply == Reply("Something is shown on the screen.", True)
    body = endpoint.bodies[0]
    assert body["path"] == "/v1/chat/completions" and body["max_tokens"] == 5
    assert body["model"] == "name" and body["temperature"] == 0.0
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    assert text_of(body) == "What?" and numbers_of(body) == [7, 9]
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"
    assert ask.used == {"calls": 1, "tries": 1, "prompt_tokens": 10, "new_tokens": 3}
    assert "secret" not in ask.name


RUBBISH = [
    Says(status=503, body=b"busy"),
    Says(body=b"<html>"),
    Says(body=b'{"choices": []}'),
    Says(body=b"[]"),
    Says(text=""),
    Says(text=None),
    Says(status=500, body=b""),
    Says(body=b"[" * 100_000),
    Says(body=b'{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1e999}}'),
    # Failures whose body never comes, or comes in a form that it does not have.
    Says(status=500, body=b"", headers={"Content-Length": "9"}),
    Says(status=429, body=b"zz\r\n", headers={"Transfer-Encoding": "chunked"}),
]


@pytest.mark.parametrize("wrong", RUBBISH, ids=range(len(RUBBISH)))
def test_what_may_pass_is_tried_again(endpoint: Endpoint, wrong: Says) -> None:
    ask, pauses = caller(endpoint)
    in_turn(endpoint, wrong, wrong, Says("Yes."))
    assert ask(Prompt("Is it?")).text == "Yes."
    assert ask.used["tries"] == 3 and ask.used["calls"] == 1
    assert 1 <= pauses[0] <= 1.25 and 2 <= pauses[1] <= 2.5


def test_a_pause_the_endpoint_asks_for_is_kept(endpoint: Endpoint) -> None:
    ask, pauses = caller(endpoint)
    in_turn(
        endpoint,
        Says(status=429, headers={"Retry-After": "7"}, body=b""),
        Says(status=429, headers={"Retry-After": "Mon, 01 Jan"}, body=b""),
        Says(status=429, headers={"Retry-After": "9999"}, body=b""),
        Says("Yes."),
    )
    ask(Prompt("Is it?"))
    assert 7 <= pauses[0] <= 8.75 and 2 <= pauses[1] <= 2.5 and 60 <= pauses[2] <= 75


def test_an_answer_that_trickles_is_given_up(endpoint: Endpoint) -> None:
    ask, _ = caller(endpoint, tries=1, timeout_s=1.5)
    endpoint.script = lambda body: Says(trickle_s=0.4)
    with pytest.raises(CallError, match=r"takes more than 1\.5 s|timed out"):
        ask(Prompt("Is it?"))


def test_a_key_goes_to_no_other_address(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with Endpoint() as other:
        endpoint.script = lambda body: Says(status=302, body=b"", headers={"Location": other.url})
        ask, pauses = caller(endpoint, key_variable="MY_KEY")
        with pytest.raises(CallError, match=f"status 302: ; it sends on to {other.url}"):
            ask(Prompt("Is it?"))
        assert not pauses and not other.headers


def test_tries_end(endpoint: Endpoint) -> None:
    ask, pauses = caller(endpoint, tries=3)
    endpoint.script = lambda body: Says(status=502, body=b"gateway")
    with pytest.raises(CallError, match="no answer after 3 tries; the last: status 502: gateway"):
        ask(Prompt("Is it?"))
    assert len(pauses) == 2


def test_saying_nothing_is_told_from_not_answering(endpoint: Endpoint) -> None:
    ask, _ = caller(endpoint, tries=2)
    endpoint.script = lambda body: Says(text="")
    with pytest.raises(EmptyAnswer, match="no answer after 2 tries; the last: an answer without"):
        ask(Prompt("Is it?"))


def test_what_lasts_is_not_tried_again(endpoint: Endpoint) -> None:
    ask, pauses = caller(endpoint)
    endpoint.script = lambda body: Says(status=404, body=b"no model called name")
    with pytest.raises(CallError, match="status 404: no model called name"):
        ask(Prompt("Is it?"))
    assert not pauses and len(endpoint.bodies) == 1


def test_an_endpoint_that_is_slow_or_gone(endpoint: Endpoint) -> None:
    given_up = threading.Event()

    def more_patient(pause_s: float) -> None:
        given_up.set()
        ask.timeout_s = 120.0

    def only_once_given_up(body: dict[str, Any]) -> Says:
        first = not given_up.is_set()
        assert given_up.wait(100)
        return Says("Early." if first else "Late.")

    ask = EndpointCaller(endpoint.url, "name", sleep=more_patient, tries=2, timeout_s=0.3)
    endpoint.script = only_once_given_up
    assert ask(Prompt("Is it?")).text == "Late." and ask.used["tries"] == 2
    gone = EndpointCaller("http://127.0.0.1:9/v1", "name", tries=2, sleep=lambda s: None)
    with pytest.raises(CallError, match="no answer after 2 tries"):
        gone(Prompt("Is it?"))


def test_an_answer_that_was_cut_off_says_so(endpoint: Endpoint) -> None:
    endpoint.script = lambda body: Says("It is a", finish="length")
    assert caller(endpoint)[0](Prompt("What?")) == Reply("It is a", False)


def test_wrong_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CallError, match="begins with http"):
        EndpointCaller("localhost:8000", "name")
    with pytest.raises(CallError, match="above zero, got 0, 120"):
        EndpointCaller("http://x/v1", "name", tries=0)
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(CallError, match="NO_KEY holds no key"):
        EndpointCaller("http://x/v1", "name", key_variable="NO_KEY")
    with pytest.raises(CallError, match="no-such-folder"):
        LocalCaller.load("./no-such-folder")


def test_a_local_model_sees_pictures() -> None:
    ask = LocalCaller(tiny_model(seed=1), tiny_processor(), name="tiny")
    dark, light = (np.full((48, 64, 3), level, np.uint8) for level in (10, 240))
    one = ask(Prompt("What?", (dark, dark), max_new_tokens=12))
    assert one == ask(Prompt("What?", (dark, dark), max_new_tokens=12))
    assert one != ask(Prompt("What?", (light, light), max_new_tokens=12))
    assert one != ask(Prompt("What?", max_new_tokens=12))
    ends = [ask(Prompt("What?", turns=(("Who?", x),), max_new_tokens=12)) for x in ("He", "She")]
    assert ends[0] != ends[1]
    assert ask.used["calls"] == 6 and ask.used["new_tokens"] >= 4
    with pytest.raises(CallError, match="tiny: the prompt has"):
        ask(Prompt("What?", max_new_tokens=5000))


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
def test_local_models_of_other_families_see_pictures(name: str, tmp_path: Any) -> None:
    needs_torchvision()
    ask = LocalCaller.load(str(save_family(name, tmp_path / name)))
    dark, light = (np.full((48, 64, 3), level, np.uint8) for level in (10, 240))
    one, other = (ask(Prompt("What?", (x,) * 3, max_new_tokens=6)) for x in (dark, light))
    assert one.text and other.text and one != other


def test_a_local_language_model_answers(tmp_path: Any) -> None:
    model = tiny_model(seed=2)
    language = type(model.model.language_model).__name__.replace("Model", "ForCausalLM")
    import transformers

    causal = getattr(transformers, language)(model.config.text_config)
    causal.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ask = LocalCaller.load(str(tmp_path))
    reply = ask(Prompt("Why?", system="Be short.", max_new_tokens=8))
    assert reply.text and not reply.complete and ask.used["new_tokens"] == 8
    # One that ends with the last token that it may have has ended.
    words, asked = ask.processor, Prompt("Why?", system="Be short.", max_new_tokens=2)
    second = words.encode(reply.text)[1]
    ask.model.generation_config.eos_token_id = second
    assert ask(asked).complete and not ask(replace(asked, max_new_tokens=1)).complete
    with pytest.raises(CallError, match="sees no pictures"):
        ask(Prompt("Why?", (np.zeros((4, 4, 3), np.uint8),)))
    with pytest.raises(CallError, match="do not fit its context of 4096"):
        ask(Prompt("Why? " * 2000, max_new_tokens=8))


class Listed:
    """A caller that gives its answers one after another."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    def __call__(self, prompt: Prompt) -> Reply:
        self.asked.append(prompt)
        return Reply(self.texts.pop(0))


def number(reply: Reply) -> int:
    return int(reply.text)


def test_an_answer_that_cannot_be_used_is_asked_for_again() -> None:
    ask = Listed("one", "2")
    prompt = Prompt("How many?", system="Count.", turns=(("Who?", "Two cats."),))
    assert ask_until(ask, prompt, number, attempts=3) == 2
    second = ask.asked[1]
    assert second.text.startswith("How many?\n\nAn earlier answer could not be used: invalid")
    assert replace(second, text=prompt.text) == prompt
    with pytest.raises(ValueError, match="after 2 answers, the last begins 'b'"):
        ask_until(Listed("a", "b"), Prompt("How many?"), number, attempts=2)
