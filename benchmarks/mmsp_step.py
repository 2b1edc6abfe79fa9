"""What does a whole LongVILA training step cost over several GPUs, part by part?

Forward and backward (no optimiser) of one long video through a SigLIP-so400m tower, its projector
and a few layers of Qwen2-7B's shape, under FSDP2 and sequence parallelism, by three ways of
bringing frames to tokens: ours, LongVILA's all-reduce re-shard, and the tower replicated on every
rank. Text model, attention, checkpointing and loss are ours in all three, so that the difference
is the vision path alone.

Parts are taken from events in the stream: ``vision_forward`` ends where the text model starts
(encoding, row exchange, embedding), ``text_forward`` where the head starts, ``loss_forward`` with
the loss; ``text_backward`` ends when the fused embeddings have their gradient, ``vision_backward``
with the step.

At a length that one GPU can hold, loss and the gradients of tower, projector, embedding, text
layers and head are checked against the same weights in one process, before anything is timed.

    torchrun --nproc-per-node 2 -m benchmarks.mmsp_step
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import _cluster
from benchmarks._attempt import OUT_OF_MEMORY, attempt, clean
from benchmarks._cluster import Cluster, Stopwatch
from benchmarks._interleave import Steps, interleave
from benchmarks._model import (
    add_text_options,
    add_tower_options,
    draw,
    model_config,
    rows_per_frame,
)
from benchmarks._results import Kind, Report, Row, hardware
from benchmarks.peers.vision_reshard import all_reduce_reshard

QUESTION = "What does a whole step cost, part by part, by how frames reach their tokens?"
GIB = 2**30
#: Dense bf16 rate of one H100/H200 by its datasheet; MFU is over this.
PEAK_TFLOPS = 989.0
VARIANTS: dict[str, Kind] = {
    "longvila": "ours",
    "all_reduce_reshard": "peer",
    "replicated_tower": "peer",
}
PARTS = ("vision_forward", "text_forward", "loss_forward", "text_backward", "vision_backward")
LIMIT = {"bfloat16": 6e-2, "float32": 1e-3}


@dataclass(frozen=True)
class Batch:
    """One packed sample: a prompt, a video, an answer."""

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor
    frames: int

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def build_model(options: argparse.Namespace, device: torch.device) -> Any:
    from longvila.model.modeling_longvila import LongVILAForConditionalGeneration

    config = model_config(options, vision_batch_size=options.frame_batch)
    return draw(lambda: LongVILAForConditionalGeneration(config), device, options.dtype).train()


def make_batch(options: argparse.Namespace, frames: int, cluster: Cluster) -> Batch:
    """Prompt, then each frame's placeholders and a newline, then an answer with labels."""
    generator = torch.Generator().manual_seed(7)
    words = options.vocab - 2
    video = torch.full((frames, rows_per_frame(options) + 1), options.vocab - 1)
    video[:, -1] = 1
    prompt = torch.randint(2, words, (32,), generator=generator)
    answer = torch.randint(2, words, (options.answer,), generator=generator)
    ids = torch.cat([prompt, video.flatten(), answer])
    labels = torch.full_like(ids, -100)
    labels[-options.answer :] = answer
    dtype = getattr(torch, options.dtype)
    size = (frames, 3, options.image_size, options.image_size)
    device_generator = torch.Generator(cluster.device).manual_seed(8)
    pixels = torch.empty(size, dtype=dtype, device=cluster.device)
    pixels.normal_(generator=device_generator)
    device = cluster.device
    return Batch(ids[None].to(device), labels[None].to(device), pixels, frames)


def call(model: Any, batch: Batch) -> Tensor:
    """The loss of a batch by the model's own call."""
    return model(
        input_ids=batch.input_ids,
        pixel_values_videos=batch.pixels,
        video_num_frames=torch.tensor([batch.frames]),
        labels=batch.labels,
        use_cache=False,
    ).loss


# ---- the other two vision paths ---------------------------------------------------------------


