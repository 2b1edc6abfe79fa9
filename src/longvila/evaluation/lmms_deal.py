"""Questions dealt over groups of ranks by their video, so that each video is read once.

lmms-eval deals documents to ranks in turn and expects every rank to answer its own. Three questions
about one film would go to three ranks, which would read it three times; and ranks that share a
sequence would be given different questions, where they must work on the same one. So::

    lmms-eval   rank 0: q0 q4 q8     rank 1: q1 q5 q9     rank 2: q2 q6 ...    as it dealt them
       |                 all ranks tell each other their questions
    by video    film A: q0 q1 q2     film B: q3 q4 q5     ...
       |                 films dealt to groups, the longest first, to the group with least to do
    groups      ranks 0 1 answer A, C     ranks 2 3 answer B, D        one sequence over two ranks
       |                 all ranks tell each other the answers
    lmms-eval   rank 0: a0 a4 a8     ...                               each takes its own

Questions travel as plain data (messages, names of files), a few hundred bytes each; pixels never.

Cost: two gathers of objects over all ranks for a whole benchmark. With one process nothing moves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def deal(costs: Mapping[Hashable, float], groups: int) -> list[list[Hashable]]:
    """Deal things of known cost to groups.

    Args:
        costs: Cost of each thing; their order breaks ties.
        groups: How many groups.

    Returns:
        The things of each group, in the order given.
    """
    order = {thing: place for place, thing in enumerate(costs)}
    load = [0.0] * groups
    dealt: list[list[Hashable]] = [[] for _ in range(groups)]
    for thing in sorted(costs, key=lambda t: (-costs[t], order[t])):
        least = min(range(groups), key=lambda g: (load[g], g))
        load[least] += costs[thing]
        dealt[least].append(thing)
    return [sorted(part, key=order.__getitem__) for part in dealt]


def by_medium(media: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Bring questions about one medium together.

    Args:
        media: What each question shows.

    Returns:
        Places of the questions of each medium, in the order in which media first come.
    """
    found: dict[Hashable, list[int]] = defaultdict(list)
    for place, medium in enumerate(media):
        found[medium].append(place)
    return dict(found)


def gather(mine: Sequence[T], ranks: int) -> list[list[T]]:
    """Tell all ranks what each rank has.

    Args:
        mine: This rank's.
        ranks: How many ranks there are; with one nothing is sent.

    Returns:
        Every rank's, by rank.

    Comm: One gather of objects over all ranks.
    """
    if ranks == 1:
        return [list(mine)]
    box: list[Any] = [None] * ranks
    dist.all_gather_object(box, list(mine))
    return box
