"""Predict operations, time and memory of a training step or a prompt, and what to switch on.

Examples:
    longvila plan --model 7B --frames 2048 --gpus 4
    longvila plan --model OUT/sft --stage long-sft-512 --gpus 2 --gpu h100
    longvila plan --model 8B --tokens 2097152 --gpus 256 --gpu a100 --per-node 8 --link-gbps 400
    longvila plan --model 7B --frames 1024 --gpus 1 --inference
    longvila plan --model 7B --frames 512 --gpus 8 --rates my_attention.json my_memory_plan.json

It needs no GPU and no weights. --model takes a preset (1.5B, 7B, 7B-448, 8B, 13B, 34B, or the name
of a published LongVILA) or the folder of a model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvila.cli._options import parse
from longvila.errors import LongVILAError

#: Every mesh of so many is tried; more would take minutes, and there is no such machine.
MOST_GPUS = 65_536


@dataclass(frozen=True)
class Options:
    """Predict tokens, operations, time and memory of a step, and what to switch on."""

    model: str
    """Preset (1.5B, 7B, 7B-448, 8B, 13B, 34B), published name, or folder of a model."""
    gpus: int
    """GPUs."""
    frames: int | None = None
    """Frames of the video; the stage's, or none."""
    tokens: int | None = None
    """Tokens of the row, frames included; the stage's, or those of the frames and the text."""
    text_tokens: int = 512
    """Tokens of prompt and answer, where the tokens follow from the frames."""
    targets: int | None = None
    """Tokens with a loss; the text tokens, or all of a row without frames."""
    stage: str | None = None
    """Stage whose tuned parts, frames and length are planned."""
    micro_batches: int = 1
    """Rows of a data-parallel group in a step."""
    gpu: str = "h200"
    """Device: h200, h100, a100."""
    memory_gib: float | None = None
    """What torch sees of a GPU's memory; the device's if not given."""
    host_gib: float = 128.0
    """Host memory that a GPU may use."""
    per_node: int = 8
    """GPUs of a node."""
    link_gbps: float = 400.0
    """Gbit/s of a link between nodes, one direction."""
    links_per_node: int | None = None
    """Links of a node; one a GPU if not given."""
    seq_parallel_size: int | None = None
    """Ranks that share a row; chosen if not given."""
    backend: str | None = None
    """Attention's back end; the fastest whose rate on the device is known if not given."""
    compiled: bool = False
    """Plan with norms and MLPs compiled (parallel.compile)."""
    rates: tuple[Path, ...] = ()
    """Result files of the benchmarks attention and memory_plan on your machine."""
    frame_side: int = 448
    """Pixels along a side of a frame, where the model takes any."""
    inference: bool = False
    """Plan reading and answering a prompt in place of a training step."""
    chunk_tokens: int = 8192
    """Tokens of a prompt read at once on one GPU."""
    json: bool = False
    """Print everything as JSON."""


def _tuned(options: Options, size: Any) -> Any:
    """Which parts a stage tunes, with the parameters of its adapter."""
    from longvila.memory.operations import Tuned
    from longvila.train.stages import get_stage

    if options.stage is None:
        return Tuned(tower=size.tower is not None, projector=size.tower is not None)
    stage = get_stage(options.stage)
    rates, adapter = stage.rates, stage.adapter
    media = size.tower is not None
    extra = beside = 0
    if adapter is not None:
        text = size.text
        widths = {"q": text.heads, "k": text.kv_heads, "v": text.kv_heads, "o": text.heads}
        for target in adapter.targets:
            heads = widths.get(target[0]) if target.endswith("_proj") else None
            other = text.mlp_width if heads is None else heads * text.head_dim
            extra += text.layers * adapter.rank * (text.width + other)
        beside = ("embeddings" in adapter.also_tune) * text.embedding_parameters
        beside += ("head" in adapter.also_tune) * text.head_parameters
        norms = text.width * (2 * text.layers + 1) + text.qk_norm * 2 * text.head_dim * text.layers
        beside += ("norms" in adapter.also_tune) * norms
    return Tuned(
        tower=media and rates.vision_tower is not None,
        projector=media and rates.projector is not None,
        text=rates.language_model is not None and adapter is None,
        adapter_parameters=extra,
        text_parameters=beside,
    )


