"""An engine over ranks for a caller that only one of them can hear.

What a server does next follows from what arrives at it, which the first rank alone sees. There a
`Leader` stands in for the `Engine`: before each call it tells the other ranks, and they make the
same call with the same arguments in `follow`::

    rank 0    scheduler -> Leader.prefill, read, fork, decode -> engine
                             | one broadcast: the call, numbers of caches, tensors
    others    follow:  wait -> the same call                  -> engine

Caches never travel. Each has a number, under which every rank keeps its own shard; the numbers of
those that the first rank has dropped go along with the next call.

An error of the arguments (a prompt that is too long, a frame that cannot be encoded) is raised on
all ranks alike, and the next call works. Any other error may have come on one rank only, in the
middle of a collective that the others wait in. Nothing can be computed after that: the leader
raises `RanksLostError`, now and ever after, and whoever runs the ranks has to end them.

Cost of a call: a broadcast through the host of what describes it, and of each larger tensor as it
lies in memory. Frames reach the other ranks that way, decoded by the first.
"""

from __future__ import annotations

import io
import itertools
import pickle
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longvila.errors import LongVILAError, RankError
from longvila.inference.cache import ShardedCache
from longvila.inference.engine import Engine

#: How long the ranks may wait for the next call; a server may be idle for days.
_PATIENCE = timedelta(days=365)
#: Raised on all ranks alike.
_COMMON = (ValueError, LongVILAError)


class RanksLostError(RankError):
    """The ranks are not at the same call any more; they have to be ended and started anew."""


@dataclass(frozen=True)
class _Call:
    """What all ranks do next; the name is empty at the end.

    Attributes:
        name: Method of the engine.
        cache: Number of the cache that it gets.
        result: Number of the cache that it returns.
        arguments: Its other arguments.
        dropped: Numbers of caches that are not needed any more.
    """

    name: str
    cache: int | None = None
    result: int | None = None
    arguments: tuple[Any, ...] = ()
    dropped: tuple[int, ...] = ()

    def perform(self, engine: Engine, cache: ShardedCache | None) -> Any:
        """Make the call on one rank."""
        if self.name in ("prefill", "read"):
            return getattr(engine, self.name)(*self.arguments, onto=cache)
        assert cache is not None
        if self.name == "fork":
            return engine.fork(cache, tokens=self.arguments[0])
        return engine.decode(cache, *self.arguments)


# ---- transport -------------------------------------------------------------------------------

#: Tensors of fewer bytes travel inside of the description.
_SMALL_BYTES = 4096


class _Packer(pickle.Pickler):
    """Leaves larger tensors out, with a note of type and shape in their place."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        """Return the note; None for what is written as it is."""
        if not isinstance(obj, Tensor) or obj.numel() * obj.element_size() < _SMALL_BYTES:
            return None
        self.tensors.append(obj.detach().cpu().contiguous())
        return obj.dtype, tuple(obj.shape)


class _Unpacker(pickle.Unpickler):
    """Makes room for the tensors that were left out, in their order."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Any:
        """Return a tensor that is still to be filled."""
        dtype, shape = pid
        self.tensors.append(torch.empty(shape, dtype=dtype))
        return self.tensors[-1]


