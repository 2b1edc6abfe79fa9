"""Mixtures: exact coverage, weights, order that is a function of the position."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction

import pytest
from data_cases import Listed, text_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from longvila.data.mixture import Mixture, mix64, parse_mixture, permute


def listed(name: str, rows: int) -> Listed:
    return Listed(name, [text_sample(i) for i in range(rows)])


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permutations_are_bijections(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_of_huge_sets_need_no_table() -> None:
    seen = {permute(i, 747_000_000, 3) for i in range(2000)}
    assert len(seen) == 2000 and max(seen) > 700_000_000 and min(seen) < 40_000_000


def test_permutations_outside_are_refused() -> None:
    with pytest.raises(IndexError, match="0 to 2, got 3"):
        permute(3, 3, 0)


def test_hash_is_the_same_everywhere() -> None:
    assert mix64(1, 2, 3) == 0x48CF5028B6DF10DB
    assert mix64(1, 2) != mix64(2, 1)


def test_weights_are_read_and_named_mixtures_expanded() -> None:
    known = {"base": "a+b*2", "more": "base*0.5+c"}
    assert parse_mixture("more + a*3", known) == {
        "a": Fraction(7, 2),
        "b": Fraction(1),
        "c": Fraction(1),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [("a+", "cannot read"), ("a*-1", "cannot read"), ("a*0", "above zero"), ("x", "circle")],
)
def test_wrong_mixtures_say_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mixture(text, {"x": "y", "y": "x"})


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["1", "2", "0.5", "1.7"]))
@settings(max_examples=60, deadline=None)
def test_every_row_is_seen_equally_often(first: int, second: int, weight: str) -> None:
    if round(second * Fraction(weight)) < 1:
        return
    mixture = Mixture([listed("a", first), listed("b", second)], f"a+b*{weight}", seed=5)
    epochs = 3
    seen = Counter(mixture.place(p) for p in range(epochs * len(mixture)))
    for name, rows in (("a", first), ("b", second)):
        counts = [seen[(name, row)] for row in range(rows)]  # type: ignore[index]
        assert max(counts) - min(counts) <= 1
        share = len(mixture) - first if name == "b" else first
        assert sum(counts) == epochs * share


def test_epochs_are_shuffled_anew_and_seeds_differ() -> None:
    mixture = Mixture([listed("a", 50)], seed=1)
    orders = [[mixture.place(e * 50 + i).row for i in range(50)] for e in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)
    other = Mixture([listed("a", 50)], seed=2)
    assert [other.place(i).row for i in range(50)] != orders[0]
    again = Mixture([listed("a", 50)], seed=1)
    assert [again.place(i).row for i in range(50)] == orders[0]


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    mixture = Mixture([listed("b", 2), listed("a", 2)], shuffle=False)
    assert [tuple(mixture.place(p)) for p in range(5)] == [
        ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("a", 0),
    ]  # fmt: skip


def test_substitutes_are_of_the_same_dataset_and_never_the_broken_row() -> None:
    mixture = Mixture([listed("a", 3), listed("b", 9)])
    for position in range(24):
        broken = mixture.place(position)
        for attempt in range(5):
            place = mixture.substitute(position, attempt)
            assert place.dataset == broken.dataset and place.row != broken.row
            assert place == mixture.substitute(position, attempt)


def test_unknown_and_empty_datasets_are_refused() -> None:
    # Of two of one name, one would be lost.
    with pytest.raises(ValueError, match="two datasets are called 'a'"):
        Mixture([listed("a", 3), listed("b", 3), listed("a", 2)])
    with pytest.raises(ValueError, match="names 'c'"):
        Mixture([listed("a", 1)], "c")
    with pytest.raises(ValueError, match="a has no samples"):
        Mixture([listed("a", 0)])
    with pytest.raises(ValueError, match="none at all"):
        Mixture([listed("a", 2)], "a*0.1")


def test_fingerprint_tells_orders_apart() -> None:
    base = Mixture([listed("a", 5)], seed=1)
    assert base.fingerprint == Mixture([listed("a", 5)], seed=1).fingerprint
    others = [Mixture([listed("a", 6)], seed=1), Mixture([listed("a", 5)], seed=2)]
    others.append(Mixture([listed("a", 5)], "a*2", seed=1))
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert "a: 5 rows, 5 an epoch (100.0%)" in base.describe()


def test_what_changed_since_an_order_was_saved_is_said() -> None:
    saved = Mixture([listed("a", 6000), listed("b", 5), listed("c", 2)], seed=1).order
    sets = [listed("a", 6100), listed("b", 5), listed("d", 3)]
    assert Mixture(sets, "a+b*2+d", seed=2).changes(json.loads(json.dumps(saved))) == (
        "a: 6,000 rows (6,000 an epoch) when saved, 6,100 rows (6,100 an epoch) now; "
        "b: 5 rows (5 an epoch) when saved, 5 rows (10 an epoch) now; "
        "c: 2 rows (2 an epoch) when saved, not there now; "
        "d: not there when saved, 3 rows (3 an epoch) now; "
        "seed of the order: 1 when saved, 2 now"
    )
