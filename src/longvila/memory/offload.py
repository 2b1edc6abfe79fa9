"""Move tensors to the host between forward and backward, behind the computation.

What a checkpointed layer keeps (its input, and attention's output) is small a layer and large over
all of them: at a million tokens more than a GPU holds. It is not needed again until the backward
pass reaches the layer, so it can wait on the host.

On a GPU:

1. ``Region.put`` hands in a tensor. It stays where it is until ``keep_last`` further regions
   (layers) have begun, so the last ones, which the backward pass wants first, never move.
2. Then a copy to pinned memory is queued on a side stream, behind the work that makes the tensor.
   The GPU memory is released when the copy has finished; at most ``MAX_IN_FLIGHT`` copies may be
   unfinished before the computation is made to wait for the oldest.
3. ``Stored.fetch`` of one region also queues the copies back of the region before it, on another
   side stream, so that they run under the backward of this one.
4. A tensor that no longer fits the byte budget stays on the GPU. Budgets fill from the front, so
   what stays is what is wanted first.

A tensor that several operations of a layer save is moved once, and comes back once.

The host never waits for the device. Pinned buffers have the size of their tensor (torch's own would
be rounded up to a power of two) and are reused from step to step. On the CPU the same calls copy at
once; it saves nothing there and exists so that every path is tested.

What it does not do: compress, or move what the backward pass of a layer creates and uses at once.
"""

from __future__ import annotations

import collections
import mmap
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

#: Copies to the host that may be unfinished before the computation waits for the oldest.
MAX_IN_FLIGHT = 4


@dataclass
class _Buffer:
    """Host memory for one tensor, with the copy that last used it."""

    data: Tensor
    last_use: torch.cuda.Event | None = None


def host_memory(num_bytes: int, *, pinned: bool) -> Tensor:
    """Return host memory of exactly this size, locked for copies if a GPU uses it.

    Args:
        num_bytes: Size, at least 1.
        pinned: Whether the pages are locked and known to CUDA.

    Returns:
        ``(num_bytes,)`` uint8, page-aligned.

    Raises:
        RuntimeError: If CUDA refuses to lock the pages, for lack of memory as a rule.
    """
    # A mapping of its own, since two registered buffers must not share a page.
    pages = mmap.mmap(-1, num_bytes)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if pinned:
        address, cudart = memory.data_ptr(), torch.cuda.cudart()
        status = cudart.cudaHostRegister(address, num_bytes, 0)
        if int(status) != 0:
            raise RuntimeError(
                f"CUDA cannot lock {num_bytes / 2**30:.2f} GiB of host memory (error {status}); "
                "lower the budget of the offload, or raise the limit of locked memory"
            )
        # Runs before the pages are given back.
        weakref.finalize(pages, cudart.cudaHostUnregister, address).atexit = False
    return memory


