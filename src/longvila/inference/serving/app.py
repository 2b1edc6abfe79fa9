"""The HTTP application: routes around a `longvila.inference.serving.scheduler.Scheduler`.

| route | |
| --- | --- |
| ``POST /v1/chat/completions`` | OpenAI's, plain or streamed |
| ``GET /v1/models`` | the one model |
| ``PUT /v1/uploads`` | a file ahead of questions about it, named ``upload:ID`` afterwards |
| ``POST /v1/frames`` | the frames that the model would see of a video, small, with their times |
| ``GET /health`` | whether the model's thread runs |
| ``GET /metrics`` | Prometheus' text |
| ``GET /`` | the page, where it is served |

A streamed answer that has nothing to say yet sends comments about how far it is, so that nobody on
the way takes it for dead. When the client leaves, its request is cancelled at the next unit of
work. The event loop does no work of its own: bodies are parsed, media decoded and pictures drawn in
threads.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import io
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from longvila.inference.serving.access import Gate
from longvila.inference.serving.errors import Cancelled, RequestError
from longvila.inference.serving.fetch import Fetcher
from longvila.inference.serving.guards import Guards, read_body
from longvila.inference.serving.jobs import Done, Event, Failed, Job, Piece, Stage
from longvila.inference.serving.media import MediaLoader, Wanted
from longvila.inference.serving.metrics import Metrics
from longvila.inference.serving.protocol import (
    Answer,
    ChatRequest,
    parse_frames,
    parse_request,
    to_question,
)
from longvila.inference.serving.scheduler import GOING_DOWN, Scheduler
from longvila.inference.serving.settings import Settings
from longvila.inference.serving.uploads import Budget, Uploads

log = logging.getLogger(__name__)

Result = TypeVar("Result")

#: Seconds of silence after which a streamed answer says how far it is.
_SILENCE_S = 2.0
_THUMBNAIL = (160, 120)
_MOST_THUMBNAILS = 64
_PAGE = {"": "index.html", "app.js": "app.js", "style.css": "style.css"}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class Server:
    """The parts of a server, put together.

    Args:
        engine: A `longvila.inference.engine.Engine`.
        processor: The model's processor.
        settings: Of the server.
        fetcher: Fetches addresses.
        on_close: Called when the model's thread has stopped; harmless when called again.
    """

    def __init__(
        self,
        engine: Any,
        processor: Any,
        settings: Settings,
        *,
        fetcher: Fetcher | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings, self.on_close = settings, on_close
        self.metrics = Metrics()
        self.uploads = Uploads(settings.limits.stored_bytes)
        self.gate = Gate(settings.access, settings.limits, self.uploads, fetcher)
        try:
            self.loader = MediaLoader(
                processor, self.gate, settings.limits,
                frames=settings.frames, cache_bytes=settings.media_cache_bytes,
            )  # fmt: skip
            self.scheduler = Scheduler(engine, processor, self.loader, settings, self.metrics)
        except BaseException:
            self.uploads.close()
            raise
        self.bodies = Budget(settings.limits.held_bytes, "the server holds too many requests")
        self.metrics.counter("http_responses_total", "Answers by route and status.")
        self.metrics.gauge(
            "upload_bytes", "Bytes of uploaded files.", lambda: {(): self.uploads.num_bytes}
        )
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        self._drawing = asyncio.Semaphore(settings.limits.preparing)
        self.app: Any = Guards(self._application(), settings)

    def close(self) -> None:
        """Stop the model's thread and remove uploads."""
        self.scheduler.close()
        self.uploads.close()
        self.on_close()

    # ---- the application

    def _application(self) -> FastAPI:
        @contextlib.asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            yield
            await run_in_threadpool(self.close)

        # The pages of the schema would load scripts from elsewhere.
        app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("POST", "/v1/chat/completions", self._chat),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{model:path}", self._model),
            ("PUT", "/v1/uploads", self._upload),
            ("POST", "/v1/frames", self._frames),
            ("GET", "/metrics", self._metrics),
        ]
        for method, path, handler in routes:
            methods = ["GET", "HEAD"] if method == "GET" else [method]
            app.add_api_route(
                path, self._guarded(path, handler), methods=methods, response_model=None
            )
        plain: dict[str, Callable[..., Any]] = {"/health": self._health}
        if self.settings.page:
            plain |= {f"/{name}": functools.partial(page_file, name) for name in _PAGE}
        for path, answer in plain.items():
            app.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)
        app.add_exception_handler(HTTPException, _plain_error)
        return app

    def _guarded(
        self, path: str, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._authenticate(request)
                response = await handler(request)
            except RequestError as error:
                response = JSONResponse(error.body(), error.status, error.headers())
            except Cancelled:
                # Nobody reads it; a number for the figures, as other servers have it.
                response = Response(status_code=499)
            except asyncio.CancelledError:
                # The HTTP server ends, and has waited for answers for as long as it does.
                gone = RequestError.unavailable(GOING_DOWN)
                response = JSONResponse(gone.body(), gone.status, gone.headers())
            except Exception:
                log.exception("a request failed")
                response = JSONResponse(RequestError.internal().body(), 500)
            self.metrics.add("http_responses_total", path=path, status=str(response.status_code))
            return response

        return guarded

    def _presented(self, request: Request) -> str:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return key.strip() if scheme.lower() == "bearer" else ""

    def _authenticate(self, request: Request) -> None:
        if not self._keys:
            return
        # A header's bytes come as latin-1, whatever the client meant.
        digest = hashlib.sha256(self._presented(request).encode("latin-1")).digest()
        # All are compared, so that time says nothing.
        if not sum(hmac.compare_digest(digest, key) for key in self._keys):
            raise RequestError(
                "the key is missing or wrong; send it as Authorization: Bearer KEY",
                status=401, code="invalid_api_key",
            )  # fmt: skip

    def _client(self, request: Request) -> str:
        """Who asks: a key where keys are given out, else an address and what it says it is."""
        key = hashlib.sha256(self._presented(request).encode()).hexdigest()[:16]
        if self._keys:
            return key
        return f"{request.client.host if request.client else ''} {key}"

    async def _body(self, request: Request, hold: Hold) -> bytes:
        # A page elsewhere can send other types without asking; this one needs permission.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(
                "send JSON, with Content-Type: application/json", status=415, code="not_json"
            )
        limits = self.settings.limits
        parts = []
        async for piece in read_body(request, limits.body_bytes, limits.body_s):
            hold.take(len(piece))
            parts.append(piece)
        return b"".join(parts)

    # ---- chat

    async def _chat(self, request: Request) -> Response:
        hold = Hold(self.bodies)
        try:
            response = await self._answer(request, hold)
        except BaseException:
            hold.release()
            raise
        if not isinstance(response, EventStream):
            hold.release()
        return response

    async def _answer(self, request: Request, hold: Hold) -> Response:
        body = await self._body(request, hold)
        chat = await run_in_threadpool(parse_request, body)
        question = await run_in_threadpool(to_question, chat, self.settings)
        for wanted in question.media:
            await run_in_threadpool(self.gate.admit, wanted.url)
        del body
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.scheduler.submit(self._client(request), question, emit)
        answer = Answer(chat.model)
        if not chat.stream:
            return await self._whole(request, job, events, answer)
        # The first event decides whether this is an answer at all, with its own status.
        try:
            held = await self._until_text(events)
        except BaseException:
            self.scheduler.cancel(job)
            raise
        pieces = self._stream(events, answer, chat, held)

        def finish() -> None:
            self.scheduler.cancel(job)
            hold.release()

        return EventStream(pieces, finish)

    async def _until_text(self, events: asyncio.Queue[Event]) -> Event | None:
        """Wait a moment for the first text or failure; None if it takes longer."""
        try:
            async with asyncio.timeout(_SILENCE_S):
                while True:
                    event = await events.get()
                    if isinstance(event, Failed):
                        raise event.error
                    if not isinstance(event, Stage):
                        return event
        except TimeoutError:
            return None

    async def _whole(
        self, request: Request, job: Job, events: asyncio.Queue[Event], answer: Answer
    ) -> Response:
        async def collect() -> Response:
            texts: list[str] = []
            while True:
                event = await events.get()
                if isinstance(event, Piece):
                    texts.append(event.text)
                elif isinstance(event, Failed):
                    raise event.error
                elif isinstance(event, Done):
                    return JSONResponse(answer.whole("".join(texts), event))

        try:
            return await unless_left(collect(), request.receive)
        finally:
            self.scheduler.cancel(job)

    async def _stream(
        self,
        events: asyncio.Queue[Event],
        answer: Answer,
        chat: ChatRequest,
        held: Event | None,
    ) -> AsyncIterator[str]:
        stage: Stage | None = None
        yield _sse(answer.chunk({"role": "assistant", "content": ""}))
        while True:
            try:
                async with asyncio.timeout(_SILENCE_S):
                    event, held = held or await events.get(), None
            except TimeoutError:
                yield _comment(stage)
                continue
            if isinstance(event, Stage):
                if stage is None or event.name != stage.name:
                    yield _comment(event)
                stage = event
            elif isinstance(event, Piece):
                yield _sse(answer.chunk({"content": event.text}))
            elif isinstance(event, Failed):
                yield _sse(event.error.body())
                return
            else:
                yield _sse(answer.chunk({}, event))
                if chat.stream_options.include_usage:
                    yield _sse(answer.usage_chunk(event))
                yield "data: [DONE]\n\n"
                return

    # ---- other routes

    def _card(self) -> dict[str, Any]:
        return {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "longvila"}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self.settings.name:
            raise RequestError("there is no such model", status=404, code="model_not_found")
        return JSONResponse(self._card())

    async def _health(self) -> Response:
        alive = self.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.render(), media_type="text/plain; version=0.0.4")

    async def _upload(self, request: Request) -> Response:
        limits = self.settings.limits
        path, hold = self.uploads.new_path(), Hold(self.uploads.incoming)
        try:
            with path.open("wb") as out:
                async for piece in read_body(request, limits.upload_bytes, limits.media_s):
                    hold.take(len(piece))
                    await run_in_threadpool(out.write, piece)
            if path.stat().st_size == 0:
                raise RequestError("the upload is empty", code="invalid_media")
            key = await run_in_threadpool(self.uploads.add, path)
        except OSError as fault:
            log.exception("an upload could not be kept")
            raise RequestError(
                "the server has no room for the file", status=507, code="no_room", retry_after_s=30
            ) from fault
        finally:
            path.unlink(missing_ok=True)
            hold.release()
        return JSONResponse({"url": f"upload:{key}"})

    async def _frames(self, request: Request) -> Response:
        hold, left = Hold(self.bodies), threading.Event()

        def progress(stage: str, done: int, total: int) -> None:
            if left.is_set():
                raise Cancelled

        async def draw(wanted: Wanted) -> dict[str, Any]:
            async with self._drawing:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(None, self._draw, wanted, progress)

        try:
            wanted = await run_in_threadpool(parse_frames, await self._body(request, hold))
            found = await unless_left(draw(wanted), request.receive)
        finally:
            left.set()
            hold.release()
        return JSONResponse(found)

    def _draw(self, wanted: Wanted, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
        medium = self.loader.load(wanted, progress=progress)
        video = medium.video
        assert video is not None
        step = -(-medium.count // _MOST_THUMBNAILS)
        shape = video.metadata.width, video.metadata.height
        scale = min(most / side for most, side in zip(_THUMBNAIL, shape, strict=True))
        size = [max(1, round(scale * side)) for side in shape]
        frames = []
        for number in range(0, medium.count, step):
            picture = Image.fromarray(video.frames[number]).resize(size)
            out = io.BytesIO()
            picture.save(out, "JPEG", quality=80)
            data = base64.b64encode(out.getvalue()).decode()
            time_s = float(video.timestamps_s[number])
            frames.append({"time_s": time_s, "image": f"data:image/jpeg;base64,{data}"})
        return {
            "duration_s": float(video.metadata.duration_s),
            "num_frames": medium.count,
            "frames": frames,
        }


class Hold:
    """What one request has taken of a budget.

    Args:
        budget: The budget.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget, self.count = budget, 0

    def take(self, count: int) -> None:
        """Take more; see `Budget.take`."""
        self.budget.take(count)
        self.count += count

    def release(self) -> None:
        """Give everything back; harmless when repeated."""
        count, self.count = self.count, 0
        self.budget.give(count)


async def unless_left(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Do something for a client, unless it leaves first.

    Args:
        work: What to do; cancelled when the client leaves.
        receive: Tells of the client.

    Returns:
        What the work returns.

    Raises:
        Cancelled: If the client left.
    """

    async def wait_until_left() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(wait_until_left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, until they end or the client leaves.

    Args:
        pieces: The events.
        finish: Called in either case.
    """

    def __init__(self, pieces: AsyncIterator[str], finish: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.pieces, self.finish = pieces, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""

        async def pump() -> None:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            async for piece in self.pieces:
                body = {"body": piece.encode(), "more_body": True}
                await send({"type": "http.response.body", **body})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await unless_left(pump(), receive)
        except Cancelled:
            log.debug("a client left before its answer ended")
        except asyncio.CancelledError:
            # As in `Server._guarded`; by now the answer has begun.
            gone = _sse(RequestError.unavailable(GOING_DOWN).body())
            await send({"type": "http.response.body", "body": gone.encode()})
        finally:
            self.finish()


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _comment(stage: Stage | None) -> str:
    if stage is None:
        return ": waiting\n\n"
    return f": {stage.name} {stage.done} {stage.total}\n\n"


async def _plain_error(request: Request, fault: Exception) -> Response:
    """Give routing's own errors the form of all others."""
    assert isinstance(fault, HTTPException)
    error = RequestError(str(fault.detail), status=fault.status_code, code="no_such_route")
    return JSONResponse(error.body(), error.status, fault.headers)


async def page_file(name: str) -> Response:
    """Return a file of the page."""
    file = _PAGE[name]
    folder = resources.files("longvila.inference.serving") / "page"
    data = Path(str(folder / file)).read_bytes()
    headers = {"Content-Security-Policy": _POLICY}
    return Response(data, media_type=_TYPES[file.rpartition(".")[2]], headers=headers)
