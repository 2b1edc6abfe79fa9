"""How long until the first token of an answer about a long video, and how fast do the others come?

A LongVILA of SigLIP-so400m and Qwen2-7B's shape, random weights made on the device, reads a prompt
of frames (made on the device too, batch by batch: decoding files is another question) and answers.

1. *Peer*: transformers' own ``generate`` of the same model, placed by accelerate's
   ``device_map="auto"`` over the same GPUs, at the lengths it holds (`benchmarks._peer_generate`).
   Running out of memory is a row. With ``--peer-longest`` its longest prompt is found from its own
   peaks, tried, and read by us as well; ``times_peer`` is how much sooner our first token comes.
2. *First prompt.* The process's first one of ours, before anything else has run: ``notes`` say how
   long its first token took (with whatever is compiled and set up at a first use), and how long
   when it was read again. Rows are of prompts after that.
3. *Check.* At a short length the engine's logits are compared with those of the model's forward.
4. *Ceilings, in the same process.* The rate of the attention kernel (a chunk of queries over a long
   block of keys, the fastest back end), of the text model's matrix products on a chunk, the time of
   the tower on a micro-batch, and the rate at which memory is copied. From these follow
   ``floor_s``, the time of the prompt's arithmetic at those rates, and ``decode_floor_ms``, the
   time to read weights and keys once.
5. *Ours*, length by length: time to first token and decode rate as a streamer sees them, from
   ``Engine.generate`` (the median of a few where a prompt takes seconds), and the peak of memory
   beside the one that ``longvila plan --inference`` says. Then further questions about the film,
   each of its own length and answered on a fork; the slowest is in percent of the whole first one.

A row is written when its first answer is there, and again with the questions. While a prompt is
read, ``notes.reading`` says how far it is: a run that is cut off leaves that.

``--sample-chunks K`` reads K chunks behind random keys instead of the whole prompt and adds up the
straight line through their times (a chunk's time is linear in what is before it). Such rows say so:
``sampled`` is 1 and ``fit_error_percent`` is how far the line is from the samples.

    python -m benchmarks.prefill
    torchrun --nproc-per-node 2 -m benchmarks.prefill

``--tiny`` runs all of it on the CPU in seconds, with shapes that say nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _cluster
from benchmarks._cluster import Cluster, timed_ms
from benchmarks._model import (
    add_text_options,
    add_tower_options,
    draw,
    model_config,
    rows_per_frame,
    text_config,
)
from benchmarks._results import Report, Row, hardware

QUESTION = "How long until the first token about a long video, and how fast are the others?"
GIB = 2**30
#: A prompt whose arithmetic takes longer than so many seconds is read once.
LONG_S = 10.0
#: Seconds of the first answer and the further questions beyond the arithmetic of a prompt.
AFTERWARDS_S = 15.0
#: How much longer than its arithmetic a prompt is taken to last.
SLACK = 1.15
LIMIT = {"bfloat16": 5e-2, "float32": 1e-4}


# ---- model and prompt --------------------------------------------------------------------------


def build_model(options: argparse.Namespace, device: torch.device) -> Any:
    """Random weights of the shape asked for, made on the device in their final type."""
    from longvila.model.modeling_longvila import LongVILAForConditionalGeneration

    text = text_config(options, bos_token_id=None, eos_token_id=None)
    config = model_config(options, text=text, vision_batch_size=options.frame_batch)
    model = draw(lambda: LongVILAForConditionalGeneration(config), device, options.dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


class DrawnFrames:
    """Frames of noise, drawn on the device when they are asked for.

    Args:
        options: Their size.
        frames: How many.
        device: Where.
    """

    def __init__(self, options: argparse.Namespace, frames: int, device: torch.device) -> None:
        self.num_frames = frames
        self.shape = (3, options.image_size, options.image_size)
        self.dtype, self.device = getattr(torch, options.dtype), device

    def draw(self, start: int, stop: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(start)
        pixels = torch.empty(stop - start, *self.shape, dtype=self.dtype, device=self.device)
        return pixels.normal_(generator=generator)

    def stream(self, ranges: Sequence[tuple[int, int]], *, batch: int | None) -> Iterator[Tensor]:
        step = batch or 16
        for start, stop in ranges:
            for first in range(start, stop, step):
                yield self.draw(first, min(first + step, stop))


def tokens_per_frame(options: argparse.Namespace) -> int:
    return rows_per_frame(options) + 1


def prompt(options: argparse.Namespace, tokens: int, device: torch.device) -> dict[str, Any]:
    """A prompt of about so many tokens: as many frames as fit, then words."""
    per_frame = tokens_per_frame(options)
    frames = max(1, (tokens - options.words) // per_frame)
    generator = torch.Generator().manual_seed(7)
    video = torch.full((frames, per_frame), options.vocab - 1)
    video[:, -1] = 1
    words = torch.randint(2, options.vocab - 2, (options.words,), generator=generator)
    return {
        "input_ids": torch.cat([video.flatten(), words])[None],
        "pixel_values_videos": DrawnFrames(options, frames, device),
        "video_num_frames": torch.tensor([frames]),
    }


# ---- ceilings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Rates measured in this run.

    Attributes:
        attention_tflops: Of the fastest kernel.
        attention_kernel: Its name.
        layer_ms: Matrix products of one text layer on a chunk.
        tower_ms: The tower and projector on a micro-batch.
        copy_gb_per_s: Bytes read and written by a copy.
    """

    attention_tflops: float
    attention_kernel: str
    layer_ms: float
    tower_ms: float
    copy_gb_per_s: float


