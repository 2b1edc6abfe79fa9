"""Does a model learn alike however a step's samples are dealt over the ranks?

The same twenty steps of the same small LongVILA (Qwen2-0.5B's layers, half as many, behind a small
tower) on the same video samples, every parameter trained, once on each mesh of the ranks at hand:
pure data parallelism (the yardstick), all on one sequence, and what is between. What runs is
`parallelize` and `longvila.train.step.train_step`, as in ``longvila train``.

1. The model is drawn from one seed for each mesh and put on it: float32 shards, bf16 compute.
2. A step has as many samples as there are ranks, videos of different lengths with an answer each.
   A data-parallel group takes its share of them as micro-batches, so every mesh sees all of them.
   Samples come back every few steps, so that there is something to learn.
3. Loss and gradient norm of each step are compared with the yardstick's, relative to it.

Sums in bf16 are taken in another order on each mesh, so curves part by its rounding; in float32
(the CPU) by that of float32. It measures no speed.

    torchrun --nproc-per-node 4 -m benchmarks.loss_curve
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import _cluster
from benchmarks._attempt import clean
from benchmarks._cluster import Cluster
from benchmarks._model import (
    add_text_options,
    add_tower_options,
    draw,
    model_config,
    rows_per_frame,
)
from benchmarks._results import Report, Row, hardware

QUESTION = "Is the loss curve of sequence parallelism that of data parallelism?"
#: Relative differences of loss that a mesh may have; above them the run fails, its file written.
LIMITS = {"bfloat16": 2e-2, "float32": 1e-4}
TINY = {
    "steps": 3, "model_dim": 56, "text_mlp": 96, "layers": 2, "vocab": 128, "width": 32,
    "mlp_width": 48, "vision_layers": 2, "vision_heads": 2, "image_size": 56, "patch_size": 14,
    "frames": [3, 5, 2, 4], "answer": 8, "dtype": "float32",
}  # fmt: skip


def meshes(ranks: int) -> dict[str, tuple[int, int]]:
    """Name, sequence-parallel degree and ring degree of each mesh, the yardstick first."""
    found = {f"dp {ranks}": (1, 1)}
    if ranks >= 4:
        found[f"dp {ranks // 2}, ulysses 2"] = (2, 1)
        found[f"ring 2 x ulysses {ranks // 2}"] = (ranks, 2)
    found[f"ring {ranks}"] = (ranks, ranks)
    found[f"ulysses {ranks}"] = (ranks, 1)
    return found


def sample(options: argparse.Namespace, number: int, device: torch.device) -> dict[str, Any]:
    """A video of its own length and look, a question, and an answer that has the loss."""
    generator = torch.Generator().manual_seed(1000 + number)
    frames, vocab = options.frames[number % len(options.frames)], options.vocab
    video = torch.full((frames, rows_per_frame(options) + 1), vocab - 1)
    video[:, -1] = 1
    words = torch.randint(2, vocab - 2, (2 * options.answer,), generator=generator)
    ids = torch.cat([words[: options.answer], video.flatten(), words[options.answer :]])[None]
    labels = torch.full_like(ids, -100)
    labels[:, -options.answer :] = ids[:, -options.answer :]
    shape = (frames, 3, options.image_size, options.image_size)
    pixels = torch.randn(shape, generator=generator).to(getattr(torch, options.dtype))
    return {
        "input_ids": ids.to(device),
        "labels": labels.to(device),
        "pixel_values_videos": pixels.to(device),
        "video_num_frames": torch.tensor([frames]),
    }


def train(
    degrees: tuple[int, int],
    samples: list[dict[str, Any]],
    options: argparse.Namespace,
    cluster: Cluster,
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Losses and gradient norms of all steps on one mesh, and what it is."""
    from longvila.model.modeling_longvila import LongVILAForConditionalGeneration
    from longvila.parallel.apply import ParallelPlan, parallelize
    from longvila.sp import build_mesh
    from longvila.train.stages import Optimizer, Rates
    from longvila.train.step import build_optimizer, train_step

    mesh = build_mesh(*degrees, device_type=cluster.device.type)
    config = model_config(options, vision_batch_size=options.frame_batch)
    model = draw(lambda: LongVILAForConditionalGeneration(config), cluster.device, "float32")
    weights = sum(p.numel() for p in model.parameters())
    compute = None if options.dtype == "float32" else getattr(torch, options.dtype)
    parallelize(model.train(), mesh, ParallelPlan(compute_dtype=compute, two_stage=True))
    rates = Rates(vision_tower=options.rate, projector=options.rate, language_model=options.rate)
    optimizer = build_optimizer(model, rates, Optimizer(max_steps=options.steps))
    losses, norms = [], []
    began = time.perf_counter()
    for step in range(options.steps):
        # Every group takes every dp-th sample of the step.
        first = step * cluster.world_size
        numbers = range(first + mesh.dp_rank, first + cluster.world_size, mesh.dp_size)
        batches = [samples[number % len(samples)] for number in numbers]
        result = train_step(model, batches, optimizer, mesh, clip_norm=1.0)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    about = {
        "dp": mesh.dp_size,
        "ring": mesh.ring_size,
        "ulysses": mesh.ulysses_size,
        "parameters": weights,
        "tokens_a_step": result.counts.tokens,
        "seconds": round(time.perf_counter() - began, 1),
    }
    return losses, norms, about


def apart(found: list[float], yardstick: list[float]) -> float:
    """Greatest difference relative to the yardstick."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, yardstick, strict=True))


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    report = Report("loss_curve", QUESTION, hardware(cluster))
    drawn = [sample(options, number, cluster.device) for number in range(options.samples)]
    yardstick: tuple[list[float], list[float]] | None = None
    for name, degrees in meshes(cluster.world_size).items():
        if yardstick is not None and not re.search(options.meshes, name):
            continue
        losses, norms, about = train(degrees, drawn, options, cluster)
        clean()
        yardstick = yardstick or (losses, norms)
        metrics = {
            "loss_apart": apart(losses, yardstick[0]),
            "gradient_norm_apart": apart(norms, yardstick[1]),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
        samples = [{"loss": a, "gradient_norm": b} for a, b in zip(losses, norms, strict=True)]
        shape = {"steps": options.steps, "dtype": options.dtype, "heads": options.heads,
                 "kv_heads": options.kv_heads, "frames": options.frames}  # fmt: skip
        report.rows.append(
            Row(name, "ours", about["tokens_a_step"], shape, metrics, samples, about)
        )
        shown = " ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        cluster.say(f"  {name:24s} {shown} {about}")
        if cluster.is_main and options.out is not None:
            report.write(options.out, suffix=options.suffix)
    limit = LIMITS[options.dtype]
    wrong = {
        r.method: r.metrics["loss_apart"] for r in report.rows if r.metrics["loss_apart"] > limit
    }
    if wrong:
        raise RuntimeError(f"losses differ from those of data parallelism by over {limit}: {wrong}")
    return report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--meshes", default=".", help="beside data parallelism, by name")
    parser.add_argument("--samples", type=int, default=8, help="different ones")
    parser.add_argument("--frames", type=int, nargs="+", default=[48, 96, 24, 72, 64])
    parser.add_argument("--answer", type=int, default=64, help="words with a loss")
    parser.add_argument("--rate", type=float, default=5e-5)
    add_tower_options(
        parser, image_size=224, width=768, mlp_width=3072, vision_layers=6, vision_heads=12
    )
    add_text_options(
        parser, model_dim=896, text_mlp=4864, layers=12, heads=14, kv_heads=2, vocab=32000
    )
    parser.add_argument("--frame-batch", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
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
