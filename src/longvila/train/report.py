"""Plans as text and as plain values.

It computes nothing but percentages; `longvila.train.planning` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from longvila.memory.estimate import Peak
from longvila.memory.rates import GIB
from longvila.train.planning import Plan, PromptPlan, advice


def _count(number: float) -> str:
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,.0f}"


def _parts(title: str, parts: Mapping[str, float], unit: str, scale: float = 1.0) -> list[str]:
    total = sum(parts.values())
    lines = [f"{title:<44}{total / scale:>10.2f} {unit}"]
    for name, value in parts.items():
        if value > 0.0005 * total:
            lines.append(f"  {name:<42}{value / scale:>10.2f}  {value / total:>4.0%}")
    return lines


def _peak_lines(peak: Peak, limit: float, fits: bool) -> list[str]:
    lines = _parts(f"peak of a GPU, {peak.moment}", peak.parts, "GiB", GIB)
    if peak.host_bytes:
        lines.append(f"{'host memory of a GPU':<44}{peak.host_bytes / GIB:>10.2f} GiB")
    verdict = "fits" if fits else "DOES NOT FIT"
    room = f"{verdict}: torch can have {limit / GIB:.1f} GiB of the device"
    return [*lines, room]


def show_plan(plan: Plan) -> str:
    """Return a plan as text."""
    size, load, ranks, time = plan.size, plan.load, plan.ranks, plan.time
    assert time is not None and plan.gpu is not None
    tuned = plan.tuned.parameters(size)
    lines = [
        f"{size.name}: {_count(size.parameters)} parameters, {_count(tuned)} tuned",
        f"row: {load.tokens:,} tokens, {load.frames:,} frames, {load.targets:,} targets; "
        f"{ranks.local_tokens(load.tokens):,} tokens a GPU",
        f"on {ranks.world} x {plan.gpu.name}: dp {ranks.dp} x ring {ranks.ring} x ulysses "
        f"{ranks.ulysses}, {ranks.per_node} a node, attention {plan.settings.backend}",
        *(f"  - {reason}" for reason in plan.reasons),
    ]
    if len(plan.meshes) > 1:
        shown = ", ".join(
            f"ring {each.ranks.ring} x ulysses {each.ranks.ulysses} {each.seconds:.2f} s"
            for each in plan.meshes[:4]
        )
        lines.append(f"  - predicted with checkpoints: {shown}")
    lines.append("")
    counts = time.operations
    lines.append(
        f"operations of a row: {_count(counts.needed)}FLOP needed, {_count(counts.total)}FLOP run"
    )
    for part in counts.forward:
        numbers = (counts.forward[part], counts.backward[part], counts.recompute[part])
        if sum(numbers):
            told = ", ".join(
                f"{name} {_count(value)}"
                for name, value in zip(("forward", "backward", "again"), numbers, strict=True)
                if value
            )
            lines.append(f"  {part.replace('_', ' '):<16}{told}")
    lines.append("")
    lines += _parts("time of a step", time.parts, "s")
    tokens = load.tokens * load.micro_batches * ranks.dp
    lines.append(f"{tokens / time.seconds / ranks.world:,.0f} tokens/s/GPU")
    lines += [f"note: {note}" for note in time.notes]
    lines.append("")
    lines += _peak_lines(plan.peak, plan.limit_bytes, plan.fits)
    lines += ["", "tried in order:"]
    for each in plan.attempts:
        told = f"{each.peak.bytes / GIB:8.1f} GiB {each.seconds:9.2f} s"
        lines.append(
            f"  {each.name:<34}{told}  {'fits' if each.fits else 'does not fit':<13}{each.how}"
        )
    if plan.fits:
        lines.append(f"switch on: {', '.join(_switches(plan)) or 'nothing'}")
    elif plan.enough_gpus is not None:
        lines.append(f"use {plan.enough_gpus} GPUs: the fewest, of multiples, that hold this row")
    else:
        lines.append("no number of GPUs that was tried holds this row: fewer tokens or frames")
    return "\n".join(lines)


def _switches(plan: Plan) -> list[str]:
    """Every switch of the plan, as settings of a stage."""
    settings, found = plan.settings, [f"parallel.seq_parallel_size={plan.ranks.sp}"]
    if plan.ranks.sp > 1:
        found.append(f"parallel.seq_parallel_ring_size={plan.ranks.ring}")
    found.append(f"parallel.activation_checkpointing={str(settings.checkpointing).lower()}")
    if any(each.name == "fewer frames at once" for each in plan.attempts):
        tower = plan.size.tower
        assert tower is not None
        found.append(f"vision_batch_size={tower.frames_per_call} in the model's configuration")
    if settings.compiled:
        found.append("parallel.compile=true")
    if settings.mlp_tile_rows is not None:
        found.append(f"parallel.mlp_tile_rows={settings.mlp_tile_rows}")
    if settings.offload_bytes:
        found.append(f"parallel.offload_gib={settings.offload_bytes / GIB:.0f}")
    if settings.optimizer == "adamw-host":
        found.append("optimizer.offload=true")
    return found


def show_prompt(plan: PromptPlan) -> str:
    """Return a prompt's plan as text."""
    size, load, ranks, time = plan.size, plan.load, plan.ranks, plan.time
    lines = [
        f"{size.name}: {_count(size.parameters)} parameters",
        f"prompt: {load.tokens:,} tokens, {load.frames:,} frames",
        f"on {ranks.world} x {plan.gpu.name}: ring {ranks.ring} x ulysses {ranks.ulysses}",
        f"operations: {_count(time.operations)}FLOP",
        "",
        *_parts("time to the first token", time.parts, "s"),
        f"each further token: at least {1e3 * time.per_token:.1f} ms",
        *(f"note: {note}" for note in time.notes),
        "",
        *_peak_lines(plan.peak, plan.limit_bytes, plan.fits),
    ]
    if not plan.fits:
        more = f"use {plan.enough_gpus} GPUs" if plan.enough_gpus else "use fewer tokens"
        lines.append(more)
    return "\n".join(lines)


