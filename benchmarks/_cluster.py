"""The processes of one measurement: ranks, device, clocks, and agreement between ranks.

Started by ``torchrun`` (one process a device) or alone (one process). On CUDA the ranks talk NCCL
and time with events; on the CPU they talk gloo and read the host clock, so that the same file is
exercised in tests with tiny shapes.

``--emulate-hosts N`` deals the ranks, in order, to N groups with an ``NCCL_HOSTID`` each: NCCL then
believes that every group is another machine and takes sockets between them instead of NVLink and
shared memory. Without a number every rank is its own host.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

#: A collective that takes longer than this has lost a rank; better to stop than to burn a lease.
COLLECTIVE_TIMEOUT_S = int(os.environ.get("COLLECTIVE_TIMEOUT_S", "180"))


@dataclass(frozen=True)
class Cluster:
    """Who we are among the ranks of one measurement."""

    rank: int
    world_size: int
    device: torch.device
    hosts: int = 1

    @property
    def ranks_per_host(self) -> int:
        return self.world_size // self.hosts

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print from rank 0, at once."""
        if self.is_main:
            print(text, flush=True)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(device_ids=[self.device.index] if self.is_cuda else None)
        self.synchronize()

    def everywhere(self, values: list[float], op: str = "max") -> list[float]:
        """Reduce a list of numbers over ranks, so that every rank decides alike."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
        return tensor.tolist()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else 0

    def allocator(self) -> tuple[int, int]:
        """Bytes torch's allocator held at the most, and how often it had to give back and retry."""
        if not self.is_cuda:
            return 0, 0
        stats = torch.cuda.memory_stats(self.device)
        return torch.cuda.max_memory_reserved(self.device), stats.get("num_alloc_retries", 0)

    def reset_peak(self) -> int:
        """Forget the peak; return what is allocated now."""
        if not self.is_cuda:
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def add_hosts_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--emulate-hosts``, whose value is the number of hosts, 1 for the real one."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    parser.add_argument("--emulate-hosts", type=int, nargs="?", default=1, const=ranks)


def start(*, emulate_hosts: int = 1) -> Cluster:
    """Join the ranks that torchrun (or a test) set up; a lone process is a cluster of one."""
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return Cluster(rank, world_size, _device(rank), emulate_hosts)
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if emulate_hosts < 1 or world_size % emulate_hosts:
        raise ValueError(f"{world_size} ranks cannot be dealt to {emulate_hosts} hosts")
    if emulate_hosts > 1:
        host = rank * emulate_hosts // world_size
        os.environ["NCCL_HOSTID"] = f"emulated-{host}"
        os.environ.setdefault("NCCL_IB_DISABLE", "1")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            device_id=device if device.type == "cuda" else None,
        )
    return Cluster(rank, world_size, device, emulate_hosts)


def stop() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(*, emulate_hosts: int = 1) -> Iterator[Cluster]:
    """The ranks of one measurement, left at its end; after a failure without waiting for work."""
    cluster = start(emulate_hosts=emulate_hosts)
    try:
        yield cluster
        cluster.synchronize()
    finally:
        stop()


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")


class Stopwatch:
    """Marks in a stream of work; the times between them are read once, after the last.

    CUDA events are recorded into the stream, so marking never waits for the device.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cuda = cluster.is_cuda
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps_ms(self) -> list[float]:
        """Milliseconds between consecutive marks; waits for the last of them."""
        if self._cuda:
            self._marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self._marks, self._marks[1:], strict=False)]


def timed_ms(cluster: Cluster, function: Callable[[], Any], *, calls: int) -> float:
    """Mean milliseconds of a call over a run of calls, on the slowest rank."""
    cluster.barrier()
    watch = Stopwatch(cluster)
    watch.mark()
    for _ in range(calls):
        function()
    watch.mark()
    return cluster.everywhere([watch.laps_ms()[0] / calls])[0]
