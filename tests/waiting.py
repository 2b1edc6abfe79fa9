"""Waiting for what another thread or process is about to do."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    met: Callable[[], object], pending: Callable[[], object] | str, *, seconds: float = 120.0
) -> None:
    """Look again and again until a condition is met.

    A client that has its answer knows nothing of what the server does afterwards: whoever looks
    there has to wait for it. The bound only ends a test that would wait for ever; no machine is so
    slow that it matters.

    Args:
        met: The condition.
        pending: What is not so yet, for the error; asked when time is over.
        seconds: The bound.

    Raises:
        AssertionError: If the condition is still not met.
    """
    deadline = time.monotonic() + seconds
    while not met():
        if time.monotonic() > deadline:
            why = pending if isinstance(pending, str) else pending()
            raise AssertionError(f"not after {seconds:g} s: {why}")
        time.sleep(0.005)
