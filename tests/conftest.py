"""What holds for every test."""

from __future__ import annotations

import sys

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server of ranks before a test that forks workers of its own starts a poorer one.

    It loads while the first tests run. Only where a collected module starts ranks.
    """
    ranks = sys.modules.get("longvila.testing.ranks")
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    if ranks is not None and any(
        value in (ranks.run_ranks, ranks.ranks)
        for module in modules
        for name, value in vars(module).items()
        if name in ("run_ranks", "ranks")
    ):
        ranks.start_server()
