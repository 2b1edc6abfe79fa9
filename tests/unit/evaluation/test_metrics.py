"""Intervals and clustered errors against published and hand-made values."""

import math
import random
import statistics

import pytest

from longvila.evaluation.metrics import clustered_mean, wilson_interval


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe 1998, table I: method 3, to four places.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_published(correct, total, low, high):
    got = wilson_interval(correct, total, confidence=0.95)
    assert got == pytest.approx((low, high), abs=5e-5)


def test_wilson_solves_its_equation():
    z = statistics.NormalDist().inv_cdf(0.95)
    for correct, total in [(3, 10), (599, 600), (1, 2)]:
        for bound in wilson_interval(correct, total, confidence=0.9):
            error = math.sqrt(bound * (1 - bound) / total)
            assert abs(correct / total - bound) == pytest.approx(z * error, rel=1e-9)


def test_wilson_mirror_and_ends():
    low, high = wilson_interval(2, 7, confidence=0.99)
    assert wilson_interval(5, 7, confidence=0.99) == pytest.approx((1 - high, 1 - low))
    assert wilson_interval(0, 5, confidence=0.95)[0] == 0.0
    assert wilson_interval(5, 5, confidence=0.95)[1] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0.95), "at least one trial"),
        ((3, 2, 0.95), r"in \[0, 2\]"),
        ((-1, 2, 0.95), r"in \[0, 2\]"),
        ((1, 2, 1.0), r"in \(0, 1\)"),
    ],
)
def test_wilson_refuses(arguments, message):
    correct, total, confidence = arguments
    with pytest.raises(ValueError, match=message):
        wilson_interval(correct, total, confidence=confidence)


def test_clusters_of_one_are_the_usual_error():
    values = [random.Random(0).random() for _ in range(17)]
    mean, error = clustered_mean(values, range(17))
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(17))


def test_copies_inside_a_cluster_add_nothing():
    one = [1.0, 0.0, 0.0, 1.0, 1.0]
    copies = [value for value in one for _ in range(8)]
    names = [name for name in "abcde" for _ in range(8)]
    assert clustered_mean(copies, names) == pytest.approx(clustered_mean(one, "abcde"))
    assert clustered_mean(copies, range(40))[1] < clustered_mean(copies, names)[1] / 2


def test_unequal_clusters_by_hand():
    # mean 0.5; cluster sums of deviations 0.5 + 0.5 - 0.5 = 0.5 and -0.5; sqrt(0.5 * 2) / 4.
    assert clustered_mean([1, 1, 0, 0], ["a", "a", "a", "b"]) == pytest.approx((0.5, 0.25))


def test_one_cluster_has_no_error():
    mean, error = clustered_mean([1, 0], ["a", "a"])
    assert mean == 0.5
    assert math.isnan(error)


def test_clustered_mean_refuses():
    with pytest.raises(ValueError, match="2 values but 1 clusters"):
        clustered_mean([1, 2], ["a"])
    with pytest.raises(ValueError, match="no values"):
        clustered_mean([], [])
