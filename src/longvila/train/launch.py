"""Processes of a run on one machine: started together, stopped together, never left behind.

    longvila train            this process: torchrun's agent, in process
      rank 0, rank 1, ...     the same command again, with RANK and WORLD_SIZE set

1. **A rank that fails** ends the run. The agent stops the others; which rank it was, and how it
   ended, is said. What the rank itself knows (its place on the mesh, the step) it has logged.
2. **SIGTERM** to the command, as Slurm sends it before it takes a machine away, goes on to the
   ranks and to nobody else: they finish the step, save, and end. The agent would kill them after
   half a minute, which a long step does not keep to, so it is told to leave that signal alone.
   **Ctrl-C** ends the ranks at once; what was saved stays.
3. **SIGKILL** of the command leaves nobody to stop the ranks, which run in sessions of their own.
   Each watches the process that began it and ends when that is gone (`end_with_parent`), so that a
   run which is begun again does not meet its own ghost. The command tells them its number: a rank
   that is still importing when the command is killed knows that somebody else adopted it.

Under another launcher (torchrun itself, Slurm's) the first and second are that launcher's: with
torchrun give ``--shutdown-timeout`` the time that a step and a save take.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from longvila.errors import RankError
from longvila.log import get_logger

_LOG = get_logger(__name__)
#: Exit status of a run that SIGTERM ended: it has saved, and the same command goes on.
TERMINATED = 128 + signal.SIGTERM
_LOOK_EVERY_S = 0.5
#: Environment variable in which `launch` tells its ranks which process started them.
_STARTED_BY = "LONGVILA_TRAIN_STARTED_BY"


def launch(number: int, module: str, argv: Sequence[str]) -> int:
    """Run a module in several processes of this machine.

    Args:
        number: Processes.
        module: What ``python -m`` runs.
        argv: Its arguments.

    Returns:
        The exit status: 0, or `TERMINATED`.

    Raises:
        RankError: If a rank fails; says which, and how it ended.
        KeyboardInterrupt: On Ctrl-C, once the ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    arguments = parse_args(
        [
            "--standalone", f"--nproc-per-node={number}",
            "--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", "-m", module, *argv,
        ]
    )  # fmt: skip
    with _sigterm_to_ranks(module) as terminated, _number_told():
        try:
            run(arguments)
        except ChildFailedError as fault:
            if not terminated:
                raise RankError(_describe(fault)) from fault
        except SignalException as fault:
            if fault.sigval != signal.SIGINT:
                raise
            raise KeyboardInterrupt from fault
    return TERMINATED if terminated else 0


def _describe(fault: object) -> str:
    said = []
    for rank, failure in sorted(getattr(fault, "failures", {}).items()):
        how = f"exit status {failure.exitcode}"
        if failure.exitcode < 0:
            how = f"killed by {signal.Signals(-failure.exitcode).name}"
            if failure.exitcode == -signal.SIGKILL:
                how += ", perhaps for want of memory"
        said.append(f"rank {rank} (process {failure.pid}): {how}")
    return (
        f"the run was ended by {'; '.join(said)}. Its own message stands above, with its place on "
        "the mesh; saves are whole, and the same command goes on from the newest"
    )


@contextmanager
def _sigterm_to_ranks(module: str) -> Iterator[list[int]]:
    """Pass SIGTERM on to the ranks; the list is not empty once it came."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        import psutil

        came.append(number)
        for child in psutil.Process().children():
            try:
                if module in child.cmdline():
                    child.send_signal(number)
            except psutil.NoSuchProcess:
                _LOG.debug("process %d ended by itself", child.pid)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _number_told() -> Iterator[None]:
    """Have the processes that are started here know which one started them."""
    os.environ[_STARTED_BY] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_STARTED_BY, None)


def end_with_parent() -> None:
    """End this process, at once and whatever it does, when the one that started it is gone.

    That is the process that `launch` ran in, also where it was gone before this was called; under
    another launcher, the parent that this process has now, so it is called first of all: who was
    gone before it is not missed.
    """
    parent = int(os.environ.get(_STARTED_BY, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        # Not through logging, whose locks another thread may hold for ever.
        sys.stderr.write(f"process {os.getpid()}: who started this rank is gone; ending\n")
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