class _Numbers:
    """For a plan, every rank's row counts and which rows this rank's tokens want; found once."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.known: dict[tuple[Any, ...], tuple[list[int], Tensor]] = {}

    def of(self, plan: Any, group: Any) -> tuple[list[int], Tensor]:
        from longvila.sp.vision import exchange_rows

        key = (plan.send_counts, plan.receive_counts)
        if key not in self.known:
            counts = [int(n) for n in self.cluster.gather_objects(plan.num_sent)]
            start = sum(counts[: self.cluster.rank])
            numbers = torch.arange(start, start + plan.num_sent, device=self.cluster.device)
            wanted = exchange_rows(
                numbers[:, None].double(), plan, group=group, differentiable=False
            )
            self.known[key] = counts, wanted[:, 0].long()
        return self.known[key]


@contextlib.contextmanager
def vision_path(variant: str, numbers: _Numbers) -> Iterator[None]:
    """Replace the row exchange, and for the replicated tower the deal, for a while."""
    from longvila.parallel import mmsp

    if variant == "longvila":
        yield
        return
    exchange, encode = mmsp.exchange_rows, mmsp.TwoStageForward._encode_local
    rank = numbers.cluster.rank

    def by_all_reduce(rows: Tensor, plan: Any, *, group: Any, differentiable: bool) -> Tensor:
        counts, wanted = numbers.of(plan, group)
        return all_reduce_reshard(rows, counts, rank, wanted, group)

    def by_choice(rows: Tensor, plan: Any, *, group: Any, differentiable: bool) -> Tensor:
        return rows.index_select(0, numbers.of(plan, group)[1])

    def encode_all(self: Any, plan: Any, batch: dict[str, Any]) -> list[Tensor]:
        found = []
        for kind in self.family.media:
            units = plan.media.units.get(kind.name)
            if units is not None:
                pixels = batch[kind.pixels]
                found.append(self._encode_units(kind, pixels, units.frames, units.unit_shapes))
        return found

    try:
        if variant == "all_reduce_reshard":
            mmsp.exchange_rows = by_all_reduce
        else:
            mmsp.exchange_rows = by_choice
            mmsp.TwoStageForward._encode_local = encode_all
        yield
    finally:
        mmsp.exchange_rows, mmsp.TwoStageForward._encode_local = exchange, encode


# ---- parts ------------------------------------------------------------------------------------


class Parts:
    """Marks at the seams of a step, from hooks on the text model."""

    def __init__(self, model: Any, cluster: Cluster) -> None:
        self.cluster = cluster
        self.watch = Stopwatch(cluster)
        text = model.model.language_model
        self.handles = [
            text.register_forward_pre_hook(self._text_starts, with_kwargs=True),
            text.register_forward_hook(self._text_ends),
        ]

    def _text_starts(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        kwargs["inputs_embeds"].register_hook(self._embeddings_have_gradients)
        self.watch.mark()

    def _text_ends(self, module: Any, args: Any, output: Any) -> None:
        self.watch.mark()

    def _embeddings_have_gradients(self, grad: Tensor) -> None:
        self.watch.mark()

    def step(self, model: Any, batch: Batch) -> list[float]:
        """One forward and backward; milliseconds of :data:`PARTS`."""
        self.watch = Stopwatch(self.cluster)
        self.watch.mark()
        loss = call(model, batch)
        self.watch.mark()
        loss.backward()
        self.watch.mark()
        laps = self.watch.laps_ms()
        if len(laps) != len(PARTS):
            raise RuntimeError(f"expected {len(PARTS)} parts of a step, got {len(laps)}")
        model.zero_grad(set_to_none=True)
        return laps

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


# ---- check ------------------------------------------------------------------------------------


def gradients_by_part(model: Any) -> dict[str, list[Tensor]]:
    """Full gradients of every trainable parameter, by part of the model, in fp32."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        if "vision_tower" in name:
            part = "tower"
        elif "multi_modal_projector" in name:
            part = "projector"
        elif "embed_tokens" in name:
            part = "embedding"
        else:
            part = "head" if "lm_head" in name else "text"
        parts.setdefault(part, []).append(parameter.grad.detach().float().clone())
    return parts


