"""How far is the planned peak of a training step from the measured one?

Real training steps (`longvila.train.step.train_step`: FSDP2, checkpoints, tiled loss, AdamW) of
random-weight models with the layers of Qwen2-7B and the tower of SigLIP-so400m, few enough of them
that a case takes seconds. Each case runs twice; the second step is measured, by phase: up to the
loss, backward, optimiser. The allocator's own count is read at the seams without waiting for the
device. Beside it stands what `longvila.memory.estimate` says of the same model (read from the model
by `longvila.parallel.sizes`), row and settings, and the error in percent; on a device whose rates
are known, the planned time of the step too.

The rows ``rate/...`` are sustained rates of this machine, which ``longvila plan --rates FILE``
reads: matrix products as wide as the model's, copies within the device, and to and from pinned
host memory.

On a CPU the live bytes of tensors are counted operator by operator, for tests with tiny shapes.

    python -m benchmarks.memory_plan
    torchrun --nproc-per-node 2 -m benchmarks.memory_plan
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import _cluster
from benchmarks._cluster import Cluster
from benchmarks._model import add_text_options, add_tower_options, draw, model_config, text_config
from benchmarks._results import Report, Row, hardware

QUESTION = "How far is the planned peak of a training step from the measured one?"
GIB = 2**30
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape.

    Attributes:
        name: For the row.
        layers: Text layers.
        tokens: Tokens of the row a rank, frames included.
        frames: Frames a rank.
        targets: Tokens with a loss a rank; None for all.
        checkpointing: Whether layers run again.
        plain_layers: Layers, the last ones, that do not.
        mlp_tile_rows: Rows of the MLP computed at once; None for all.
        compiled: Whether norms and MLPs are compiled.
        offload_gib: Host budget.
        frames_per_call: Frames in the tower at once.
        tuned: Parts that are tuned, by their first letters: tower, projector, language model.
        micro_batches: Rows of a step.
    """

    name: str
    layers: int = 4
    tokens: int = 32768
    frames: int = 0
    targets: int | None = None
    checkpointing: bool = True
    plain_layers: int = 0
    mlp_tile_rows: int | None = None
    compiled: bool = False
    offload_gib: float = 0.0
    frames_per_call: int = 32
    tuned: str = "tpl"
    micro_batches: int = 1


CASES = (
    Case(name="text 32K"),
    Case(name="text 64K, short answer", tokens=65536, targets=512),
    Case(name="text 16K, two micro-batches", tokens=16384, micro_batches=2),
    Case(name="text 96K, offload", tokens=98304, targets=512, offload_gib=8.0),
    Case(name="text 96K, MLP in tiles", tokens=98304, targets=512, mlp_tile_rows=8192),
    Case(name="text 64K, compiled", tokens=65536, targets=512, compiled=True),
    Case(name="no checkpoints 12K", tokens=12288, checkpointing=False),
    Case(name="16K, half without checkpoints", tokens=16384, plain_layers=2),
    Case(name="128 frames, 32 at once", tokens=26240, frames=128, targets=512),
    Case(name="128 frames, 8 at once", tokens=26240, frames=128, targets=512, frames_per_call=8),
    Case(name="128 frames, frozen tower", tokens=26240, frames=128, targets=512, tuned="pl"),
    Case(name="2 layers, 160K", layers=2, tokens=163840, targets=512),
)

TINY = (
    Case(name="text", layers=3, tokens=1024, targets=64),
    Case(name="no checkpoints", layers=3, tokens=512, targets=64, checkpointing=False),
    Case(name="frames", layers=2, tokens=256, frames=16, targets=32, frames_per_call=8),
)


def build_model(options: argparse.Namespace, case: Case, device: torch.device) -> Any:
    """A model of random weights in float32, its untuned parts frozen."""
    from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
    from longvila.train.parts import tune

    config = model_config(
        options,
        text=text_config(options, num_hidden_layers=case.layers),
        vision_batch_size=case.frames_per_call,
        image_token_id=options.vocab,
        video_token_id=options.vocab + 1,
    )
    model = draw(lambda: LongVILAForConditionalGeneration(config), device, "float32")
    return tune(model.train(), rates(case))


def rates(case: Case) -> Any:
    from longvila.train.stages import Rates

    return Rates(
        vision_tower=1e-5 if "t" in case.tuned else None,
        projector=1e-5 if "p" in case.tuned else None,
        language_model=1e-5 if "l" in case.tuned else None,
    )


