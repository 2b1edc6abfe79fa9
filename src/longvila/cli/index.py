"""Read a video once and keep what was read, for any number of questions later.

Examples:
    longvila index film.mp4 --output film.index --model CHECKPOINT --frames 2048
    longvila index film.mp4 --output film.index --model CHECKPOINT --frames 6000 --gpus 8
    longvila ask film.index "What happens at 00:12?"

The folder holds the keys and values of the text model, a file for each GPU that read, and is read
by any number of them. Asking checks that model, file and frames are those it was made with.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from longvila.cli import ask
from longvila.cli._options import ReadingOptions, parse
from longvila.errors import LongVILAError

if TYPE_CHECKING:
    from longvila.inference.workers import Ranks


@dataclass(frozen=True)
class Options(ReadingOptions):
    """Read a video once and keep what was read."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MEDIUM...")]
    """Videos and images in the order they are shown."""
    output: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace a stored prompt that is there."""


def main(argv: list[str]) -> int:
    """Run the verb.

    Args:
        argv: Arguments after the verb.

    Returns:
        The exit status.
    """
    options = parse(Options, argv, "index", __doc__, flag_pairs=False)
    if not options.inputs:
        raise LongVILAError("there is nothing to read: longvila index VIDEO --output DIR")
    ask.check_numbers(options)
    device = ask.find_device(options.device, gpus=options.gpus)
    return ask.run_over_ranks(run, options, size=options.gpus, device=device)


def check_output(options: Options) -> None:
    """Refuse a folder that cannot be written.

    Args:
        options: With ``output`` and ``overwrite``.

    Raises:
        StoreError: If it holds a stored prompt, or is none and cannot become one.
    """
    from longvila.inference.store import StoreError, is_stored

    output = options.output
    if is_stored(output) and not options.overwrite:
        raise StoreError(f"{output} holds a stored prompt already; give --overwrite")
    there = next(each for each in (output, *output.absolute().parents) if each.exists())
    if not there.is_dir():
        raise StoreError(f"--output {output}: {there} is a file; a stored prompt is a folder")
    if not os.access(there, os.W_OK):
        raise StoreError(f"--output {output}: {there} cannot be written to")


def run(ranks: Ranks, options: Options) -> int:
    """Read and write on one rank.

    Args:
        ranks: This process among those that share the work.
        options: The options.

    Returns:
        The exit status.
    """
    from longvila.inference.session import Session

    check_output(options)  # hours of reading come before the first byte is written
    with ask.progress_bars(quiet=not ranks.is_first) as progress:
        session = Session(*ask.open_engine(options, ranks), progress=progress)
        media = ranks.together(lambda: ask.load(session, list(options.inputs), options))
        timings = session.watch(media)
        model = options.model
        if model is not None and Path(model).is_dir():
            model = str(Path(model).resolve())  # to be found from anywhere
        note = {"model": model}
        session.save(options.output, note=note, overwrite=options.overwrite)
    if ranks.is_first:
        written = sum(file.stat().st_size for file in options.output.iterdir())
        print(
            f"[{timings.prompt_tokens} tokens, {written / 2**20:.1f} MiB in {options.output}; "
            f"decode {timings.decode_s:.2f} s; vision {timings.vision_s:.2f} s; "
            f"prefill {timings.prefill_s:.2f} s]",
            file=sys.stderr,
        )
    return 0