def check(model: Any, options: argparse.Namespace, cluster: Cluster, mesh: Any) -> dict[str, float]:
    """Loss and gradients over the mesh against this process alone, on the same weights."""
    from longvila.parallel.apply import ParallelPlan, parallelize, reduce_gradients, unparallelize

    batch = make_batch(options, options.check_frames, cluster)
    alone = call(model, batch)
    alone.backward()
    want = gradients_by_part(model)
    model.zero_grad(set_to_none=True)
    plan = ParallelPlan(fsdp=False, parameter_dtype=None, compute_dtype=None, two_stage=True)
    parallelize(model, mesh, plan)
    loss = call(model, batch)
    loss.backward()
    reduce_gradients(model)
    got = gradients_by_part(model)
    model.zero_grad(set_to_none=True)
    unparallelize(model)
    errors = {"check_loss_error": abs(loss.item() - alone.item()) / abs(alone.item())}
    if got.keys() != want.keys():
        raise RuntimeError(f"gradients of {sorted(got)}, expected {sorted(want)}")
    for part, expected in want.items():
        pairs = list(zip(got[part], expected, strict=True))
        off = sum(float((a - b).square().sum()) for a, b in pairs)
        size = sum(float(b.square().sum()) for b in expected)
        errors[f"check_{part}_gradient_error"] = (off / size) ** 0.5
        mine = sum(float(a.square().sum()) for a, _ in pairs)
        errors[f"check_{part}_gradient_norm_error"] = abs((mine / size) ** 0.5 - 1.0)
    cluster.say(
        f"check at {batch.tokens} tokens: "
        + " ".join(f"{name.removeprefix('check_')} {e:.1e}" for name, e in errors.items())
    )
    limit = LIMIT[options.dtype]
    wrong = {name: e for name, e in errors.items() if not e <= limit}
    if wrong:
        raise RuntimeError(f"the step is wrong, not timing it: {wrong} above {limit}")
    return errors


def model_flops(options: argparse.Namespace, batch: Batch) -> float:
    """Floating-point operations the step must do (no recomputation), over all GPUs.

    Matrix products count 6 per parameter and token, attention 3.5 times its forward (causal in
    the text model, full in the tower); the head counts for rows with a target only.
    """
    m, t = options.model_dim, batch.tokens
    head_dim = m // options.heads
    layer = 2 * m * m + 2 * m * options.kv_heads * head_dim + 3 * m * options.text_mlp
    text = options.layers * (6.0 * layer * t + 3.5 * 2.0 * t * t * m)
    head = 6.0 * m * options.vocab * options.answer
    return text + head + vision_flops(options, batch.frames)


