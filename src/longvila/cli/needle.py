"""Hide pictures in a long film and measure whether a model finds them.

Examples:
    longvila needle --model CHECKPOINT --haystack film.mp4 --out out/needle
    longvila needle --model CHECKPOINT --haystack films/ --needles mine/ --max-frames 1400
    longvila needle --model CHECKPOINT --haystack film.mp4 --needles lmms-lab/v_niah_needles \\
        --protocol paper --preset paper-6000
    torchrun --nproc-per-node 8 -m longvila.cli.needle --model CHECKPOINT --haystack film.mp4

Every answer is on disk as soon as it is given: the same command goes on where it stopped. The
folder gets records.jsonl, result.json, page.html and a heat map for each kind of question.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from longvila.cli._measuring import Measuring, check, shared, shipped, show
from longvila.cli._options import parse
from longvila.errors import LongVILAError
from longvila.packaged import default_model


@dataclass(frozen=True, kw_only=True)
class Options(Measuring):
    """Hide pictures in a long film and measure whether a model finds them."""

    haystack: str = "synthetic"
    """A film, a folder of films or of pictures, or "synthetic" for one drawn in code."""
    needles: str | None = None
    """A folder, a file, or a data set's name; the pictures of this package if absent."""
    tier: str | None = None
    """Use the needles of this tier only ("seen" or "unseen" for the package's own)."""
    out: Path = Path("out/needle")
    """Folder for answers and pages."""
    preset: Literal["paper-6000", "paper-1400"] | None = None
    """A figure of the paper; sets the grid."""
    max_frames: int = 6000
    """Most frames of the film."""
    interval: int = 300
    """Step of the numbers of frames."""
    lengths: tuple[int, ...] = ()
    """Numbers of frames instead of evenly spaced ones."""
    depth_interval: float = 0.2
    """Step of depths."""
    protocol: Literal["paper", "strict", "both"] = "both"
    """The paper's teacher-forced test, the stricter one, or both."""
    insert: Literal["frame", "paste"] = "frame"
    """The paper's test: a frame of its own, or pasted on a frame of the film."""
    strict_insert: Literal["frame", "paste"] = "paste"
    """The same for the stricter test."""
    layout: Literal["needle", "model"] = "needle"
    """The paper's test: frames with nothing between them, or the model's own layout."""
    strict_layout: Literal["needle", "model"] = "model"
    """The same for the stricter test."""
    tasks: tuple[str, ...] = ()
    """Tasks of the stricter test that are asked (retrieval, grounding, ...); all if absent."""
    ways: int = 4
    """Names that the stricter test offers where one is shown."""
    trials: int = 1
    """Films in each cell of the stricter test."""
    per_film: int = 4
    """Needles in each of them."""
    fps: float = 1.0
    """Frames taken from the film each second."""
    step_s: float | None = None
    """Seconds between frames as the prompt's times say; as in the film if absent."""
    part: tuple[float, float] = (0.0, 1.0)
    """Where each film begins and ends, as shares of its length."""
    repeat: bool = False
    """Show a film again that is too short."""
    words: Path | None = None
    """JSON file with other words for the questions."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "needle", __doc__)
    from longvila.evaluation.needle import check_plan, run_needle
    from longvila.evaluation.needle_sets import check_haystack, load_needles, open_haystack
    from longvila.inference.sight import sampler_of

    check(options)
    plan = plan_of(options)
    needles = load_needles(options.needles or shipped(), tier=options.tier)
    check_plan(plan, needles)
    check_haystack(options.haystack, fps=options.fps, part=options.part)
    source = options.model or str(default_model())
    model, processor, mesh = load(source, options)
    haystack = open_haystack(
        options.haystack,
        num_frames=plan.frames,
        fps=plan.fps,
        processor=sampler_of(processor),
        repeat=options.repeat,
        part=options.part,
    )
    groups = run_needle(
        model, processor, plan, haystack, needles, out=options.out, name=Path(source).name,
        **shared(options, mesh),
    )  # fmt: skip
    show(groups, options.out, mesh)
    return 0


def plan_of(options: Options) -> Any:
    """Return the plan that the options describe.

    Raises:
        LongVILAError: If the file of words is not one, or a question in it cannot be filled in.
    """
    from longvila.evaluation.needle import PRESETS, Plan
    from longvila.evaluation.needle_plan import Words

    words = Words()
    if options.words is not None:
        try:
            given = json.loads(options.words.read_text(encoding="utf-8-sig"))
        except ValueError as fault:
            raise LongVILAError(f"--words {options.words} is no JSON: {fault}") from fault
        known = {each.name for each in fields(Words)}
        texts = isinstance(given, dict) and all(isinstance(x, str) for x in given.values())
        if not texts or not set(given) <= known:
            raise LongVILAError(f"{options.words} must map some of {sorted(known)} to texts")
        words = Words(**given)
    names = {each.name for each in fields(Plan)} - {"words"}
    values = {name: getattr(options, name) for name in names}
    if options.preset is not None:
        if options.lengths:
            raise LongVILAError("--preset and --lengths both say how many frames: give one")
        values.update(PRESETS[options.preset])
    return Plan(**values, words=words)


def load(source: str, options: Any) -> tuple[Any, Any, Any]:
    """Load a model for this process, and its mesh where torchrun started several.

    Args:
        source: Folder or hub id.
        options: ``device``, ``dtype`` and ``seq_parallel_size`` are read.

    Returns:
        Model, processor, and mesh or None.

    Raises:
        CheckpointError: If there is no such checkpoint.
    """
    import torch
    import torch.distributed as dist

    from longvila.cli.ask import find_device
    from longvila.model.opening import open_checkpoint
    from longvila.sp.mesh import build_mesh

    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = find_device(options.device)
    kind = torch.device(device).type
    if kind == "cuda":
        if device == kind:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    model, processor = open_checkpoint(source, device=device, dtype=options.dtype, label="--model")
    mesh = None
    if world > 1:
        text = model.config.get_text_config()
        size = options.seq_parallel_size
        mesh = build_mesh(
            world if size == -1 else size,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            device_type=kind,
        )
    return model, processor, mesh


if __name__ == "__main__":
    from longvila.cli.main import main as command

    sys.exit(command(["needle", *sys.argv[1:]]))
