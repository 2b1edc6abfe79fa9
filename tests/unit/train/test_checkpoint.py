"""Saves: one run a folder. What a save holds is tested with the loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvila.errors import CheckpointError
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.train.checkpoint import held


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    refused = pytest.raises(CheckpointError, match="another run is at work in")
    with held(tmp_path), refused, held(tmp_path, patience_s=0.3):
        raise AssertionError("both hold it")
    with held(tmp_path):
        assert (tmp_path / ".lock").exists()


def refused_everywhere(_: Rank, output: str) -> str:
    try:
        with held(Path(output), patience_s=0.1):
            return "held"
    except CheckpointError as fault:
        return str(fault)


def test_all_ranks_are_refused(tmp_path: Path) -> None:
    with held(tmp_path):
        said = run_ranks(refused_everywhere, 2, str(tmp_path))
    assert all("another run" in each for each in said)
    assert run_ranks(refused_everywhere, 2, str(tmp_path)) == ["held", "held"]
