"""Offload on the CPU: the same steps, copied at once."""

from __future__ import annotations

import pytest
import torch

from longvila.memory.offload import Offload, host_memory


def big(seed: int = 0, rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def test_tensors_move_once_keep_last_regions_have_begun_and_come_back_exact() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=2, min_bytes=0)
    regions = [offload.region()]
    first = regions[0].put(big())
    for expected in (0, 128, 128, 128):
        regions.append(offload.region())
        assert offload.moved_bytes == expected
    assert first.tensor is None, "on the host only"
    assert torch.equal(first.fetch(), big())


def test_memory_locked_ahead_is_what_tensors_of_its_size_take() -> None:
    offload = Offload(budget_bytes=3 * 128 + 100, keep_last=0, min_bytes=0)
    offload.reserve(128, 5, pinned=False)
    reserved = {buffer.data.data_ptr() for buffer in offload._free[128]}
    assert len(reserved) == 3 and offload.used_bytes == 0, "as far as the budget goes"
    region = offload.region()
    stored = [region.put(big(seed)) for seed in range(2)]
    offload.region()
    assert {each._buffer.data.data_ptr() for each in stored if each._buffer} < reserved
    assert offload.used_bytes == 2 * 128
    # Another size pushes out what is idle, and no more of it than the budget asks for.
    other = region.put(big(rows=12))
    assert other.tensor is None and not offload._free[128]
    assert all(torch.equal(each.fetch(), big(seed)) for seed, each in enumerate(stored))


def test_layout_and_dtype_survive() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=1, min_bytes=0)
    region = offload.region()
    tensors = [
        torch.randn(3, 4, 5).transpose(0, 2),
        torch.randn(3, 4).bfloat16(),
        torch.arange(6).view(2, 3),
        torch.randn(8, 4)[::2],
        torch.randn(1, 4).expand(3, 4),
    ]
    stored = [region.put(t) for t in tensors]
    offload.region()
    assert all(s.tensor is None for s in stored)
    for s, t in zip(stored, tensors, strict=True):
        back = s.fetch()
        assert back.dtype == t.dtype and torch.equal(back, t)
    assert stored[0].fetch().stride() == tensors[0].stride()


def test_fetching_a_region_brings_back_the_one_before_it_and_no_other() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=1, min_bytes=0)
    stored, regions = [], []
    for i in range(4):
        regions.append(offload.region())
        stored.append(regions[-1].put(big(i)))
    regions.append(offload.region())
    assert [s.tensor is None for s in stored] == [True] * 4
    stored[3].fetch()
    assert [s.tensor is None for s in stored] == [True, True, False, True]
    stored[2].fetch()
    assert [s.tensor is None for s in stored] == [True, False, True, True]


def test_what_exceeds_the_budget_stays() -> None:
    offload = Offload(budget_bytes=2 * 128, keep_last=1, min_bytes=0)
    regions = [offload.region() for _ in range(4)]
    stored = [region.put(big(i)) for i, region in enumerate(regions)]
    offload.region()
    assert [s.tensor is None for s in stored] == [True, True, False, False]
    assert offload.used_bytes == offload.peak_bytes == 256
    for i, s in enumerate(stored):
        assert torch.equal(s.fetch(), big(i))


def test_host_memory_is_given_back_and_reused() -> None:
    offload = Offload(budget_bytes=128, keep_last=1, min_bytes=0)
    pointers = set()
    for step in range(3):
        region = offload.region()
        stored = region.put(big(step))
        offload.region()
        assert stored._buffer is not None and offload.used_bytes == 128
        pointers.add(stored._buffer.data.data_ptr())
        assert torch.equal(stored.fetch(), big(step))
        del stored, region
        assert offload.used_bytes == 0
    assert len(pointers) == 1


def test_idle_buffers_of_other_sizes_give_way() -> None:
    offload = Offload(budget_bytes=256, keep_last=1, min_bytes=0)
    for rows in (8, 16, 8, 4):
        region = offload.region()
        stored = region.put(big(0, rows))
        offload.region()
        assert stored.tensor is None
        idle = sum(size * len(buffers) for size, buffers in offload._free.items())
        assert offload.used_bytes + idle <= 256
        del stored, region


def test_small_tensors_and_parameters_stay() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=1, min_bytes=129)
    region = offload.region()
    small, weight = region.put(big()), region.put(torch.nn.Parameter(big(1, rows=100)))
    offload.region()
    assert small.tensor is not None and weight.tensor is not None
    assert torch.equal(small.fetch(), big()) and offload.moved_bytes == 0


def test_a_tensor_put_after_its_region_began_to_move_moves_at_once() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=1, min_bytes=0)
    region = offload.region()
    offload.region()
    assert region.put(big()).tensor is None


def test_fetching_twice() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=1, min_bytes=0)
    region = offload.region()
    stored = region.put(big())
    offload.region()
    assert torch.equal(stored.fetch(), stored.fetch())


def test_keeping_none_moves_at_once() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=0, min_bytes=0)
    region = offload.region()
    stored = region.put(big())
    assert stored.tensor is None and torch.equal(stored.fetch(), big())


def test_a_budget_below_zero() -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1, 1, 0"):
        Offload(budget_bytes=-1, min_bytes=0)


def test_a_tensor_handed_in_twice_moves_once_and_stays_until_both_have_it() -> None:
    offload = Offload(budget_bytes=10_000, keep_last=1, min_bytes=0)
    region, tensor = offload.region(), big()
    first, second = region.put(tensor), region.put(tensor)
    assert first is second
    part = region.put(tensor[:4])
    assert part is not first, "a part of it is another tensor"
    other = region.put(tensor.add_(1))
    assert other is not first, "it was written to in between"
    offload.region()
    assert offload.moved_bytes == 128 + 64 + 128
    one = first.fetch()
    assert first.tensor is one and offload.returned_bytes == 128 + 64 + 128
    assert torch.equal(one, second.fetch()) and first.tensor is None
    assert torch.equal(first.fetch(), one), "once more, from the host"


def test_host_memory_has_the_size_it_was_asked_for() -> None:
    memory = host_memory(1001, pinned=False)
    assert memory.shape == (1001,) and memory.dtype == torch.uint8
    assert memory.data_ptr() % 4096 == 0
    view = memory[:1000].view(torch.float32)
    del memory
    view.fill_(3.0)
    assert view.sum() == 750
