"""Whose turn it is, what is shared, what is kept, and what happens when something breaks."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longvila.inference.engine import Engine
from longvila.inference.serving.access import Gate
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.jobs import Done, Event, Failed, Job, Piece, Question, Stage
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

    def wait(self, seconds: float = 20.0) -> tuple[str, Done]:
        text, deadline = "", time.monotonic() + seconds
        while True:
            event = self.events.get(timeout=max(0.01, deadline - time.monotonic()))
            if isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Done):
                return text, event
            elif isinstance(event, Failed):
                raise event.error

    def until(self, kind: type[Event]) -> None:
        while not isinstance(self.events.get(timeout=20), kind):
            continue


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
        bench.scheduler.close()
        bench.engine.close()


def slow_down(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, *, read: float, write: float
) -> dict[str, float]:
    """Let each unit take longer; returns what all of them took, which goes on growing."""
    prefill, decode = bench.engine.prefill, bench.engine.decode
    spent = {"read": 0.0, "write": 0.0}

    def slowly(name: str, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            time.sleep(seconds)
            try:
                return work(*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    monkeypatch.setattr(bench.engine, "prefill", slowly("read", read, prefill))
    monkeypatch.setattr(bench.engine, "decode", slowly("write", write, decode))
    return spent


# ---- turns


def test_a_long_prompt_takes_half_of_the_time_and_no_more(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token after every slice would be ten times slower than this."""
    bench = make(slice_tokens=16)
    spent = slow_down(bench, monkeypatch, read=0.05, write=0.005)
    writer = bench.ask("writer", "w", new=250)
    writer.until(Stage)
    reader = bench.ask("reader", "x" * 300, new=1)
    before = dict(spent)
    reader.wait(30)
    read, write = (spent[name] - before[name] for name in ("read", "write"))
    assert writer.job.state == "active", "the writer was done before the reader"
    assert 0.7 < write / read < 1.4, f"{read:.2f} s of reading, {write:.2f} s of writing"
    bench.scheduler.cancel(writer.job)


def test_many_requests_do_not_buy_more_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    slow_down(bench, monkeypatch, read=0.0, write=0.005)
    crowd = [bench.ask("crowd", f"request {n}", new=200) for n in range(5)]
    for asked in crowd:
        asked.until(Piece)
    before = [len(asked.job.new) for asked in crowd]
    one = bench.ask("one", "a single request", new=60)
    one.wait(30)
    counts = [len(asked.job.new) for asked in crowd]
    theirs = sum(counts) - sum(before)
    assert 30 < theirs < 100, f"{theirs} tokens of five requests beside 60 of one"
    assert max(counts) - min(counts) <= 4, "a client's own requests go on together"


def test_an_idle_client_does_not_save_time_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    slow_down(bench, monkeypatch, read=0.0, write=0.005)
    busy = bench.ask("busy", "writes for long", new=250)
    time.sleep(0.4)
    late = bench.ask("late", "comes later", new=60)
    late.until(Stage)
    before = len(busy.job.new)
    late.wait(30)
    beside = len(busy.job.new) - before
    # Shares are of time, which a machine that stalls moves; with time saved up it were next to 0.
    assert beside > 12, f"the busy client wrote {beside} tokens beside 60"
    bench.scheduler.cancel(busy.job)


def test_long_answers_of_one_client_keep_nobody_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(limits=replace(LIMITS, active=2))
    slow_down(bench, monkeypatch, read=0.0, write=0.01)
    crowd = [bench.ask("crowd", f"request {n}", new=200) for n in range(4)]
    crowd[0].until(Piece)
    assert bench.ask("one", "a single request", new=3).wait()[1].new_tokens == 3
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
            assert stuck.wait(100)
            raise RequestError("slow")
        return load(wanted, **options)

    monkeypatch.setattr(bench.loader, "load", slow_load)
    crowd = [bench.ask("crowd", f"request {n}", video="slow") for n in range(6)]
    assert bench.ask("one", "with a film", video="a.mp4").wait(30)[1].new_tokens == 4
    assert bench.ask("crowd", "only text").wait(30)[1].new_tokens == 4
    stuck.set()
    for asked in crowd:
        with pytest.raises(RequestError, match="slow"):
            asked.wait()


def test_media_are_prepared_for_clients_in_turn(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(limits=replace(LIMITS, preparing=1, active=1))
    begun: list[str] = []
    load = bench.scheduler._load

    def noted(job: Job) -> Any:
        begun.append(job.client)
        time.sleep(0.02)
        return load(job)

    monkeypatch.setattr(bench.scheduler, "_load", noted)
    slow_down(bench, monkeypatch, read=0.02, write=0.01)
    crowd = [bench.ask("crowd", f"request {n}", video="a.mp4") for n in range(6)]
    one = bench.ask("one", "a single request", video="b.mp4")
    one.wait()
    assert begun.index("one") <= 3, begun
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
    slow_down(bench, monkeypatch, read=0.001, write=0.001)
    most = 0
    asked = [bench.ask(f"c{n}", f"{n}" * 400, new=40) for n in range(6)]
    while any(a.job.state != "done" for a in asked):
        most = max(most, bench.scheduler.counts()["active"])
        time.sleep(0.001)
    for one in asked:
        assert one.wait()[1].new_tokens == 40
    assert 1 <= most <= 3, f"{most} active at once"
    with pytest.raises(RequestError, match="do not fit the server's memory"):
        bench.ask("x", "z" * 1100, new=200).wait()


def test_a_request_that_is_cancelled_leaves_what_was_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make(slice_tokens=32)
    slow_down(bench, monkeypatch, read=0.05, write=0.0)
    asked = bench.ask("x", "q" * 300, new=4)
    asked.until(Stage)
    while asked.job.read < 64:
        time.sleep(0.005)
    bench.scheduler.cancel(asked.job)
    bench.scheduler.cancel(asked.job)
    while bench.scheduler.counts()["active"]:
        time.sleep(0.005)
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
    assert caught.value.status == 503
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
    bench = make(limits=replace(LIMITS, active=1, wait_s=0.3))
    slow_down(bench, monkeypatch, read=0.0, write=0.01)
    first = bench.ask("x", "long", new=200)
    first.until(Piece)
    with pytest.raises(RequestError, match="waited longer") as caught:
        bench.ask("y", "short").wait()
    assert caught.value.status == 503 and caught.value.retry_after_s
    bench.scheduler.cancel(first.job)


def test_closing_answers_everybody_and_leaves_nothing(make: Make) -> None:
    bench = make()
    asked = [bench.ask(f"c{n}", "on and on", new=250, video="a.mp4") for n in range(12)]
    bench.scheduler.close()
    for one in asked:
        with pytest.raises(RequestError, match="going down"):
            one.wait(5)
    with pytest.raises(RequestError, match="going down"):
        bench.ask("late", "hello")
    gc.collect()
    assert not len(bench.scheduler.prefix) and not bench.scheduler._jobs
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("longvila-") for name in names), names


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path, make: Make) -> None:
    bench = make()
    bench.scheduler.close()
    bench.engine.model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match="no_repeat_ngram_size=3"):
        Scheduler(bench.engine, bench.processor, bench.loader, bench.settings)