def vision_flops(options: argparse.Namespace, frames: int) -> float:
    """Those of tower and projector."""
    m, w, used = options.model_dim, options.width, options.vision_layers - 1
    patches = (options.image_size // options.patch_size) ** 2
    per_layer = 6.0 * (4 * w * w + 2 * w * options.mlp_width) * patches
    tower = frames * used * (per_layer + 3.5 * 4.0 * patches * patches * w)
    return tower + 6.0 * frames * rows_per_frame(options) * (4 * w * m + m * m)


# ---- run --------------------------------------------------------------------------------------


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    from longvila.parallel.apply import ParallelPlan, parallelize
    from longvila.sp import build_mesh

    report = Report("mmsp_step", QUESTION, hardware(cluster))
    mesh = build_mesh(
        cluster.world_size,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        device_type=cluster.device.type,
    )
    cluster.say(mesh.explain())
    model = build_model(options, cluster.device)
    errors = check(model, options, cluster, mesh)
    dtype = getattr(torch, options.dtype)
    plan = ParallelPlan(
        fsdp=options.fsdp,
        parameter_dtype=torch.float32 if options.fsdp else None,
        compute_dtype=dtype if options.fsdp else None,
        mlp_tile_rows=options.tile,
        two_stage=True,
    )
    parallelize(model, mesh, plan)
    current = SimpleNamespace(model=model, parts=Parts(model, cluster))
    del model
    numbers = _Numbers(cluster)
    for frames in options.frames:
        batch = make_batch(options, frames, cluster)
        short = make_batch(options, min(frames, options.warm_frames), cluster)
        laps: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
        running = ""

        def step(
            variant: str, batch: Batch = batch, laps: dict[str, list[list[float]]] = laps
        ) -> None:
            nonlocal running
            running = variant
            began = time.perf_counter()
            with vision_path(variant, numbers):
                laps[variant].append(current.parts.step(current.model, batch))
            took = time.perf_counter() - began
            cluster.say(f"    {variant} with {batch.frames} frames: {took:.2f} s")

        chosen = [v for v in options.variants if v == "longvila" or cluster.world_size > 1]
        steps: dict[str, Steps] = {}
        while chosen:
            found, reason = attempt(
                lambda step=step, chosen=chosen, short=short: interleave(
                    cluster,
                    {variant: lambda variant=variant: step(variant) for variant in chosen},
                    repeats=options.repeats,
                    warm_up={
                        variant: lambda variant=variant: step(variant, short) for variant in chosen
                    },
                ),
                cluster,
            )
            if found is not None:
                steps = found
                break
            if reason != OUT_OF_MEMORY:
                raise RuntimeError(f"{running} {reason}")
            # What ran out left sharded parameters gathered: the rest goes on with a new model.
            chosen = [variant for variant in chosen if variant != running]
            laps.update({variant: [] for variant in chosen})
            shape = {"frames": frames, "text_layers": options.layers}
            about = {"failed": reason}
            report.rows.append(Row(running, VARIANTS[running], batch.tokens, shape, {}, [], about))
            current.parts.remove()
            current.model = current.parts = None
            clean()
            current.model = parallelize(build_model(options, cluster.device), mesh, plan)
            current.parts = Parts(current.model, cluster)
        for variant in chosen:
            base = steps.get("replicated_tower", steps[variant]).median_ms
            found = steps[variant]
            # The first lap is the warm-up.
            columns = [sorted(column) for column in zip(*laps[variant][1:], strict=True)]
            middle = [column[len(column) // 2] for column in columns]
            metrics = {
                "step_s": found.median_ms / 1e3,
                "tokens_per_s_per_gpu": 1e3 * batch.tokens / found.median_ms / cluster.world_size,
                "mfu_percent": 100.0
                * model_flops(options, batch)
                / (found.median_ms * 1e-3 * cluster.world_size * PEAK_TFLOPS * 1e12),
                "speedup": base / found.median_ms,
                "spread_percent": found.spread_percent,
                "peak_gib": found.peak_bytes / GIB,
                **{f"{part}_s": ms / 1e3 for part, ms in zip(PARTS, middle, strict=True)},
                **(errors if variant == "longvila" else {}),
            }
            shape = {
                "frames": frames,
                "rows_per_frame": rows_per_frame(options),
                "text_layers": options.layers,
                "sequence_parallel": cluster.world_size,
                "fsdp": options.fsdp,
            }
            report.rows.append(
                Row(
                    variant,
                    VARIANTS[variant],
                    batch.tokens,
                    shape,
                    {name: float(f"{value:.5g}") for name, value in metrics.items()},
                    [round(ms / 1e3, 5) for ms in found.total_ms],
                )
            )
            shown = " ".join(f"{n} {v:.4g}" for n, v in metrics.items() if "check" not in n)
            cluster.say(f"  {batch.tokens} tokens {variant:20s} {shown}")
        if cluster.is_main and options.out is not None:
            cluster.say(f"wrote {report.write(options.out, suffix=options.suffix)}")
    current.parts.remove()
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--frames", type=int, nargs="+", default=[664])
    parser.add_argument("--check-frames", type=int, default=16)
    parser.add_argument("--answer", type=int, default=256)
    add_tower_options(parser)
    add_text_options(parser, layers=4)
    parser.add_argument("--frame-batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-frames", type=int, default=64)
    parser.add_argument("--tile", type=int, default=16384, help="tokens of an MLP's tile")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--fsdp", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suffix", default="")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with _cluster.joined() as cluster:
        run(options, cluster)


if __name__ == "__main__":
    main()
