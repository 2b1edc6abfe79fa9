"""A server of a tiny model in this process, on a port of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import uvicorn
from tests.waiting import wait_until

from longvila.inference.engine import Engine
from longvila.inference.serving.app import Server
from longvila.inference.serving.settings import Access, Limits, Settings
from longvila.testing import tiny

__all__ = ["LIMITS", "Access", "Running", "ask", "clip", "data_uri", "replace", "running"]

LIMITS = Limits(
    body_bytes=1 << 20,
    text_chars=20_000,
    upload_bytes=1 << 20,
    stored_bytes=4 << 20,
    media_items=4,
    media_bytes=1 << 20,
    frames=64,
    duration_s=60.0,
    pixels=1 << 20,
    new_tokens=256,
    wait_s=120.0,
    media_s=120.0,
    body_s=120.0,
    write_s=120.0,
)


def clip(path: Path, *, seed: int = 0, num_frames: int = 24) -> Path:
    """Draw a short clip of coloured fields; each seed has colours of its own."""
    chance = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=8, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48 + 16 * (seed % 3), "yuv420p"
        fields = chance.integers(0, 255, (3, 4, 3))
        for number in range(num_frames + seed):
            fields[number % 3, number % 4] = chance.integers(0, 255, 3)
            picture = np.kron(fields, np.ones((16, 16, 1))).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            out.mux(stream.encode(frame.reformat(stream.width, stream.height)))
        out.mux(stream.encode(None))
    return path


def data_uri(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def ask(text: str, *urls: str, **options: Any) -> dict[str, Any]:
    """One user message with videos before its text."""
    parts = [{"type": "video_url", "video_url": {"url": url, **options}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


@dataclass
class Running:
    """A server that listens."""

    url: str
    server: Server
    engine: Engine
    processor: Any
    root: Path
    loop: asyncio.AbstractEventLoop
    ends: bool
    oracle: tuple[Engine, Any] | None = None

    def direct(
        self, messages: list[dict[str, Any]], *, max_new_tokens: int, **processor_kwargs: Any
    ) -> str:
        """Return what the engine answers when asked without a server.

        A model of its own with the same weights, so that the server's is left alone.
        """
        if self.oracle is None:
            model = tiny.tiny_model(config=self.engine.model.config)
            self.oracle = Engine(model), tiny.tiny_processor(model.config)
        engine, processor = self.oracle
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", processor_kwargs=processor_kwargs,
        )  # fmt: skip
        out = engine.generate(
            dict(inputs), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=processor.tokenizer.eos_token_id if self.ends else None,
            pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
        new = out[0, inputs["input_ids"].shape[1] :]
        return str(processor.tokenizer.decode(new, skip_special_tokens=True))


@contextlib.contextmanager
def listening(app: Any) -> Iterator[tuple[str, list[asyncio.AbstractEventLoop]]]:
    """Run an application in a thread; yields its address and its event loop."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def noted(scope: Any, receive: Any, send: Any) -> None:
        loops[:] = [asyncio.get_running_loop()]
        await app(scope, receive, send)

    # A client that asks again is to find its connection open, however late it comes.
    config = uvicorn.Config(
        noted, port=0, log_level="error", timeout_graceful_shutdown=2, timeout_keep_alive=600
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="test-server")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server is starting")
        assert thread.is_alive(), "the server did not start"
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", loops
    finally:
        server.should_exit = True
        thread.join(timeout=120)
        assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def running(
    folder: Path,
    *,
    ends: bool = False,
    lead: Callable[[Engine], Any] = lambda engine: engine,
    mesh: Any = None,
    **changes: Any,
) -> Iterator[Running]:
    """Serve a tiny model; files may be read below ``folder / "root"``.

    Over ranks, ``lead`` makes what stands in for the engine on the first of them.

    Its random weights soon choose the token that ends an answer. Unless ``ends``, that token is one
    like others, and answers are as long as asked for.
    """
    torch.set_num_threads(1)
    root = folder / "root"
    root.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "name": "tiny",
        "limits": LIMITS,
        "access": Access(roots=(root,)),
        "hosts": ("127.0.0.1", "localhost"),
        "frames": 8,
        "new_tokens": 12,
        "kv_bytes": 64 << 20,
        "media_cache_bytes": 8 << 20,
        "slice_tokens": 64,
        **changes,
    }
    processor = tiny.tiny_processor()
    with Engine(tiny.tiny_model(), mesh) as engine:
        talks = lead(engine)
        close = talks.close if talks is not engine else lambda: None
        server = Server(talks, processor, Settings(**values), on_close=close)
        if not ends:
            server.scheduler.stops = frozenset()
        with listening(server.app) as (url, loops):
            yield Running(url, server, engine, processor, root, loops[0], ends)
