"""What the tests of the data generation share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from endpoint import Endpoint

from longvila.media.synthetic import clip


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as served:
        yield served


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of eight and four seconds, two frames a second; frames carry their numbers."""
    folder = tmp_path_factory.mktemp("videos")
    clip(folder / "first.mp4", 16, fps=2)
    (folder / "more").mkdir()
    clip(folder / "more" / "second.mp4", 8, fps=2, first_number=100)
    return folder
