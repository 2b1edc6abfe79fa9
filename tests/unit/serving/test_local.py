"""A server for the time of a block."""

from __future__ import annotations

import socket
import tempfile
import threading
from pathlib import Path

import openai
import pytest

from longvila.inference.engine import Engine
from longvila.inference.serving.local import LocalServer
from longvila.inference.serving.settings import Settings
from longvila.testing import tiny


def test_a_block_with_a_server() -> None:
    model, processor = tiny.tiny_model(), tiny.tiny_processor()
    before = set(threading.enumerate())
    for _ in range(2):
        with (
            LocalServer(model, processor, Settings(name="mine", new_tokens=3)) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
        ):
            answer = client.chat.completions.create(
                model="mine", messages=[{"role": "user", "content": "Hello"}]
            )
            assert answer.usage is not None and answer.usage.completion_tokens <= 3
        # A pool's idle worker ends a moment after its pool.
        left = [thread for thread in threading.enumerate() if thread not in before]
        for thread in left:
            thread.join(timeout=120)
        assert not [thread for thread in left if thread.is_alive()]
        Engine(model).close()  # the model is free again


def test_a_server_that_cannot_start_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny.tiny_model(), tiny.tiny_processor()
    model.generation_config.min_length = 3
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="min_length"), LocalServer(model, processor):
        pass
    assert not list(tmp_path.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="use"), LocalServer(model, processor, port=port):
            pass
    Engine(model).close()
