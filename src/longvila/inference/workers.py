"""The ranks of one command: processes of its own, or those that a launcher started.

``ranks(4)`` makes this process the first of four ranks and starts the three others, which run the
same function with the same arguments. The first rank keeps what belongs to the user: standard
input, output, signals. Under ``torchrun`` the ranks are there already.

A rank that fails would leave the others waiting in a collective for ever. So the first process
watches the ones it started: when one dies, the others are ended, its message is printed, and the
command ends. When all fail alike (a prompt that is too long), the first one's own error is the one
that is seen. The others end with the first one, however it ends and whatever they wait for.

It starts processes of this machine only; several machines are `torchrun`'s.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from longvila.errors import LongVILAError
from longvila.inference.together import together
from longvila.sp.mesh import SPMesh, build_mesh

log = logging.getLogger(__name__)

#: How long the first rank may take to fail by itself after another one did.
_GRACE_S = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a command.

    Attributes:
        rank: Which one; the first talks to the user.
        size: How many there are.
        device: Where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that talks to the user."""
        return self.rank == 0

    def mesh(self, config: Any) -> SPMesh | None:
        """Return a mesh on which all ranks share a sequence.

        Args:
            config: Configuration of a text model, for its heads.

        Comm: Creates process groups.
        """
        if self.size == 1:
            return None
        return build_mesh(
            self.size,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None),
            device_type=self.device.type,
        )

    def share(self, value: Any) -> Any:
        """Return the first rank's value on every rank.

        Comm: One broadcast of an object.
        """
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank.

        Comm: One all-gather of an object.
        """
        found: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def together(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank, and raise on all of them if it fails on one.

        Args:
            work: What to do; must not communicate.

        Raises:
            RankError: Where it worked, if it failed elsewhere.

        Comm: One all-gather of error messages.
        """
        return work() if self.size == 1 else together(work)


def launched() -> bool:
    """Whether a launcher started several ranks of this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _device(kind: str, rank: int) -> torch.device:
    if kind != "cuda":
        return torch.device(kind)
    if rank >= torch.cuda.device_count():
        raise LongVILAError(
            f"there is no GPU {rank}: this machine has {torch.cuda.device_count()}; ask for fewer"
        )
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def leave_ranks() -> None:
    """Destroy the default process group, and before it what it would wait for.

    Comm: Waits for all ranks.
    """
    steps = sys.modules.get("longvila.inference.static_step")
    if steps is not None:  # else nothing can have been captured
        steps.release_graphs()
    dist.destroy_process_group()


def run_over_ranks(
    work: Callable[[Ranks, Any], int], argument: Any, *, size: int, device: str
) -> int:
    """Run a function on every rank; this process is the first, or what its launcher says.

    Args:
        work: A function of a module; given this rank and the argument; returns a status.
        argument: Must be picklable.
        size: Ranks to be; not looked at under a launcher.
        device: Type of device, and for one rank perhaps its number.

    Returns:
        The status of this rank.

    Raises:
        LongVILAError: If there are not so many GPUs.

    Comm: Creates and ends the default process group.
    """
    if launched():
        rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        place = _device(device.partition(":")[0], int(os.environ.get("LOCAL_RANK", rank)))
        dist.init_process_group(_backend(place))
        status = work(Ranks(rank, size, place), argument)
        leave_ranks()  # not after an error, whose ranks may be in a collective
        return status
    if size == 1:
        return work(Ranks(0, 1, torch.device(device)), argument)
    kind = device.partition(":")[0]
    if kind == "cuda" and size > torch.cuda.device_count():
        _device(kind, size - 1)
    with _others(work, argument, size, kind) as store:
        place = _device(kind, 0)
        dist.init_process_group(_backend(place), store=store, rank=0, world_size=size)
        status = work(Ranks(0, size, place), argument)
        leave_ranks()
    return status


def _worker(
    work: Callable[[Ranks, Any], int],
    argument: Any,
    rank: int,
    size: int,
    kind: str,
    port: int,
    pipe: Connection,
) -> None:
    # Progress and streams are the first rank's.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    threading.Thread(target=_end_with_first, name="longvila-first", daemon=True).start()
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
        place = _device(kind, rank)
        dist.init_process_group(_backend(place), store=store, rank=rank, world_size=size)
        work(Ranks(rank, size, place), argument)
        leave_ranks()
    except BaseException as error:
        message = str(error) if isinstance(error, LongVILAError) else traceback.format_exc()
        with contextlib.suppress(BrokenPipeError):  # the first has ended; nobody is to be told
            pipe.send("interrupted" if isinstance(error, KeyboardInterrupt) else message)
            pipe.close()
        # Not through the interpreter's exit, which may wait for a collective.
        os._exit(1)


def _end_with_first() -> None:
    """End this process as soon as the one that started it has ended.

    A signal may end it at any time; whoever then waits for it in a store or a collective would do
    so for minutes.
    """
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _start(process: Any) -> None:
    """Start a process that takes no notice of Ctrl-C before it works.

    While it imports, the first rank waits for it where Python does not run: an end there would be
    an end of the command with a traceback.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _others(
    work: Callable[[Ranks, Any], int], argument: Any, size: int, kind: str
) -> Iterator[dist.TCPStore]:
    """Start the other ranks, watch them, and end them."""
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes, pipes = [], []
    for rank in range(1, size):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (work, argument, rank, size, kind, store.port, theirs)
        process = context.Process(target=_worker, args=arguments, daemon=True)
        _start(process)
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    closing = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(processes, pipes, closing), name="longvila-ranks", daemon=True
    )
    watcher.start()
    try:
        yield store
    except BaseException:
        closing.set()
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join()
        closing.set()


def _last_words(pipe: Connection, status: int) -> str:
    """What a rank said before it ended, or how it ended if it could not."""
    try:
        if pipe.poll():
            return str(pipe.recv())
    except EOFError:  # killed: its end of the pipe is closed, and nothing was written
        log.debug("a rank ended without a word")
    if status == -signal.SIGKILL:
        return "was killed; the system does that when the machine's memory runs out"
    return f"ended with status {status}"


def _watch(processes: list[Any], pipes: list[Connection], closing: threading.Event) -> None:
    """End the command when a rank died and the first one does not notice."""
    left = {process.sentinel: number for number, process in enumerate(processes)}
    while left and not closing.is_set():
        for sentinel in wait(list(left), timeout=0.5):
            number = left.pop(sentinel)  # type: ignore[arg-type]
            if processes[number].exitcode == 0:
                continue
            if closing.wait(_GRACE_S):
                return
            message = _last_words(pipes[number], processes[number].exitcode)
            for process in processes:
                process.kill()
            end_line = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hid the cursor
            sys.stderr.write(f"{end_line}longvila: rank {number + 1}: {message}\n")
            sys.stderr.flush()
            os._exit(1)
