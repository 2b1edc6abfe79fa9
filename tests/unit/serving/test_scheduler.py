"""Whose turn it is, what is shared, what is kept, and what happens when something breaks."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.waiting import wait_until

from longvila.inference.engine import Engine
from longvila.inference.serving import scheduler as scheduler_module
from longvila.inference.serving.access import Gate
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.jobs import Done, Event, Failed, Job, Piece, Question
from longvila.inference.serving.media import MediaLoader, Wanted
from longvila.inference.serving.prefix import shared_bytes
from longvila.inference.serving.sampling import Sampling
from longvila.inference.serving.scheduler import Scheduler
from longvila.inference.serving.settings import Access, Settings
from longvila.inference.serving.uploads import Uploads
from longvila.testing import tiny

from .serving_cases import LIMITS, clip


class Bench:
    """A scheduler of a tiny model, without HTTP."""

    def __init__(self, root: Path, **changes: Any) -> None:
        self.processor = tiny.tiny_processor()
        self.settings = Settings(
            **{
                "limits": LIMITS, "access": Access(roots=(root,)), "frames": 4,
                "kv_bytes": 64 << 20, "slice_tokens": 64, **changes,
            }
        )  # fmt: skip
        self.engine = Engine(tiny.tiny_model())
        gate = Gate(self.settings.access, self.settings.limits, Uploads(1))
        self.loader = MediaLoader(
            self.processor, gate, self.settings.limits, frames=4, cache_bytes=1 << 20
        )
        self.scheduler = Scheduler(self.engine, self.processor, self.loader, self.settings)
        self.scheduler.stops = frozenset()  # answers are as long as asked for
        self.units: Units | None = None

    def ask(
        self, client: str, text: str, *, new: int = 4, video: str | None = None, **sampling: Any
    ) -> Asked:
        items: list[dict[str, str]] = [{"type": "text", "text": text}]
        media: tuple[Wanted, ...] = ()
        if video is not None:
            items, media = [{"type": "video"}, *items], (Wanted("video", video),)
        question = Question(({"role": "user", "content": items},), media, Sampling(new, **sampling))
        asked = Asked()
        asked.job = self.scheduler.submit(client, question, asked.take)
        return asked


class Asked:
    """What becomes of a request."""

    job: Job

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def take(self, event: Event) -> None:
        self.events.put(event)

    def wait(self) -> tuple[str, Done]:
        text = ""
        while True:
            event = self.events.get(timeout=120)
            if isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Done):
                return text, event
            elif isinstance(event, Failed):
                raise event.error

    def until(self, kind: type[Event]) -> None:
        while not isinstance(self.events.get(timeout=120), kind):
            continue

    def until_ready(self) -> None:
        wait_until(lambda: self.job.state in ("ready", "active"), lambda: self.job.state)


Make = Callable[..., Bench]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    for seed, name in enumerate("ab"):
        clip(tmp_path / f"{name}.mp4", seed=seed)
    benches: list[Bench] = []

    def build(**changes: Any) -> Bench:
        benches.append(Bench(tmp_path, **changes))
        return benches[-1]

    yield build
    for bench in benches:
        if bench.units is not None:
            bench.units.free()
        bench.scheduler.close()
        bench.engine.close()


class Units:
    """The model's work, a unit at a time: each begins when it is let, and takes a time that is set.

    The scheduler sees this clock, not the machine's, so that no load has a say in who is next.

    Attributes:
        done: The client, the number of the request and the kind of each unit.
        most: Most requests that were active at once.
    """

    def __init__(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, *, read: float, write: float
    ) -> None:
        self.done: list[tuple[str, int, str]] = []
        self.now, self.most = 0.0, 0
        self._let = threading.Semaphore(0)
        bench.units, self._scheduler = self, bench.scheduler
        choose, unit, engine = bench.scheduler._next, bench.scheduler._unit, bench.engine

        def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                self.now += seconds
                return work(*arguments, **options)

            return run

        def choose_when_let() -> Job | None:
            job = choose()
            return job if job is not None and self._let.acquire(blocking=False) else None

        def noted(job: Job) -> None:
            assert job.prompt is not None
            kind = "read" if job.read < len(job.prompt) else "write"
            self.most = max(self.most, bench.scheduler.counts()["active"])
            unit(job)
            self.done.append((job.client, job.number, kind))

        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=time.monotonic)
        monkeypatch.setattr(scheduler_module, "time", clock)
        monkeypatch.setattr(engine, "prefill", taking(read, engine.prefill))
        monkeypatch.setattr(engine, "decode", taking(write, engine.decode))
        monkeypatch.setattr(bench.scheduler, "_next", choose_when_let)
        monkeypatch.setattr(bench.scheduler, "_unit", noted)

    def run(self, count: int) -> None:
        """Let so many units more be done, and wait for them."""
        end = len(self.done) + count
        self._release(count)
        wait_until(lambda: len(self.done) == end, lambda: f"{len(self.done)} of {end} units")

    def free(self) -> None:
        """Let all be done."""
        self._release(10_000)

    def _release(self, count: int) -> None:
        self._let.release(count)
        with self._scheduler._changed:
            self._scheduler._poke()

    def beside(self, client: str) -> list[tuple[str, int, str]]:
        """What was done from the first unit of a client to its last."""
        own = [place for place, unit in enumerate(self.done) if unit[0] == client]
        return self.done[own[0] : own[-1] + 1]


# ---- turns


def test_a_long_prompt_takes_half_of_the_time_and_no_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token after every slice would be ten times slower than this."""
    bench = make(slice_tokens=16)
    units = Units(bench, monkeypatch, read=0.05, write=0.005)
    writer = bench.ask("writer", "w", new=250)
    units.run(20)
    reader = bench.ask("reader", "x" * 300, new=1)
    reader.until_ready()
    units.free()
    reader.wait()
    writer.wait()
    assert units.done[-1][0] == "writer", "the writer was done before the reader"
    kinds = [kind for _, _, kind in units.beside("reader")]
    read, write = 0.05 * kinds.count("read"), 0.005 * kinds.count("write")
    assert 0.7 < write / read < 1.4, f"{read:.2f} s of reading, {write:.2f} s of writing"