def make_batch(config: Any, case: Case, world_size: int) -> dict[str, Any]:
    """A row on the host, as a loader gives it: frames first, targets last, a rank's own pixels."""
    generator = torch.Generator().manual_seed(1)
    tokens, frames = case.tokens * world_size, case.frames * world_size
    vocabulary = config.text_config.vocab_size
    ids = torch.randint(0, vocabulary, (1, tokens), generator=generator)
    rows = config.tokens_per_frame + 1
    if frames:
        if frames * rows > tokens:
            raise ValueError(f"{frames} frames have {frames * rows} tokens, the row {tokens}")
        ids[0, : frames * rows].view(frames, rows)[:, :-1] = config.video_token_id
    labels = ids.clone()
    targets = tokens if case.targets is None else case.targets * world_size
    labels[:, : tokens - targets] = -100
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if frames:
        # Frames cost alike, so every rank is dealt as many.
        size = (case.frames, 3, *config.image_size)
        batch["local_pixel_values_videos"] = torch.randn(size, generator=generator)
        batch["video_num_frames"] = torch.tensor([frames])
    return batch


# ---- measuring ---------------------------------------------------------------------------------


@dataclass
class Phases:
    """Peaks of the phases of a step; the counter starts anew at each seam."""

    cluster: Cluster
    live: Any = None
    peaks: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        if self.live is not None:
            self.live.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(self.cluster.device)

    def end(self, phase: str) -> None:
        peak = self.live.peak_bytes if self.live is not None else self.cluster.peak_bytes()
        self.peaks[phase] = max(self.peaks.get(phase, 0), peak)
        self.begin()


@contextlib.contextmanager
def phases(model: Any, optimizer: Any, cluster: Cluster) -> Iterator[Phases]:
    """Mark the seams of the steps inside: the forward's end, the optimiser's begin."""
    if cluster.is_cuda:
        found = Phases(cluster)
        counted: Any = contextlib.nullcontext()
    else:
        from longvila.testing.live_bytes import LiveBytes

        states = [s for each in optimizer.state.values() for s in each.values()]
        counted = LiveBytes([*model.parameters(), *model.buffers(), *states])
        found = Phases(cluster, counted)
    handles = [
        model.register_forward_pre_hook(lambda *_: found.end("backward")),
        model.register_forward_hook(lambda *_: found.end("forward")),
        optimizer.register_step_pre_hook(lambda *_: found.end("backward")),
    ]
    with counted:
        found.begin()
        yield found
        found.end("optimizer")
    for handle in handles:
        handle.remove()


def phase_of(moment: str) -> str:
    if moment.startswith(("tower forward", "loss")):
        return "forward"
    return "optimizer" if moment == "optimizer" else "backward"


