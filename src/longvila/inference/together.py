"""Work of several ranks that fails on all of them if it fails on one.

A rank that raises alone leaves the others waiting for it in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from longvila.errors import LongVILAError, RankError

Result = TypeVar("Result")


def together(
    work: Callable[[], Result],
    group: dist.ProcessGroup | None = None,
    *,
    raises: type[LongVILAError] = RankError,
) -> Result:
    """Do something on every rank of a group, and raise on all of them if it fails on one.

    No rank returns before all have done it.

    Args:
        work: What to do; must not communicate.
        group: The ranks; None for all there are.
        raises: What is raised where it worked, if it failed elsewhere.

    Returns:
        What ``work`` returned here.

    Raises:
        LongVILAError: Of the type ``raises``, with the message of the first rank that failed. Where
            it failed, its own error.

    Comm: One all-gather of error messages.
    """
    result: list[Result] = []
    error: Exception | None = None
    try:
        result.append(work())
    except Exception as fault:
        error = fault
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, None if error is None else str(error), group=group)
    if error is not None:
        raise error
    for rank, message in enumerate(found):
        if message is not None:
            raise raises(f"rank {rank}: {message}")
    return result[0]
