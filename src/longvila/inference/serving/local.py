"""A server inside this process: for notebooks, scripts and tests.

    with LocalServer(model, processor, Settings(name="mine")) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")

The application runs in a thread with an event loop of its own, the model in another. Leaving the
block answers what is under way with an error, stops both threads and gives the model back its own
forward.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import uvicorn

from longvila.inference.engine import Engine
from longvila.inference.serving.app import Server
from longvila.inference.serving.settings import Settings


class LocalServer:
    """Serves a model on a port of this machine while a block runs.

    Args:
        model: A model of a known family in evaluation mode; nobody else may use it meanwhile.
        processor: Its processor.
        settings: Of the server.
        port: Port; 0 for any that is free.

    Attributes:
        server: The `longvila.inference.serving.app.Server`, inside the block.
    """

    server: Server

    def __init__(
        self, model: Any, processor: Any, settings: Settings | None = None, *, port: int = 0
    ) -> None:
        self.model, self.processor, self.port = model, processor, port
        self.settings = settings or Settings()

    def __enter__(self) -> str:
        """Start; return the server's address."""
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(Engine(self.model))
            listener = stack.enter_context(socket.create_server(("127.0.0.1", self.port)))
            self.server = Server(engine, self.processor, self.settings)
            stack.callback(self.server.close)
            self._held = stack.pop_all()
        config = uvicorn.Config(self.server.app, log_level="error", timeout_graceful_shutdown=2)
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._uvicorn.run, args=([listener],), name="longvila-http"
        )
        self._thread.start()
        # The socket listens already: whoever connects waits until the application is there.
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def __exit__(self, *failure: object) -> None:
        """Stop."""
        self._uvicorn.should_exit = True
        self._thread.join()
        self._held.close()
