"""Fifty clients of all kinds at once: right answers for all that wait, and nothing left behind.

Good clients ask about files, data and text, plain and streamed, once and in turns; their answers
are known beforehand from the engine. Beside them are clients that send what is wrong, that leave in
the middle, that read slowly, and that speak no HTTP. Every request must end, the good ones in the
right words, and afterwards tasks, threads, files, caches and memory must be what they were.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib.util
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
from tests.waiting import wait_until

from longvila.inference.cache import ShardedCache
from longvila.inference.serving.jobs import Job
from longvila.inference.serving.media import Medium

CLIENTS = 50


def load_cases() -> ModuleType:
    """The helper of the unit tests, which is no package."""
    name = "serving_cases"
    if name not in sys.modules:
        file = Path(__file__).parents[1] / "unit" / "serving" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


cases = load_cases()


@dataclass
class Script:
    """A conversation: questions about one video, and what is said to each."""

    messages: list[list[dict[str, Any]]]
    answers: list[str]


@dataclass
class Seen:
    """What the clients saw."""

    right: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def scripts(server: Any, folder: Path) -> list[Script]:
    """Write conversations and let the engine answer them."""
    found = []
    for number in range(6):
        path = cases.clip(server.root / f"clip{number}.mp4", seed=number)
        url = path.name if number % 2 else cases.data_uri(path)
        asked: list[dict[str, Any]] = []
        direct: list[dict[str, Any]] = []
        messages, answers = [], []
        for turn in range(3):
            text = f"Question {number}.{turn}?"
            if turn == 0 and number != 5:
                asked.append(cases.ask(text, url, num_frames=3 + number))
                video = {"type": "video", "video": str(path)}
                direct.append({"role": "user", "content": [video, {"type": "text", "text": text}]})
            else:
                asked.append({"role": "user", "content": text})
                direct.append({"role": "user", "content": text})
            messages.append(list(asked))
            said = server.direct(direct, max_new_tokens=12 + turn, num_frames=3 + number)
            answers.append(said)
            for each in (asked, direct):
                each.append({"role": "assistant", "content": said})
        found.append(Script(messages, answers))
    return found


BAD: list[tuple[dict[str, Any], int]] = [
    ({"model": "other"}, 404),
    ({"messages": "no"}, 400),
    ({"messages": [cases.ask("?", "../secret.mp4")]}, 403),
    ({"messages": [cases.ask("?", "/etc/passwd")]}, 403),
    ({"messages": [cases.ask("?", "http://169.254.169.254/latest/")]}, 403),
    ({"messages": [cases.ask("?", "data:video/mp4;base64,AAAA")]}, 400),
    ({"messages": [cases.ask("?", "broken.mp4")]}, 400),
    ({"messages": [cases.ask("?", "clip1.mp4", num_frames=9999)]}, 400),
    ({"messages": [{"role": "user", "content": "x" * 20000}]}, 400),
    ({"max_tokens": 10**9}, 400),
    ({"tools": [{}]}, 400),
    ({"seed": "a"}, 400),
]


class Crowd:
    """The clients of a server.

    Args:
        server: The server.
        known: Conversations with their answers.
        until: When clients stop asking, if all kinds of them have been answered.
    """

    KINDS = frozenset({"talk", "stream", "dawdle", "spoil", "leave", "babble"})

    def __init__(self, server: Any, known: list[Script], until: float) -> None:
        self.server, self.known, self.until = server, known, until
        self.seen = Seen()

    def goes_on(self) -> bool:
        """A slow machine has more time, so that each kind has had its turn."""
        late = time.monotonic() - self.until
        return late < 0 or (late < 120 and not set(self.seen.right) >= self.KINDS)

    async def run(self) -> None:
        kinds = [
            self.talk,
            self.talk,
            self.stream,
            self.spoil,
            self.leave,
            self.dawdle,
            self.babble,
        ]
        await asyncio.gather(
            *(self.client(number, kinds[number % len(kinds)]) for number in range(CLIENTS))
        )

    async def client(self, number: int, act: Any) -> None:
        chance = random.Random(number)
        async with openai.AsyncOpenAI(
            base_url=f"{self.server.url}/v1", api_key=f"key{number}", max_retries=0, timeout=120
        ) as api:
            while self.goes_on():
                try:
                    await act(api, chance)
                except Exception as fault:
                    self.seen.wrong.append(f"{act.__name__}: {type(fault).__name__}: {fault}")
                await asyncio.sleep(chance.uniform(0, 0.2))

    def check(self, name: str, said: str | None, expected: str) -> None:
        if said == expected:
            self.seen.right[name] += 1
        else:
            self.seen.wrong.append(f"{name}: said {said!r}, not {expected!r}")

    async def talk(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        script = chance.choice(self.known)
        for turn in range(chance.randint(1, 3)):
            answer = await api.chat.completions.create(
                model="tiny", messages=script.messages[turn], max_tokens=12 + turn
            )  # type: ignore[call-overload]
            self.check("talk", answer.choices[0].message.content, script.answers[turn])

    async def stream(
        self, api: openai.AsyncOpenAI, chance: random.Random, pause: float = 0.0
    ) -> None:
        script, turn = chance.choice(self.known), chance.randrange(3)
        chunks = await api.chat.completions.create(
            model="tiny", messages=script.messages[turn], max_tokens=12 + turn, stream=True
        )  # type: ignore[call-overload]
        said, ended = "", None
        async for chunk in chunks:
            said += chunk.choices[0].delta.content or ""
            ended = chunk.choices[0].finish_reason
            await asyncio.sleep(pause)
        assert ended in ("stop", "length"), f"the stream ended with {ended}"
        self.check("dawdle" if pause else "stream", said, script.answers[turn])

    async def dawdle(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        await self.stream(api, chance, pause=0.1)

    async def spoil(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        change, status = chance.choice(BAD)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **change}
        body["stream"] = chance.random() < 0.5
        try:
            said = await api.post("/chat/completions", body=body, cast_to=str)
        except openai.APIStatusError as error:
            assert error.status_code == status, f"{change}: {error}"
            self.seen.right["spoil"] += 1
        else:
            # What is found out after a while can only be said inside a stream that has begun.
            assert body["stream"], f"{change} was answered"
            assert '"error"' in said and '"finish_reason": "' not in said, f"{change}: {said}"
            self.seen.right["spoil"] += 1

    async def leave(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        script = chance.choice(self.known)
        options: dict[str, Any] = {
            "model": "tiny", "messages": script.messages[0], "max_tokens": 200, "temperature": 2.0,
        }  # fmt: skip
        if chance.random() < 0.5:
            chunks = await api.chat.completions.create(**options, stream=True)
            async for _ in chunks:
                if chance.random() < 0.3:
                    break
            await chunks.close()
        else:
            try:
                patient = api.with_options(timeout=chance.uniform(0.01, 0.3))
                await patient.chat.completions.create(**options)
            except openai.APITimeoutError:
                self.seen.right["left"] += 1
        self.seen.right["leave"] += 1

    async def babble(self, api: openai.AsyncOpenAI, chance: random.Random) -> None:
        port = int(self.server.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        kind = b"Content-Type: application/json\r\n"
        writer.write(
            chance.choice(
                [
                    b"\x16\x03\x01\x02\x00\x01",
                    head + kind + b"Content-Length: 1000\r\n\r\n{",
                    head + kind + b"Content-Length: 99999999\r\n\r\n" + b" " * 5000,
                    head + b"Content-Length: nine\r\n\r\n",
                    head + kind + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n{",
                    b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
                    b"GET /" + b"a" * 100_000,
                ]
            )
        )
        try:
            await writer.drain()
            async with asyncio.timeout(chance.uniform(0.01, 0.3)):
                await reader.read(100)
        except (TimeoutError, ConnectionError):
            self.seen.right["hung up"] += 1
        writer.close()
        self.seen.right["babble"] += 1


# ---- what must be as before


def alive(kind: type) -> int:
    return sum(type(thing) is kind for thing in gc.get_objects())


def resident_mib() -> float:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def wait_for_quiet(server: Any, tasks: int) -> None:
    counts = server.server.scheduler.counts
    wait_until(
        lambda: not any(counts().values()) and len(asyncio.all_tasks(server.loop)) <= tasks,
        lambda: f"{counts()}, {[str(t) for t in asyncio.all_tasks(server.loop)]}",
    )


def left_behind(server: Any, files: int) -> dict[str, int]:
    """Count what the server still has of requests that have ended."""
    gc.collect()
    inner = server.server
    found = {
        "requests": alive(Job),
        "key-value caches": alive(ShardedCache) - len(inner.scheduler.prefix),
        "media": alive(Medium) - len(inner.loader.kept),
        "shares of clients": len(inner.scheduler._spent),
        "bytes of bodies": inner.bodies.taken + inner.uploads.incoming.taken,
        "open files": max(0, len(os.listdir("/proc/self/fd")) - files - 2),
    }
    return {name: count for name, count in found.items() if count}


def check_clean(server: Any, tasks: int, files: int) -> None:
    wait_for_quiet(server, tasks)
    # Threads let go of the last request, and sockets of clients that are gone, in their own time.
    wait_until(lambda: not left_behind(server, files), lambda: left_behind(server, files))
    inner = server.server
    assert inner.loader.kept.weight <= inner.settings.media_cache_bytes
    from longvila.inference.serving.prefix import shared_bytes

    kept = shared_bytes(entry.cache for entry in inner.scheduler.prefix.entries)
    assert kept <= inner.settings.kv_bytes


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = replace(cases.LIMITS, waiting=2 * CLIENTS)
    # Little room, so that what is kept has to go again and again.
    sizes = {"kv_bytes": 2 << 20, "media_cache_bytes": 100 << 10}
    with cases.running(tmp_path, limits=limits, **sizes) as server:
        (tmp_path / "secret.mp4").write_bytes(b"secret")
        (server.root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"x" * 500)
        yield server
    assert not list(tmp_path.glob("longvila-*")), "temporary files were left behind"


@pytest.mark.parametrize("seconds", [6, pytest.param(120, marks=[pytest.mark.slow])])
@pytest.mark.timeout(900)
def test_fifty_clients_at_once(server: Any, tmp_path: Path, seconds: float) -> None:
    known = scripts(server, tmp_path)
    said = [answer for script in known for answer in script.answers]
    assert len(set(said)) == len(said), "answers that do not depend on the question prove nothing"
    # The first round fills pools and caches; what it leaves is the measure for the second.
    tasks = len(asyncio.all_tasks(server.loop))
    first = Crowd(server, known, time.monotonic() + seconds / 3)
    asyncio.run(first.run())
    wait_for_quiet(server, tasks)
    files, memory = len(os.listdir("/proc/self/fd")), resident_mib()
    rounds, grown = [first.seen], []
    # A leak grows by every round; pools that a slow first round did not fill grow once.
    while not grown or (grown[-1] >= 20 and len(grown) < 4):
        crowd = Crowd(server, known, time.monotonic() + seconds * 2 / 3)
        asyncio.run(crowd.run())
        check_clean(server, tasks, files)
        rounds.append(crowd.seen)
        now = resident_mib()
        grown.append(now - memory)
        memory = now
    print(json.dumps({"grown_mib": [round(each, 1) for each in grown], **rounds[-1].right}))
    for seen in rounds:
        assert not seen.wrong, f"{len(seen.wrong)} wrong, the first: {seen.wrong[:3]}"
        assert set(seen.right) >= Crowd.KINDS, f"no {Crowd.KINDS - set(seen.right)}"
    assert grown[-1] < 20, f"every round takes more memory, in MiB: {grown}"
    metrics = server.server.metrics
    answered = metrics.value("requests_total", outcome="answered")
    waited_for = sum(seen.right[kind] for seen in rounds for kind in ("talk", "stream", "dawdle"))
    assert answered >= waited_for
    assert metrics.value("requests_total", outcome="failed") == 0
    assert metrics.value("requests_total", outcome="cancelled") > 0
    assert metrics.value("reused_tokens_total") > metrics.value("read_tokens_total")
