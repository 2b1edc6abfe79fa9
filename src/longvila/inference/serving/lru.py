"""A cache that forgets what was used longest ago once its values weigh too much."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class WeightedLRU(Generic[Key, Value]):
    """Values under a bound on their weight; safe to use from several threads.

    Args:
        budget: Most weight of all values; a value heavier than that is not kept.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.weight = budget, 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """Return a value, which is now the one used last, or None."""
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            self._entries.move_to_end(key)
            return found[0]

    def put(self, key: Key, value: Value, weight: int) -> None:
        """Keep a value in place of what the key had."""
        with self._lock:
            self._drop(key)
            if weight > self.budget:
                return
            self._entries[key] = (value, weight)
            self.weight += weight
            while self.weight > self.budget:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self.weight = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _drop(self, key: Key) -> None:
        found = self._entries.pop(key, None)
        if found is not None:
            self.weight -= found[1]
