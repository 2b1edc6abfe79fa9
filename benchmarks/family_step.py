"""What does a training step on a long video cost for models of other families, unmodified?

Stock transformers classes in the shapes of Qwen2.5-VL-7B and Qwen3-VL-8B, random weights, put on a
mesh by `longvila.parallelize`, beside LongVILA-7B at as many tokens; every parameter is trained,
tower and mergers included, float32 shards with AdamW's states, bf16 compute. What is timed is
`longvila.train.step.train_step`. For each family:

1. The model, not yet sharded, runs a short video by transformers' own forward on this device
   alone. Its loss and gradient norms (of all, of the tower, the merger and the language model)
   are what MM-SP has to reproduce over all GPUs; what does not is not timed.
2. ``longvila``: the step at full length. ``replicated_tower``: the same model, but every rank
   encodes all frames and picks the rows of its tokens; which is what sequence parallelism without
   a plan for frames does. The rate is zero, so that both see the same weights, and the norm of one
   must be that of the other.
3. ``stock_trainer``: transformers' Trainer with FSDP2, gradient checkpointing and no sequence
   parallelism, with videos that grow until one does not fit (``peers/stock_trainer.py``). It comes
   last, for all families, since running out of memory may take the process with it.

Rates are of the operations that a step needs (``family_shapes.py``), so that families with another
tower, another depth or another vocabulary compare: ``tflops_per_gpu`` over LongVILA's is
``rate_of_longvila`` in the notes.

Parts are marks in the stream: ``vision_forward`` up to the row exchange (planning, decoding of
positions, encoding), ``exchange_forward``, ``embed``, ``text_forward``, ``loss_forward``,
``text_backward``, ``exchange_backward``, ``vision_backward`` up to the gradients' norm,
``norm_clip``, ``update``. A replicated tower has no exchange; picking rows stands in its place.

    torchrun --nproc-per-node 2 -m benchmarks.family_step
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _cluster
from benchmarks._attempt import OUT_OF_MEMORY, attempt, clean
from benchmarks._cluster import Cluster, Stopwatch
from benchmarks._model import draw
from benchmarks._results import Kind, Report, Row, hardware, spread_percent
from benchmarks.family_shapes import SHAPES, Batch, Shape, operations
from benchmarks.mmsp_step import _Numbers, vision_path
from benchmarks.train_step import GIB, PEAK_TFLOPS, reserve

QUESTION = "What does a step on a long video cost for other families, by part, against LongVILA?"
STARTED = time.perf_counter()
PARTS = (
    "vision_forward", "exchange_forward", "embed", "text_forward", "loss_forward",
    "text_backward", "exchange_backward", "vision_backward", "norm_clip", "update",
)  # fmt: skip
VARIANTS: dict[str, Kind] = {"longvila": "ours", "replicated_tower": "peer"}
GROUPS = ("vision_tower", "projector", "language_model")
#: Relative errors against one GPU, by dtype: loss, norm of all gradients, norm of a part's.
LIMITS = {"bfloat16": (2e-3, 2e-2, 1e-1), "float32": (1e-5, 1e-3, 1e-3)}


class Marks:
    """Named marks in the stream; a part is what ends with the mark of its name."""

    def __init__(self, cluster: Cluster) -> None:
        self.watch, self.names = Stopwatch(cluster), [""]
        self.watch.mark()

    def mark(self, name: str) -> None:
        self.names.append(name)
        self.watch.mark()

    def parts_s(self) -> dict[str, float]:
        """Seconds of each part; parts that a step has not are zero."""
        laps = zip(self.names[1:], self.watch.laps_ms(), strict=True)
        found = dict.fromkeys(PARTS, 0.0)
        for name, lap in laps:
            found[name] += lap / 1e3
        return found


class FamilyEngine:
    """A family's model on the mesh, and its step.

    Args:
        shape: The family.
        options: Of the command line.
        cluster: The ranks.
    """

    def __init__(self, shape: Shape, options: argparse.Namespace, cluster: Cluster) -> None:
        self.shape, self.options, self.cluster = shape, options, cluster
        self.model: Any = None
        self.optimizer: Any = None
        self.mesh: Any = None
        self.marks = Marks(cluster)
        self.numbers = _Numbers(cluster)
        self.about: dict[str, Any] = {}

    def build(self) -> Any:
        """Make the model on this device, the same on all ranks, not yet sharded."""
        options, cluster = self.options, self.cluster
        self.model = draw(lambda: self.shape.make(options), cluster.device, options.dtype).train()
        return self.model

    def batch(self, tokens: int) -> Batch:
        """A sample on this device."""
        found = self.shape.batch(self.model.config, tokens, self.options)
        for name, value in found.inputs.items():
            if value.is_floating_point():
                found.inputs[name] = value.to(self.cluster.device)
        return found

    def shard(self, compiled: bool) -> None:
        """Put it on the ranks, with its optimiser."""
        from longvila.memory.offload import Offload
        from longvila.parallel.apply import ParallelPlan, parallelize
        from longvila.parallel.families import find_family
        from longvila.sp import build_mesh
        from longvila.train.stages import Optimizer, Rates
        from longvila.train.step import build_optimizer

        options, model = self.options, self.model
        text = find_family(model).text_model(model)
        self.mesh = build_mesh(
            self.cluster.world_size,
            num_heads=text.config.num_attention_heads,
            num_kv_heads=text.config.num_key_value_heads,
            device_type=self.cluster.device.type,
        )
        dtype = getattr(torch, options.dtype)
        offload = None
        if options.offload_gib:
            offload = Offload(budget_bytes=int(options.offload_gib * GIB), keep_last=1)
        parallelize(
            model,
            self.mesh,
            ParallelPlan(
                compute_dtype=None if dtype == torch.float32 else dtype,
                plain_layers=options.plain_layers,
                offload=offload,
                mlp_tile_rows=options.mlp_tile or None,
                compile_modules=compiled,
                loss_tile_rows=options.loss_tile,
                two_stage=True,
            ),
        )
        rates = Rates(vision_tower=1e-5, projector=1e-5, language_model=1e-5)
        settings = Optimizer(max_steps=1, offload=options.host_moments)
        self.optimizer = build_optimizer(model, rates, settings)
        text.register_forward_pre_hook(self._text_starts, with_kwargs=True)
        text.register_forward_hook(lambda *_: self.marks.mark("text_forward"))
        model.register_forward_hook(lambda *_: self.marks.mark("loss_forward"))
        self.optimizer.register_step_pre_hook(lambda *_: self.marks.mark("norm_clip"))
        self.about = {
            "mesh": self.mesh.explain(),
            "compiled_norms_and_mlps": compiled,
            "plain_layers": options.plain_layers,
            "mlp_tile_rows": options.mlp_tile or None,
            "offload_gib": options.offload_gib,
            "moments_on_host": options.host_moments,
        }

    def _text_starts(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["inputs_embeds"].register_hook(lambda _: self.marks.mark("text_backward"))
        self.marks.mark("embed")

    @contextlib.contextmanager
    def _marked_exchange(self) -> Iterator[None]:
        from longvila.parallel import mmsp

        exchange = mmsp.exchange_rows

        def marked(rows: Tensor, plan: Any, **options: Any) -> Tensor:
            self.marks.mark("vision_forward")
            if rows.requires_grad:
                rows.register_hook(lambda _: self.marks.mark("exchange_backward"))
            found = exchange(rows, plan, **options)
            self.marks.mark("exchange_forward")
            if found.requires_grad:  # between the text's gradient and this one are copies
                found.register_hook(lambda _: self.marks.mark("text_backward"))
            return found

        mmsp.exchange_rows = marked
        try:
            yield
        finally:
            mmsp.exchange_rows = exchange

    def step(self, batch: Batch, variant: str, norms: dict[str, float] | None = None) -> Any:
        """Train on one sample without moving; the parts are in ``marks``.

        Args:
            batch: The sample.
            variant: Of :data:`VARIANTS`.
            norms: Gets the norm of each group's gradients.
        """
        from longvila.train import step as steps

        finish = steps.finish_step

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.marks.mark("vision_backward")
            if norms is not None:
                norms.update(group_norms(self.model))
            return finish(*args, **kwargs)

        steps.finish_step = marked
        try:
            with vision_path(variant, self.numbers), self._marked_exchange():
                self.marks = Marks(self.cluster)
                found = steps.train_step(
                    self.model, [batch.inputs], self.optimizer, self.mesh, rate=0.0, clip_norm=1.0
                )
                self.marks.mark("update")
        finally:
            steps.finish_step = finish
        return found

    def close(self) -> None:
        """Let go of everything."""
        self.model = self.optimizer = self.mesh = None


def group_norms(model: Any) -> dict[str, float]:
    """Norm of the gradients of each part of a model, over all shards."""
    from longvila.train.parts import named_parts
    from longvila.train.step import gradient_norm

    groups = named_parts(model)
    gradients = {g: [p.grad for _, p in groups[g] if p.grad is not None] for g in GROUPS}
    return {group: float(gradient_norm(each)) for group, each in gradients.items()}


# ---- check -------------------------------------------------------------------------------------


def alone(engine: FamilyEngine, batch: Batch) -> tuple[float, dict[str, float]]:
    """Loss and gradient norms of a sample by the model's own forward on this device."""
    model, device = engine.model, engine.cluster.device
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    model.gradient_checkpointing_disable()
    norms = group_norms(model)
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), norms


