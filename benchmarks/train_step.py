"""What does a full fine-tuning step on long text cost, against the peers that train so long?

The step of context extension: a LongVILA of Qwen2-7B's shape, random weights, one document of text
over all GPUs, every parameter trained, float32 shards with AdamW's states, bf16 compute, the
gradient norm taken and the update made. What is timed is `longvila.train.step.train_step`, which
``longvila train`` runs; the peers' steps are in ``peers/train_steps.py``.

1. Each engine builds its model; before it is sharded, this process alone runs a short document
   through it by transformers' own forward (all layers, bf16), which gives the loss and the gradient
   norm that the engine has to reproduce over all GPUs. An engine that does not is not timed.
2. A warm-up step, then the timed ones, at each length; a step counts as long as its slowest rank.
   Engines run one after the other, since a GPU holds the states of one.
3. What does not fit is a row that says so.

MFU is causal and counts no recomputation: for S tokens, N weights without the input embedding, L
layers of width M, ``6 N S + 6 S^2 M L`` operations, over the dense bf16 rate of the data sheet.

Parts of our step are marks in the stream: ``embed`` up to the text model, ``text_forward``,
``loss_forward``, ``backward`` up to the gradients' norm, ``norm_clip``, ``update``. With
``--video`` documents are one long video and an answer: encoding and exchange are
``vision_forward``, and ``backward`` is cut where the fused embeddings have their gradient.

    torchrun --nproc-per-node 2 -m benchmarks.train_step --peers
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import _cluster
from benchmarks._attempt import OUT_OF_MEMORY, attempt, clean
from benchmarks._cluster import Cluster, Stopwatch
from benchmarks._model import (
    add_text_options,
    add_tower_options,
    draw,
    model_config,
    rows_per_frame,
)
from benchmarks._results import Kind, Report, Row, hardware, spread_percent
from benchmarks.mmsp_step import vision_flops

QUESTION = "What does a full fine-tuning step on long text cost, AdamW included?"
GIB = 2**30
#: Host memory left to what warm-up steps move.
WARM_UP_BYTES = 9 * GIB
STARTED = time.perf_counter()
#: Dense bf16 rate of one H100/H200 by its datasheet; MFU is over this.
PEAK_TFLOPS = 989.0
PARTS = ("embed", "text_forward", "loss_forward", "backward", "norm_clip", "update")
VIDEO_PARTS = (
    "vision_forward", "text_forward", "loss_forward", "text_backward", "vision_backward",
    "norm_clip", "update",
)  # fmt: skip
#: Relative errors against one GPU that an engine may have, by dtype: loss, gradient norm.
LIMITS = {"bfloat16": (2e-3, 2e-2), "float32": (1e-5, 1e-3)}


@dataclass
class Stepped:
    """What a step gave."""

    loss: float
    gradient_norm: float
    parts_ms: list[float] = field(default_factory=list)


class Engine(Protocol):
    """A way to train the model over all ranks."""

    name: str
    kind: Kind
    about: dict[str, Any]

    def build(self) -> Any:
        """Make the model on this device, the same on all ranks, not yet sharded."""

    def shard(self, tokens: int) -> None:
        """Put it on the ranks for documents of that length, with its optimiser."""

    def step(self, ids: Tensor, rate: float) -> Stepped:
        """Train on one document, ``(1, S)`` ids that all ranks have."""

    def close(self) -> None:
        """Let go of everything."""


class LongVILA:
    """``parallelize`` and ``train_step``, with the memory settings that a length needs."""

    kind: Kind = "ours"

    def __init__(self, options: argparse.Namespace, cluster: Cluster, mesh: Any) -> None:
        self.name = "longvila"
        self.options, self.cluster, self.mesh = options, cluster, mesh
        self.about: dict[str, Any] = {}
        self.model: Any = None
        self.optimizer: Any = None
        self.locking: threading.Thread | None = None
        self.watch = Stopwatch(cluster)

    def build(self) -> Any:
        from longvila.model.modeling_longvila import LongVILAForConditionalGeneration

        options = self.options
        config = model_config(options, vision_batch_size=options.frame_batch)
        self.model = draw(
            lambda: LongVILAForConditionalGeneration(config), self.cluster.device, options.dtype
        ).train()
        return self.model

    def shard(self, tokens: int) -> None:
        from longvila.memory.estimate import training_peak
        from longvila.memory.offload import Offload
        from longvila.memory.operations import Load
        from longvila.memory.settings import Ranks, Settings
        from longvila.parallel.apply import ParallelPlan, parallelize
        from longvila.parallel.sizes import size_of
        from longvila.train.stages import Optimizer, Rates
        from longvila.train.step import build_optimizer

        options = self.options
        dtype = getattr(torch, options.dtype)
        gib = at_length(options.offload_gib, tokens, 0.0)
        plain = int(at_length(options.plain_layers, tokens, 0))
        offload = None
        if gib:
            keep_last = int(at_length(options.offload_keep_last, tokens, 1))
            offload = Offload(budget_bytes=int(gib * GIB), keep_last=keep_last)
            if options.recompute and not plain:
                self._lock_ahead(offload, tokens)
        tile = int(at_length(options.mlp_tile, tokens, 0)) or None
        host_moments = bool(at_length(options.host_moments, tokens, 0))
        frames = frames_of(options, tokens)
        planned = training_peak(
            size_of(self.model),
            Load(tokens=tokens, frames=frames, targets=options.answer if frames else tokens),
            ranks=Ranks(ulysses=self.mesh.ulysses_size, ring=self.mesh.ring_size),
            settings=Settings(
                parameter_bytes=4,
                compute_bytes=dtype.itemsize,
                optimizer="adamw-host" if host_moments else "adamw",
                checkpointing=options.recompute,
                plain_layers=plain,
                offload_bytes=int(gib * GIB),
                keep_last=1 if offload is None else offload.keep_last,
                mlp_tile_rows=tile,
                compiled=options.compile,
                loss_tile_rows=options.loss_tile,
                backend="fa4" if self.cluster.is_cuda else "cpu",
            ),
        )
        parallelize(
            self.model,
            self.mesh,
            ParallelPlan(
                compute_dtype=None if dtype == torch.float32 else dtype,
                activation_checkpointing=options.recompute,
                plain_layers=plain if options.recompute else 0,
                offload=offload,
                mlp_tile_rows=tile,
                compile_modules=options.compile,
                loss_tile_rows=options.loss_tile,
                two_stage=True,
            ),
        )
        rates = Rates(vision_tower=1e-5, projector=1e-5, language_model=1e-5)
        settings = Optimizer(max_steps=1, offload=host_moments)
        self.optimizer = build_optimizer(self.model, rates, settings)
        text = self.model.model.language_model
        text.register_forward_pre_hook(self._text_starts, with_kwargs=True)
        text.register_forward_hook(lambda *_: self.watch.mark())
        self.model.register_forward_hook(lambda *_: self.watch.mark())
        self.optimizer.register_step_pre_hook(lambda *_: self.watch.mark())
        self.offload = offload
        self.about = {
            "recompute": options.recompute,
            "plain_layers": plain,
            "offload_gib": gib,
            "mlp_tile_rows": tile,
            "compiled_norms_and_mlps": options.compile,
            "moments_on_host": host_moments,
            "planned_gib": round(planned.bytes / GIB, 2),
        }

    def _lock_ahead(self, offload: Any, tokens: int) -> None:
        """Lock the host memory of checkpoints beside the build, as a run's first step would."""
        cluster, options = self.cluster, self.options
        local = tokens // cluster.world_size
        size = local * options.model_dim * (4 if options.dtype == "float32" else 2)
        # What warm-up steps move has other sizes, and would push reserved memory out.
        number = max(offload.budget_bytes - WARM_UP_BYTES, 0) // size

        def lock() -> None:
            if cluster.is_cuda:
                torch.cuda.set_device(cluster.device)
            offload.reserve(size, number, pinned=cluster.is_cuda)

        self.locking = threading.Thread(target=lock, daemon=True)
        self.locking.start()

    def _text_starts(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.options.video:
            kwargs["inputs_embeds"].register_hook(lambda _: self.watch.mark())
        self.watch.mark()

    def settle(self) -> None:
        """Wait for what still runs beside the build."""
        if self.locking is not None:
            self.locking.join()

    def step(self, ids: Tensor, rate: float) -> Stepped:
        from longvila.train import step as steps

        self.watch = Stopwatch(self.cluster)
        finish = steps.finish_step

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.watch.mark()
            return finish(*args, **kwargs)

        steps.finish_step = marked
        try:
            batch = arguments(self.options, ids)
            self.watch.mark()
            result = steps.train_step(
                self.model, [batch], self.optimizer, self.mesh, rate=rate, clip_norm=1.0
            )
            self.watch.mark()
        finally:
            steps.finish_step = finish
        laps = self.watch.laps_ms()
        if len(laps) != len(parts_of(self.options)):
            expected = parts_of(self.options)
            raise RuntimeError(f"expected {len(expected)} parts of a step, got {len(laps)}")
        return Stepped(result.loss, result.gradient_norm, laps)

    def close(self) -> None:
        self.settle()
        self.model = self.optimizer = self.offload = None


def at_length(table: dict[int, float], tokens: int, default: float) -> float:
    """The setting of the longest listed length that is not above this one."""
    known = [length for length in table if length <= tokens]
    return table[max(known)] if known else default


def parts_of(options: argparse.Namespace) -> tuple[str, ...]:
    return VIDEO_PARTS if options.video else PARTS


def frames_of(options: argparse.Namespace, tokens: int) -> int:
    """Frames of a document of so many tokens."""
    room = max(tokens - options.answer, 0) if options.video else 0
    return room // (rows_per_frame(options) + 1)


def document(options: argparse.Namespace, tokens: int, cluster: Cluster) -> Tensor:
    """Ids of one document: words; with ``--video`` a prompt, frames and an answer."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, options.vocab - 2, (1, tokens), generator=generator)
    if options.video:
        a_frame, frames = rows_per_frame(options) + 1, frames_of(options, tokens)
        video = torch.full((frames, a_frame), options.vocab - 1)
        video[:, -1] = 1
        start = tokens - options.answer - frames * a_frame
        ids[0, start : start + frames * a_frame] = video.flatten()
    return ids.to(cluster.device)


def arguments(options: argparse.Namespace, ids: Tensor) -> dict[str, Any]:
    """What a model is called with for a document; the same pixels at every call."""
    if not options.video:
        return {"input_ids": ids, "labels": ids}
    labels = torch.full_like(ids, -100)
    labels[:, -options.answer :] = ids[:, -options.answer :]
    frames = int((ids == options.vocab - 1).sum()) // rows_per_frame(options)
    size = (frames, 3, options.image_size, options.image_size)
    pixels = torch.empty(size, dtype=getattr(torch, options.dtype), device=ids.device)
    pixels.normal_(generator=torch.Generator(ids.device).manual_seed(8))
    return {
        "input_ids": ids,
        "labels": labels,
        "pixel_values_videos": pixels,
        "video_num_frames": torch.tensor([frames]),
    }


# ---- one GPU -----------------------------------------------------------------------------------


def reference(model: Any, ids: Tensor, options: argparse.Namespace) -> tuple[float, float]:
    """Loss and gradient norm of a document by the model's own forward on this device alone."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model(**arguments(options, ids), use_cache=False).loss
    loss.backward()
    model.gradient_checkpointing_disable()
    squares = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
    norm = float(torch.stack(squares).sum().sqrt())
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), norm


