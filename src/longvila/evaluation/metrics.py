"""How sure a score is: intervals of proportions and errors of clustered means.

1. A proportion gets Wilson's score interval: the rates p for which the observed count is not
   further than z standard errors sqrt(p (1 - p) / n) away. It stays inside [0, 1] and says
   something at 0 of n and n of n, where the textbook interval has no width.
2. A mean over questions of which several share a video gets an error by cluster: deviations are
   added up inside each cluster first, then squared. Ten questions about one film that are right or
   wrong together count as one observation, not ten. With one value a cluster it is the usual
   standard error of the mean.

Cost: one pass. Not done: intervals of differences between models that answered the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist


def wilson_interval(correct: int, total: int, *, confidence: float) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    Args:
        correct: Successes.
        total: Trials.
        confidence: Share of such intervals that hold the true rate, in (0, 1).

    Returns:
        Lower and upper bound, both in [0, 1].

    Raises:
        ValueError: If there is no trial, ``correct`` is not in [0, total], or ``confidence`` is
            not in (0, 1).

    Source: E. B. Wilson, 1927.
    """
    if total < 1:
        raise ValueError(f"an interval needs at least one trial, got {total}")
    if not 0 <= correct <= total:
        raise ValueError(f"correct must be in [0, {total}], got {correct}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = correct / total
    scale = 1 + z * z / total
    middle = (rate + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    # The ends are exact in theory and off by an ulp in floating point.
    low = 0.0 if correct == 0 else middle - half
    high = 1.0 if correct == total else middle + half
    return low, high


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Return a mean and its standard error with values correlated inside clusters.

    Args:
        values: Scores.
        clusters: For each score, what it shares with others: its video.

    Returns:
        The mean of the values, and its standard error; NaN with fewer than two clusters, which
        say nothing about how clusters differ.

    Raises:
        ValueError: If there is no value, or the lengths differ.

    Source: Liang and Zeger, 1986, with the factor G / (G - 1) for G clusters.
    """
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values but {len(clusters)} clusters")
    if not values:
        raise ValueError("the mean of no values is not defined")
    count = len(values)
    mean = math.fsum(values) / count
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + (value - mean)
    groups = len(sums)
    if groups < 2:
        return mean, math.nan
    spread = math.fsum(part * part for part in sums.values())
    return mean, math.sqrt(spread * groups / (groups - 1)) / count
