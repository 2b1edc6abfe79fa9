"""Run something that may not fit or may not work, and agree over ranks about what came of it."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._cluster import Cluster

#: Why a row has no figures.
OUT_OF_MEMORY = "out of memory"


def attempt(function: Callable[[], Any], cluster: Cluster) -> tuple[Any, str | None]:
    """Return a result, or why there is none; all ranks agree which.

    A rank that fails while another waits in a collective ends in the collective's timeout. The
    ranks hold the same and so run out of memory at the same place.
    """
    result, reason = None, None
    try:
        result = function()
    except torch.OutOfMemoryError as fault:
        reason = OUT_OF_MEMORY
        cluster.say(f"    {str(fault).splitlines()[0][:300]}")
    except Exception as fault:  # of a peer's own packages, any; it becomes the row's reason
        reason = f"failed: {type(fault).__name__}: {str(fault)[:300]}"
        cluster.say("".join(traceback.format_exception(fault)[-6:]))
    if cluster.everywhere([float(reason is not None)])[0]:
        return None, reason or "failed on another rank"
    return result, None


def clean() -> None:
    """Give back the memory of what ran before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
