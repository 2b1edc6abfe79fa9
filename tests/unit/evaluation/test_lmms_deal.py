"""Questions come together by video, and videos go where there is least to do."""

from __future__ import annotations

import random

from longvila.evaluation.lmms_deal import by_medium, deal, gather
from longvila.testing.ranks import Rank, ranks


def test_everything_is_dealt_once_and_evenly() -> None:
    draw = random.Random(0)
    costs = {f"film {i}": draw.uniform(1, 10) for i in range(40)}
    for groups in (1, 3, 8, 50):
        dealt = deal(costs, groups)
        assert sorted(film for part in dealt for film in part) == sorted(costs)
        assert dealt == deal(costs, groups)
        loads = [sum(costs[film] for film in part) for part in dealt]
        # The longest first: no group is more than one film above another.
        assert max(loads) - min(loads) <= max(costs.values())
    order = list(costs)
    assert all(part == sorted(part, key=order.index) for part in deal(costs, 3))


def test_the_longest_goes_alone() -> None:
    assert deal({"a": 1, "b": 9, "c": 1, "d": 1}, 2) == [["b"], ["a", "c", "d"]]


def test_questions_about_one_film_come_together() -> None:
    assert by_medium(["x", "y", "x", "", "y"]) == {"x": [0, 2], "y": [1, 4], "": [3]}


def test_one_process_tells_nobody() -> None:
    assert gather([1, 2], 1) == [[1, 2]]


@ranks(2)
def test_all_ranks_know_the_same(rank: Rank) -> None:
    assert gather([rank.rank] * (rank.rank + 1), rank.world_size) == [[0], [1, 1]]