def load_of(options: Options, size: Any) -> Any:
    """Return what a row holds.

    Raises:
        LongVILAError: If neither frames nor tokens are known, or the frames do not fit the tokens.
    """
    from longvila.memory.operations import Load
    from longvila.train.stages import get_stage

    frames, tokens = options.frames, options.tokens
    if options.stage is not None:
        data = get_stage(options.stage).data
        frames = (data.num_frames or 0) if frames is None else frames
        if tokens is None and options.frames is None:
            tokens = data.max_tokens
    frames = frames or 0
    if not frames and tokens is None:
        raise LongVILAError("give --frames, --tokens or --stage")
    media = 0 if size.tower is None else frames * size.tower.tokens
    if frames and size.tower is None:
        raise LongVILAError(f"{size.name} has no vision tower; leave --frames out")
    if tokens is None:
        tokens = media + options.text_tokens
    if media > tokens:
        raise LongVILAError(f"{frames} frames have {media:,} tokens, the row {tokens:,}")
    targets = options.targets
    if targets is None:
        targets = min(options.text_tokens, tokens - media) if frames else tokens
    return Load(tokens=tokens, frames=frames, targets=targets, micro_batches=options.micro_batches)


def make_plan(options: Options) -> Any:
    """Return the plan of a command line."""
    from dataclasses import replace

    from longvila.memory.rates import GIB, find_gpu, with_results
    from longvila.memory.settings import Settings
    from longvila.memory.timing import Links
    from longvila.parallel.sizes import load_size
    from longvila.train.planning import Planner
    from longvila.train.stages import get_stage

    if not 1 <= options.gpus <= MOST_GPUS:
        raise LongVILAError(f"--gpus must be from 1 to {MOST_GPUS:,}, got {options.gpus:,}")
    for name in ("memory_gib", "per_node", "link_gbps", "links_per_node", "chunk_tokens",
                 "frame_side"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise LongVILAError(f"--{name.replace('_', '-')} must be above zero, got {value:g}")
    if options.host_gib < 0:
        raise LongVILAError(f"--host-gib must not be below zero, got {options.host_gib:g}")
    if options.inference and options.seq_parallel_size is not None:
        raise LongVILAError("--seq-parallel-size is for training; all GPUs share a prompt")
    size = load_size(options.model, frame_side=options.frame_side)
    try:
        gpu = with_results(find_gpu(options.gpu), options.rates)
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        files = ", ".join(map(str, options.rates))
        raise LongVILAError(
            f"--rates {files}: expected result files of the benchmarks, in JSON; got {fault}"
        ) from fault
    if options.memory_gib is not None:
        gpu = replace(gpu, memory_bytes=options.memory_gib * GIB)
    backend = options.backend or max(gpu.attention, key=lambda name: gpu.attention[name][1])
    base = Settings(backend=backend, compiled=options.compiled)
    if options.stage is not None:
        parallel = get_stage(options.stage).parallel
        base = replace(
            base,
            loss_tile_rows=parallel.loss_tile_rows,
            compiled=options.compiled or parallel.compile,
        )
    planner = Planner(
        size,
        gpu,
        tuned=_tuned(options, size),
        base=base,
        links=Links(rate=options.link_gbps * 1e9 / 8, per_node=options.links_per_node),
        per_node=options.per_node,
        host_bytes=options.host_gib * GIB,
    )
    load = load_of(options, size)
    if options.inference:
        return planner.prompt(load, options.gpus, chunk_tokens=options.chunk_tokens)
    return planner.plan(load, options.gpus, seq_parallel_size=options.seq_parallel_size)


def main(argv: list[str]) -> int:
    """Run ``longvila plan``.

    Returns:
        0 if the plan fits, 3 if it does not.
    """
    options = parse(Options, argv, "plan", __doc__)
    from longvila.train.planning import PromptPlan
    from longvila.train.report import plan_as_dict, prompt_as_dict, show_plan, show_prompt

    plan = make_plan(options)
    if isinstance(plan, PromptPlan):
        text = json.dumps(prompt_as_dict(plan), indent=1) if options.json else show_prompt(plan)
    else:
        text = json.dumps(plan_as_dict(plan), indent=1) if options.json else show_plan(plan)
    print(text)
    return 0 if plan.fits else 3


if __name__ == "__main__":
    from longvila.cli.main import main as command

    sys.exit(command(["plan", *sys.argv[1:]]))
