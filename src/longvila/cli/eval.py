"""Run video benchmarks, or lay finished runs side by side.

Examples:
    longvila eval --list
    longvila eval --tasks videomme,nextqa_mc_test --model CHECKPOINT --out runs/mine
    longvila eval --tasks vnbench --data vnbench=/data/VNBench --model CHECKPOINT --out runs/mine
    torchrun --nproc-per-node 8 -m longvila.cli.eval --tasks videomme --model CHECKPOINT \\
        --out runs/mine --seq-parallel-size 4
    longvila eval --compare runs/mine runs/theirs --page both.html

Frames are the paper's for each benchmark (--list shows them). Questions come from lmms-eval
(pip install 'longvila[eval]'); each video is read once for all its questions. Under torchrun,
--seq-parallel-size ranks share a video and the groups share the benchmark. The same command again
goes on where it was interrupted. An answer that chooses none of the options is wrong, and counted.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from longvila.cli._measuring import check_run
from longvila.cli._options import parse
from longvila.errors import LongVILAError
from longvila.evaluation.columns import aligned
from longvila.evaluation.presets import PRESETS, Preset, find_preset


@dataclass(frozen=True)
class Options:
    """Run video benchmarks, or lay finished runs side by side."""

    tasks: str = ""
    """Benchmarks, by their names or the original evaluator's, separated by commas."""
    model: str | None = None
    """Folder or hub id of the checkpoint; the small model of this package if absent."""
    out: Path | None = None
    """Folder of the results; begun again, the run goes on there."""
    frames: int | None = None
    """Frames of each video; the paper's for each benchmark if absent."""
    limit: int | None = None
    """Questions of each benchmark, for a trial; all if absent."""
    data: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="TASK=FOLDER")
    ] = ()
    """Where a benchmark's questions and videos are; may be given many times."""
    seq_parallel_size: int = 1
    """Ranks that share a video, under torchrun."""
    seq_parallel_ring_type: Literal["zigzag_ring_varlen", "ring_varlen", "gather"] = (
        "zigzag_ring_varlen"
    )
    """How they share it."""
    device: str = "auto"
    """Where the model runs, as torch names it; auto is this rank's GPU, or the CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision; auto is bfloat16 on a GPU and float32 on a CPU."""
    seed: int = 0
    """Of sampling, where a benchmark samples."""
    compare: tuple[Path, ...] = ()
    """Folders of finished runs to lay side by side, instead of running."""
    page: Path | None = None
    """File of the page that --compare writes."""
    list: bool = False
    """List the benchmarks."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "eval", __doc__, flag_pairs=False)
    if options.list:
        print(listing())
        return 0
    if options.compare:
        return compare(options)
    presets = chosen(options.tasks)
    if options.out is None:
        raise LongVILAError("--out is needed: the folder of the results")
    data = folders(options.data, presets)
    for name in ("frames", "limit"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise LongVILAError(f"--{name} must be at least 1, got {given}")
    check_run(options)
    require_lmms_eval()
    quieten()
    from longvila.evaluation.lmms_run import Plan, run
    from longvila.evaluation.report import table
    from longvila.packaged import default_model

    plan = Plan(
        presets=presets,
        model=options.model or str(default_model()),
        out=options.out,
        frames=options.frames,
        limit=options.limit,
        data=data,
        seq_parallel_size=options.seq_parallel_size,
        ring_type=options.seq_parallel_ring_type,
        device=None if options.device == "auto" else options.device,
        dtype=options.dtype,
        seed=options.seed,
    )
    summaries = run(plan)
    if summaries:
        print(table(summaries))
        print(f"\nwrote {options.out / 'report.html'}")
    if "RANK" in os.environ:
        import torch.distributed as dist

        from longvila.inference.workers import leave_ranks

        if dist.is_initialized():
            leave_ranks()
    return 0


def listing() -> str:
    """Return the benchmarks as a table."""
    rows = [("name", "frames", "lmms-eval's task", "also called")]
    for preset in PRESETS:
        note = f"  ({preset.note})" if preset.note else ""
        rows.append(
            (preset.name, str(preset.frames), preset.task, ", ".join(preset.aliases) + note)
        )
    return aligned(rows)


def chosen(tasks: str) -> tuple[Preset, ...]:
    """Return the benchmarks that are named, each once.

    Args:
        tasks: Names separated by commas.

    Raises:
        LongVILAError: If none is named, or one is not known.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise LongVILAError("--tasks is needed: names of benchmarks (--list shows them)")
    try:
        presets = [find_preset(name) for name in names]
    except KeyError as fault:
        raise LongVILAError(str(fault.args[0])) from fault
    return tuple({preset.name: preset for preset in presets}.values())


def folders(given: tuple[str, ...], presets: tuple[Preset, ...]) -> dict[str, Path]:
    """Return the folder of each benchmark that one was given for.

    Args:
        given: ``TASK=FOLDER`` each.
        presets: The benchmarks that run.

    Raises:
        LongVILAError: If one is no pair, no benchmark that runs, or no folder.
    """
    found = {}
    for pair in given:
        name, equals, folder = pair.partition("=")
        named = chosen(name) if name and equals else ()
        if len(named) != 1:
            raise LongVILAError(f"--data wants TASK=FOLDER, got {pair!r}")
        (preset,) = named
        if preset not in presets:
            raise LongVILAError(f"--data names {name}, which is not among --tasks")
        if not Path(os.path.expanduser(folder)).is_dir():
            raise LongVILAError(f"--data {name}: there is no folder {folder}")
        found[preset.name] = Path(os.path.expanduser(folder))
    return found


def require_lmms_eval() -> None:
    """Say what to install where lmms-eval is missing.

    Raises:
        LongVILAError: If it is.
    """
    from importlib.util import find_spec

    if find_spec("lmms_eval") is None:
        raise LongVILAError(
            "benchmarks come from lmms-eval, which is not installed: pip install 'longvila[eval]'"
        )


def quieten() -> None:
    """Keep lmms-eval's notes about its own task files off the terminal, and bars out of files."""
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")


def compare(options: Options) -> int:
    """Lay finished runs side by side."""
    if options.page is None:
        raise LongVILAError("--compare needs --page, the file to write")
    from longvila.evaluation.report import page
    from longvila.evaluation.runs import read_run

    runs = [read_run(folder) for folder in options.compare]
    if len({run.name for run in runs}) < len(runs):
        # Folders of one name in different places.
        named = zip(runs, options.compare, strict=True)
        runs = [replace(run, name=str(folder)) for run, folder in named]
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(runs), encoding="utf-8")
    print(f"wrote {options.page}")
    return 0


if __name__ == "__main__":
    from longvila.cli.main import main as command

    sys.exit(command(["eval", *sys.argv[1:]]))