def measure(
    case: Case, options: argparse.Namespace, cluster: Cluster, gpu: Any | None = None
) -> Row:
    """Run one case; return planned and measured peaks, and times where rates are known."""
    from longvila.memory.estimate import training_peak
    from longvila.memory.offload import Offload
    from longvila.memory.operations import Load, Tuned
    from longvila.memory.settings import Ranks, Settings
    from longvila.memory.timing import training_time
    from longvila.parallel.apply import ParallelPlan, parallelize
    from longvila.parallel.sizes import size_of
    from longvila.sp.mesh import build_mesh
    from longvila.train.stages import Optimizer
    from longvila.train.step import build_optimizer, train_step

    world = cluster.world_size
    model = build_model(options, case, cluster.device)
    config, size = model.config, size_of(model)
    mesh = build_mesh(
        world, options.ring_size, num_heads=options.heads, num_kv_heads=options.kv_heads,
        device_type=cluster.device.type,
    )  # fmt: skip
    budget = int(case.offload_gib * GIB)
    plan = ParallelPlan(
        activation_checkpointing=case.checkpointing,
        offload=Offload(budget_bytes=budget) if budget else None,
        plain_layers=case.plain_layers,
        mlp_tile_rows=case.mlp_tile_rows,
        compile_modules=case.compiled,
        two_stage=True,
    )
    parallelize(model, mesh, plan)
    optimizer = build_optimizer(model, rates(case), Optimizer())
    batches = [make_batch(config, case, world)] * case.micro_batches
    backend = options.backend or chosen_backend(options, cluster)
    train_step(model, batches, optimizer, mesh)
    gc.collect()
    cluster.barrier()
    steady = torch.cuda.memory_allocated(cluster.device) if cluster.is_cuda else 0
    began = time.perf_counter()
    with phases(model, optimizer, cluster) as found:
        train_step(model, batches, optimizer, mesh)
    cluster.synchronize()
    step_s = time.perf_counter() - began
    load = Load(
        tokens=case.tokens * world,
        frames=case.frames * world,
        targets=(case.tokens if case.targets is None else case.targets) * world,
        micro_batches=case.micro_batches,
    )
    settings = Settings(
        checkpointing=case.checkpointing, offload_bytes=budget, backend=backend,
        loss_tile_rows=plan.loss_tile_rows, plain_layers=case.plain_layers,
        mlp_tile_rows=case.mlp_tile_rows, compiled=case.compiled,
    )  # fmt: skip
    tuned = Tuned(tower="t" in case.tuned, projector="p" in case.tuned, text="l" in case.tuned)
    ranks = Ranks(ring=mesh.ring_size, ulysses=mesh.ulysses_size, kv_exchange=mesh.plan.kv_exchange)
    peak = training_peak(size, load, ranks=ranks, settings=settings, tuned=tuned)
    predicted = dict.fromkeys(PHASES, 0.0)
    for moment, parts in peak.moments.items():
        phase = phase_of(moment)
        predicted[phase] = max(predicted[phase], sum(parts.values()))
    values = cluster.everywhere([float(found.peaks[phase]) for phase in PHASES])
    measured = dict(zip(PHASES, values, strict=True))
    highest = max(measured.values())
    metrics = {
        "peak_gib": highest / GIB,
        "planned_gib": peak.bytes / GIB,
        "error_percent": 100 * (peak.bytes / highest - 1),
        "step_s": step_s,
    }
    if gpu is not None:
        time_of = training_time(size, load, gpu=gpu, ranks=ranks, settings=settings, tuned=tuned)
        metrics["planned_s"] = time_of.seconds
        metrics["time_error_percent"] = 100 * (time_of.seconds / step_s - 1)
    for phase in PHASES:
        metrics[f"{phase}_peak_gib"] = measured[phase] / GIB
        metrics[f"{phase}_planned_gib"] = predicted[phase] / GIB
    if cluster.is_cuda:
        metrics["between_steps_gib"] = steady / GIB
        metrics["reserved_gib"] = torch.cuda.max_memory_reserved(cluster.device) / GIB
        free, total = torch.cuda.mem_get_info(cluster.device)
        outside = total - free - torch.cuda.memory_reserved(cluster.device)
        metrics["outside_torch_gib"] = outside / GIB
    shape = {
        "layers": case.layers, "frames": load.frames, "targets": load.targets,
        "sequence_parallel": world, "ring": mesh.ring_size, "checkpointing": case.checkpointing,
        "plain_layers": case.plain_layers, "mlp_tile_rows": case.mlp_tile_rows,
        "compiled": case.compiled,
        "offload_gib": case.offload_gib, "frames_per_call": case.frames_per_call,
        "tuned": case.tuned, "micro_batches": case.micro_batches, "backend": backend,
    }  # fmt: skip
    about = {
        "moment": peak.moment,
        "planned_parts_gib": {name: round(n / GIB, 4) for name, n in peak.parts.items()},
        "planned_moments_gib": {
            name: round(sum(parts.values()) / GIB, 4) for name, parts in peak.moments.items()
        },
    }
    return Row(
        f"step/{case.name}", "ours", load.tokens, shape,
        {name: float(f"{value:.5g}") for name, value in metrics.items()}, about=about,
    )  # fmt: skip


def chosen_backend(options: argparse.Namespace, cluster: Cluster) -> str:
    """The attention back end that a step of this shape takes."""
    from longvila.ops.attention import select_backend
    from longvila.ops.backends import AttentionSpec

    spec = AttentionSpec(
        device_type=cluster.device.type,
        capability=torch.cuda.get_device_capability(cluster.device) if cluster.is_cuda else None,
        dtype=torch.bfloat16,
        head_dim=options.model_dim // options.heads,
        packed=False,
        causal=True,
        needs_backward=True,
    )
    return select_backend(spec).name


# ---- rates -------------------------------------------------------------------------------------


def sustained(cluster: Cluster, call: Any, seconds: float) -> float:
    """Seconds of one call, over so many seconds of them after a warm-up."""
    for _ in range(3):
        call()
    cluster.synchronize()
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            call()
        cluster.synchronize()
        calls += 5
    return (time.perf_counter() - began) / calls