def check(
    engine: Engine, alone: tuple[float, float], ids: Tensor, options: argparse.Namespace
) -> dict[str, float]:
    """Errors of an engine's loss and gradient norm; raises where they are too large."""
    got = engine.step(ids, 0.0)
    errors = {
        "check_loss_error": abs(got.loss - alone[0]) / abs(alone[0]),
        "check_gradient_norm_error": abs(got.gradient_norm - alone[1]) / alone[1],
    }
    for (name, error), limit in zip(errors.items(), LIMITS[options.dtype], strict=True):
        if not error <= limit:
            raise RuntimeError(
                f"{engine.name} is wrong, not timing it: {name} {error:.2e} above {limit}; loss "
                f"{got.loss} and norm {got.gradient_norm}, one GPU has {alone[0]} and {alone[1]}"
            )
    return errors


# ---- measurement -------------------------------------------------------------------------------


def reserve(cluster: Cluster) -> None:
    """Let torch's allocator take the device's memory now, rather than in the first timed step."""
    if cluster.is_cuda:
        free, _ = torch.cuda.mem_get_info(cluster.device)
        torch.empty(max(free - 6 * GIB, 0), dtype=torch.uint8, device=cluster.device)


def model_flops(options: argparse.Namespace, tokens: int) -> float:
    """Operations of a step over all GPUs; see the module's text."""
    m, head_dim = options.model_dim, options.model_dim // options.heads
    layer = 2 * m * m + 2 * m * options.kv_heads * head_dim + 3 * m * options.text_mlp
    weights = options.layers * layer
    attention = 6.0 * float(tokens) ** 2 * m * options.layers
    if not options.video:
        return 6.0 * (weights + m * options.vocab) * tokens + attention
    frames = frames_of(options, tokens)
    head = 6.0 * m * options.vocab * options.answer
    return 6.0 * weights * tokens + attention + head + vision_flops(options, frames)


