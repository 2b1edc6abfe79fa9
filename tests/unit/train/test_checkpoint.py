"""Saves: one run a folder. What a save holds is tested with the loop."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from longvila.errors import CheckpointError
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.train.checkpoint import find_saves, held, load, save, writing


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


def test_a_disk_that_is_full_is_a_sentence_and_earlier_saves_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def write(step: int) -> None:
        save(tmp_path, step, model, optimizer, run={}, data={}, keep=2)

    def full(*given: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(1)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device.* MiB left\. Earlier saves"
    ):
        write(2)
    assert [each.path.name for each in find_saves(tmp_path)] == ["step-1"]


def test_a_part_that_is_frozen_after_a_save_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    save(tmp_path, 1, model, torch.optim.AdamW(model.parameters()), run={}, data={}, keep=1)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.weight])
    with pytest.raises(CheckpointError, match=r"nothing frozen, this run freezes 1 tensors \(bias"):
        load(find_saves(tmp_path)[0], model, optimizer, seed=0)


def test_weights_that_do_not_fit_the_disk_are_a_sentence_too(tmp_path: Path) -> None:
    said = pytest.raises(CheckpointError, match=r"model cannot be written \(I/O error\)")
    with said, writing(tmp_path / "model"):
        raise SafetensorError("I/O error\nand more")


def test_all_ranks_are_refused(tmp_path: Path) -> None:
    with held(tmp_path):
        said = run_ranks(refused_everywhere, 2, str(tmp_path))
    assert all("another run" in each for each in said)
    assert run_ranks(refused_everywhere, 2, str(tmp_path)) == ["held", "held"]
