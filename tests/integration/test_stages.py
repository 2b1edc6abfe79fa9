"""All five kinds of stage on files, each from the result of the one before, on one rank and four.

A tiny model with random weights, clips that are drawn and encoded here, JSON lines and rows of
token ids. Both chains see the same rows in the same order, so losses and weights agree.
"""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parent))
from stage_files import SMALL, write_files

from longvila.cli.main import main
from longvila.errors import CheckpointError, ContextLengthError
from longvila.model.convert_vila import convert_to_longvila
from longvila.testing import Rank
from longvila.testing.asserts import assert_close
from longvila.testing.ranks import run_ranks
from longvila.train.run import Job, train
from longvila.train.settings import from_plain, override, read_yaml
from longvila.train.stages import Stage, StageError, get_stage

CHAIN: dict[str, tuple[str, ...]] = {
    "align": ("samples_per_step=5",),
    "pretrain": ("samples_per_step=5",),
    "sft": ("samples_per_step=5", "num_frames=3"),
    "extend-64k": ("rows_per_step=2", "warmup_steps=1"),
    "long-sft-256": ("samples_per_step=3", "num_frames=12", "saving.vila=true"),
}


def small(name: str, *more: str) -> Stage:
    return override(get_stage(name), [*SMALL, *CHAIN[name], *more])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model to begin from, and the data."""
    return write_files(tmp_path_factory.mktemp("stages"))


def run_chain(_: Rank, files: str, out: str, sp: int) -> dict[str, list[float]]:
    losses, model = {}, Path(files) / "base"
    for name in CHAIN:
        output = Path(out) / name
        stage = small(name, f"seq_parallel_size={sp}")
        job = Job(stage=stage, model=str(model), data=Path(files) / "data.yaml", output=output)
        progress = train(job)
        assert progress is not None
        losses[name] = progress.losses
        model = output
    return losses


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_five_stages_on_one_rank_and_on_four(files: Path, tmp_path: Path) -> None:
    one = run_ranks(run_chain, 1, str(files), str(tmp_path / "one"), 1, timeout_s=280)[0]
    four = run_ranks(run_chain, 4, str(files), str(tmp_path / "four"), 4, timeout_s=280)
    for losses in four:
        assert list(losses) == list(one)
        for name, each in losses.items():
            assert len(each) == 2 and each == pytest.approx(one[name], rel=1e-5), name
    before = weights(files / "base")
    for name in CHAIN:
        mine, theirs = weights(tmp_path / "one" / name), weights(tmp_path / "four" / name)
        assert set(mine) == set(theirs) == set(before)
        for key, value in mine.items():
            assert_close(theirs[key], value, name=f"{name}: {key}", tolerance=2e-5)
        changed = {key for key in mine if not torch.equal(mine[key], before[key])}
        tuned = {
            part: any(part in key for key in changed)
            for part in ("vision_tower", "multi_modal_projector", "language_model")
        }
        assert list(tuned.values()) == {
            "align": [False, True, False],
            "pretrain": [False, True, True],
            "extend-64k": [False, False, True],
        }.get(name, [True, True, True])
        before = mine
    # Context extension tunes embeddings and norms, and folds its adapter into the projections.
    last = tmp_path / "one" / "long-sft-256"
    model = AutoModelForImageTextToText.from_pretrained(last)
    assert model.config.context_length == 131072
    assert model.config.text_config.rope_parameters["rope_theta"] == 15_300_000.0
    assert AutoProcessor.from_pretrained(last).tokenizer.model_max_length == 131072
    stage = from_plain(Stage, read_yaml(last / "stage.yaml"))
    assert stage == small("long-sft-256", "seq_parallel_size=1")
    lines = [json.loads(line) for line in (last / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["frames"] > 0 for line in lines)
    # The original's layout holds the same weights.
    convert_to_longvila(last / "vila", tmp_path / "back")
    back = weights(tmp_path / "back")
    for key, value in weights(last).items():
        assert torch.equal(back[key], value), key


def test_what_cannot_be_trained_is_said_before_anything_is_loaded(
    files: Path, tmp_path: Path
) -> None:
    job = Job(
        stage=override(small("sft"), ["max_tokens=8192"]),
        model=str(files / "base"), data=files / "data.yaml", output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(ContextLengthError, match=r"have 8192 tokens, the model's context is 4096"):
        train(job)
    (files / "other.yaml").write_text("datasets:\n  a: {adapter: llava, path: texts.jsonl}\n")
    job = Job(
        stage=small("sft"),
        model=str(files / "base"), data=files / "other.yaml", output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(StageError, match=r"name a mixture 'sft' in the file, or --set data.mix"):
        train(job)


def test_a_folder_that_another_model_stands_in_is_no_output(files: Path, tmp_path: Path) -> None:
    job = Job(stage=small("sft"), model="", data=files / "data.yaml", output=files / "base")
    with pytest.raises(
        CheckpointError, match=r"base holds a finished model, of no stage; give sft"
    ):
        train(job)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "stage.yaml").write_text("name: align\n")
    with pytest.raises(CheckpointError, match=r"a finished model, of align; give sft an output"):
        train(replace(job, output=tmp_path))
    (tmp_path / "stage.yaml").write_text("name: sft\n")
    assert train(replace(job, output=tmp_path)) is None


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "longvila.cli.train", *arguments],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip


def twice(_: Rank, given: list[str]) -> list[str]:
    """The command of one rank, and the same again, in a process that has its imports."""
    said = []
    for _ in range(2):
        logging.getLogger().handlers.clear()  # the command adds its own, for this stderr
        with redirect_stderr(io.StringIO()) as heard:
            assert main(["train", *given]) == 0
        said.append(heard.getvalue())
    return said


def test_the_command_starts_its_ranks_resumes_on_others_and_leaves_the_finished_alone(
    files: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("optimizer: {max_steps: 2, eps: 1.0e-4}\n")
    sets = [part for text in (*SMALL[:5], *CHAIN["sft"]) for part in ("--set", text)]
    given = [
        "sft", "--model", str(files / "base"), "--data", str(files / "data.yaml"),
        "--output", str(tmp_path / "out"), "--config", str(tmp_path / "mine.yaml"), *sets,
    ]  # fmt: skip
    first = command(*given, "--ranks", "2", "--stop-after", "1", "--set", "seq_parallel_size=2")
    assert first.returncode == 0, first.stderr
    assert "step 1, 50.0%" in first.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    second, third = run_ranks(twice, 1, [*given, "--ranks", "1"], timeout_s=280)[0]
    assert "saved by 2 ranks, resumed on 1" in second and "step 2, 100.0%" in second
    assert (tmp_path / "out" / "config.json").exists()
    assert "counts" in json.loads((tmp_path / "out" / "left-out.json").read_text())
    assert "is finished; nothing to do" in third