def measure(
    engine: Engine, ids: Tensor, options: argparse.Namespace, cluster: Cluster, *, repeats: int
) -> tuple[dict[str, float], list[float]]:
    """Metrics of an engine's step, and its times in seconds."""
    seconds, parts = [], []
    peak = held = 0.0
    retries = 0.0
    getattr(engine, "settle", lambda: None)()
    reserve(cluster)
    for _ in range(repeats):
        gc.collect()
        cluster.barrier()
        cluster.reset_peak()
        tries = cluster.allocator()[1]
        began = time.perf_counter()
        found = engine.step(ids, 1.0)
        cluster.synchronize()
        took = time.perf_counter() - began
        reserved, again = cluster.allocator()
        took, used, reserved, again = cluster.everywhere(
            [took, float(cluster.peak_bytes()), float(reserved), float(again - tries)]
        )
        seconds.append(took)
        parts.append(found.parts_ms)
        peak, held, retries = max(peak, used), max(held, reserved), retries + again
        cluster.say(
            f"    step of {ids.shape[1]}: {took:.3f} s, {[round(p) for p in found.parts_ms]}"
        )
    step_s, tokens = statistics.median(seconds), ids.shape[1]
    metrics = {
        "step_s": step_s,
        "tokens_per_s_per_gpu": tokens / step_s / cluster.world_size,
        "mfu_percent": 100.0
        * model_flops(options, tokens)
        / (step_s * cluster.world_size * PEAK_TFLOPS * 1e12),
        "peak_gib": peak / GIB,
        "reserved_gib": held / GIB,
        "allocator_retries": retries,
        "spread_percent": spread_percent(seconds),
        "loss": found.loss,
        "gradient_norm": found.gradient_norm,
    }
    if found.parts_ms:
        columns = zip(*parts, strict=True)
        for part, column in zip(parts_of(options), columns, strict=True):
            metrics[f"{part}_s"] = statistics.median(column) / 1e3
    return metrics, seconds