def check(
    engine: FamilyEngine, batch: Batch, wanted: tuple[float, dict[str, float]]
) -> dict[str, float]:
    """Errors of the step over all GPUs; raises where they are too large."""
    loss, norms = wanted
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    got: dict[str, float] = {}
    found = engine.step(batch, "longvila", got)
    # The groups' gradients are not yet divided by the targets.
    scale = found.gradient_norm / sum(norm**2 for norm in got.values()) ** 0.5
    errors = {
        "check_loss_error": abs(found.loss - loss) / abs(loss),
        "check_gradient_norm_error": abs(found.gradient_norm - whole) / whole,
    }
    for group, norm in norms.items():
        errors[f"check_{group}_norm_error"] = abs(scale * got[group] - norm) / norm
    limits = LIMITS[engine.options.dtype]
    for number, (name, error) in enumerate(errors.items()):
        if not error <= limits[min(number, 2)]:
            raise RuntimeError(
                f"{engine.shape.name} is wrong, not timing it: {name} {error:.2e}; loss "
                f"{found.loss} and norm {found.gradient_norm}, one GPU has {loss} and {whole}"
            )
    engine.cluster.say(
        f"  {engine.shape.name} checked at {batch.tokens} tokens: "
        + " ".join(f"{name.removeprefix('check_')} {e:.1e}" for name, e in errors.items())
    )
    return errors


