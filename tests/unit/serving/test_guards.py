"""Slow senders, slow readers, and names of hosts."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from longvila.inference.serving.guards import Guards, host_name
from longvila.inference.serving.settings import Limits, Settings

from .serving_cases import LIMITS, replace, running


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost", "localhost"), ("LocalHost:80", "localhost"), ("[::1]:80", "::1"),
        ("127.0.0.1:8000", "127.0.0.1"), (" a.b ", "a.b"), ("", ""), ("[::1", "::1"),
    ],
)  # fmt: skip
def test_hosts(header: str, name: str) -> None:
    assert host_name(header) == name


def test_a_body_that_does_not_come_is_given_up(tmp_path: Path) -> None:
    with running(tmp_path, limits=replace(LIMITS, body_s=0.3)) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=40) as plug:
            plug.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            start = time.monotonic()
            answer = plug.recv(4096)
        assert b" 408 " in answer and time.monotonic() - start < 30


def test_an_answer_that_nobody_takes_is_given_up() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    sent: list[Any] = []

    async def stuck(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.sleep(60)

    async def run() -> None:
        guards = Guards(app, Settings(limits=Limits(write_s=0.1)))
        await guards({"type": "http", "headers": []}, None, stuck)  # type: ignore[arg-type]

    start = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - start < 30
    assert (b"x-frame-options", b"DENY") in sent[0]["headers"]
