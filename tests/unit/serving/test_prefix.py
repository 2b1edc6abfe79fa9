"""Caches that are kept: found by what they share, counted once, dropped by age."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from longvila.inference.cache import ShardedCache
from longvila.inference.engine import Engine
from longvila.inference.serving.prefix import PrefixCache, shared_bytes, shared_length
from longvila.testing import tiny


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(tiny.tiny_model()) as engine:
        yield engine


def read(engine: Engine, *ids: int, onto: ShardedCache | None = None) -> ShardedCache:
    options: dict[str, Any] = {} if onto is None else {"onto": onto}
    return engine.prefill({"input_ids": torch.tensor([ids])}, **options)


def keys(*values: int) -> Any:
    return np.array(values, np.int64)


def test_the_longest_shared_beginning_is_found(engine: Engine) -> None:
    prefix = PrefixCache()
    assert prefix.best(keys(1, 2)) is None
    prefix.put(keys(1, 2, 3), read(engine, 1, 2, 3))
    prefix.put(keys(1, 2, 4, 5), read(engine, 1, 2, 4, 5))
    prefix.put(keys(9, 2), read(engine, 9, 2))
    for wanted, length, entry in (
        ((1, 2, 4, 6), 3, (1, 2, 4, 5)), ((1, 2, 3, 9), 3, (1, 2, 3)), ((9,), 1, (9, 2)),
    ):  # fmt: skip
        found = prefix.best(keys(*wanted))
        assert found is not None and found[1] == length
        assert found[0].keys.tolist() == list(entry)
    assert prefix.best(keys(8)) is None
    assert prefix.best(keys(1, 2, 4, 6), more_than=3) is None


def test_an_entry_that_is_continued_is_dropped(engine: Engine) -> None:
    prefix = PrefixCache()
    first = read(engine, 1, 2, 3)
    prefix.put(keys(1, 2, 3), first)
    longer = read(engine, 4, 5, onto=engine.fork(first))
    prefix.put(keys(1, 2, 3, 4, 5), longer)
    assert [entry.keys.tolist() for entry in prefix.entries] == [[1, 2, 3, 4, 5]]
    prefix.put(keys(1, 2), read(engine, 1, 2))
    assert len(prefix) == 1, "what is there already is not kept twice"
    with pytest.raises(ValueError, match="2 keys of a cache of 5 tokens"):
        prefix.put(keys(1, 2), longer)


def test_the_oldest_goes_first(engine: Engine) -> None:
    prefix = PrefixCache()
    for start in (1, 2, 3):
        prefix.put(keys(start, 7), read(engine, start, 7))
    prefix.touch(prefix.entries[0])
    assert prefix.evict() and [int(e.keys[0]) for e in prefix.entries] == [1, 3]
    assert prefix.evict() and prefix.evict() and not prefix.evict()


def test_buffers_are_counted_once(engine: Engine) -> None:
    film = read(engine, *range(1, 129))
    alone = shared_bytes([film])
    assert alone >= film.local_bytes > 0
    forks = [engine.fork(film) for _ in range(5)]
    assert shared_bytes([film, *forks]) == alone
    read(engine, 1, 2, onto=forks[0])
    assert alone < shared_bytes([film, *forks]) < 2 * alone


def test_a_few_tokens_do_not_keep_a_large_buffer(engine: Engine) -> None:
    film = read(engine, *range(1, 201))
    short, most = engine.fork(film, tokens=5), engine.fork(film, tokens=190)
    assert shared_bytes([short]) < shared_bytes([film]) / 8
    assert shared_bytes([film, most]) == shared_bytes([film]), "most of it is shared, not copied"
    plain = engine.decode(engine.fork(read(engine, *range(1, 6))), torch.tensor([[7]]))
    torch.testing.assert_close(engine.decode(short, torch.tensor([[7]])), plain)


def test_what_is_shared_beyond_a_place() -> None:
    a = keys(1, 2, 3, 4)
    assert shared_length(a, keys(1, 2, 3, 9), 2) == 3
    assert shared_length(a, keys(1, 2, 3, 9), 3) == 0
    assert shared_length(a, keys(1, 2), 2) == 0
    assert shared_length(a, keys(8, 2, 3), 2) == 0