def send(value: Any, group: Any) -> None:
    """Tell all ranks something from the first; see `receive`.

    Args:
        value: Anything that can be pickled.
        group: Of `control_group`.

    Comm: A broadcast of the description's length, of it, and of each larger tensor.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    data = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    for each in (torch.tensor([data.numel()]), data, *packer.tensors):
        dist.broadcast(each.flatten().view(torch.uint8), group=group, group_src=0)


def receive(group: Any) -> Any:
    """Return what the first rank sent.

    Args:
        group: Of `control_group`.

    Comm: As `send`.
    """
    length = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(length.view(torch.uint8), group=group, group_src=0)
    data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, group=group, group_src=0)
    unpacker = _Unpacker(io.BytesIO(data.numpy().tobytes()))
    value = unpacker.load()
    for each in unpacker.tensors:
        dist.broadcast(each.flatten().view(torch.uint8), group=group, group_src=0)
    return value


def control_group() -> Any:
    """Return the group through which calls are told.

    Comm: Creates a process group of all ranks.
    """
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


# ---- ranks -----------------------------------------------------------------------------------


class Leader:
    """Stands in for the engine on the first rank; used by one thread at a time.

    Args:
        engine: This rank's.
        group: Of `control_group`.
        on_lost: Called once when the ranks have lost each other.

    Attributes:
        lost: Why the ranks cannot go on; None while they can.
    """

    def __init__(
        self, engine: Engine, group: Any, on_lost: Callable[[], None] = lambda: None
    ) -> None:
        self.engine, self.group, self.on_lost = engine, group, on_lost
        self.model, self.text, self.family = engine.model, engine.text, engine.family
        self.context_length = engine.context_length
        self.lost: BaseException | None = None
        self._told_to_end = False
        self._counter = itertools.count()
        self._numbers: weakref.WeakKeyDictionary[ShardedCache, int] = weakref.WeakKeyDictionary()
        self._dropped: deque[int] = deque()

    @property
    def num_ranks(self) -> int:
        """Ranks that share a sequence."""
        return self.engine.num_ranks

    def prefill(
        self, inputs: Mapping[str, Any], *, onto: ShardedCache | None = None
    ) -> ShardedCache:
        """Read a prompt on all ranks; see `Engine.prefill`."""
        return self._cache("prefill", onto, dict(inputs))

    def read(self, batch: Mapping[str, Any], *, onto: ShardedCache | None = None) -> ShardedCache:
        """Read prepared inputs on all ranks; see `Engine.read`."""
        return self._cache("read", onto, dict(batch))

    def fork(self, cache: ShardedCache, *, tokens: int | None = None) -> ShardedCache:
        """Return a cache that begins alike, on all ranks; see `Engine.fork`."""
        call = _Call("fork", self._numbers[cache], next(self._counter), (tokens,))
        return self._keep(call, self._everywhere(call, cache))

    def decode(self, cache: ShardedCache, ids: Tensor) -> Tensor:
        """Read further tokens on all ranks; see `Engine.decode`."""
        logits: Tensor = self._everywhere(
            _Call("decode", self._numbers[cache], None, (ids,)), cache
        )
        return logits

    def close(self) -> None:
        """Let the other ranks return from `follow`; calling it again does nothing.

        Comm: One broadcast.
        """
        if self.lost is None and not self._told_to_end:
            self._told_to_end = True
            self._tell(_Call(""))

    def check(self) -> None:
        """Raise if the ranks have lost each other.

        Raises:
            RanksLostError: With the reason.
        """
        if self.lost is not None:
            raise self._error() from self.lost

    def _error(self) -> RanksLostError:
        return RanksLostError(f"the ranks have lost each other: {self.lost!r}")

    def _cache(self, name: str, onto: ShardedCache | None, inputs: dict[str, Any]) -> ShardedCache:
        if onto is None:
            call = _Call(name, None, next(self._counter), (inputs,))
        else:
            number = self._numbers[onto]
            call = _Call(name, number, number, (inputs,))
        return self._keep(call, self._everywhere(call, onto))

    def _keep(self, call: _Call, cache: ShardedCache) -> ShardedCache:
        """Know a cache by its number until nobody refers to it."""
        if cache not in self._numbers:
            assert call.result is not None
            self._numbers[cache] = call.result
            weakref.finalize(cache, self._dropped.append, call.result).atexit = False
        return cache

    def _everywhere(self, call: _Call, cache: ShardedCache | None) -> Any:
        self.check()
        try:
            self._tell(call)
            return call.perform(self.engine, cache)
        except _COMMON:
            raise
        except BaseException as fault:
            self.lost = fault
            self.on_lost()
            raise self._error() from fault

    def _tell(self, call: _Call) -> None:
        dropped = []
        while self._dropped:
            dropped.append(self._dropped.popleft())
        whole = _Call(call.name, call.cache, call.result, call.arguments, tuple(dropped))
        send(whole, self.group)


def follow(engine: Engine, group: Any) -> None:
    """Do what the leader does until it is closed.

    Args:
        engine: This rank's.
        group: Of `control_group`.

    Comm: As the calls.
    """
    caches: dict[int, ShardedCache] = {}
    while True:
        call: _Call = receive(group)
        for number in call.dropped:
            caches.pop(number, None)
        if not call.name:
            return
        cache = None if call.cache is None else caches[call.cache]
        try:
            result = call.perform(engine, cache)
        except _COMMON:
            continue  # the leader has the same one, and somebody to tell it to
        if call.result is not None:
            caches[call.result] = result
        del cache, result, call
