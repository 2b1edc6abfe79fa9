"""What holds for every test."""

from __future__ import annotations

import importlib.util
import random
import sys

import pytest

if importlib.util.find_spec("hypothesis") is not None:  # tests on a GPU do without
    import hypothesis

    # The same examples every time, however slow the machine: whoever changes nothing sees nothing
    # new. `pytest --hypothesis-profile=default` searches on.
    hypothesis.settings.register_profile(
        "suite",
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed what is drawn without a seed, fixtures' included.

    Else it depends on what ran before in this process, which is another thing in each run.
    """
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


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