def profile(engine: Engine, ids: Tensor, path: Path, cluster: Cluster) -> None:
    """Write the kernels of one step, by the time they take on the first rank."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cluster.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        engine.step(ids, 1.0)
        cluster.synchronize()
    if cluster.is_main:
        key = "self_cuda_time_total" if cluster.is_cuda else "self_cpu_time_total"
        table = found.key_averages().table(
            sort_by=key, row_limit=70, max_name_column_width=90, max_src_column_width=0
        )
        path.mkdir(parents=True, exist_ok=True)
        (path / f"profile_{engine.name}_{ids.shape[1]}.txt").write_text(table)


def run_engine(
    make: Callable[[], Engine],
    lengths: list[int],
    options: argparse.Namespace,
    cluster: Cluster,
    report: Report,
    save: Callable[[], None],
) -> None:
    """Check and time one engine at several lengths, building it anew for each."""
    checked: dict[str, float] = {}
    for tokens in lengths:
        if time.perf_counter() - STARTED > options.stop_after_s:
            cluster.say(f"  no time left for {tokens} tokens")
            break
        engine = make()
        began = time.perf_counter()
        ids = document(options, options.check_tokens, cluster)

        first = not checked

        def prepare(
            engine: Engine = engine, tokens: int = tokens, ids: Tensor = ids, first: bool = first
        ) -> Any:
            model = engine.build()
            alone = reference(model, ids, options) if first else None
            del model
            engine.shard(tokens)
            return alone

        alone, reason = attempt(prepare, cluster)
        if reason is None and alone is not None:
            errors, reason = attempt(
                lambda engine=engine, alone=alone, ids=ids: check(engine, alone, ids, options),
                cluster,
            )
            checked = errors or {}
        whole = document(options, tokens, cluster)
        # Two short documents of different lengths: what compiles does so for any length then.
        for part in (2, 1) if first else (1,):
            warm = document(options, min(tokens, options.warm_tokens) // part, cluster)
            if reason is None:
                _, reason = attempt(
                    lambda engine=engine, warm=warm: engine.step(warm, 0.0), cluster
                )
        metrics: dict[str, float] = {}
        seconds: list[float] = []
        if reason is None:
            long = options.long_tokens if engine.kind == "ours" else options.long_peer_tokens
            repeats = options.repeats if tokens < long else options.long_repeats
            cluster.say(
                f"  {engine.name} at {tokens}: ready after {time.perf_counter() - began:.1f} s"
            )
            result, reason = attempt(
                lambda engine=engine, whole=whole, repeats=repeats: measure(
                    engine, whole, options, cluster, repeats=repeats
                ),
                cluster,
            )
            if result is not None:
                metrics, seconds = result
        if reason is None and options.profile and options.out is not None:
            profile(engine, whole, options.out, cluster)
        about = {**engine.about, **({"failed": reason} if reason else {})}
        offload = getattr(engine, "offload", None)
        if offload is not None:
            about["offload_used_gib"] = round(offload.peak_bytes / GIB, 2)
        shape = {
            "layers": options.layers,
            "model_dim": options.model_dim,
            "sequence_parallel": cluster.world_size,
            "check_tokens": options.check_tokens,
            **({"frames": frames_of(options, tokens)} if options.video else {}),
        }
        rounded = {name: float(f"{v:.5g}") for name, v in {**metrics, **checked}.items()}
        rounded = rounded if metrics else {}
        samples = [round(s, 4) for s in seconds]
        report.rows.append(Row(engine.name, engine.kind, tokens, shape, rounded, samples, about))
        shown = " ".join(f"{n} {v:.4g}" for n, v in rounded.items()) or str(reason)
        cluster.say(f"  {engine.kind:5s} {engine.name:28s} {tokens:8d}  {shown}")
        save()
        engine.close()
        del engine, offload, whole, ids
        clean()
        if reason is not None and reason != OUT_OF_MEMORY:
            break
    torch._dynamo.reset()


def compare(report: Report) -> list[dict[str, Any]]:
    """Ours over the best peer, a length each."""
    found = []
    for tokens in sorted({row.tokens for row in report.rows}):
        rows = [r for r in report.rows if r.tokens == tokens and r.metrics]
        ours = [r for r in rows if r.kind == "ours"]
        peers = [r for r in rows if r.kind == "peer"]
        if ours and peers:
            mine = min(ours, key=lambda row: row.metrics["step_s"])
            best = min(peers, key=lambda row: row.metrics["step_s"])
            ratio = best.metrics["step_s"] / mine.metrics["step_s"]
            found.append({"tokens": tokens, "ours": mine.method, "peer": best.method,
                          "speedup": round(ratio, 4)})  # fmt: skip
    return found


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    from longvila.sp import build_mesh

    report = Report("train_step", QUESTION, hardware(cluster))
    mesh = build_mesh(
        cluster.world_size,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        device_type=cluster.device.type,
    )
    cluster.say(mesh.explain())

    def save() -> None:
        report.notes["comparisons"] = compare(report)
        if cluster.is_main and options.out is not None:
            report.write(options.out, suffix=options.suffix)

    if not options.only_peers:
        run_engine(
            lambda: LongVILA(options, cluster, mesh),
            options.lengths, options, cluster, report, save,
        )  # fmt: skip
    if options.peers or options.only_peers:
        from benchmarks.peers.train_steps import peer_engines

        for name, reason, make in peer_engines(options, cluster):
            if reason is not None:
                cluster.say(f"  left out {name}: {reason}")
                report.not_measured.append({"method": name, "reason": reason})
                continue
            run_engine(make, options.peer_lengths, options, cluster, report, save)
    save()
    for each in report.notes["comparisons"]:
        cluster.say(f"  {each}")
    return report


def _table(text: str) -> dict[int, float]:
    """``65536:8,131072:2`` as ``{65536: 8, 131072: 2}``."""
    pairs = (part.split(":") for part in text.split(",") if part)
    return {int(tokens): float(value) for tokens, value in pairs}


TINY = {
    "lengths": [96], "peer_lengths": [96], "check_tokens": 64, "warm_tokens": 64,
    "model_dim": 64, "text_mlp": 96, "layers": 3, "heads": 4, "kv_heads": 2, "vocab": 256,
    "width": 32, "mlp_width": 48, "vision_layers": 2, "vision_heads": 2, "image_size": 28,
    "dtype": "float32", "repeats": 1, "loss_tile": 16, "answer": 16,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--lengths", type=int, nargs="*", default=[65536, 131072, 262144])
    parser.add_argument("--peer-lengths", type=int, nargs="*", default=[65536, 131072])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--only-peers", action="store_true")
    parser.add_argument("--methods", default="", help="peers to run, a regular expression")
    parser.add_argument("--check-tokens", type=int, default=8192)
    parser.add_argument("--warm-tokens", type=int, default=40960)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-tokens", type=int, default=200_000)
    parser.add_argument("--long-peer-tokens", type=int, default=200_000)
    parser.add_argument("--long-repeats", type=int, default=1)
    add_tower_options(parser)
    add_text_options(parser)
    parser.add_argument("--video", action="store_true", help="documents are a video each")
    parser.add_argument("--answer", type=int, default=256, help="tokens with a loss of a video's")
    parser.add_argument("--frame-batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loss-tile", type=int, default=4096)
    parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    # Settings by length: the entry of the longest length not above the step's counts.
    parser.add_argument("--plain-layers", type=_table, default=_table("65536:15,131072:4,262144:0"))
    parser.add_argument("--mlp-tile", type=_table, default=_table("262144:16384"))
    parser.add_argument("--offload-gib", type=_table, default=_table("524288:72"))
    parser.add_argument("--offload-keep-last", type=_table, default={})
    parser.add_argument("--host-moments", type=_table, default={})
    parser.add_argument("--stop-after-s", type=float, default=float("inf"))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a shape for the CPU")
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
