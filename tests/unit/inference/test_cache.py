"""The cache keeps every token on one rank, shares by reference and follows its own integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longvila.inference import cache as cache_module
from longvila.inference.cache import ShardedCache, ShardLayer
from longvila.inference.forks import fork_first
from longvila.sp.layout import SequenceLayout
from longvila.sp.mesh import MeshPlan, SPMesh


def numbered(start: int, tokens: int, *, rows: int = 1) -> Tensor:
    """Keys ``(rows, K, tokens, D)`` that say which token they are."""
    return torch.arange(start, start + tokens, dtype=torch.float64).view(1, 1, -1, 1).repeat(
        rows, 2, 1, 3
    )  # fmt: skip


def tokens_of(layer: ShardLayer) -> list[int]:
    """Token numbers of the first row, after checking that values belong to their keys."""
    found: list[int] = []
    for k, v in layer.parts():
        assert torch.equal(v, -k)
        found += k[0, :, 0, 0].long().tolist()
    return found


def append(cache: ShardedCache, start: int, tokens: int, *, rows: int = 1) -> int:
    new = numbered(start, tokens, rows=rows)
    with cache.appending(tokens) as owner:
        for layer in range(len(cache.shards)):
            returned = cache.update(new, -new, layer)
            assert returned[0] is new
    return owner


def group(ring: int, ulysses: int) -> list[ShardedCache]:
    """The caches of all ranks, in one process."""
    plan = MeshPlan(ring_size=ring, ulysses_size=ulysses)
    return [ShardedCache(2, mesh=SPMesh(plan=plan, rank=rank)) for rank in range(ring * ulysses)]


def fill(caches: list[ShardedCache], layout: SequenceLayout, total: int) -> None:
    for rank, cache in enumerate(caches):
        keys = layout.shard(numbered(0, layout.num_tokens), rank, dim=2)
        with cache.receiving(layout, total):
            for layer in range(2):
                cache.update(keys, -keys, layer)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_FIRST_CAPACITY", 4)
    monkeypatch.setattr(cache_module, "_COPIED_AT_MOST", 10)


def test_tails_grow_in_place_then_by_copies_then_by_new_tails() -> None:
    cache = ShardedCache(1)
    layer = cache.shards[0]
    append(cache, 0, 3)
    first = layer.keys.data_ptr()
    append(cache, 3, 1)
    assert layer.keys.data_ptr() == first and not layer.segments
    append(cache, 4, 1)
    assert layer.keys.shape[1] == 8 and not layer.segments
    append(cache, 5, 7)
    old = layer.keys.data_ptr()
    append(cache, 12, 9)  # twelve tokens are not copied again
    assert layer.segments[0][0].data_ptr() == old
    assert tokens_of(layer) == list(range(21)) and cache.get_seq_length() == 21


def test_a_reserved_prefill_is_one_buffer_of_just_its_size() -> None:
    cache = ShardedCache(1)
    cache.reserve(30)
    for start in range(0, 30, 6):
        append(cache, start, 6)
    assert cache.shards[0].keys.shape[1] == 30 and not cache.shards[0].segments
    assert cache.local_bytes == 2 * 30 * 2 * 3 * 8


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 3), (2, 2)])
def test_every_token_is_on_one_rank_and_new_ones_go_where_fewest_are(
    ring: int, ulysses: int, kind: str
) -> None:
    caches = group(ring, ulysses)
    layout = SequenceLayout((11, 5), ring, ulysses, kind)  # type: ignore[arg-type]
    fill(caches, layout, 11)  # the second document is filler
    for step in range(9):
        held = caches[0].held
        owners = {append(cache, 11 + step, 1) for cache in caches}
        assert owners == {held.index(min(held))}
    for layer in range(2):
        shards = [tokens_of(cache.shards[layer]) for cache in caches]
        assert sorted(n for shard in shards for n in shard) == list(range(20))
        assert [len(shard) for shard in shards] == caches[0].held
    assert all(cache.held == caches[0].held for cache in caches)


@pytest.mark.parametrize("remove", [0, 1, 3, 4, 9, 12, 15])
def test_crop_takes_the_last_tokens_wherever_they_are(remove: int) -> None:
    caches = group(2, 2)
    fill(caches, SequenceLayout((11,), 2, 2, "zigzag"), 11)
    for cache in caches:
        append(cache, 11, 3)
        append(cache, 14, 1)
        cache.crop(-remove)
    shards = [tokens_of(cache.shards[0]) for cache in caches]
    assert sorted(n for shard in shards for n in shard) == list(range(15 - remove))
    assert [len(shard) for shard in shards] == caches[0].held
    for cache in caches:
        append(cache, 15 - remove, 2)
    assert sorted(n for c in caches for n in tokens_of(c.shards[1])) == list(range(17 - remove))
    # Older assisted decoding counts in tensors; what is kept of it are integers.
    caches[0].crop(torch.tensor(-1))
    assert all(type(number) is int for number in caches[0].held)
    with pytest.raises(ValueError, match="crop takes minus"):
        caches[0].crop(-18 + remove)
    with pytest.raises(ValueError, match="crop takes minus"):
        caches[0].crop(1)


@pytest.mark.parametrize("tokens", [-1, 8])
def test_a_fork_of_more_than_there_is_is_refused(tokens: int) -> None:
    cache = ShardedCache(2)
    append(cache, 0, 7)
    with pytest.raises(ValueError, match=f"holds 7 tokens, a fork cannot begin with {tokens}"):
        fork_first(cache, tokens)
    assert fork_first(cache, 7).get_seq_length() == 7


def test_forks_share_storage_and_differ_afterwards() -> None:
    cache = ShardedCache(2)
    append(cache, 0, 7)
    fork = cache.fork()
    again = fork.fork()
    append(cache, 7, 2)
    append(fork, 70, 3)
    again.crop(-2)
    assert tokens_of(cache.shards[1]) == [*range(7), 7, 8]
    assert tokens_of(fork.shards[1]) == [*range(7), 70, 71, 72]
    assert tokens_of(again.shards[1]) == [*range(5)]
    pointers = {each.shards[0].segments[0][0].data_ptr() for each in (cache, fork, again)}
    assert len(pointers) == 1


def test_rows_share_a_prefix_of_one_row_and_are_reordered_behind_it() -> None:
    cache = ShardedCache(1)
    layer = cache.shards[0]
    append(cache, 0, 5)
    new = numbered(5, 2, rows=3) + 100 * torch.arange(3).view(3, 1, 1, 1)
    with cache.appending(2):
        cache.update(new, -new, 0)
    assert [part[0].shape[0] for part in layer.parts()] == [1, 3]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert layer.parts()[1][0][:, 0, 0, 0].tolist() == [205, 205, 5]
    assert layer.parts()[0][0].shape[0] == 1
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    assert layer.parts()[1][0][:, 0, 0, 0].tolist() == [205, 205, 5, 5]
    with pytest.raises(ValueError, match="holds 4 rows, got 3"):
        append(cache, 7, 1, rows=3)


def test_a_failed_step_leaves_nothing() -> None:
    cache = ShardedCache(2)
    append(cache, 0, 3)
    new = numbered(3, 4)
    with pytest.raises(KeyError), cache.appending(4):
        cache.update(new, -new, 0)
        raise KeyError("a layer failed")
    assert cache.get_seq_length() == 3
    assert [tokens_of(layer) for layer in cache.shards] == [[0, 1, 2]] * 2
    append(cache, 3, 1)
    assert [tokens_of(layer) for layer in cache.shards] == [[0, 1, 2, 3]] * 2


def test_misuse_is_refused() -> None:
    cache = ShardedCache(1)
    new = numbered(0, 2)
    with pytest.raises(RuntimeError, match="does not attend over it"):
        cache.update(new, new, 0)
    with pytest.raises(RuntimeError, match="through its update"):
        cache.shards[0].update(new, new)
    with cache.appending(1), pytest.raises(RuntimeError, match="under way"), cache.appending(1):
        pass
    one, two = SequenceLayout((2,)), SequenceLayout((2,), 2, 1)
    wrong = pytest.raises(ValueError, match="layout of 2 ranks, a cache of 1")
    with wrong, ShardedCache(1).receiving(two, 2):
        pass
    with pytest.raises(ValueError, match="needs an empty cache"), cache.receiving(one, 2):
        pass
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.shards[0].num_local_tokens == 0
