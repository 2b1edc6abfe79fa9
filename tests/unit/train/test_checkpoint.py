"""Saves: one run a folder. What a save holds is tested with the loop."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from longvila.errors import CheckpointError
from longvila.testing import Rank
from longvila.testing.ranks import run_ranks
from longvila.train.checkpoint import clean, find_saves, held, load, save, writing


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


@pytest.mark.parametrize("name", ["run.json", "name"])
def test_a_disk_that_is_full_at_the_last_small_file_is_the_same_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([model.weight])
    plain = Path.write_text

    def full(path: Path, *given: Any, **named: Any) -> int:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device.* MiB left\. Earlier saves"
    ):
        save(tmp_path, 1, model, optimizer, run={}, data={}, keep=1)


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


@pytest.mark.parametrize("name", ["run.json", "rank-0.pt", ".metadata", "__0_0.distcp"])
def test_a_damaged_save_is_named_and_nothing_else_is_taken(tmp_path: Path, name: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        save(tmp_path, step, model, optimizer, run={}, data={}, keep=2)
    file = tmp_path / "step-2" / name
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"step-2 is damaged \(.*save before it"):
        load(find_saves(tmp_path)[-1], model, optimizer, seed=0)
    (tmp_path / "step-2").rename(tmp_path / "away")
    load(find_saves(tmp_path)[-1], model, optimizer, seed=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_bit_that_flips_is_found_on_all_ranks(tmp_path: Path, ranks: int) -> None:
    assert run_ranks(saved_and_read, ranks, str(tmp_path), False) == ["whole"] * ranks
    said = run_ranks(saved_and_read, ranks, str(tmp_path), True)
    assert len(set(said)) == 1
    assert re.search(
        r"step-1 is damaged \(__0_0.distcp: .*checksum is wrong .*copy it again", said[0]
    )


def test_a_state_that_one_rank_lacks_ends_all(tmp_path: Path) -> None:
    assert run_ranks(saved_and_read, 2, str(tmp_path), False) == ["whole"] * 2
    (tmp_path / "step-1" / "rank-1.pt").unlink()
    said = run_ranks(saved_and_read, 2, str(tmp_path), False)
    assert len(set(said)) == 1
    assert re.search(r"step-1 is damaged \(rank-1.pt: .*No such file", said[0])


def saved_and_read(rank: Rank, output: str, flip: bool) -> str:
    torch.manual_seed(0)
    model, folder = nn.Linear(8, 8), Path(output)
    optimizer = torch.optim.AdamW(model.parameters())
    if not find_saves(folder):
        save(folder, 1, model, optimizer, run={}, data={}, keep=1)
    if flip and rank.rank == 0:
        file = folder / "step-1" / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[content.index(model.weight.detach().numpy().tobytes()) + 30] ^= 4
        file.write_bytes(content)
    if dist.is_initialized():
        dist.barrier()
    try:
        load(find_saves(folder)[0], model, optimizer, seed=0)
    except CheckpointError as fault:
        return str(fault)
    return "whole"


def test_a_save_of_another_model_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    models = nn.Linear(2, 2), nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2))
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    save(tmp_path, 1, models[0], optimizers[0], run={}, data={}, keep=2)
    for model, optimizer in zip(models[1:], optimizers[1:], strict=True):
        with pytest.raises(CheckpointError, match=r"step-1 does not fit the model: .*new output"):
            load(find_saves(tmp_path)[-1], model, optimizer, seed=0)


def test_what_is_no_whole_save_is_said_to_be_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-3").mkdir()
    clean(tmp_path)
    assert "step-3 is passed over" in caplog.text and (tmp_path / "step-3").is_dir()
