"""Packing: nothing lost, nothing over the budget, nobody waits forever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvila.data.packing import Packer, pack

LENGTHS = st.lists(st.integers(1, 100), max_size=80)


@given(LENGTHS)
@settings(max_examples=150, deadline=None)
def test_rows_hold_each_document_once_and_keep_the_budget(lengths: list[int]) -> None:
    rows = pack(lengths, 100)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 100 for row in rows)


@given(LENGTHS)
@settings(max_examples=100, deadline=None)
def test_rows_take_the_longest_that_fits(lengths: list[int]) -> None:
    left = dict(enumerate(lengths))
    for row in pack(lengths, 100):
        assert row[0] == min(left)
        room = 100 - left.pop(row[0])
        for number in row[1:]:
            fitting = [(length, -n) for n, length in left.items() if length <= room]
            assert (lengths[number], -number) == max(fitting)
            room -= left.pop(number)
        assert all(length > room for length in left.values())


def test_packing_wastes_little() -> None:
    lengths = [(37 * i) % 91 + 5 for i in range(500)]
    assert sum(lengths) > 0.95 * 100 * len(pack(lengths, 100))


@given(LENGTHS, st.integers(0, 79))
@settings(max_examples=60, deadline=None)
def test_a_restored_packer_goes_on_alike(lengths: list[int], cut: int) -> None:
    packer = Packer(100)
    for number, length in enumerate(lengths):
        packer.add(number, length)
    for _ in range(min(cut, len(packer)) // 3):
        if len(packer):
            packer.pop()
    other = Packer(100)
    other.restore(packer.waiting)
    assert other.waiting == packer.waiting
    while len(packer):
        assert other.pop() == packer.pop()
    with pytest.raises(IndexError, match="no document waits"):
        other.pop()


def test_rows_may_be_limited_in_documents() -> None:
    packer = Packer(100, max_documents=2)
    for number in range(5):
        packer.add(number, 10)
    assert [packer.pop() for _ in range(3)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("length", [0, 101])
def test_a_document_that_fits_no_row_is_refused_not_looped_over(length: int) -> None:
    with pytest.raises(ValueError, match=f"document 3 has {length} tokens; a row holds 1 to 100"):
        Packer(100).add(3, length)


def test_misuse_is_refused() -> None:
    packer = Packer(10)
    packer.add(1, 5)
    with pytest.raises(ValueError, match="waits already"):
        packer.add(1, 5)
    with pytest.raises(ValueError, match="at least 1"):
        Packer(0)