class Offload:
    """A host budget and the traffic to and from it; one for a training run.

    Args:
        budget_bytes: Host memory that may be used.
        keep_last: Regions (layers) whose tensors stay on the device.
        min_bytes: Tensors smaller than this stay on the device.

    Raises:
        ValueError: If an argument is negative.

    Memory:
        Up to ``budget_bytes`` of pinned host memory; on the GPU the tensors of ``keep_last``
        regions, of the region about to run backward, and of copies in flight.
    """

    def __init__(self, *, budget_bytes: int, keep_last: int = 1, min_bytes: int = 1 << 20) -> None:
        if min(budget_bytes, keep_last, min_bytes) < 0:
            raise ValueError(
                "budget_bytes, keep_last and min_bytes must not be negative, got "
                f"{budget_bytes}, {keep_last}, {min_bytes}"
            )
        self.budget_bytes, self.keep_last, self.min_bytes = budget_bytes, keep_last, min_bytes
        self.used_bytes = 0
        """Host memory in use now."""
        self.peak_bytes = 0
        """The most host memory in use so far."""
        self.moved_bytes = 0
        """Bytes copied to the host so far."""
        self.returned_bytes = 0
        """Bytes copied back so far."""
        self._free: dict[int, list[_Buffer]] = collections.defaultdict(list)
        self._waiting: collections.deque[weakref.ref[Region]] = collections.deque()
        self._in_flight: collections.deque[tuple[Stored, torch.cuda.Event]] = collections.deque()
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}
        self._last_region: weakref.ref[Region] | None = None

    def region(self) -> Region:
        """Begin the next layer: all but the last ``keep_last`` start to move."""
        region = Region(self, None if self._last_region is None else self._last_region())
        self._last_region = weakref.ref(region)
        self._waiting.append(self._last_region)
        while len(self._waiting) > self.keep_last:
            earlier = self._waiting.popleft()()
            if earlier is not None:
                earlier.begin_moving()
        return region

    def reserve(self, num_bytes: int, number: int, *, pinned: bool) -> None:
        """Lock memory for tensors of one size now, rather than in the first step that moves them.

        Locking goes at a few GiB a second, which a first step can be too short to hide. It may run
        in a thread of its own, while a model is built, say.

        Args:
            num_bytes: Size of a tensor.
            number: Tensors of that size that will wait at a time; fewer where the budget ends.
            pinned: As for `host_memory`.
        """
        for _ in range(min(number, self.budget_bytes // max(num_bytes, 1))):
            self._free[num_bytes].append(_Buffer(host_memory(num_bytes, pinned=pinned)))

    def _take_buffer(self, tensor: Tensor) -> _Buffer | None:
        """Return host memory for a tensor, or None if the budget is spent."""
        size = tensor.nbytes
        if self.used_bytes + size > self.budget_bytes:
            return None
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        if self._free[size]:
            return self._free[size].pop()
        self._trim()
        return _Buffer(host_memory(size, pinned=tensor.is_cuda))

    def _trim(self) -> None:
        """Drop idle buffers until idle and used ones together keep to the budget.

        The smallest first, which are the quickest to lock again.
        """
        idle = sum(length * len(buffers) for length, buffers in list(self._free.items()))
        for length, buffers in sorted(self._free.items()):
            while buffers and self.used_bytes + idle > self.budget_bytes:
                buffers.pop()
                idle -= length

    def _give_buffer(self, buffer: _Buffer) -> None:
        self.used_bytes -= buffer.data.nbytes
        self._free[buffer.data.nbytes].append(buffer)

    def _side_streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            self._streams[device] = (torch.cuda.Stream(device), torch.cuda.Stream(device))
        return self._streams[device]

    def _release(self, limit: int) -> None:
        """Let go of the device memory of finished copies, and of all but ``limit`` others."""
        while self._in_flight:
            stored, done = self._in_flight[0]
            if not done.query():
                if len(self._in_flight) <= limit:
                    return
                # Memory freed now is handed to later work of this stream only.
                torch.cuda.current_stream(stored.device).wait_event(done)
            self._in_flight.popleft()
            stored.tensor = None

    def _withdraw(self, stored: Stored) -> torch.cuda.Event | None:
        """Stop waiting for a copy whose tensor is wanted back before it finished."""
        for entry in self._in_flight:
            if entry[0] is stored:
                self._in_flight.remove(entry)
                return entry[1]
        return None


class Region:
    """The tensors of one layer, which move together."""

    def __init__(self, offload: Offload, previous: Region | None) -> None:
        self.offload = offload
        self.previous = None if previous is None else weakref.ref(previous)
        self.stored: list[weakref.ref[Stored]] = []
        self._known: dict[tuple[object, ...], weakref.ref[Stored]] = {}
        self._moving = False

    def put(self, tensor: Tensor) -> Stored:
        """Hand in a tensor; the caller lets go of it."""
        key = (
            tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape,
            tensor.stride(), tensor.dtype, tensor._version,
        )  # fmt: skip
        known = self._known[key]() if key in self._known else None
        # Whoever still holds its tensor holds the address too: nothing else can have it.
        if known is not None and known.tensor is not None and tensor.nbytes:
            known.uses += 1
            return known
        stored = Stored(self, tensor.detach())
        self._known[key] = weakref.ref(stored)
        if tensor.nbytes >= max(self.offload.min_bytes, 1) and not isinstance(
            tensor, torch.nn.Parameter
        ):
            self.stored.append(weakref.ref(stored))
            if self._moving:
                stored.move()
        return stored

    def begin_moving(self) -> None:
        """Queue the copies to the host."""
        self._moving = True
        for stored in self._alive():
            stored.move()

    def begin_returning(self) -> None:
        """Queue the copies back of what has not been fetched yet."""
        for stored in self._alive():
            if not stored.fetched:
                stored.begin_return()

    def _alive(self) -> list[Stored]:
        return [stored for ref in self.stored if (stored := ref()) is not None]


class Stored:
    """One tensor, here or on the host."""

    def __init__(self, region: Region, tensor: Tensor) -> None:
        self.region = region
        self.device = tensor.device
        self.tensor: Tensor | None = tensor
        self.uses = 1
        self.fetched = False
        self._meta = torch.empty_like(tensor, device="meta")
        self._buffer: _Buffer | None = None
        self._returning: torch.cuda.Event | None = None

    def move(self) -> None:
        """Queue the copy to the host, if the budget allows it."""
        offload, tensor = self.region.offload, self.tensor
        if tensor is None or self._buffer is not None:
            return
        buffer = offload._take_buffer(tensor)
        if buffer is None:
            return
        self._buffer = buffer
        weakref.finalize(self, offload._give_buffer, buffer).atexit = False
        offload.moved_bytes += tensor.nbytes
        target = self._view(buffer)
        if self.device.type != "cuda":
            target.copy_(tensor)
            self.tensor = None
            return
        down, _ = offload._side_streams(self.device)
        if buffer.last_use is not None:
            down.wait_event(buffer.last_use)
        down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(down):
            target.copy_(tensor, non_blocking=True)
        buffer.last_use = done = torch.cuda.Event()
        done.record(down)
        offload._in_flight.append((self, done))
        offload._release(MAX_IN_FLIGHT)

    def begin_return(self) -> None:
        """Queue the copy back, unless the tensor is still here."""
        if self.tensor is not None or self._buffer is None:
            return
        # Allocated by the stream that will use it, and so reusable by it later.
        self.tensor = torch.empty_like(self._meta, device=self.device)
        self.region.offload.returned_bytes += self.tensor.nbytes
        source = self._view(self._buffer)
        if self.device.type != "cuda":
            self.tensor.copy_(source)
            return
        _, up = self.region.offload._side_streams(self.device)
        # Not record_stream: a host that runs ahead would find no block free. Whoever fetches it
        # waits for the copy first, and so does __del__.
        # The memory may still be read by work queued before it was allocated; and the copy down
        # may not have finished.
        up.wait_stream(torch.cuda.current_stream(self.device))
        if self._buffer.last_use is not None:
            up.wait_event(self._buffer.last_use)
        with torch.cuda.stream(up):
            self.tensor.copy_(source, non_blocking=True)
        self._buffer.last_use = self._returning = torch.cuda.Event()
        self._returning.record(up)

    def fetch(self) -> Tensor:
        """Return the tensor, on its device; its neighbours of the region before follow.

        It stays on the device until it was fetched as often as it was handed in. May be called
        more often; what is on the host is then copied once more.
        """
        # The backward pass has begun: no more copies down, so what they still hold is let go of.
        self.region.offload._release(0)
        self.region.begin_returning()
        before = None if self.region.previous is None else self.region.previous()
        if before is not None:
            before.begin_returning()
        self.begin_return()
        tensor = self.tensor
        assert tensor is not None
        if self._buffer is None:
            return tensor  # never moved
        arrived = self._returning or self.region.offload._withdraw(self)
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        self.fetched = True
        self.uses -= 1
        if self.uses <= 0:
            self._returning = self.tensor = None  # the caller owns it now
        return tensor

    def __del__(self) -> None:
        """Let nothing take the memory of a copy under way that nobody fetched."""
        if self._returning is not None and self.tensor is not None:
            torch.cuda.current_stream(self.device).wait_event(self._returning)

    def _view(self, buffer: _Buffer) -> Tensor:
        meta = self._meta
        return buffer.data.view(meta.dtype).as_strided(meta.shape, meta.stride())