# ---- measurement -------------------------------------------------------------------------------


def left_s(options: argparse.Namespace) -> float:
    """Seconds until nothing more is to begin."""
    return float(options.stop_after_s - (time.perf_counter() - STARTED))


def measure(engine: FamilyEngine, batch: Batch, variant: str, needed: float) -> Row:
    """One row of a variant at full length."""
    cluster, options = engine.cluster, engine.options
    seconds: list[float] = []
    parts: list[dict[str, float]] = []
    peak, found = 0, None
    repeats = options.repeats if variant == "longvila" else 1
    for number in range(repeats):
        gc.collect()
        cluster.barrier()
        (late,) = cluster.everywhere([float(number > 0 and left_s(options) < seconds[-1])])
        if late:
            break
        cluster.reset_peak()
        began = time.perf_counter()
        found = engine.step(batch, variant)
        cluster.synchronize()
        took, used = cluster.everywhere(
            [time.perf_counter() - began, float(cluster.peak_bytes())]
        )  # fmt: skip
        seconds.append(took)
        parts.append(engine.marks.parts_s())
        peak = max(peak, int(used))
    assert found is not None
    step_s = statistics.median(seconds)
    tflops = needed / (step_s * cluster.world_size * 1e12)
    metrics = {
        "step_s": step_s,
        "tokens_per_s_per_gpu": batch.tokens / step_s / cluster.world_size,
        "tflops_per_gpu": tflops,
        "mfu_percent": 100.0 * tflops / PEAK_TFLOPS,
        "peak_gib": peak / GIB,
        "spread_percent": spread_percent(seconds),
        "loss": found.loss,
        "gradient_norm": found.gradient_norm,
        **{f"{part}_s": statistics.median(each[part] for each in parts) for part in PARTS},
    }
    samples = [round(s, 4) for s in seconds]
    return row(engine, variant, batch.tokens, metrics, samples=samples)


