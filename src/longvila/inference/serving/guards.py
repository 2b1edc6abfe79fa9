"""What stands before every route, on the ASGI level: whom a request is for, and how fast it goes.

- The host must be one that the server answers to: a page elsewhere that points a name of its own at
  this machine gets nothing.
- A body is read up to a bound of bytes and seconds, whatever its header promises.
- An answer that nobody takes is given up after a while, and its request with it.
- Every answer says that its type is meant, and that no other page may frame it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longvila.inference.serving.access import shorten
from longvila.inference.serving.errors import Cancelled, RequestError
from longvila.inference.serving.settings import Settings

log = logging.getLogger(__name__)

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


def host_name(header: str) -> str:
    """Return the host of a Host header without its port, in small letters."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


class Guards:
    """ASGI middleware; see the module.

    Args:
        app: What is behind.
        settings: Of the server.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.hosts = {host.lower() for host in settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if self.hosts and host_name(given) not in self.hosts:
            error = RequestError(
                "the request is addressed to another host; start the server with --host-names",
                status=421, code="wrong_host",
            )  # fmt: skip
            await JSONResponse(error.body(), error.status)(scope, receive, send)
            return

        async def patient_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            async with asyncio.timeout(self.settings.limits.write_s):
                await send(message)

        try:
            await self.app(scope, receive, patient_send)
        except TimeoutError:
            log.warning("a client did not read its answer; it was given up")


async def read_body(request: Request, limit: int, seconds: float) -> AsyncIterator[bytes]:
    """Yield the pieces of a body.

    Args:
        request: The request.
        limit: Most bytes.
        seconds: Most seconds for all of it.

    Raises:
        RequestError: If it is too large, too slow, or compressed.
        Cancelled: If the client left.
    """
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise RequestError(
            f"Content-Encoding {shorten(coding)} is not undone here; send the body as it is",
            status=415, code="content_encoding",
        )  # fmt: skip
    too_large = RequestError(
        f"the request is larger than the {limit} bytes that are taken; send fewer or smaller media",
        status=413,
        code="body_too_large",
    )
    promised = request.headers.get("content-length", "0")
    if promised.isdecimal() and int(promised) > limit:
        raise too_large
    size = 0
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    pieces = request.stream()
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(pieces, None)
        except TimeoutError:
            raise RequestError(
                f"the body did not come within {seconds:.0f} s", status=408, code="body_timeout"
            ) from None
        except ClientDisconnect:
            raise Cancelled from None
        if piece is None:
            return
        size += len(piece)
        if size > limit:
            raise too_large
        yield piece
