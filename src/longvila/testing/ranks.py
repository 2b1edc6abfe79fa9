"""Run a function on several gloo processes, from a test or a script.

    @ranks(1, 2, 4)
    def test_sum(rank: Rank) -> None:
        x = torch.ones(3)
        torch.distributed.all_reduce(x)
        assert x[0] == rank.world_size

Each process is forked from a server that has torch loaded, and what the caller had loaded of this
package and of transformers' models when it first started ranks; so eight of them start in well
under a second. It inherits no threads of the caller. The ranks meet at a file, not a port. If one
rank fails, or none answers in time, all are ended and the error shows the traceback of every rank
that had one.

It does not emulate GPUs or links; the collectives are real, over shared memory.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import multiprocessing as mp
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longvila.errors import RankError

PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "numpy",
    "pytest",
    # Importing models costs seconds of CPU a process; forked ranks then have them for nothing.
    "longvila.parallel.apply",
    "longvila.testing.tiny",
    "longvila.model.processing_longvila",
    # What tiny models are made of, which transformers imports when the first one is built.
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.siglip.modeling_siglip",
)
#: What the ranks preload beside if the caller has it: a test's imports are its ranks' imports.
_SHARED = re.compile(r"longvila\.|transformers\.models\.\w+\.modeling_|hypothesis$|peft$")

#: How long the others may take to say what they saw, once one has failed.
_LAST_WORDS_S = 10.0


@dataclass(frozen=True)
class Rank:
    """What a function run by :func:`ranks` receives first."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class _Target:
    """A module-level function by file and name, so that no pickling of code objects is needed."""

    module: str
    file: str
    qualname: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> _Target:
        if "<locals>" in function.__qualname__:
            raise TypeError(
                f"{function.__qualname__} is defined inside a function; ranks can only run "
                "module-level functions, since other processes must be able to import them"
            )
        file = inspect.getsourcefile(function)
        if file is None:
            raise TypeError(f"{function.__qualname__} has no source file to import it from")
        return cls(function.__module__, file, function.__qualname__)

    def load(self) -> Callable[..., Any]:
        module = sys.modules.get(self.module)
        if module is None:
            try:
                module = importlib.import_module(self.module)
            except ModuleNotFoundError:
                spec = importlib.util.spec_from_file_location(self.module, self.file)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[self.module] = module
                spec.loader.exec_module(module)
        value: Any = module
        for part in self.qualname.split("."):
            value = getattr(value, part)
        return getattr(value, "_ranks_function", value)


def _worker(
    target: _Target,
    rank: int,
    world_size: int,
    rendezvous: str,
    timeout_s: float,
    path: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pipe: Connection,
) -> None:
    sys.path[:] = path
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        try:
            # A rank that ended at once would close connections that others are still making.
            dist.barrier()
            result = target.load()(Rank(rank, world_size), *args, **kwargs)
            pipe.send((True, result))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    except BaseException:  # reported in full by the parent
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()


def start_server() -> None:
    """Start the server of ranks, if this process has none, without waiting for it.

    The first `run_ranks` does so too. A process has one such server: where something else in it
    forks from one as well, whoever comes first decides what is preloaded.
    """
    _context()
    forkserver.ensure_running()


@functools.cache
def _context() -> Any:
    context = mp.get_context("forkserver")
    # The server passes over what it cannot import, such as models without transformers.
    loaded = sorted(name for name in list(sys.modules) if _SHARED.match(name))
    context.set_forkserver_preload([*PRELOAD, *loaded])
    return context


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 240.0,
    **kwargs: Any,
) -> list[Any]:
    """Run ``function(Rank, *args, **kwargs)`` on ``world_size`` gloo ranks.

    Args:
        function: A module-level function; it and its arguments must be importable and picklable.
        world_size: Number of processes.
        timeout_s: Seconds until all ranks are ended and an error is raised.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankError: If a rank raised, died or did not finish in time.
    """
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}")
    context = _context()
    target = _Target.of(function)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        rendezvous = str(Path(folder) / "store")
        processes, pipes = [], []
        for rank in range(world_size):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_worker,
                args=(
                    target, rank, world_size, rendezvous, timeout_s,
                    list(sys.path), args, kwargs, send,
                ),
                daemon=True,
            )  # fmt: skip
            process.start()
            send.close()
            processes.append(process)
            pipes.append(receive)
        try:
            return _collect(pipes, target.qualname, timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(timeout=2.0)
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: Sequence[Connection], name: str, timeout_s: float) -> list[Any]:
    """Wait for all ranks; once one has failed the others get a moment to say what they saw."""
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        remaining = deadline - time.monotonic()
        ready = wait(list(waiting), timeout=max(remaining, 0.0))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                succeeded, value = pipe.recv()
            except EOFError:
                succeeded, value = False, "the process ended without an answer (killed?)"
            if succeeded:
                results[rank] = value
            else:
                failures[rank] = value
                deadline = min(deadline, time.monotonic() + _LAST_WORDS_S)
    if failures or waiting:
        silent = sorted(waiting.values())
        lines = [f"{name} failed on {len(failures)} of {len(pipes)} ranks"]
        if silent:
            lines.append(f"no answer from ranks {silent} (limit {timeout_s:g} s)")
        lines += [f"--- rank {rank}\n{text}" for rank, text in sorted(failures.items())]
        raise RankError("\n".join(lines))
    return [results[rank] for rank in range(len(pipes))]


def ranks(*world_sizes: int, timeout_s: float = 240.0) -> Callable[[Callable[..., Any]], Any]:
    """Turn a module-level test function into one pytest case a world size.

    The function's first parameter receives a :class:`Rank`; further parameters come from
    ``pytest.mark.parametrize`` or fixtures and must be picklable.
    """
    import pytest

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def test(*args: Any, world_size: int, **kwargs: Any) -> None:
            run_ranks(test, world_size, *args, timeout_s=timeout_s, **kwargs)

        parameters = list(inspect.signature(function).parameters.values())[1:]
        own = inspect.Parameter("world_size", inspect.Parameter.KEYWORD_ONLY)
        test.__signature__ = inspect.Signature([*parameters, own])  # type: ignore[attr-defined]
        test._ranks_function = function  # type: ignore[attr-defined]
        del test.__wrapped__  # type: ignore[attr-defined]  # pytest would read its signature
        return pytest.mark.parametrize("world_size", world_sizes)(test)

    return decorate