def row(
    engine: FamilyEngine,
    method: str,
    tokens: int,
    metrics: dict[str, float],
    *,
    samples: list[float] | None = None,
    failed: str | None = None,
    about: dict[str, Any] | None = None,
) -> Row:
    """A row of a family."""
    shape = {
        "family": engine.shape.name,
        "sequence_parallel": engine.cluster.world_size if method in VARIANTS else 1,
        "check_tokens": engine.options.check_tokens,
    }
    rounded = {name: float(f"{value:.5g}") for name, value in metrics.items()}
    about = {**(engine.about if about is None else about), **({"failed": failed} if failed else {})}
    kind = VARIANTS.get(method, "peer")
    return Row(f"{engine.shape.name}/{method}", kind, tokens, shape, rounded, samples or [], about)


class Session:
    """The run: families, rows, and the file that they go to."""

    def __init__(self, options: argparse.Namespace, cluster: Cluster) -> None:
        self.options, self.cluster = options, cluster
        self.report = Report("family_step", QUESTION, hardware(cluster))
        self.operations: dict[str, dict[str, float]] = {}

    def add(self, found: Row) -> None:
        """Keep a row, print it, and write all there are."""
        self.report.rows.append(found)
        shown = " ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
        at = time.perf_counter() - STARTED
        failed = found.about.get("failed", "")
        self.cluster.say(f"[{at:5.0f} s] {found.method:32s} {found.tokens:8d}  {shown}{failed}")
        self.report.notes["operations"] = self.operations
        self.report.notes["comparisons"] = compare(self.report)
        if self.cluster.is_main and self.options.out is not None:
            self.report.write(self.options.out, suffix=self.options.suffix)

    def late(self, needed_s: float, what: str) -> bool:
        """Whether there is no time left for something; all ranks agree."""
        (found,) = self.cluster.everywhere([float(left_s(self.options) < needed_s)])
        if found:
            self.cluster.say(f"  no time left for {what}")
            self.report.not_measured.append({"method": what, "reason": "no time left"})
        return bool(found)

    def family(self, shape: Shape, *, compiled: bool) -> None:
        """Check and time one family."""
        options, cluster = self.options, self.cluster
        if self.late(0.0, shape.name):
            return
        engine = FamilyEngine(shape, options, cluster)
        tokens = options.tokens
        checked: dict[str, float] = {}

        def prepare() -> tuple[Batch, float]:
            nonlocal checked
            model = engine.build()
            short = engine.batch(options.check_tokens)
            wanted = alone(engine, short)
            batch = engine.batch(tokens)
            self.operations[shape.name] = operations(model, batch)
            del model
            engine.shard(compiled)
            checked = check(engine, short, wanted)
            engine.step(engine.batch(options.warm_tokens), "longvila")
            reserve(cluster)
            return batch, sum(self.operations[shape.name].values())

        ready, reason = attempt(prepare, cluster)
        if reason is None:
            cluster.say(f"[{time.perf_counter() - STARTED:5.0f} s] {shape.name} is ready")
        again = reason is not None and compiled and reason != OUT_OF_MEMORY and not checked
        variants = list(VARIANTS) if shape.name in options.replicated else ["longvila"]
        for variant in variants:
            if reason is None and not self.late(0.0, f"{shape.name}/{variant}"):
                found, reason = attempt(
                    lambda variant=variant: measure(engine, *_args(ready, variant)), cluster
                )
                if found is not None:
                    if variant == "longvila":
                        found.metrics |= {n: float(f"{e:.3g}") for n, e in checked.items()}
                    self.add(found)
            if reason is not None:
                self.add(row(engine, variant, tokens, {}, failed=reason))
                break
        ready = None
        engine.close()
        torch._dynamo.reset()
        clean()
        if again:
            cluster.say(f"  {shape.name} once more without torch.compile")
            self.family(shape, compiled=False)

    def stock(self, shape: Shape) -> None:
        """Find the longest video that transformers' Trainer trains on."""
        from benchmarks.peers.stock_trainer import StockRun

        options, cluster = self.options, self.cluster
        method = "stock_trainer"
        if self.late(0.0, f"{shape.name}/{method}"):
            return
        engine = FamilyEngine(shape, options, cluster)
        about = {
            "package": "transformers",
            "shipped": True,
            "attention": "sdpa",
            "sharding": "FSDP2 through accelerate" if cluster.is_cuda else "none",
            "samples": "a video a GPU",
        }
        run = StockRun(shape, options, cluster, engine.build)

        def told(tokens: int, seconds: float, peak: int) -> None:
            metrics = {
                "step_s": seconds,
                # Every rank has a sample of its own.
                "tokens_per_s_per_gpu": tokens / seconds,
                "peak_gib": peak / GIB,
            }
            self.add(row(engine, method, tokens, metrics, samples=[round(seconds, 4)], about=about))

        stop_at = STARTED + options.stop_after_s
        _, reason = attempt(lambda: run.run(told, stop_at), cluster)
        steps = run.steps
        done = len(steps.done) if steps is not None else 0
        if steps is not None and steps.out_of_time:
            self.report.not_measured.append(
                {"method": f"{shape.name}/{method}", "reason": "no time left for a longer video"}
            )
        if reason is not None:
            tokens = options.stock_tokens[min(done, len(options.stock_tokens) - 1)]
            self.add(row(engine, method, tokens, {}, failed=reason, about=about))
        engine.close()
        clean()


