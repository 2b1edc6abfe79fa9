"""Many requests, one model: who is read, and who writes, when.

    waiting  --pool: fetch, decode, tokenise-->  ready  --memory is free-->  active  -->  done

1. A request waits in its client's own line. Media are prepared by a small pool of threads, of which
   a client occupies half at most; next is the client that has the fewest requests under way. Text
   has a thread of its own.
2. What is prepared becomes active once its keys and values fit beside what is active; kept caches
   make room. A client has half of the places at most.
3. One thread runs the model, a unit at a time: a slice of a prompt, or one token of an answer. The
   next unit goes to the client that has had the least time of the model so far, measured, not
   counted: a slice is a hundred tokens' work, and turns would let one long film slow every other
   answer by that much. A client that comes back does not claim the time it was away.
4. Before each slice the kept caches and those under way are looked at: what another request has
   read is shared instead of read again. Ten clients who send the same film at once read it once.
5. After the last token the cache is kept for the next turn.

The wait of a client is bounded: with n clients active it gets an n-th of the time, and whoever has
had least waits for one unit. A prompt has at most `_MOST_SLICES` slices, since every slice of a
long one becomes a segment of its cache that each later token looks through.

Sequences are not batched: many clients share the model's time, they do not add to it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from longvila.inference.leading import RanksLostError
from longvila.inference.serving.errors import Cancelled, RequestError
from longvila.inference.serving.family_prompt import prompt_builder
from longvila.inference.serving.jobs import Done, Event, Failed, Job, Piece, Question, Seen, Stage
from longvila.inference.serving.media import MediaLoader, Medium
from longvila.inference.serving.metrics import Metrics
from longvila.inference.serving.prefix import PrefixCache, shared_bytes, shared_length
from longvila.inference.serving.prompt import Prompt
from longvila.inference.serving.sampling import (
    Sampler,
    TextStream,
    check_generation_config,
    stop_tokens,
)
from longvila.inference.serving.settings import Settings

log = logging.getLogger(__name__)

_MOST_SLICES = 32
GOING_DOWN = "the server is going down"


class Scheduler:
    """Serves requests with one engine.

    Args:
        engine: A `longvila.inference.engine.Engine` of one process, or the
            `longvila.inference.leading.Leader` of several.
        processor: The model's processor.
        loader: Loads media.
        settings: Of the server.
        metrics: Where figures go.

    Raises:
        ValueError: If the model's generation configuration asks for what is not done.
    """

    def __init__(
        self,
        engine: Any,
        processor: Any,
        loader: MediaLoader,
        settings: Settings,
        metrics: Metrics | None = None,
    ) -> None:
        self.engine, self.processor, self.loader = engine, processor, loader
        self.settings, self.limits = settings, settings.limits
        check_generation_config(engine.model.generation_config)
        self._build = prompt_builder(engine, processor, loader)
        self.stops = stop_tokens(engine.model, processor.tokenizer)
        self.device: torch.device = engine.model.get_output_embeddings().weight.device
        self.context: int | None = engine.context_length
        self.token_bytes = _token_bytes(engine)
        self.prefix = PrefixCache()
        self.metrics = metrics or Metrics()
        self._declare()
        self.failure: BaseException | None = None
        self._numbers = itertools.count()
        self._jobs: dict[int, Job] = {}
        self._spent: dict[str, float] = {}
        self._clock = 0.0
        self._changed = threading.Condition()
        self._poked = self._closing = False
        self._kv = (0, 0)
        self._pool = ThreadPoolExecutor(self.limits.preparing, thread_name_prefix="longvila-media")
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="longvila-text")
        self._thread = threading.Thread(target=self._run, name="longvila-model", daemon=True)
        self._thread.start()

    # ---- for the application, from any thread

    def submit(self, client: str, question: Question, emit: Callable[[Event], None]) -> Job:
        """Take a request.

        Args:
            client: Who asks; requests of one client share its turns.
            question: What.
            emit: Takes events, in order, the last one `Done` or `Failed` unless cancelled.

        Returns:
            The request under way.

        Raises:
            RequestError: If too many are waiting, or the server is going down.
        """
        with self._changed:
            if self._closing or self.failure is not None:
                raise RequestError.unavailable(GOING_DOWN)
            jobs = self._jobs.values()
            waiting = sum(job.state != "active" for job in jobs)
            own = sum(job.client == client for job in jobs)
            if own >= self.limits.per_client:
                raise self._busy(f"you have {own} requests under way, at most that many are taken")
            if waiting >= self.limits.waiting:
                raise self._busy(f"{waiting} requests are waiting, at most that many are taken")
            job = Job(next(self._numbers), client, question, emit)
            self._jobs[job.number] = job
            if client not in self._spent:
                self._spent[client] = self._clock
            self._poke()
        return job

    def cancel(self, job: Job) -> None:
        """Stop a request that nobody waits for any more; harmless when it is done."""
        with self._changed:
            job.cancelled.set()
            if job.state == "waiting":
                self._leave(job, "cancelled")
            self._poke()

    def close(self) -> None:
        """Fail everything under way and stop the threads."""
        with self._changed:
            self._closing = True
            for job in self._jobs.values():
                job.cancelled.set()
            self._poke()
        self._thread.join()
        for pool in (self._pool, self._texts):
            pool.shutdown(wait=True, cancel_futures=True)
        error = RequestError.unavailable(GOING_DOWN)
        with self._changed:
            for job in list(self._jobs.values()):
                job.emit(Failed(error))
                self._leave(job, "failed")
        self.prefix.clear()
        self.loader.kept.clear()

    @property
    def alive(self) -> bool:
        """Whether the model's thread is running."""
        return self._thread.is_alive() and self.failure is None

    def counts(self) -> dict[str, int]:
        """Count the requests in each state."""
        found = dict.fromkeys(("waiting", "preparing", "ready", "active"), 0)
        with self._changed:
            for job in self._jobs.values():
                found[job.state] += 1
        return found

    # ---- bookkeeping, under the lock

    def _poke(self) -> None:
        self._poked = True
        self._changed.notify_all()

    def _leave(self, job: Job, outcome: str) -> None:
        """Forget a request and what it holds."""
        if self._jobs.pop(job.number, None) is None:
            return
        job.state = "done"
        job.prompt = job.cache = job.sampler = job.text = None
        if not any(other.client == job.client for other in self._jobs.values()):
            self._spent.pop(job.client, None)
        self.metrics.add("requests_total", outcome=outcome)
        self.metrics.observe("request_seconds", time.monotonic() - job.arrived)

    def _fail(self, job: Job, error: RequestError) -> None:
        with self._changed:
            self._leave(job, "refused" if error.status < 500 else "failed")
        job.emit(Failed(error))

    def _in(self, state: str) -> list[Job]:
        with self._changed:
            return [job for job in self._jobs.values() if job.state == state]

    # ---- media

    def _start_preparing(self) -> None:
        with self._changed:
            now = time.monotonic()
            late = [
                job
                for job in self._jobs.values()
                if job.state in ("waiting", "ready") and now - job.arrived > self.limits.wait_s
            ]
        for job in late:
            self._fail(job, self._busy(f"waited longer than {self.limits.wait_s:.0f} s", 503))
        with self._changed:
            self._deal_out([job for job in self._jobs.values() if job.state == "waiting"])

    def _deal_out(self, waiting: list[Job]) -> None:
        """Give requests to the threads that prepare them, the least served clients' first."""
        for job in [job for job in waiting if not job.question.media]:
            job.state = "preparing"
            self._texts.submit(self._prepare, job)
        waiting = [job for job in waiting if job.question.media]
        others = [job for job in self._jobs.values() if job.state in ("preparing", "ready")]
        # What is decoded ahead is held in memory: no more than is soon needed.
        ahead = sum(bool(job.question.media) for job in others)
        under_way = Counter(job.client for job in self._jobs.values() if job.state != "waiting")
        begun = Counter(job.client for job in others if job.question.media)
        while ahead < 2 * self.limits.preparing:
            # One client's slow downloads must not hold up everybody's.
            most = max(1, self.limits.preparing // 2)
            free = [job for job in waiting if begun[job.client] < most]
            if not free:
                return
            job = min(free, key=lambda j: (under_way[j.client], self._spent[j.client], j.number))
            waiting.remove(job)
            job.state = "preparing"
            ahead += 1
            under_way[job.client] += 1
            begun[job.client] += 1
            self._pool.submit(self._prepare, job)

    def _prepare(self, job: Job) -> None:
        """Load the media of a request and write its prompt; runs in the pool."""
        try:
            prompt = self._load(job)
        except Cancelled:
            with self._changed:
                if not self._closing:  # else `close` still owes it an answer
                    self._leave(job, "cancelled")
        except RequestError as error:
            self._fail(job, error)
        except Exception:
            log.exception("preparing a request failed")
            self._fail(job, RequestError.internal())
        else:
            with self._changed:
                job.prompt, job.state = prompt, "ready"
            if self.failure is not None:
                self._fail(job, RequestError.unavailable("the server failed"))
        with self._changed:
            self._poke()

    def _load(self, job: Job) -> Prompt:
        last = 0.0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last
            if job.cancelled.is_set():
                raise Cancelled
            if time.monotonic() - last > 0.2 or done == total:
                last = time.monotonic()
                job.emit(Stage(stage, done, total))

        deadline = time.monotonic() + self.limits.media_s
        media: list[Medium] = []
        left = self.limits.frames
        for wanted in job.question.media:
            progress("fetch", len(media), len(job.question.media))
            medium = self.loader.load(
                wanted, frames_left=left, deadline=deadline, progress=progress
            )
            if medium.kind == "video":
                left -= medium.count
            media.append(medium)
        prompt = self._build(job.question.messages, media)
        job.most_new = self._check_length(len(prompt), job.question.sampling.max_new_tokens)
        return prompt

    def _check_length(self, length: int, asked: int) -> int:
        """Return how many tokens an answer may have, or refuse the prompt."""
        most = self.limits.prompt_tokens
        if most is not None and length > most:
            raise _too_long(f"the prompt has {length} tokens, at most {most} are taken")
        room = None if self.context is None else self.context - length
        if room is not None and room < max(1, asked):
            raise _too_long(
                f"the prompt has {length} tokens and {max(1, asked)} new ones were asked for, but "
                f"the model's context is {self.context}"
            )
        default = min(self.settings.new_tokens, self.limits.new_tokens)
        new = asked or min(default, room or default)
        need = (length + new) * self.token_bytes
        if need > self.settings.kv_bytes:
            most = self.settings.kv_bytes // self.token_bytes
            raise _too_long(
                f"{length} tokens of the prompt and {new} new ones do not fit the server's memory, "
                f"which holds {most}"
            )
        return new

    # ---- the model's thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    if self._closing:
                        return
                    self._poked = False
                self._start_preparing()
                self._sweep()
                self._admit()
                job = self._next()
                if job is not None:
                    self._unit(job)
                    continue
                with self._changed:
                    if not self._poked and not self._closing:
                        self._changed.wait(0.5)
        except BaseException as failure:
            log.exception("the model's thread ended")
            self.failure = failure
            error = RequestError.unavailable("the server failed")
            for state in ("waiting", "ready", "active"):
                for job in self._in(state):
                    self._fail(job, error)

    def _sweep(self) -> None:
        for job in (*self._in("ready"), *self._in("active")):
            if job.cancelled.is_set():
                if self._closing:
                    return  # `close` still owes them an answer
                self._keep(job)
                with self._changed:
                    self._leave(job, "cancelled")
                self._make_room(0)

    def _admit(self) -> None:
        active, ready = self._in("active"), self._in("ready")
        own = Counter(job.client for job in active)
        # Half of the places are for others, so that long answers of one client keep nobody out.
        most = max(1, self.limits.active // 2)
        while len(active) < self.limits.active:
            free = [job for job in ready if own[job.client] < most]
            if not free:
                break
            job = min(free, key=lambda job: (own[job.client], job.number))
            ready.remove(job)
            assert job.prompt is not None
            keys, shared = job.prompt.keys, 0
            if found := self.prefix.best(keys):
                self.prefix.touch(found[0])
                shared = found[1]
            for other in active:
                assert other.prompt is not None
                shared = max(shared, shared_length(keys, other.prompt.keys, shared))
            need = (len(keys) - shared + job.most_new) * self.token_bytes
            if not self._make_room(need) and active:
                break
            job.sampler = Sampler(
                job.question.sampling, self.engine.model.generation_config, self.device
            )
            job.text = TextStream(self.processor.tokenizer, job.question.sampling.stop)
            self.metrics.observe("wait_seconds", time.monotonic() - job.arrived)
            with self._changed:
                job.state = "active"
                self._spent[job.client] = max(self._spent[job.client], self._clock)
            active.append(job)
            own[job.client] += 1

    def _make_room(self, need: int) -> bool:
        """Drop kept caches until so many bytes more fit; say whether they do."""
        while True:
            active = self._in("active")
            caches = [job.cache for job in active if job.cache is not None]
            coming = 0
            for job in active:
                assert job.prompt is not None
                held = 0 if job.cache is None else job.cache.get_seq_length()
                coming += (len(job.prompt) + job.most_new - held) * self.token_bytes
            under_way = shared_bytes(caches)
            used = shared_bytes([*caches, *(entry.cache for entry in self.prefix.entries)])
            self._kv = (under_way, used - under_way)
            if used + coming + need <= self.settings.kv_bytes:
                return True
            if not self.prefix.evict():
                return False

    def _next(self) -> Job | None:
        """Return the request whose turn it is."""
        active = self._in("active")
        if not active:
            return None
        job = min(active, key=lambda job: (self._spent[job.client], job.number))
        self._clock = max(self._clock, self._spent[job.client])
        # Of one client's requests the oldest would starve the others: the least far goes first.
        own = [other for other in active if other.client == job.client]
        return min(own, key=lambda job: (len(job.new), job.number))

    def _unit(self, job: Job) -> None:
        start = time.perf_counter()
        try:
            assert job.prompt is not None
            if job.read < len(job.prompt):
                self._read_slice(job)
            else:
                assert job.cache is not None
                self.engine.decode(job.cache, torch.tensor([job.new[-1:]]))
                self._write(job)
        except RanksLostError:
            raise  # nothing can be computed any more
        except torch.OutOfMemoryError:
            log.exception("the model ran out of memory; kept caches are dropped")
            self.prefix.clear()
            self._fail(
                job,
                RequestError(
                    "out of memory; ask for fewer frames, or later",
                    status=503,
                    code="memory",
                    retry_after_s=5,
                ),
            )
        except Exception:
            log.exception("a request failed")
            self._fail(job, RequestError.internal())
        finally:
            spent = time.perf_counter() - start
            with self._changed:
                if job.client in self._spent:
                    self._spent[job.client] += spent

    def _read_slice(self, job: Job) -> None:
        prompt = job.prompt
        assert prompt is not None
        self._borrow(job)
        # Ranks share the work of a slice: as long as one of one rank takes, so long may it take.
        tokens = self.engine.num_ranks * self.settings.slice_tokens
        tokens = max(tokens, -(-len(prompt) // _MOST_SLICES))
        end = prompt.slice_end(job.read, tokens)
        job.cache = prompt.read(self.engine, job.read, end, self.loader, onto=job.cache)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the time would be another client's
        self.metrics.add("read_tokens_total", end - job.read)
        job.read = end
        job.emit(Stage("read", end, len(prompt)))
        if end == len(prompt):
            self.metrics.add("reused_tokens_total", job.reused)
            self._write(job)

    def _borrow(self, job: Job) -> None:
        """Continue from what was read of the same beginning, if that is further."""
        prompt = job.prompt
        assert prompt is not None
        source, length = None, job.read
        if found := self.prefix.best(prompt.keys, length):
            self.prefix.touch(found[0])
            source, length = found[0].cache, found[1]
        for other in self._in("active"):
            if other is job or other.cache is None or other.prompt is None:
                continue
            shared = shared_length(prompt.keys, other.prompt.keys[: other.read], length)
            if shared > length:
                source, length = other.cache, shared
        # The last token is always read: its logits are wanted.
        length = prompt.cut_before(min(length, len(prompt) - 1))
        if source is None or length <= job.read:
            return
        cache = self.engine.fork(source, tokens=length)
        job.reused += length - job.read
        job.cache, job.read = cache, length

    def _write(self, job: Job) -> None:
        """Choose a token from the logits and send what is certain of the text."""
        assert job.cache is not None and job.sampler is not None and job.text is not None
        logits, ids = job.cache.logits, job.cache.input_ids
        assert logits is not None and ids is not None
        token = job.sampler.choose(logits, ids)
        if not job.new:
            self.metrics.observe("first_token_seconds", time.monotonic() - job.arrived)
        job.new.append(token)
        self.metrics.add("new_tokens_total")
        reason = "stop" if token in self.stops else None
        text = "" if reason else job.text.push(token)
        if job.text.stopped:
            reason = "stop"
        elif reason is None and len(job.new) >= job.most_new:
            reason = "length"
        if reason:
            text += job.text.finish()
        if text:
            job.emit(Piece(text))
        if reason:
            self._finish(job, reason)

    def _finish(self, job: Job, reason: str) -> None:
        assert job.prompt is not None
        seen = tuple(Seen(m.kind, m.count, m.timestamps_s) for m in job.prompt.media)
        done = Done(reason, len(job.prompt), job.reused, len(job.new), seen)
        self._keep(job)
        with self._changed:
            self._leave(job, "answered")
        self._make_room(0)
        job.emit(done)

    def _keep(self, job: Job) -> None:
        """Keep what a request read and wrote for whoever goes on from there."""
        if job.cache is None or job.prompt is None or job.cache.get_seq_length() == 0:
            return
        # The last token was not fed back.
        fed = max(0, job.cache.get_seq_length() - len(job.prompt))
        keys = np.concatenate([job.prompt.keys[: job.read], np.array(job.new[:fed], np.int64)])
        cache, job.cache = job.cache, None
        self.prefix.put(keys, cache)

    # ---- figures

    def _busy(self, why: str, status: int = 429) -> RequestError:
        return RequestError(f"{why}; come back later", status=status, code="busy", retry_after_s=5)

    def _declare(self) -> None:
        metrics = self.metrics
        metrics.counter("requests_total", "Chat requests by how they ended.")
        metrics.counter("read_tokens_total", "Prompt tokens read by the model.")
        metrics.counter("reused_tokens_total", "Prompt tokens taken from earlier requests.")
        metrics.counter("new_tokens_total", "Tokens generated.")
        metrics.histogram("wait_seconds", "From arrival to the model's beginning.")
        metrics.histogram("first_token_seconds", "From arrival to the first token.")
        metrics.histogram("request_seconds", "From arrival to the end.")
        metrics.gauge(
            "requests", "Chat requests under way.",
            lambda: {(("state", state),): n for state, n in self.counts().items()},
        )  # fmt: skip
        metrics.gauge(
            "kv_bytes", "Bytes of keys and values.",
            lambda: {(("of", "active"),): self._kv[0], (("of", "kept"),): self._kv[1]},
        )  # fmt: skip
        metrics.gauge("kept_prefixes", "Caches kept.", lambda: {(): len(self.prefix)})
        metrics.gauge(
            "kept_media_bytes", "Bytes of decoded media kept.",
            lambda: {(): self.loader.kept.weight},
        )  # fmt: skip


def _too_long(why: str) -> RequestError:
    return RequestError(
        f"{why}: ask for fewer frames (num_frames, fps), shorten the conversation or lower "
        "max_tokens",
        code="context_length_exceeded",
        param="messages",
    )


def _token_bytes(engine: Any) -> int:
    """Bytes of one token's keys and values on a rank, which has its share of the tokens."""
    config = engine.text.config
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(engine.text.parameters()).element_size()
    whole = 2 * config.num_hidden_layers * heads * dim * size
    return -(-int(whole) // int(engine.num_ranks))
