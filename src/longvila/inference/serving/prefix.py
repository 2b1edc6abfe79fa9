"""Key-value caches that are kept: a prompt that begins like an earlier one is not read again.

An entry is a cache and the keys of its tokens. `best` finds the entry that shares the longest
beginning with a prompt; a fork of it, cut there, shares its memory. An entry that another one
continues is dropped, since the longer one serves both.

Memory is counted by the buffers themselves, each once however many caches refer to it: the second
question about a film adds its own tokens, not the film's. What is under way counts too. When a
budget is exceeded the entries go that were used longest ago.

Cost of a look: a few comparisons for entries that differ early, one pass over the keys otherwise.
Only the thread that runs the model may use it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longvila.inference.cache import ShardedCache
from longvila.inference.serving.prompt import common_prefix


@dataclass(eq=False)
class Entry:
    """A cache that is kept.

    Attributes:
        keys: Keys of its tokens.
        cache: The cache.
        used: When it was used last, in uses.
    """

    keys: NDArray[np.int64]
    cache: ShardedCache
    used: int


def buffers(cache: ShardedCache) -> dict[int, int]:
    """Map the address of each buffer that a cache refers to, to its bytes."""
    found = {}
    for layer in cache.shards:
        for pair in layer.parts():
            for tensor in pair:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def shared_bytes(caches: Iterable[ShardedCache]) -> int:
    """Bytes of all buffers of some caches, each counted once."""
    found: dict[int, int] = {}
    for cache in caches:
        found.update(buffers(cache))
    return sum(found.values())


def shared_length(keys: NDArray[np.int64], others: NDArray[np.int64], more_than: int) -> int:
    """Count the leading keys that two prompts share; zero if certainly not more than so many."""
    if min(len(keys), len(others)) <= more_than or keys[more_than] != others[more_than]:
        return 0
    return common_prefix(keys, others)


class PrefixCache:
    """Caches that are kept under a budget."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._uses = 0

    def __len__(self) -> int:
        return len(self.entries)

    def best(self, keys: NDArray[np.int64], more_than: int = 0) -> tuple[Entry, int] | None:
        """Find the entry that shares the longest beginning.

        Args:
            keys: Of a prompt.
            more_than: Shared keys that are of no use yet.

        Returns:
            The entry and the number of keys shared, or None.
        """
        found = None
        for entry in self.entries:
            length = shared_length(keys, entry.keys, more_than)
            if length > more_than:
                found, more_than = (entry, length), length
        return found

    def touch(self, entry: Entry) -> None:
        """Note that an entry is used."""
        self._uses += 1
        entry.used = self._uses

    def put(self, keys: NDArray[np.int64], cache: ShardedCache) -> None:
        """Keep a cache.

        Args:
            keys: Of its tokens; those of a last token that was never fed back are left out.
            cache: Belongs to the entry from now on.

        Raises:
            ValueError: If the cache holds another number of tokens.
        """
        if len(keys) != cache.get_seq_length():
            raise ValueError(f"{len(keys)} keys of a cache of {cache.get_seq_length()} tokens")
        for entry in self.entries:
            if len(entry.keys) >= len(keys) and common_prefix(keys, entry.keys) == len(keys):
                self.touch(entry)
                return
        self.entries = [e for e in self.entries if common_prefix(keys, e.keys) < len(e.keys)]
        entry = Entry(keys, cache, 0)
        self.touch(entry)
        self.entries.append(entry)

    def evict(self) -> bool:
        """Drop the entry that was used longest ago; say whether there was one."""
        if not self.entries:
            return False
        self.entries.remove(min(self.entries, key=lambda entry: entry.used))
        return True

    def clear(self) -> None:
        """Drop everything."""
        self.entries.clear()
