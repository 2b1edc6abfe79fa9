"""Measure a model offline, with film and pictures out of Python packages.

    longvila bench --model CHECKPOINT --out out/bench
    longvila bench --small                           # seconds on a CPU; film drawn in code
    longvila bench --film mine.mp4 --pictures mine/ --lengths 64 256
    torchrun --nproc-per-node 8 -m longvila.cli.bench --model CHECKPOINT

Retrieval, counting, ordering, temporal grounding and captions at 32 to 6,000 frames. The film and
the drawings are fetched with pip once and cached. Every answer is on disk as soon as it is given:
the same command goes on where it stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longvila.cli._options import parse
from longvila.errors import LongVILAError
from longvila.packaged import default_model, fetch

#: The part of the packaged film that the small model's training did not use, and its length.
HELD_OUT = (2 / 3, 1.0)
SMALL_LENGTHS = (16, 32)


@dataclass(frozen=True)
class Options:
    """Measure a model offline, with film and pictures out of Python packages."""

    model: str | None = None
    """Folder or hub id of the checkpoint; the small model of this package if absent."""
    out: Path = Path("out/bench")
    """Folder for answers and pages."""
    lengths: tuple[int, ...] = (32, 128, 512, 2048, 6000)
    """Numbers of frames."""
    film: str | None = None
    """A film, a folder of them, or "synthetic"; the packaged one if absent."""
    part: tuple[float, float] | None = None
    """Where the film begins and ends, as shares of it; what training did not use if absent."""
    pictures: str | None = None
    """Pictures with names, as for `longvila needle`; packaged drawings if absent."""
    per_tier: int = 120
    """Packaged drawings of each tier."""
    trials: int = 4
    """Films with pictures for each length and depth."""
    per_film: int = 4
    """Pictures in each."""
    captions: int = 40
    """Single pictures of each tier."""
    control: bool = True
    """Ask about films without pictures and grey ones, too."""
    small: bool = False
    """A film drawn in code, the shipped pictures, two short lengths: to try it out."""
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


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "bench", __doc__)
    from longvila.cli.needle import load, progress_line
    from longvila.evaluation.builtin import run_bench
    from longvila.evaluation.page import text_table

    plan = plan_of(options)
    if options.film not in (None, "synthetic") and not Path(options.film).exists():
        raise LongVILAError(f"--film {options.film}: no such file or folder")
    source = options.model or str(default_model())
    model, processor, mesh = load(source, options)
    material = material_of(options, plan, processor)
    first = mesh is None or mesh.rank == 0
    groups = run_bench(
        model, processor, plan, material, out=options.out, name=Path(source).name, mesh=mesh,
        chunk_tokens=options.chunk_tokens, keep_rows=options.keep_rows,
        past_limit=options.beyond_context,
        progress=progress_line() if first else None,
    )  # fmt: skip
    if first:
        print(text_table(groups))
        print(f"\n{options.out / 'page.html'}")
    return 0


def plan_of(options: Options) -> Any:
    """Return the plan that the options describe.

    Raises:
        LongVILAError: If lengths are not numbers of frames.
    """
    from longvila.evaluation.builtin import BenchPlan, check_lengths

    try:
        lengths = check_lengths(SMALL_LENGTHS if options.small else options.lengths)
    except ValueError as fault:
        raise LongVILAError(f"--lengths: {fault}") from fault
    return BenchPlan(
        lengths=lengths,
        trials=1 if options.small else options.trials,
        per_film=options.per_film,
        captions=min(options.captions, 6) if options.small else options.captions,
        control=options.control,
        seed=options.seed,
    )


def material_of(options: Options, plan: Any, processor: Any) -> Any:
    """Fetch and open what is shown.

    Args:
        options: The command line.
        plan: How many frames are needed.
        processor: The model's.

    Raises:
        LongVILAError: If a film or pictures cannot be had.
    """
    import numpy as np

    from longvila.cli.needle import shipped
    from longvila.evaluation.builtin import Material, emoji_needles, load_events
    from longvila.evaluation.needle_sets import SYNTHETIC, load_needles, open_haystack
    from longvila.inference.sight import sampler_of
    from longvila.media.video import open_video

    frames = max(plan.lengths)
    if options.small or options.pictures is not None:
        pictures = load_needles(options.pictures or shipped())
    else:
        pictures = emoji_needles(
            fetch("openmoji-font"), per_tier=options.per_tier,
            rng=np.random.default_rng(options.seed),
        )  # fmt: skip
    part = sampler_of(processor)
    if options.film == SYNTHETIC or (options.small and options.film is None):
        film = open_haystack(SYNTHETIC, num_frames=frames, fps=1.0, processor=part)
        return Material(film, 0.0, float(frames), pictures)
    packaged = options.film is None
    source = str(fetch("film-bbb")) if packaged else str(options.film)
    share = options.part or (HELD_OUT if packaged else (0.0, 1.0))
    if Path(source).is_dir():
        film = open_haystack(source, num_frames=frames, fps=1.0, processor=part, part=share)
        return Material(film, 0.0, float(frames), pictures)
    with open_video(source) as reader:
        length_s = reader.metadata.duration_s
    start_s, stop_s = (length_s * each for each in share)
    # So many frames a second that the part gives all that are needed; beyond the film's own rate
    # its frames repeat.
    film = open_haystack(
        source, num_frames=frames, fps=(frames + 0.5) / (stop_s - start_s), processor=part,
        part=share,
    )  # fmt: skip
    events = load_events(start_s, stop_s) if packaged else []
    return Material(film, start_s, stop_s - start_s, pictures, events)


if __name__ == "__main__":
    from longvila.cli.main import main as command

    sys.exit(command(["bench", *sys.argv[1:]]))
