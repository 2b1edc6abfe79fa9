"""Does the vision stage scale over ranks, and what does moving its rows cost?

Three questions on the same ranks:

1. ``tower``: forward and backward of a SigLIP-so400m tower and its projector over 1024 frames, by
   how the frames are dealt: replicated on every rank (what most trainers do, and the time of one
   GPU), dealt and exchanged by one all-to-all-v (ours), dealt and summed as whole buffers
   (LongVILA's re-shard), dealt and gathered everywhere (Automodel's).
2. ``exchange``: only the movement of the rows, forward and backward, with its peak memory.
3. ``mixed``: frames of three resolutions, dealt by count and by cost; the slowest rank's time.

With ``--controls`` the tower alone is timed, and two ways more, which tell what an all-reduce with
wrong gradients gains from moving rows and what from the zeros that are left of half of them (a GPU
multiplies zeros faster): the all-reduce with right gradients, and our exchange made to lose those
of rows that travel.

Before timing, each way of moving rows is checked on a small set: the rows every rank gets and the
tower's gradients, summed over ranks, against one process encoding everything. LongVILA's loses
gradient, and the file says how much.

    torchrun --nproc-per-node 2 -m benchmarks.vision_balance
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import _cluster
from benchmarks._cluster import Cluster
from benchmarks._interleave import Steps, interleave
from benchmarks._model import TEXT, add_tower_options, draw, model_config, tower_config
from benchmarks._results import Kind, Report, Row, hardware
from benchmarks.peers.vision_reshard import (
    all_gather_reshard,
    all_reduce_reshard,
    all_reduce_with_gradients,
)

QUESTION = (
    "How does the vision stage scale over GPUs, row exchange included, and what do other ways of "
    "moving the rows cost?"
)
GIB = 2**30
KINDS: dict[str, Kind] = {
    "replicated_tower": "peer",
    "longvila_exchange": "ours",
    "all_reduce_reshard": "peer",
    "all_gather_reshard": "peer",
}
CONTROLS: dict[str, Kind] = {
    "exchange_losing_gradients": "ours",
    "all_reduce_with_gradients": "peer",
}
#: Patches at which attention costs as much as the rest of a layer, in widths of the tower.
LINEAR_OVER_WIDTH = 6


@dataclass(frozen=True)
class Deal:
    """Who encodes which rows, and which rows each rank's tokens need.

    Attributes:
        counts: Rows each rank encodes.
        wanted: Row numbers this rank's tokens need, in the order in which ours delivers them.
        plan: Our exchange plan.
        frames: This rank's frames.
    """

    counts: list[int]
    wanted: Tensor
    plan: Any
    frames: range


def make_deal(
    cluster: Cluster, costs: list[int], rows_per_frame: list[int], *, text_every: int = 0
) -> Deal:
    """Deal frames by cost and plan the exchange to a zigzag ring layout.

    Args:
        cluster: The ranks, one sequence-parallel group.
        costs: Relative cost of each frame.
        rows_per_frame: Rows each frame gives.
        text_every: Text tokens after each frame.
    """
    from longvila.sp.layout import SequenceLayout
    from longvila.sp.vision import plan_frames, plan_rows

    ranks = cluster.world_size
    frames = plan_frames(costs, ranks)
    positions, at = [], 0
    for count in rows_per_frame:
        positions.append(torch.arange(at, at + count))
        at += count + text_every
    place = torch.cat(positions)
    layout = SequenceLayout((at,), ring_size=ranks, ulysses_size=1, kind="zigzag")
    plan = plan_rows(frames, rows_per_frame, place, layout, rank=cluster.rank)
    edges = [0, *accumulate(rows_per_frame)]
    cuts = [edges[cut] for cut in frames.cuts]
    owner, _ = layout.locate(place)
    wanted = (owner == cluster.rank).nonzero().flatten()
    return Deal(
        [b - a for a, b in pairwise(cuts)],
        wanted.to(cluster.device),
        plan.to(cluster.device),
        frames.units(cluster.rank),
    )


def move(how: str, rows: Tensor, deal: Deal, cluster: Cluster) -> Tensor:
    """This rank's tokens' rows by one of the ways."""
    from longvila.sp.vision import exchange_rows

    if how == "replicated_tower" or cluster.world_size == 1:
        return rows.index_select(0, deal.wanted)
    group = dist.group.WORLD
    if how in ("longvila_exchange", "exchange_losing_gradients"):
        got = exchange_rows(rows, deal.plan, group=group, differentiable=True)
        if how == "longvila_exchange":
            return got
        start = sum(deal.counts[: cluster.rank])
        stayed = (deal.wanted >= start) & (deal.wanted < start + deal.counts[cluster.rank])
        return torch.where(stayed[:, None], got, got.detach())
    reshard = {
        "all_reduce_reshard": all_reduce_reshard,
        "all_reduce_with_gradients": all_reduce_with_gradients,
        "all_gather_reshard": all_gather_reshard,
    }[how]
    return reshard(rows, deal.counts, cluster.rank, deal.wanted, group)


def ways(options: argparse.Namespace) -> dict[str, Kind]:
    return KINDS | CONTROLS if options.controls else KINDS


def build_model(options: argparse.Namespace, device: torch.device) -> Any:
    """Tower and projector of a LongVILA model; its language model is a stub that never runs."""
    from transformers import Qwen2Config

    from longvila.model.modeling_longvila import LongVILAModel

    text = Qwen2Config(
        hidden_size=options.model_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=8,
        layer_types=["full_attention"],
    )
    config = model_config(
        options,
        vision=tower_config(options),
        text=text,
        vision_batch_size=options.frame_batch,
    )
    model = draw(lambda: LongVILAModel(config), device, options.dtype).train()
    model.gradient_checkpointing_enable()
    for parameter in model.language_model.parameters():
        parameter.requires_grad_(False)
    return model


def encode(model: Any, pixels: Tensor) -> Tensor:
    if pixels.shape[0] == 0:
        return pixels.new_zeros((0, model.config.text_config.hidden_size))
    return model.encode_media(pixels, kind="video").rows


def tower_parameters(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def pixels_of(
    options: argparse.Namespace, frames: range, cluster: Cluster, size: int | None = None
) -> Tensor:
    """Frames drawn from their own seeds, so that any rank draws the same frame alike."""
    side = size or options.image_size
    dtype = getattr(torch, options.dtype)
    out = torch.empty((len(frames), 3, side, side), dtype=dtype, device=cluster.device)
    for slot, frame in enumerate(frames):
        generator = torch.Generator(cluster.device).manual_seed(1000 + frame)
        out[slot].normal_(generator=generator)
    return out


def check_moves(
    model: Any, options: argparse.Namespace, cluster: Cluster
) -> dict[str, dict[str, float]]:
    """Row and gradient errors of every way on a few frames, against one process doing all."""
    frames = options.check_frames
    per_frame = encode(model, pixels_of(options, range(1), cluster)).shape[0]
    deal = make_deal(cluster, [1] * frames, [per_frame] * frames, text_every=1)
    everything = pixels_of(options, range(frames), cluster)
    rows = encode(model, everything)
    generator = torch.Generator(cluster.device).manual_seed(5)
    upstream = torch.randn(rows.shape, generator=generator, device=rows.device).to(rows.dtype)
    rows.backward(upstream)
    parameters = tower_parameters(model)
    # A parameter without a gradient (positions beyond the cut, say) has none in any way.
    used = [p for p in parameters if p.grad is not None]
    want = [p.grad.float() for p in used]
    for parameter in used:
        parameter.grad = None
    errors = {}
    for how in ways(options):
        mine = everything if how == "replicated_tower" else everything[list(deal.frames)]
        got = move(how, encode(model, mine), deal, cluster)
        expected = rows.detach().index_select(0, deal.wanted)
        got.backward(upstream.index_select(0, deal.wanted))
        difference = scale = 0.0
        for parameter, reference in zip(used, want, strict=True):
            grad = torch.zeros_like(reference) if parameter.grad is None else parameter.grad.float()
            if cluster.world_size > 1:
                dist.all_reduce(grad)
            difference += float((grad - reference).square().sum())
            scale += float(reference.square().sum())
            parameter.grad = None
        off = float((got.detach().float() - expected.float()).square().sum())
        size = float(expected.float().square().sum())
        off, size = cluster.everywhere([off, size], op="sum")
        errors[how] = {
            "error_rows": (off / max(size, 1e-30)) ** 0.5,
            "error_gradient": (difference / scale) ** 0.5,
        }
        shown = " ".join(f"{k} {v:.2e}" for k, v in errors[how].items())
        cluster.say(f"  checked {how:22s} {shown}")
    return errors


def time_tower(
    model: Any,
    options: argparse.Namespace,
    cluster: Cluster,
    errors: dict[str, dict[str, float]],
    report: Report,
) -> None:
    """Question 1."""
    frames = options.frames
    per_frame = encode(model, pixels_of(options, range(1), cluster)).shape[0]
    deal = make_deal(cluster, [1] * frames, [per_frame] * frames, text_every=1)
    everything = pixels_of(options, range(frames), cluster)
    mine = everything[deal.frames.start : deal.frames.stop]
    upstream = torch.randn((deal.wanted.numel(), options.model_dim), device=cluster.device).to(
        everything.dtype
    )

    def step(how: str) -> Callable[[], None]:
        def run() -> None:
            rows = encode(model, everything if how == "replicated_tower" else mine)
            move(how, rows, deal, cluster).backward(upstream)
            for parameter in tower_parameters(model):
                parameter.grad = None

        return run

    def warm() -> None:
        encode(model, everything[: options.frame_batch or 1]).sum().backward()

    steps = interleave(
        cluster,
        {how: step(how) for how in ways(options)},
        repeats=options.repeats,
        warm_up=dict.fromkeys(ways(options), warm),
    )
    one = steps["replicated_tower"].median_ms
    for how, kind in ways(options).items():
        found = steps[how]
        add(
            report,
            f"tower/{how}",
            kind,
            per_frame * frames,
            {"frames": frames, "image_size": options.image_size, "rows_per_frame": per_frame},
            found,
            {
                "frames_per_s": 1e3 * frames / found.median_ms,
                "speedup": one / found.median_ms,
                **errors[how],
            },
            cluster,
        )


def time_exchange(options: argparse.Namespace, cluster: Cluster, report: Report) -> None:
    """Question 2."""
    if cluster.world_size == 1:
        return
    frames, per_frame = options.frames, options.exchange_rows_per_frame
    deal = make_deal(cluster, [1] * frames, [per_frame] * frames, text_every=1)
    dtype = getattr(torch, options.dtype)
    rows = torch.randn((deal.counts[cluster.rank], options.model_dim), device=cluster.device)
    rows = rows.to(dtype).requires_grad_()
    upstream = torch.randn((deal.wanted.numel(), options.model_dim), device=cluster.device)
    upstream = upstream.to(dtype)
    moves = [how for how in KINDS if how != "replicated_tower"]

    def step(how: str) -> Callable[[], None]:
        def run() -> None:
            got = move(how, rows, deal, cluster)
            torch.autograd.grad(got, rows, upstream)

        return run

    steps = interleave(
        cluster,
        {how: step(how) for how in moves},
        repeats=max(options.repeats, 5),
        calls=options.exchange_calls,
    )
    base = steps["all_reduce_reshard"]
    for how in moves:
        found = steps[how]
        metrics = {"speedup": base.median_ms / found.median_ms}
        if base.extra_bytes:
            metrics["memory_of_all_reduce_percent"] = 100.0 * found.extra_bytes / base.extra_bytes
        metrics["time_of_all_reduce_percent"] = 100.0 * found.median_ms / base.median_ms
        shape = {"rows": per_frame * frames, "model_dim": options.model_dim}
        add(
            report, f"exchange/{how}", KINDS[how], per_frame * frames, shape, found, metrics,
            cluster,
        )  # fmt: skip


def time_mixed(model: Any, options: argparse.Namespace, cluster: Cluster, report: Report) -> None:
    """Question 3."""
    from longvila.sp.vision import frame_cost, plan_frames

    sizes = [side for side, count in options.mixed for _ in range(count)]
    linear = LINEAR_OVER_WIDTH * options.width
    costs = [frame_cost((side // options.patch_size) ** 2, linear_patches=linear) for side in sizes]
    plans = {
        "longvila_by_cost": plan_frames(costs, cluster.world_size),
        "by_count": plan_frames([1] * len(sizes), cluster.world_size),
    }
    tower = model.vision_tower

    def step(units: range) -> Callable[[], None]:
        batches = [
            pixels_of(options, range(start, min(start + batch, stop)), cluster, side)
            for side, first, last in runs(sizes, units)
            for batch in [max(1, options.mixed_batch_pixels // side**2)]
            for stop in [last]
            for start in range(first, last, batch)
        ]

        def run() -> None:
            for pixels in batches:
                out = tower(pixels, interpolate_pos_encoding=True).last_hidden_state
                out.backward(out.detach())
            for parameter in tower_parameters(model):
                parameter.grad = None

        return run

    steps = interleave(
        cluster,
        {name: step(plan.units(cluster.rank)) for name, plan in plans.items()},
        repeats=options.repeats,
    )
    slow = steps["by_count"].median_ms
    for name, plan in plans.items():
        spent = [sum(costs[unit] for unit in plan.units(r)) for r in range(cluster.world_size)]
        metrics = {
            "speedup": slow / steps[name].median_ms,
            "balance_percent": 100.0 * sum(spent) / (len(spent) * max(spent)),
        }
        kind: Kind = "ours" if name.startswith("longvila") else "peer"
        shape = {"frames_by_side": {str(side): count for side, count in options.mixed}}
        add(report, f"mixed/{name}", kind, 0, shape, steps[name], metrics, cluster)


def runs(sizes: list[int], units: range) -> list[tuple[int, int, int]]:
    """Stretches ``(size, first, last)`` of equal size among consecutive units."""
    found: list[tuple[int, int, int]] = []
    for unit in units:
        if found and found[-1][0] == sizes[unit]:
            found[-1] = (found[-1][0], found[-1][1], unit + 1)
        else:
            found.append((sizes[unit], unit, unit + 1))
    return found


def add(
    report: Report,
    method: str,
    kind: Kind,
    tokens: int,
    shape: dict[str, Any],
    steps: Steps,
    metrics: dict[str, float],
    cluster: Cluster,
) -> None:
    metrics = {
        "total_ms": steps.median_ms,
        "spread_percent": steps.spread_percent,
        "extra_gib": steps.extra_bytes / GIB,
        **metrics,
    }
    metrics = {name: float(f"{value:.5g}") for name, value in metrics.items()}
    shape = {**shape, "sequence_parallel": cluster.world_size}
    samples = [round(ms, 3) for ms in steps.total_ms]
    report.rows.append(Row(method, kind, tokens, shape, metrics, samples))
    shown = " ".join(f"{name} {value:g}" for name, value in metrics.items())
    cluster.say(f"  {kind:5s} {method:30s} {shown}")


def run(options: argparse.Namespace, cluster: Cluster) -> Report:
    report = Report("vision_balance", QUESTION, hardware(cluster))

    def save() -> None:
        if cluster.is_main and options.out is not None:
            cluster.say(f"wrote {report.write(options.out, suffix=options.suffix)}")

    if not options.controls:
        time_exchange(options, cluster, report)
        save()
    model = build_model(options, cluster.device)
    errors = check_moves(model, options, cluster)
    limit = 2e-2 if options.dtype == "bfloat16" else 1e-4
    ours = errors["longvila_exchange"]
    if max(ours.values()) > limit:
        raise RuntimeError(f"the exchange is wrong, not timing it: {ours} above {limit}")
    time_tower(model, options, cluster, errors, report)
    save()
    if options.controls:
        return report
    time_mixed(model, options, cluster, report)
    save()
    return report


def _sizes(text: str) -> list[tuple[int, int]]:
    """``224:256,448:64`` as ``[(224, 256), (448, 64)]``."""
    return [(int(side), int(count)) for side, count in (p.split(":") for p in text.split(","))]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--frames", type=int, default=1024)
    add_tower_options(parser)
    parser.add_argument("--model-dim", type=int, default=TEXT["model_dim"])
    parser.add_argument("--frame-batch", type=int, default=64)
    parser.add_argument("--exchange-rows-per-frame", type=int, default=256)
    parser.add_argument("--exchange-calls", type=int, default=5)
    parser.add_argument("--mixed", type=_sizes, default=_sizes("224:256,378:96,560:64"))
    parser.add_argument("--mixed-batch-pixels", type=int, default=16 * 384**2)
    parser.add_argument("--check-frames", type=int, default=10)
    parser.add_argument(
        "--controls", action="store_true", help="where the time of a way comes from"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suffix", default="")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    with _cluster.joined() as cluster:
        run(options, cluster)


if __name__ == "__main__":
    main()
