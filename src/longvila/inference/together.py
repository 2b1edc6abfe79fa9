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
    raise_first(error, None if error is None else f": {error}", group, raises=raises)
    return result[0]


def raise_first(
    error: Exception | None,
    said: str | None,
    group: dist.ProcessGroup | None = None,
    *,
    raises: type[LongVILAError] = RankError,
) -> None:
    """Raise on every rank of a group if one failed.

    Args:
        error: What failed here, raised as it is.
        said: What the others say of it, behind "rank N"; None where nothing failed.
        group: The ranks; None for all there are.
        raises: What is raised where nothing failed, for the first rank that did.

    Comm: One all-gather of messages.
    """
    found: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, said, group=group)
    if error is not None:
        raise error
    for rank, message in enumerate(found):
        if message is not None:
            raise raises(f"rank {rank}{message}")