def attention_rates(options: argparse.Namespace, cluster: Cluster) -> dict[str, float]:
    """TFLOP/s of a chunk of queries over a long block of keys, by back end."""
    from longvila.ops.attention import attention_forward

    chunk, block = options.chunk_tokens, options.attention_block
    head_dim = options.model_dim // options.heads
    dtype = getattr(torch, options.dtype)
    q, k, v = (
        torch.randn(1, tokens, heads, head_dim, dtype=dtype, device=cluster.device)
        for tokens, heads in (
            (chunk, options.heads), (block, options.kv_heads), (block, options.kv_heads)
        )
    )  # fmt: skip
    rates: dict[str, float] = {}
    tera = 4.0 * chunk * block * options.model_dim / 1e9
    for name in ("fa4", "fa3", "cudnn", "flash", "cpu"):

        def call(name: str = name) -> None:
            attention_forward(q, k, v, causal=False, backend=name, needs_backward=False)

        try:
            call()
        except (ValueError, ImportError, RuntimeError) as error:
            cluster.say(f"  attention {name}: {str(error).splitlines()[0][:120]}")
            continue
        rates[name] = tera / timed_ms(cluster, call, calls=options.calls)
        cluster.say(f"  attention {name}: {rates[name]:.0f} TFLOP/s")
    return rates


