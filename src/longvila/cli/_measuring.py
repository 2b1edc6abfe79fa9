"""What `longvila needle` and `longvila bench` have in common: options, progress, the last lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longvila.cli.ask import find_device
from longvila.errors import LongVILAError
from longvila.packaged import asset

#: Seconds between two lines of progress.
EVERY_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """Which model, where it runs, and what is kept."""

    model: str | None = None
    """Folder or hub id of the checkpoint; the small model of this package if absent."""
    control: bool = True
    """Ask about films without pictures and grey ones, too."""
    seed: int = 0
    """Decides all that is random."""
    beyond_context: bool = False
    """Measure also beyond the length the model's configuration allows."""
    chunk_tokens: int = 8192
    """Tokens that a rank reads at once."""
    keep_rows: bool = False
    """Keep the film's rows on disk, so that a run that goes on encodes nothing again."""
    seq_parallel_size: int = -1
    """Ranks that share a sequence under torchrun; -1 for all."""
    device: str = "auto"
    """Where the model runs; auto is this process's GPU, or the CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision; auto is bfloat16 on a GPU and float32 on a CPU."""


def quieten_loading() -> None:
    """Keep transformers' bar of loaded weights out of files that standard error goes to."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def check(options: Any) -> None:
    """Refuse options that would fail later, before anything is loaded.

    Args:
        options: `Measuring` with ``out``.

    Raises:
        LongVILAError: If one is wrong.
    """
    if options.chunk_tokens < 1:
        raise LongVILAError(f"--chunk-tokens must be at least 1, got {options.chunk_tokens}")
    check_run(options)


def check_run(options: Any) -> None:
    """Refuse a seed, a number of ranks, a device or a folder that will not do.

    Args:
        options: With ``seed``, ``seq_parallel_size``, ``device`` and ``out``.

    Raises:
        LongVILAError: If one is wrong.
    """
    if not 0 <= options.seed < 2**32:
        raise LongVILAError(f"--seed must be 0 to 2**32 - 1, got {options.seed}")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if options.seq_parallel_size != -1 and not 1 <= options.seq_parallel_size <= world:
        raise LongVILAError(
            f"--seq-parallel-size {options.seq_parallel_size}: {world} "
            f"process{'es' * (world > 1)} can share a sequence; torchrun starts more"
        )
    find_device(options.device)
    if options.out.exists() and not options.out.is_dir():
        raise LongVILAError(f"--out {options.out} is a file; give a folder")
    quieten_loading()


def shared(options: Measuring, mesh: Any) -> dict[str, Any]:
    """Return what is passed on to `longvila.evaluation.measure.measure_model`.

    Args:
        options: The command line.
        mesh: Ranks, or None.
    """
    return {
        "mesh": mesh,
        "chunk_tokens": options.chunk_tokens,
        "keep_rows": options.keep_rows,
        "past_limit": options.beyond_context,
        "progress": progress_line() if mesh is None or mesh.rank == 0 else None,
    }


def show(groups: Sequence[Any], out: Path, mesh: Any) -> None:
    """Print, on the first rank, what was measured and where the page is.

    Args:
        groups: The summary.
        out: The folder.
        mesh: Ranks, or None.
    """
    from longvila.evaluation.page import text_table

    if mesh is None or mesh.rank == 0:
        print(text_table(groups))
        print(f"\n{out / 'page.html'}")


def shipped() -> Path:
    """Return the folder of this package's pictures.

    Raises:
        LongVILAError: If this build has none.
    """
    folder = asset("needles")
    if folder is None:
        raise LongVILAError("this build of longvila has no pictures (longvila/assets)")
    return folder


def progress_line() -> Any:
    """Return a progress function that says on standard error what is done and left."""
    began = time.monotonic()
    told = -EVERY_S

    def tell(done: int, total: int, scene: Any) -> None:
        nonlocal told
        spent = time.monotonic() - began
        if spent - told < EVERY_S and done < total:
            return
        told = spent
        left = spent / done * (total - done)
        print(f"[{done}/{total}] {scene.id}  {lasting(spent)}, about {lasting(left)} left",
              file=sys.stderr)  # fmt: skip

    return tell


def lasting(seconds: float) -> str:
    """Return a time as one reads it: ``42 s``, ``12 min``, ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
