"""`longvila train` refuses what cannot run before it starts ranks or reads weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvila.cli.main import main


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "data.yaml").write_text("datasets: {a: {adapter: llava, path: a.jsonl}}\n")
    given = ["--model", str(tmp_path / "gone"), "--data", str(tmp_path / "data.yaml")]
    return ["train", "sft", *given, "--output", str(tmp_path / "out")]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 1
    return capsys.readouterr().err


def test_a_mixture_that_the_file_has_not(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *files)
    assert "there are ['a']. The stage sft takes 'sharegpt4v_gpt4_100k" in said
    assert "name a mixture 'sft' in the file" in said
    assert "gone: there is no such folder" in refused(capsys, *files, "--set", "mixture=a")


def test_a_mixture_that_is_asked_for_goes_before_the_files(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("mixtures: {sft: a, all: a*2}\n")
    for asked in ([], ["--set", "mixture=all"]):
        assert "gone: there is no such folder" in refused(capsys, *files, *asked)
    assert "The stage sft takes 'b'" in refused(capsys, *files, "--set", "mixture=b")


def test_steps_to_stop_after(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--stop-after must be at least 1" in refused(capsys, *files, "--stop-after", "0")


def test_tasks_of_srun_that_know_no_rank(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert "srun started 8 tasks of this and gave none a RANK" in refused(capsys, *files)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert "there are ['a']" in refused(capsys, *files)