def measure_ceilings(model: Any, options: argparse.Namespace, cluster: Cluster) -> Ceilings:
    """Time the kernels that a prompt is made of, alone."""
    dtype, device = getattr(torch, options.dtype), cluster.device
    rates = attention_rates(options, cluster)
    kernel = max(rates, key=rates.__getitem__)
    layer = model.model.language_model.layers[0]
    x = torch.randn(options.chunk_tokens, options.model_dim, dtype=dtype, device=device)
    mlp, own = layer.mlp, layer.self_attn

    def products() -> None:
        own.o_proj(own.q_proj(x))
        own.k_proj(x), own.v_proj(x)
        mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    products()
    layer_ms = timed_ms(cluster, products, calls=options.calls)
    pixels = DrawnFrames(options, options.frame_batch, device).draw(0, options.frame_batch)

    def encode() -> None:
        model.model.encode_media(pixels, [options.frame_batch], kind="video")

    encode()
    tower_ms = timed_ms(cluster, encode, calls=options.calls)
    size = options.copy_bytes // 2
    source = torch.zeros(size, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy_ms = timed_ms(cluster, lambda: target.copy_(source), calls=options.calls)
    found = Ceilings(rates[kernel], kernel, layer_ms, tower_ms, 2 * 2 * size / copy_ms / 1e6)
    cluster.say(f"  {found}")
    return found


def floor_s(
    options: argparse.Namespace, ceilings: Ceilings, tokens: int, frames: int, ranks: int
) -> float:
    """Seconds that the prompt's arithmetic takes at the measured rates, evenly over the ranks."""
    attention = 2.0 * tokens**2 * options.model_dim * options.layers
    products = options.layers * ceilings.layer_ms / 1e3 * tokens / options.chunk_tokens
    tower = ceilings.tower_ms / 1e3 * frames / options.frame_batch
    return (attention / ceilings.attention_tflops / 1e12 + products + tower) / ranks


def decode_floor_ms(
    model: Any, options: argparse.Namespace, ceilings: Ceilings, tokens: int, ranks: int
) -> float:
    """Milliseconds to read the text model's weights, and a rank's keys and values, once."""
    text = model.model.language_model
    weights = sum(p.numel() * p.element_size() for p in text.layers.parameters())
    head = model.get_output_embeddings().weight
    weights += head.numel() * head.element_size()
    return (weights + cache_bytes(options, tokens) / ranks) / ceilings.copy_gb_per_s / 1e6


def cache_bytes(options: argparse.Namespace, tokens: int) -> int:
    head_dim = options.model_dim // options.heads
    width = torch.empty(0, dtype=getattr(torch, options.dtype)).element_size()
    return 2 * options.layers * options.kv_heads * head_dim * width * tokens


# ---- what is timed -----------------------------------------------------------------------------


class Clock:
    """A streamer that notes when tokens come; the prompt is the first thing put."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token, and of a further one."""

    ttft_s: float
    step_s: float


def timed_answer(call: Any, cluster: Cluster) -> Answer:
    """Run ``call(streamer)`` and read the streamer's clock, on the slowest rank."""
    clock = Clock()
    if cluster.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call(clock)
    first, last = clock.times[1], clock.times[-1]
    return Answer(first - start, (last - first) / max(len(clock.times) - 2, 1))


def slowest(answer: Answer, cluster: Cluster) -> Answer:
    return Answer(*cluster.everywhere([answer.ttft_s, answer.step_s]))


def greedy(options: argparse.Namespace, new_tokens: int | None = None) -> dict[str, Any]:
    new = new_tokens or options.new_tokens
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}


