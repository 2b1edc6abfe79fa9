"""Train a model through one of the stages, on one device or many.

Examples:
    longvila train sft --model BASE --data sets.yaml --output OUT
    longvila train extend-64k --model OUT --data text.yaml --output OUT64K --set max_steps=10
    longvila train long-sft-256 --model OUT64K --data sets.yaml --output LONG --config mine.yaml
    longvila train align --show > align.yaml
    torchrun --nproc-per-node 8 -m longvila.cli.train sft --model BASE --data sets.yaml --output OUT

Alone, it starts one process for each GPU of this machine (on a machine without any, as many as
--ranks says). Under torchrun, Slurm's or another launcher that sets RANK and WORLD_SIZE it is one
of the processes. Settings come from the stage, then --config, then --set, the last one winning.
The same command again goes on from the newest save; a finished output is left alone. SIGTERM ends
the step, saves and ends with status 143.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from longvila.cli._options import parse
from longvila.errors import LongVILAError

if TYPE_CHECKING:
    from longvila.train.stages import Stage


@dataclass(frozen=True)
class Options:
    """Train a model through one of the stages, on one device or many."""

    stage: tyro.conf.Positional[str]
    """Name of the stage: align, pretrain, sft, extend-64k, long-sft-256, ..."""
    model: str | None = None
    """Folder or hub name of the model to begin from."""
    data: Path | None = None
    """YAML file that lists datasets and mixtures."""
    output: Path | None = None
    """Folder of the result; begun again, the command goes on there."""
    config: Path | None = None
    """YAML file of settings laid over the stage's; it may say less than everything."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")
    ] = ()
    """A setting, by its path or its last name; may be given many times."""
    ranks: int | None = None
    """Processes to start; all GPUs, or one on a machine without any, if not given."""
    gpus: int | None = None
    """The same, where GPUs are meant: an error if there are fewer."""
    stop_after: int | None = None
    """Save and end after so many steps."""
    show: bool = False
    """Print the settings that would run, as YAML, and end."""


def settings_of(options: Options) -> Stage:
    """Return the stage with the file's settings and the overrides laid over it."""
    from longvila.train.settings import overlay, override, read_yaml
    from longvila.train.stages import get_stage

    stage = get_stage(options.stage)
    if options.config is not None:
        stage = overlay(stage, read_yaml(options.config), where=str(options.config))
    return override(stage, options.set)


def processes(options: Options) -> int:
    """Return how many processes to start on this machine.

    Raises:
        LongVILAError: If more GPUs are asked for than there are.
    """
    import torch

    found = torch.cuda.device_count()
    wanted = options.gpus if options.gpus is not None else options.ranks
    if wanted is None:
        return max(found, 1)
    if wanted < 1 or (options.gpus is not None and options.ranks is not None):
        raise LongVILAError("give either --gpus or --ranks, at least 1")
    if (options.gpus is not None or found) and wanted > found:
        raise LongVILAError(f"{wanted} GPUs are asked for, this machine has {found}")
    return wanted


def check_files(model: str, data: Path, stage: Stage) -> None:
    """Find out that a file is missing or wrong before weights are loaded.

    Raises:
        LongVILAError: If the model is no checkpoint, or one in the original's layout, or the
            mixture names what the file has not.
        ValueError: If the file of datasets cannot be read.
    """
    from longvila.model.source import check_source
    from longvila.model.vila.layout import is_vila
    from longvila.train.stages import open_mixture

    open_mixture(data, stage)
    check_source(model, label="--model")
    if is_vila(model):
        raise LongVILAError(
            f"--model {model}: is in the original's layout; first: longvila convert {model} "
            "CONVERTED"
        )


def main(argv: list[str]) -> int:
    """Run ``longvila train``."""
    from longvila.train.launch import TERMINATED, end_with_parent, launch

    if "RANK" in os.environ:
        # Before all that takes long to import: a launcher that is gone by then cannot be missed.
        end_with_parent()
    options = parse(Options, argv, "train", __doc__)
    stage = settings_of(options)
    if options.show:
        from longvila.train.settings import to_yaml

        print(to_yaml(stage), end="")
        return 0
    if options.model is None or options.data is None or options.output is None:
        raise LongVILAError("--model, --data and --output are needed (or --show)")
    if options.stop_after is not None and options.stop_after < 1:
        raise LongVILAError(f"--stop-after must be at least 1, got {options.stop_after}")
    if "RANK" not in os.environ:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1":
            raise LongVILAError(
                f"srun started {tasks} tasks of this and gave none a RANK: each would train on its "
                "own. Start one task a node, of torchrun, or set RANK, LOCAL_RANK and WORLD_SIZE "
                "from SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS, and MASTER_ADDR and MASTER_PORT"
            )
        check_files(options.model, options.data, stage)
        number = processes(options)
        if number > 1:
            return launch(number, "longvila.cli.train", argv)
    from longvila.train.run import Job, train

    job = Job(
        stage=stage,
        model=options.model,
        data=options.data,
        output=options.output,
        stop_after=options.stop_after,
    )
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    progress = train(job)
    return TERMINATED if progress is not None and progress.terminated else 0


if __name__ == "__main__":
    from longvila.cli.main import main as command

    sys.exit(command(["train", *sys.argv[1:]]))