def test_many_requests_do_not_buy_more_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    units = Units(bench, monkeypatch, read=0.0, write=0.005)
    crowd = [bench.ask("crowd", f"request {n}", new=200) for n in range(5)]
    for asked in crowd:
        asked.until_ready()
    units.run(25)
    one = bench.ask("one", "a single request", new=60)
    one.until_ready()
    units.free()
    for asked in (one, *crowd):
        asked.wait()
    beside = units.beside("one")
    theirs = sum(client == "crowd" for client, _, _ in beside)
    assert 30 < theirs < 100, f"{theirs} units of five requests beside 60 of one"
    until_then = units.done[: units.done.index(("one", one.job.number, "read"))] + beside
    counts = [until_then.count(("crowd", asked.job.number, "write")) for asked in crowd]
    assert max(counts) - min(counts) <= 4, "a client's own requests go on together"


def test_an_idle_client_does_not_save_time_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    units = Units(bench, monkeypatch, read=0.0, write=0.005)
    busy = bench.ask("busy", "writes for long", new=250)
    units.run(80)
    late = bench.ask("late", "comes later", new=60)
    late.until_ready()
    units.free()
    late.wait()
    busy.wait()
    beside = sum(client == "busy" for client, _, _ in units.beside("late"))
    # With time saved up it were next to 0.
    assert beside > 50, f"the busy client had {beside} units beside 60"


def test_long_answers_of_one_client_keep_nobody_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(limits=replace(LIMITS, active=2))
    units = Units(bench, monkeypatch, read=0.0, write=0.01)
    crowd = [bench.ask("crowd", f"request {n}", new=200) for n in range(4)]
    for asked in crowd:
        asked.until_ready()
    units.run(3)
    one = bench.ask("one", "a single request", new=3)
    one.until_ready()
    while one.job.state != "done":
        units.run(1)
    assert one.wait()[1].new_tokens == 3
    assert [asked.job.state for asked in crowd] == ["active", "ready", "ready", "ready"]
    for asked in crowd:
        bench.scheduler.cancel(asked.job)


def test_slow_downloads_of_one_client_keep_nobody_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(limits=replace(LIMITS, preparing=2))
    stuck, load = threading.Event(), bench.loader.load

    def slow_load(wanted: Wanted, **options: Any) -> Any:
        if wanted.url == "slow":
            assert stuck.wait(200)
            raise RequestError("slow")
        return load(wanted, **options)

    monkeypatch.setattr(bench.loader, "load", slow_load)
    crowd = [bench.ask("crowd", f"request {n}", video="slow") for n in range(6)]
    assert bench.ask("one", "with a film", video="a.mp4").wait()[1].new_tokens == 4
    assert bench.ask("crowd", "only text").wait()[1].new_tokens == 4
    stuck.set()
    for asked in crowd:
        with pytest.raises(RequestError, match="slow"):
            asked.wait()