def _args(ready: Any, variant: str) -> tuple[Batch, str, float]:
    batch, needed = ready
    return batch, variant, needed


def compare(report: Report) -> list[dict[str, Any]]:
    """Each family over LongVILA, over its replicated tower, and over the stock Trainer's length."""
    done = [r for r in report.rows if r.metrics]
    ours = {r.shape["family"]: r for r in done if r.kind == "ours"}
    found: list[dict[str, Any]] = []
    base = ours.get("longvila-7b")
    for family, mine in ours.items():
        line: dict[str, Any] = {"family": family, "tokens": mine.tokens}
        if base is not None and base is not mine:
            rates = [r.metrics["tflops_per_gpu"] for r in (mine, base)]
            line["rate_of_longvila"] = round(rates[0] / rates[1], 4)
        for other in done:
            if other.method == f"{family}/replicated_tower":
                ratio = other.metrics["step_s"] / mine.metrics["step_s"]
                norms = [r.metrics["gradient_norm"] for r in (mine, other)]
                line["speedup_over_replicated_tower"] = round(ratio, 4)
                line["norm_difference_to_replicated_tower"] = abs(norms[0] / norms[1] - 1.0)
            if other.method == f"{family}/stock_trainer":
                line["stock_trainer_tokens"] = other.tokens
        found.append(line)
    return found


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    session = Session(options, cluster)
    for name in options.families:
        session.family(SHAPES[name], compiled=options.compile)
    for name in options.stock:
        session.stock(SHAPES[name])
    if session.report.rows:
        for line in session.report.notes["comparisons"]:
            cluster.say(f"  {line}")
    return session.report


TINY = {
    "tokens": 300, "check_tokens": 150, "warm_tokens": 150, "stock_tokens": [100, 150],
    "answer": 8, "grid_side": 6, "dtype": "float32", "loss_tile": 16, "repeats": 1,
    "frame_batch": 4, "compile": False,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    families = list(SHAPES)
    parser.add_argument("--families", nargs="*", choices=families, default=families)
    parser.add_argument("--replicated", nargs="*", choices=families, default=families[1:])
    parser.add_argument("--stock", nargs="*", choices=families[1:], default=families[1:])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--check-tokens", type=int, default=8192)
    parser.add_argument("--warm-tokens", type=int, default=16384)
    parser.add_argument(
        "--stock-tokens", type=int, nargs="*", default=[16384, 32768, 49152, 65536, 98304, 131072]
    )
    parser.add_argument("--answer", type=int, default=256)
    parser.add_argument("--grid-side", type=int, default=32, help="patches along a Qwen frame")
    parser.add_argument("--frame-batch", type=int, default=16, help="LongVILA's frames at once")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loss-tile", type=int, default=4096)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plain-layers", type=int, default=0)
    parser.add_argument("--mlp-tile", type=int, default=0)
    parser.add_argument("--offload-gib", type=float, default=0.0)
    parser.add_argument("--host-moments", action="store_true")
    parser.add_argument("--stop-after-s", type=float, default=float("inf"))
    parser.add_argument("--tiny", action="store_true", help="shapes for the CPU")
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
