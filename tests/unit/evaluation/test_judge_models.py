"""Judges: an endpoint that is busy, broken or strange, and a local model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from longvila.errors import CheckpointError
from longvila.evaluation.judge_models import EndpointJudge, JudgeError, LocalJudge, Recording
from longvila.testing.tiny import save_tiny

ASKED = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Well?"}]
GOOD = {"choices": [{"message": {"role": "assistant", "content": "fine"}}]}


class Server:
    """An endpoint that gives a list of replies (status, body) and remembers what it was sent."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, bytes]] = []
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, body, self.headers.get("Authorization")))
                status, content = outer.replies.pop(0)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def test_an_endpoint_is_asked_in_its_form(server: Server) -> None:
    server.replies = [(200, json.dumps(GOOD).encode())]
    judge = EndpointJudge(server.base + "/", "qwen", key="word")
    assert judge.reply(ASKED) == "fine"
    ((path, body, key),) = server.requests
    assert (path, key) == ("/v1/chat/completions", "Bearer word")
    assert (body["model"], body["messages"], body["temperature"]) == ("qwen", ASKED, 0)
    assert "qwen" in judge.name and "word" not in judge.name


def test_a_busy_endpoint_is_waited_for_with_growing_pauses(server: Server) -> None:
    server.replies = [(429, b"slow down"), (503, b""), (200, json.dumps(GOOD).encode())]
    pauses: list[float] = []
    assert EndpointJudge(server.base, "m", pause=pauses.append).reply(ASKED) == "fine"
    assert pauses == [2.0, 4.0]
    assert server.requests[0][2] is None


def test_an_endpoint_that_stays_busy_is_given_up(server: Server) -> None:
    server.replies = [(500, b"broken")] * 3
    judge = EndpointJudge(server.base, "m", attempts=3, pause=lambda seconds: None)
    with pytest.raises(JudgeError, match=r"failed 3 times, last: 500: broken"):
        judge.reply(ASKED)


def test_a_refusal_is_not_tried_again(server: Server) -> None:
    server.replies = [(401, b"no such key")]
    with pytest.raises(JudgeError, match="answered 401: no such key"):
        EndpointJudge(server.base, "m").reply(ASKED)
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b"[1]"])
def test_another_form_is_an_error(server: Server, body: bytes) -> None:
    server.replies = [(200, body)]
    with pytest.raises(JudgeError, match="answered in another form"):
        EndpointJudge(server.base, "m").reply(ASKED)


def test_no_text_and_no_server_are_errors(server: Server) -> None:
    server.replies = [(200, b'{"choices": [{"message": {"content": null}}]}')]
    with pytest.raises(JudgeError, match="without a text"):
        EndpointJudge(server.base, "m").reply(ASKED)
    nobody = EndpointJudge("http://127.0.0.1:9", "m", attempts=2, pause=lambda seconds: None)
    with pytest.raises(JudgeError, match="failed 2 times"):
        nobody.reply(ASKED)
    with pytest.raises(ValueError, match="http or https"):
        EndpointJudge("file:///etc/passwd", "m")


def test_a_local_model_says_what_it_generates(tmp_path: Path) -> None:
    save_tiny(tmp_path, seed=3)
    judge = LocalJudge.load(str(tmp_path))
    judge.new_tokens = 4
    ids = judge.tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    expected: list[int] = []
    stops = {judge.tokenizer.eos_token_id}
    with torch.no_grad():
        while len(expected) < 4:
            whole = torch.cat([ids, torch.tensor([expected], dtype=ids.dtype)], 1)
            token = int(judge.model(input_ids=whole).logits[0, -1].argmax())
            expected.append(token)
            if token in stops:
                break
    assert judge.reply(ASKED) == judge.tokenizer.decode(expected, skip_special_tokens=True)
    with pytest.raises(CheckpointError):
        LocalJudge.load(str(tmp_path / "none"))


def test_a_recording_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recording"):
        Recording(tmp_path / "judged.jsonl")