def test_media_are_prepared_for_clients_in_turn(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(limits=replace(LIMITS, preparing=1, active=1))
    begun: list[str] = []
    all_asked, load = threading.Event(), bench.scheduler._load

    def noted(job: Job) -> Any:
        begun.append(job.client)
        assert all_asked.wait(100)
        return load(job)

    monkeypatch.setattr(bench.scheduler, "_load", noted)
    crowd = [bench.ask("crowd", f"request {n}", video="a.mp4") for n in range(6)]
    one = bench.ask("one", "a single request", video="b.mp4")
    all_asked.set()
    one.wait()
    assert begun.index("one") == 1, begun
    for asked in crowd:
        asked.wait()


# ---- sharing


def test_a_film_that_many_send_at_once_is_read_once(make: Make) -> None:
    bench = make(slice_tokens=12)
    asked = [bench.ask(f"client {n}", f"Question {n}", video="a.mp4", new=5) for n in range(6)]
    done = [one.wait()[1] for one in asked]
    total = sum(d.prompt_tokens for d in done)
    read = bench.scheduler.metrics.value("read_tokens_total")
    assert sum(d.cached_tokens for d in done) == total - read
    assert read < done[0].prompt_tokens + 5 * 40, f"{read} of {total} tokens were read"


def test_another_film_with_the_same_words_is_not_mistaken(make: Make) -> None:
    bench = make()
    first, _ = bench.ask("x", "What?", video="a.mp4", new=12).wait()
    other, done = bench.ask("x", "What?", video="b.mp4", new=12).wait()
    assert first != other and done.cached_tokens < 60
    again, done = bench.ask("y", "What?", video="a.mp4", new=12).wait()
    assert again == first and done.cached_tokens == done.prompt_tokens - 1


def test_what_is_kept_stays_within_its_budget(make: Make) -> None:
    token = 2 * 2 * 2 * 8 * 4
    bench = make(kv_bytes=1500 * token)
    assert bench.scheduler.token_bytes == token
    for number in range(12):
        bench.ask("x", f"{number} " + "y" * 300, new=4).wait()
        entries = bench.scheduler.prefix.entries
        assert shared_bytes(e.cache for e in entries) <= bench.settings.kv_bytes
    assert 1 <= len(entries) < 12, "the oldest go, the last stays"
    _, done = bench.ask("x", "11 " + "y" * 300, new=4).wait()
    assert done.cached_tokens == done.prompt_tokens - 1


def test_requests_wait_for_memory_and_all_are_answered(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = 2 * 2 * 2 * 8 * 4
    bench = make(kv_bytes=1200 * token)
    units = Units(bench, monkeypatch, read=0.001, write=0.001)
    asked = [bench.ask(f"c{n}", f"{n}" * 400, new=40) for n in range(6)]
    for one in asked:
        one.until_ready()
    units.free()
    for one in asked:
        assert one.wait()[1].new_tokens == 40
    assert 1 <= units.most <= 3, f"{units.most} active at once"
    with pytest.raises(RequestError, match="do not fit the server's memory"):
        bench.ask("x", "z" * 1100, new=200).wait()


def test_a_request_that_is_cancelled_leaves_what_was_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(slice_tokens=32)
    units = Units(bench, monkeypatch, read=0.05, write=0.0)
    asked = bench.ask("x", "q" * 300, new=4)
    units.run(2)
    assert asked.job.read == 64
    bench.scheduler.cancel(asked.job)
    bench.scheduler.cancel(asked.job)
    units.free()
    wait_until(lambda: not bench.scheduler.counts()["active"], "a cancelled request is active")
    assert all(not isinstance(e, Done | Failed) for e in list(asked.events.queue))
    _, done = bench.ask("x", "q" * 300, new=4).wait()
    assert 64 <= done.cached_tokens < done.prompt_tokens - 1
    assert bench.scheduler.metrics.value("requests_total", outcome="cancelled") == 1


# ---- answers


def test_a_seed_gives_the_same_answer_in_any_company(make: Make) -> None:
    bench = make()
    options: dict[str, Any] = {"new": 30, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    alone = bench.ask("x", "Say it", seed=5, **options).wait()[0]
    beside = [bench.ask(f"c{n}", "Say it", seed=n, **options) for n in range(4)]
    again = bench.ask("x", "Say it", seed=5, **options).wait()[0]
    others = {one.wait()[0] for one in beside}
    assert again == alone and len(others | {alone}) == 5


def test_the_repetition_penalty_of_the_model_is_kept(tmp_path: Path, make: Make) -> None:
    bench = make()
    config = bench.engine.model.generation_config
    plain, _ = bench.ask("x", "Say it", new=20).wait()
    config.repetition_penalty = 1.7
    penal, _ = bench.ask("x", "Say it", new=20).wait()
    inputs = bench.processor.apply_chat_template(
        [{"role": "user", "content": "Say it"}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    bench.scheduler.close()
    out = bench.engine.generate(
        dict(inputs), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    new = out[0, inputs["input_ids"].shape[1] :]
    assert penal == bench.processor.tokenizer.decode(new, skip_special_tokens=True) != plain


# ---- faults


def test_one_failure_is_one_failure(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    good = bench.ask("x", "before", new=6).wait()[0]
    decode, broken = bench.engine.decode, threading.Event()

    def fail_once(*arguments: Any) -> Any:
        if not broken.is_set():
            broken.set()
            raise RuntimeError("a fault of the model")
        return decode(*arguments)

    monkeypatch.setattr(bench.engine, "decode", fail_once)
    with pytest.raises(RequestError, match="log says why") as caught:
        bench.ask("x", "fails", new=6).wait()
    assert caught.value.status == 500
    assert bench.ask("x", "before", new=6).wait()[0] == good
    assert bench.scheduler.alive


def test_out_of_memory_empties_what_is_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    bench.ask("x", "kept", new=2).wait()
    assert len(bench.scheduler.prefix) == 1
    prefill = bench.engine.prefill

    def full(*arguments: Any, **options: Any) -> Any:
        if len(bench.scheduler.prefix):
            raise torch.OutOfMemoryError("full")
        return prefill(*arguments, **options)

    monkeypatch.setattr(bench.engine, "prefill", full)
    with pytest.raises(RequestError, match="fewer frames") as caught:
        bench.ask("x", "more", new=2).wait()
    assert caught.value.status == 503 and caught.value.headers()["Retry-After"]
    assert bench.ask("x", "again", new=2).wait()[1].new_tokens == 2


def test_nobody_waits_for_a_thread_that_died(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()

    def die() -> None:
        raise MemoryError("the loop itself")

    monkeypatch.setattr(bench.scheduler, "_admit", die)
    with pytest.raises(RequestError) as caught:
        bench.ask("x", "hello").wait()
    assert caught.value.status == 503 and not bench.scheduler.alive
    with pytest.raises(RequestError):
        bench.ask("x", "hello").wait()


def test_waiting_too_long_is_an_answer_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make(limits=replace(LIMITS, active=1))
    units = Units(bench, monkeypatch, read=0.0, write=0.01)
    first = bench.ask("x", "long", new=200)
    wait_until(lambda: first.job.state == "active", lambda: first.job.state)
    bench.scheduler.limits = replace(LIMITS, active=1, wait_s=0.001)
    second = bench.ask("y", "short")
    time.sleep(0.002)
    units.free()
    with pytest.raises(RequestError, match="waited longer") as caught:
        second.wait()
    assert caught.value.status == 503 and caught.value.retry_after_s
    bench.scheduler.cancel(first.job)


def test_closing_answers_everybody_and_leaves_nothing(make: Make) -> None:
    before = set(threading.enumerate())
    bench = make()
    asked = [bench.ask(f"c{n}", "on and on", new=250, video="a.mp4") for n in range(12)]
    bench.scheduler.close()
    for one in asked:
        with pytest.raises(RequestError, match="going down"):
            one.wait()
    with pytest.raises(RequestError, match="going down"):
        bench.ask("late", "hello")
    gc.collect()
    assert not len(bench.scheduler.prefix) and not bench.scheduler._jobs
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("where", ["preparing", "active"])
def test_closing_answers_those_whose_work_is_given_up(
    make: Make, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Work that notices the end before the end notices it."""
    bench = make()
    begun, load, sweep = threading.Event(), bench.loader.load, bench.scheduler._sweep

    def load_until_closed(wanted: Wanted, **options: Any) -> Any:
        begun.set()
        assert asked.job.cancelled.wait(100)
        return load(wanted, **options)

    def sweep_once_closed() -> None:
        if bench.scheduler.counts()["active"]:
            begun.set()
            assert asked.job.cancelled.wait(100)
        sweep()

    if where == "preparing":
        monkeypatch.setattr(bench.loader, "load", load_until_closed)
    else:
        monkeypatch.setattr(bench.scheduler, "_sweep", sweep_once_closed)
    asked = bench.ask("x", "on and on", new=250, video="a.mp4")
    assert begun.wait(100)
    bench.scheduler.close()
    with pytest.raises(RequestError, match="going down"):
        asked.wait()


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path, make: Make) -> None:
    bench = make()
    bench.scheduler.close()
    bench.engine.model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match="no_repeat_ngram_size=3"):
        Scheduler(bench.engine, bench.processor, bench.loader, bench.settings)