def _peak_as_dict(peak: Peak) -> dict[str, Any]:
    return {
        "bytes": peak.bytes,
        "host_bytes": peak.host_bytes,
        "moment": peak.moment,
        "parts": dict(peak.parts),
        "moments": {name: sum(parts.values()) for name, parts in peak.moments.items()},
    }


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values."""
    assert plan.time is not None and plan.gpu is not None
    counts = plan.time.operations
    return {
        "model": asdict(plan.size) | {"parameters": plan.size.parameters},
        "load": asdict(plan.load),
        "ranks": asdict(plan.ranks) | {"world": plan.ranks.world, "sp": plan.ranks.sp},
        "settings": asdict(plan.settings),
        "tuned_parameters": plan.tuned.parameters(plan.size),
        "gpu": plan.gpu.name,
        "sources": dict(plan.gpu.sources),
        "operations": {
            "forward": dict(counts.forward),
            "backward": dict(counts.backward),
            "recompute": dict(counts.recompute),
            "needed": counts.needed,
        },
        "time": {"seconds": plan.time.seconds, "parts": dict(plan.time.parts)},
        "notes": list(plan.time.notes),
        "peak": _peak_as_dict(plan.peak),
        "limit_bytes": plan.limit_bytes,
        "fits": plan.fits,
        "attempts": [
            {
                "name": each.name,
                "how": each.how,
                "peak_bytes": each.peak.bytes,
                "host_bytes": each.peak.host_bytes,
                "seconds": each.seconds,
                "fits": each.fits,
            }
            for each in plan.attempts
        ],
        "advice": advice(plan.attempts),
        "meshes": [
            {
                "ring": each.ranks.ring,
                "ulysses": each.ranks.ulysses,
                "kv_exchange": each.ranks.kv_exchange,
                "seconds": each.seconds,
            }
            for each in plan.meshes
        ],
        "reasons": list(plan.reasons),
        "enough_gpus": plan.enough_gpus,
        "switch_on": _switches(plan) if plan.fits else [],
    }


def prompt_as_dict(plan: PromptPlan) -> dict[str, Any]:
    """Return a prompt's plan as plain values."""
    return {
        "model": asdict(plan.size) | {"parameters": plan.size.parameters},
        "load": asdict(plan.load),
        "ranks": asdict(plan.ranks) | {"world": plan.ranks.world, "sp": plan.ranks.sp},
        "gpu": plan.gpu.name,
        "operations": plan.time.operations,
        "time": {
            "first_token_seconds": plan.time.seconds,
            "parts": dict(plan.time.parts),
            "seconds_per_token": plan.time.per_token,
        },
        "notes": list(plan.time.notes),
        "peak": _peak_as_dict(plan.peak),
        "limit_bytes": plan.limit_bytes,
        "fits": plan.fits,
        "enough_gpus": plan.enough_gpus,
    }
