"""Measure a model offline, with film and pictures out of Python packages.

Examples:
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
from typing import Any

from longvila.cli._measuring import Measuring, check, shared, shipped, show
from longvila.cli._options import parse
from longvila.errors import LongVILAError
from longvila.packaged import default_model, fetch

#: The part of the packaged film that the small model's training did not use, and its length.
HELD_OUT = (2 / 3, 1.0)
SMALL_LENGTHS = (16, 32)


@dataclass(frozen=True, kw_only=True)
class Options(Measuring):
    """Measure a model offline, with film and pictures out of Python packages."""

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
    small: bool = False
    """A film drawn in code, the shipped pictures, two short lengths: to try it out."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "bench", __doc__)
    from longvila.cli.needle import load
    from longvila.evaluation.builtin import check_bench, run_bench
    from longvila.evaluation.needle_sets import check_haystack

    check(options)
    plan = plan_of(options)
    pictures = pictures_of(options)
    check_bench(plan, pictures)
    if options.film is not None:
        check_haystack(options.film, part=options.part or (0.0, 1.0))
    source = options.model or str(default_model())
    model, processor, mesh = load(source, options)
    material = material_of(options, plan, processor, pictures)
    groups = run_bench(
        model, processor, plan, material, out=options.out, name=Path(source).name,
        **shared(options, mesh),
    )  # fmt: skip
    show(groups, options.out, mesh)
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
    if options.captions < 0 or options.per_tier < 1:
        raise LongVILAError(
            f"--captions must be 0 or more and --per-tier 1 or more, got {options.captions} and "
            f"{options.per_tier}"
        )
    return BenchPlan(
        lengths=lengths,
        trials=1 if options.small else options.trials,
        per_film=options.per_film,
        captions=min(options.captions, 6) if options.small else options.captions,
        control=options.control,
        seed=options.seed,
    )


def pictures_of(options: Options) -> list[Any]:
    """Fetch or read the pictures.

    Args:
        options: The command line.

    Raises:
        LongVILAError: If they cannot be had.
    """
    import numpy as np

    from longvila.evaluation.builtin import emoji_needles
    from longvila.evaluation.needle_sets import load_needles

    if options.small or options.pictures is not None:
        return load_needles(options.pictures or shipped())
    rng = np.random.default_rng(options.seed)
    return emoji_needles(fetch("openmoji-font"), per_tier=options.per_tier, rng=rng)


def material_of(options: Options, plan: Any, processor: Any, pictures: list[Any]) -> Any:
    """Fetch and open what is shown.

    Args:
        options: The command line.
        plan: How many frames are needed.
        processor: The model's.
        pictures: The drawings.

    Raises:
        LongVILAError: If a film cannot be had.
    """
    from longvila.evaluation.builtin import Material, load_events
    from longvila.evaluation.needle_sets import SYNTHETIC, open_haystack
    from longvila.inference.sight import sampler_of

    frames = max(plan.lengths)
    part = sampler_of(processor)
    if options.film == SYNTHETIC or (options.small and options.film is None):
        film = open_haystack(SYNTHETIC, num_frames=frames, fps=1.0, processor=part)
        return Material(film, 0.0, float(frames), pictures)
    packaged = options.film is None
    source = str(fetch("film-bbb")) if packaged else str(options.film)
    share = options.part or (HELD_OUT if packaged else (0.0, 1.0))
    film = open_haystack(source, num_frames=1, fps=1.0, processor=part, part=share)
    duration_s = film.duration_s
    start_s = share[0] / (share[1] - share[0]) * duration_s
    # So many frames a second that the part gives all that are needed; beyond the film's own rate
    # its frames repeat. Of pictures there are as many as there are.
    if film.reels[0].path.is_dir() and film.reels[0].num_frames < frames:
        raise LongVILAError(
            f"{source} has {film.reels[0].num_frames} pictures and {frames} frames are needed: "
            "measure fewer (--lengths), or bring more"
        )
    film = open_haystack(
        source, num_frames=frames, fps=(frames + 0.5) / duration_s, processor=part, part=share
    )
    events = load_events(start_s, start_s + duration_s) if packaged else []
    return Material(film, start_s, duration_s, pictures, events)


if __name__ == "__main__":
    from longvila.cli.main import main as command

    sys.exit(command(["bench", *sys.argv[1:]]))