def filled_cache(
    engine: Any, options: argparse.Namespace, edges: Sequence[int], cluster: Cluster
) -> Any:
    """A cache of random keys and values, as if so many tokens had been read.

    Args:
        engine: Whose model and mesh.
        options: The shapes.
        edges: Ascending lengths up to the whole; cut at any of them, ranks have equal parts.
        cluster: The ranks.
    """
    from longvila.inference.cache import ShardedCache
    from longvila.sp.layout import SequenceLayout

    ranks = cluster.world_size
    cache = ShardedCache(engine.text.config.num_hidden_layers, mesh=engine.mesh)
    cache.reserve(-(-edges[-1] // ranks) + len(edges))
    dtype = getattr(torch, options.dtype)
    done = 0
    for edge in edges:
        if edge == done:
            continue
        layout = SequenceLayout((edge - done,), ranks, 1, "contiguous")
        own = layout.local_lengths[cluster.rank]
        shape = (1, options.kv_heads, own, options.model_dim // options.heads)
        with cache.receiving(layout, edge - done, behind=True):
            for layer in range(options.layers):
                keys, values = (
                    torch.empty(shape, dtype=dtype, device=cluster.device).normal_()
                    for _ in range(2)
                )
                cache.update(keys, values, layer)
        done = edge
    cache.input_ids = torch.ones(1, done, dtype=torch.int64, device=cluster.device)
    return cache


def check(model: Any, options: argparse.Namespace, mesh: Any, cluster: Cluster) -> float:
    """Relative error of the engine's logits at a short length, chunks and ranks included."""
    from longvila.inference.engine import Engine

    batch = prompt(options, options.check_tokens, cluster.device)
    frames = batch["pixel_values_videos"]
    pixels = frames.draw(0, frames.num_frames)
    ids = batch["input_ids"].to(cluster.device)
    with torch.no_grad():
        want = model(
            input_ids=ids, pixel_values_videos=pixels, logits_to_keep=1,
            video_num_frames=batch["video_num_frames"],
        ).logits[0, -1].float()  # fmt: skip
    step = max(2, options.check_tokens // 3 // cluster.world_size)
    whole = {**batch, "pixel_values_videos": TensorAsFrames(pixels)}
    with Engine(model, mesh, chunk_tokens=step) as engine:
        got = engine.prefill(whole).logits[0].float()
    error = float((got - want).norm() / want.norm())
    (error,) = cluster.everywhere([error])
    cluster.say(f"check at {ids.shape[1]} tokens: error {error:.1e}")
    if not error <= LIMIT[options.dtype]:
        raise RuntimeError(f"logits are wrong, not timing: {error} above {LIMIT[options.dtype]}")
    return error


class TensorAsFrames:
    """Frames that are there, asked for like those that are not."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.num_frames = pixels, pixels.shape[0]

    def stream(self, ranges: Sequence[tuple[int, int]], *, batch: int | None) -> Iterator[Tensor]:
        for start, stop in ranges:
            yield self.pixels[start:stop]


def sampled_prefill(
    engine: Any, options: argparse.Namespace, batch: dict[str, Any], cluster: Cluster
) -> tuple[Any, float, dict[str, float], list[dict[str, float]]]:
    """Time some chunks behind random keys; return a full cache, seconds, and how well it fits."""
    tokens = batch["input_ids"].shape[1]
    chunk = options.chunk_tokens * cluster.world_size
    frames = chunk // tokens_per_frame(options)
    ids = batch["input_ids"][:, : frames * tokens_per_frame(options)]
    length = ids.shape[1]
    last = max(tokens - length, 0)
    count = max(options.sample_chunks, 2)
    pasts = [last * number // (count - 1) for number in range(count)]
    cache = filled_cache(engine, options, [*pasts, tokens], cluster)
    samples: list[dict[str, float]] = []
    for past in pasts:
        piece = {
            "input_ids": ids,
            "pixel_values_videos": DrawnFrames(options, frames, cluster.device),
            "video_num_frames": torch.tensor([frames]),
        }
        spent = []
        for _ in range(2):  # the first one plans and compiles
            fork = engine.fork(cache)
            fork.crop(past - tokens)
            cluster.barrier()
            start = time.perf_counter()
            engine.prefill(piece, onto=fork)
            cluster.synchronize()
            spent.append(time.perf_counter() - start)
            del fork
        (seconds,) = cluster.everywhere([spent[-1]])
        samples.append({"past_tokens": past, "chunk_s": seconds})
        cluster.say(f"    chunk of {length} behind {past}: {seconds:.3f} s")
    base, slope, error = line([(s["past_tokens"], s["chunk_s"]) for s in samples])
    chunks = tokens / length
    total = chunks * (base + slope * (tokens - length) / 2)
    return cache, total, {"sampled": 1.0, "fit_error_percent": 100 * error}, samples


def line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Least squares ``y = a + b x``, and the largest relative distance from it."""
    middle_x, middle_y = (statistics.mean(column) for column in zip(*points, strict=True))
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    slope = sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0
    base = middle_y - slope * middle_x
    return base, slope, max(abs(base + slope * x - y) / y for x, y in points)


# ---- ours --------------------------------------------------------------------------------------


class Reading:
    """Says now and then how far a prompt has been read, as the host sees it.

    Args:
        report: Its notes hold the last word.
        cluster: The ranks.
        save: Writes the report.
        every_s: How often.
    """

    def __init__(self, report: Report, cluster: Cluster, save: Any, every_s: float = 20.0) -> None:
        self.report, self.cluster, self.save, self.every_s = report, cluster, save, every_s
        self.start = self.last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if stage != "read" or now - self.last < self.every_s:
            return
        self.last = now
        spent = round(now - self.start, 1)
        self.report.notes["reading"] = {"tokens": done, "of": total, "seconds": spent}
        self.cluster.say(f"    read {done} of {total} tokens in {spent} s")
        self.save()


def first_prompt(
    model: Any, options: argparse.Namespace, mesh: Any, cluster: Cluster
) -> dict[str, float]:
    """Seconds to the first token of the process's first prompt, and of the same one again."""
    found: dict[str, float] = {}
    with engine_of(model, options, mesh) as engine:
        batch = prompt(options, warm_tokens(options, cluster), cluster.device)
        found["tokens"] = batch["input_ids"].shape[1]
        for name in ("first_token_s", "again_s"):
            answer = timed_answer(
                lambda clock: engine.generate(batch, streamer=clock, **greedy(options, 2)), cluster
            )
            found[name] = float(f"{slowest(answer, cluster).ttft_s:.5g}")
    cluster.say(f"first prompt: {found}")
    return found


def warm_tokens(options: argparse.Namespace, cluster: Cluster) -> int:
    """A length that needs what longer ones need: a few chunks at least."""
    few = 3 * options.chunk_tokens * cluster.world_size
    return max(few, min(options.lengths[0], 131072))


def engine_of(model: Any, options: argparse.Namespace, mesh: Any) -> Any:
    from longvila.inference.engine import Engine

    return Engine(
        model, mesh, chunk_tokens=options.chunk_tokens, decode_graphs=options.decode_graphs
    )


def planned_bytes(
    model: Any, options: argparse.Namespace, cluster: Cluster, tokens: int, frames: int
) -> float:
    """The peak of a rank that ``longvila plan --inference`` says."""
    from longvila.memory.estimate import LIBRARY_BYTES
    from longvila.memory.operations import Load
    from longvila.memory.prompts import prompt_peak
    from longvila.memory.settings import Ranks
    from longvila.parallel.sizes import size_of

    return prompt_peak(
        size_of(model), Load(tokens=tokens, frames=frames), ranks=Ranks(ring=cluster.world_size),
        chunk_tokens=options.chunk_tokens,
        compute_bytes=torch.empty(0, dtype=getattr(torch, options.dtype)).element_size(),
        library_bytes=LIBRARY_BYTES if cluster.is_cuda else 0.0,
    ).bytes  # fmt: skip


def run_ours(
    engine: Any, options: argparse.Namespace, cluster: Cluster, ceilings: Ceilings, tokens: int,
    more: dict[str, float], reading: Any, add: Any,
) -> None:  # fmt: skip
    """Prefill, decode and further questions at one length.

    Args:
        engine: Warm.
        options: The shapes.
        cluster: The ranks.
        ceilings: Rates for the floors.
        tokens: About how many.
        more: Metrics that go into the row as they are.
        reading: Told how far a prompt is.
        add: Takes the row, twice: as soon as there is an answer, and with the questions.
    """
    from longvila.inference.prefill import ReadTimes

    ranks, model = cluster.world_size, engine.model
    batch = prompt(options, tokens, cluster.device)
    length, frames = batch["input_ids"].shape[1], int(batch["video_num_frames"])
    ideal = floor_s(options, ceilings, length, frames, ranks)
    cluster.reset_peak()
    samples: list[Any] = []
    if options.sample_chunks:
        film, ttft_s, sampled, samples = sampled_prefill(engine, options, batch, cluster)
        more = {**more, **sampled}
        first = Answer(ttft_s, ask(engine, options, film, options.words, cluster).step_s)
    else:
        answers: list[Answer] = []
        for _ in range(1 if ideal > LONG_S else options.repeats):
            film = None
            free(cluster)
            cluster.reset_peak()
            times = ReadTimes(cluster.device, reading())
            box: list[Any] = []

            def answer(clock: Clock, times: Any = times, box: list[Any] = box) -> None:
                cache = engine.prefill(batch, times=times)
                box.append(engine.fork(cache))
                engine.generate(cache, streamer=clock, **greedy(options))

            answers.append(slowest(timed_answer(answer, cluster), cluster))
            film = box.pop()
        samples = [{"ttft_s": each.ttft_s, "step_s": each.step_s} for each in answers]
        first = Answer(
            statistics.median(each.ttft_s for each in answers),
            statistics.median(each.step_s for each in answers),
        )
    peak = cluster.everywhere([float(cluster.peak_bytes())])[0]
    planned = planned_bytes(model, options, cluster, length, frames)
    step_floor = decode_floor_ms(model, options, ceilings, length, ranks)
    metrics = {
        "ttft_s": first.ttft_s,
        "floor_s": ideal,
        "ttft_over_floor": first.ttft_s / ideal,
        "percent_of_ideal": 100 * ideal / first.ttft_s,
        "tokens_per_s_per_gpu": length / first.ttft_s / ranks,
        "decode_tokens_per_s": 1 / first.step_s,
        "decode_step_ms": 1e3 * first.step_s,
        "decode_floor_ms": step_floor,
        "decode_percent_of_floor": 100 * step_floor / (1e3 * first.step_s),
        "peak_gib": peak / GIB,
        "planned_peak_gib": planned / GIB,
        "cache_gib": film.local_bytes / GIB,
        "sampled": 0.0,
        **more,
    }
    if peak:
        metrics["planned_error_percent"] = 100 * (planned / peak - 1)
    add(row("longvila_engine", "ours", options, length, frames, ranks, metrics, samples))
    whole = [
        each.ttft_s + each.step_s * (options.new_tokens - 1)
        for each in (
            ask(engine, options, film, options.words + 3 * number, cluster)
            for number in range(options.questions)
        )
    ]
    if whole:
        first_s = first.ttft_s + first.step_s * (options.new_tokens - 1)
        metrics["question_s"] = max(whole)
        metrics["question_mean_s"] = statistics.mean(whole)
        metrics["question_percent_of_first"] = 100 * max(whole) / first_s
        asked = row("longvila_engine", "ours", options, length, frames, ranks, metrics, samples)
        asked.about["questions_s"] = [round(seconds, 4) for seconds in whole]
        add(asked)


def ask(
    engine: Any, options: argparse.Namespace, film: Any, words: int, cluster: Cluster
) -> Answer:
    """A further question of so many tokens, answered on a fork."""
    generator = torch.Generator().manual_seed(words)
    question = torch.randint(2, options.vocab - 2, (1, words), generator=generator)
    answer = timed_answer(
        lambda clock: engine.generate(
            engine.fork(film), question, streamer=clock, **greedy(options)
        ), cluster,
    )  # fmt: skip
    return slowest(answer, cluster)


# ---- run ---------------------------------------------------------------------------------------


def row(
    method: str, kind: Any, options: argparse.Namespace, tokens: int, frames: int, ranks: int,
    metrics: dict[str, float], samples: list[Any],
) -> Row:  # fmt: skip
    shape = {
        "frames": frames, "layers": options.layers, "heads": options.heads,
        "kv_heads": options.kv_heads, "model_dim": options.model_dim,
        "sequence_parallel": ranks, "chunk_tokens": options.chunk_tokens,
    }  # fmt: skip
    rounded = {name: float(f"{value:.5g}") for name, value in metrics.items()}
    return Row(method, kind, tokens, shape, rounded, samples)


def late(
    options: argparse.Namespace, report: Report, cluster: Cluster, method: str, tokens: int,
    seconds: float, *, alone: bool = False,
) -> bool:  # fmt: skip
    """Whether something that takes so long would end after ``--stop-after-s``; notes that.

    Args:
        options: The limit, and when the run began.
        report: Where to say what is left out.
        cluster: The ranks.
        method: What is left out.
        tokens: At which length.
        seconds: How long it would take.
        alone: Whether the other ranks do not ask.
    """
    end = time.perf_counter() - options.started + seconds
    if not alone:
        (end,) = cluster.everywhere([end])
    if end <= options.stop_after_s:
        return False
    reason = f"{tokens} tokens: would end after {end:.0f} s"
    report.not_measured.append({"method": method, "reason": reason})
    cluster.say(f"  left out {method}: {reason}")
    return True


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    from benchmarks import _peer_generate
    from longvila.sp import build_mesh

    report = Report("prefill", QUESTION, hardware(cluster))
    options.started = time.perf_counter()

    def save() -> None:
        if cluster.is_main and options.out is not None:
            report.write(options.out, suffix=options.suffix)

    def add(found: Row) -> None:
        """Take a row, in place of an earlier one of the same prompt."""
        key = (found.method, found.tokens)
        report.rows[:] = [each for each in report.rows if (each.method, each.tokens) != key]
        for each in report.rows if found.kind == "ours" else ():
            if each.kind == "peer" and each.tokens == found.tokens and "ttft_s" in each.metrics:
                times = each.metrics["ttft_s"] / found.metrics["ttft_s"]
                found.metrics["times_peer"] = float(f"{times:.5g}")
        report.rows.append(found)
        shown = " ".join(f"{name} {value:g}" for name, value in found.metrics.items())
        spent = time.perf_counter() - options.started
        cluster.say(f"  [{spent:4.0f} s] {found.kind:5s} {found.method} at {found.tokens}: {shown}")
        save()

    with torch.no_grad():
        lengths = list(options.lengths)
        if options.peer:
            longest = _peer_generate.run_peer(options, cluster, report, add)
            if options.peer_longest and longest is not None:
                lengths.append(longest)
        mesh = None
        if cluster.world_size > 1:
            mesh = build_mesh(
                cluster.world_size, num_heads=options.heads, num_kv_heads=options.kv_heads,
                device_type=cluster.device.type,
            )  # fmt: skip
        model = build_model(options, cluster.device)
        report.notes["first_prompt"] = first_prompt(model, options, mesh, cluster)
        error = check(model, options, mesh, cluster)
        ceilings = measure_ceilings(model, options, cluster)
        report.notes["ceilings"] = {
            name: value if isinstance(value, str) else float(f"{value:.5g}")
            for name, value in vars(ceilings).items()
        }
        free(cluster)
        with engine_of(model, options, mesh) as engine:
            # A graph belongs to its engine: let it be captured before anything is timed.
            short = prompt(options, warm_tokens(options, cluster), cluster.device)
            engine.generate(short, **greedy(options, 6))
            for tokens in lengths:
                free(cluster)
                expected = AFTERWARDS_S + SLACK * floor_s(
                    options, ceilings, tokens, tokens // tokens_per_frame(options),
                    cluster.world_size,
                )  # fmt: skip
                if options.sample_chunks == 0 and late(
                    options, report, cluster, "longvila_engine", tokens, expected
                ):
                    continue
                try:
                    run_ours(
                        engine, options, cluster, ceilings, tokens, {"error_logits": error},
                        lambda: Reading(report, cluster, save), add,
                    )  # fmt: skip
                except torch.OutOfMemoryError as fault:
                    if cluster.world_size > 1:
                        raise  # the other ranks are in a collective
                    report.not_measured.append(
                        {"method": "longvila_engine", "reason": f"{tokens} tokens: {fault}"[:300]}
                    )
                    break
        report.notes.pop("reading", None)
        save()
    return report


def free(cluster: Cluster) -> None:
    gc.collect()
    if cluster.is_cuda:
        torch.cuda.empty_cache()


def _lengths(text: str) -> list[int]:
    """``64k,1182000`` as ``[65536, 1182000]``."""
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    return [int(p[:-1]) * 1024 if p.endswith("k") else int(p) for p in parts]


#: Shapes for the CPU.
TINY = {
    "lengths": [120, 200], "chunk_tokens": 16, "image_size": 28, "patch_size": 14, "width": 16,
    "mlp_width": 24, "vision_layers": 2, "vision_heads": 2, "model_dim": 32, "text_mlp": 48,
    "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 96, "frame_batch": 4, "words": 5,
    "new_tokens": 4, "check_tokens": 60, "attention_block": 64, "copy_bytes": 1 << 16, "calls": 2,
    "dtype": "float32", "repeats": 2, "questions": 2,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for the CPU")
    parser.add_argument("--lengths", type=_lengths, default=_lengths("64k,256k,1182000"))
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-lengths", type=_lengths, help="as --lengths if left out")
    parser.add_argument("--peer-longest", action="store_true", help="find the peer's longest")
    parser.add_argument("--sample-chunks", type=int, default=0, help="0 reads whole prompts")
    parser.add_argument("--chunk-tokens", type=int, default=8192, help="of a rank")
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--words", type=int, default=32, help="of a question")
    parser.add_argument("--check-tokens", type=int, default=3000)
    parser.add_argument("--attention-block", type=int, default=131072)
    parser.add_argument("--copy-bytes", type=int, default=4 * GIB)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="of a prompt that takes seconds")
    parser.add_argument("--questions", type=int, default=10, help="further ones about a film")
    parser.add_argument("--decode-graphs", default="auto", help="as Engine's decode_graphs")
    parser.add_argument("--stop-after-s", type=float, default=math.inf,
                        help="begin nothing that would end later")  # fmt: skip
    add_tower_options(parser)
    parser.add_argument("--frame-batch", type=int, default=32)
    add_text_options(parser)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suffix", default="")
    argv = sys.argv[1:] if argv is None else argv
    if "--tiny" in argv:
        parser.set_defaults(**TINY)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with _cluster.joined() as cluster:
        run(options, cluster)


if __name__ == "__main__":
    main()