def measure_rates(options: argparse.Namespace, cluster: Cluster) -> list[Row]:
    """Rates of this device that a plan's times rest on."""
    device, seconds = cluster.device, options.rate_seconds
    rows, m, i = options.rate_rows, options.model_dim, options.text_mlp
    found: list[Row] = []

    def add(name: str, **metrics: float) -> None:
        metrics = {key: float(f"{value:.5g}") for key, value in metrics.items()}
        found.append(Row(f"rate/{name}", "ideal", rows, {"model_dim": m, "mlp": i}, metrics))

    x = torch.randn(rows, m, device=device, dtype=torch.bfloat16)
    w = torch.randn(i, m, device=device, dtype=torch.bfloat16)
    y = torch.randn(rows, i, device=device, dtype=torch.bfloat16)
    flops = 2.0 * rows * m * i
    forward = sustained(cluster, lambda: x @ w.T, seconds)
    inputs = sustained(cluster, lambda: y @ w, seconds)
    weights = sustained(cluster, lambda: y.T @ x, seconds)
    add(
        "matrices",
        forward_tflops_per_gpu=flops / forward / 1e12,
        backward_tflops_per_gpu=2 * flops / (inputs + weights) / 1e12,
        total_tflops_per_gpu=3 * flops / (forward + inputs + weights) / 1e12,
    )
    copied = torch.empty_like(y)
    took = sustained(cluster, lambda: copied.copy_(y), seconds)
    add("device_memory", gb_per_s=2 * y.nbytes / took / 1e9)
    if cluster.is_cuda:
        host = torch.empty(y.shape, dtype=y.dtype, pin_memory=True)
        down = sustained(cluster, lambda: host.copy_(y, non_blocking=True), seconds)
        up = sustained(cluster, lambda: y.copy_(host, non_blocking=True), seconds)
        add("host", to_host_gb_per_s=y.nbytes / down / 1e9, from_host_gb_per_s=y.nbytes / up / 1e9)
    return found


def known_rates(rows: list[Row], cluster: Cluster) -> Any | None:
    """The table's rates of this device with those just measured laid over them, None without."""
    from longvila.memory.rates import GPUS, find_gpu, with_rows

    if not cluster.is_cuda:
        return None
    name = torch.cuda.get_device_name(cluster.device)
    if not any(key in name.lower() for key in GPUS):
        return None
    gpu = find_gpu(name)
    return with_rows(gpu, [asdict(row) for row in rows], "this run") if rows else gpu


# ---- run ---------------------------------------------------------------------------------------


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    report = Report("memory_plan", QUESTION, hardware(cluster))
    if not options.no_rates:
        report.rows += measure_rates(options, cluster)
        for row in report.rows:
            cluster.say(f"  {row.method:40s} {row.metrics}")
    gpu = known_rates(report.rows, cluster)
    cases = CASES if cluster.is_cuda else TINY
    wanted = [case for case in cases if not options.only or options.only in case.name]
    for case in wanted:
        if options.shrink > 1:
            case = replace(case, tokens=case.tokens // options.shrink)
        try:
            row = measure(case, options, cluster, gpu)
        except torch.OutOfMemoryError as fault:
            report.not_measured.append({"method": f"step/{case.name}", "why": str(fault)[:200]})
            cluster.say(f"  {case.name}: out of memory")
            continue
        finally:
            gc.collect()
            if cluster.is_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(cluster.device)
        report.rows.append(row)
        shown = " ".join(f"{n} {v:.4g}" for n, v in row.metrics.items())
        cluster.say(f"  {row.method:40s} {shown} ({row.about['moment']})")
        if cluster.is_main and options.out is not None:
            report.write(options.out, suffix=options.suffix)
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--only", default="", help="cases whose name has this")
    parser.add_argument("--shrink", type=int, default=1, help="divide tokens by this")
    parser.add_argument("--backend", help="name of the attention back end the plan assumes")
    parser.add_argument("--ring-size", type=int, default=-1, help="ring degree; -1 to choose")
    parser.add_argument("--no-rates", action="store_true")
    parser.add_argument("--rate-seconds", type=float, default=1.5)
    parser.add_argument("--rate-rows", type=int, default=32768)
    add_tower_options(parser)
    add_text_options(parser)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suffix", default="")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with _cluster.joined() as cluster:
        # One process alone shards over itself, as `longvila train` does.
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cluster.is_cuda else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        run(options, cluster)


if __name__ == "__main__":
    main()
