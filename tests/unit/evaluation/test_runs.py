"""The folder of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longvila.cli.main import main
from longvila.errors import LongVILAError
from longvila.evaluation.runs import begin, check_settings, read_run, write_results

from .test_report import RECORDS, record

SETTINGS = {"model": "m", "frames": "paper", "seed": 0}


def write(folder: Path, records: Any = RECORDS) -> Path:
    begin(folder, SETTINGS, {"torch": "2"})
    write_results(folder, list(reversed(records)), {"videomme": {"accuracy": 0.5}})
    return folder


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "mine"))
    assert run.name == "mine"
    assert list(run.records) == RECORDS
    assert run.summaries["videomme"].official == {"accuracy": 0.5}
    assert run.settings == {**SETTINGS, "torch": "2"}
    scores = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert scores["videomme"]["score"]["right"] == 3
    with pytest.raises(LongVILAError, match="holds no finished run"):
        read_run(tmp_path)


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    check_settings(tmp_path, SETTINGS)
    begin(tmp_path, SETTINGS, {})
    answers = tmp_path / "answers" / "group-0.jsonl"
    answers.parent.mkdir()
    answers.touch()
    check_settings(tmp_path, {**SETTINGS, "frames": 8})  # it ended before it asked anything
    answers.write_text("{}\n")
    check_settings(tmp_path, SETTINGS)
    with pytest.raises(LongVILAError, match=r"\(frames was 'paper', is 8; seed was 0, is 2\)"):
        check_settings(tmp_path, {**SETTINGS, "frames": 8, "seed": 2})


def test_a_folder_is_read_in_any_locale(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    begin(tmp_path / "mine", {**SETTINGS, "model": "Modèle"}, {})
    code = (
        "import sys; from pathlib import Path; from longvila.evaluation.runs import read_run\n"
        "print(ascii(read_run(Path(sys.argv[1])).settings['model']))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "mine")],
        env={**os.environ, **plain}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == ascii("Modèle"), done.stderr


def test_answers_without_truth_become_a_file_to_hand_in(tmp_path: Path) -> None:
    mine = [
        record(i, None, gold=None, benchmark="egoschema_test", task="egoschema", video=f"v{i}")
        for i in range(2)
    ]
    write(tmp_path, mine)
    text = (tmp_path / "egoschema_test_submission.csv").read_text()
    assert text.split() == ["q_uid,answer", "v0,0", "v1,0"]


def test_the_verb_lays_runs_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(write(tmp_path / name)) for name in ("one", "two")]
    target = tmp_path / "deep" / "page.html"
    assert main(["eval", "--compare", *folders, "--page", str(target)]) == 0
    assert "one" in target.read_text() and "two" in target.read_text()
    other = str(write(tmp_path / "elsewhere" / "one"))
    assert main(["eval", "--compare", folders[0], other, "--page", str(target)]) == 0
    assert folders[0] in target.read_text() and other in target.read_text()
    assert main(["eval", "--compare", *folders]) == 1
    assert "--compare needs --page" in capsys.readouterr().err
