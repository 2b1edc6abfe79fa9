"""What the verb refuses, and its list; runs are in the tests of evaluation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longvila.cli.eval import chosen, folders
from longvila.cli.main import main


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    by_name = {line.split()[0]: line.split() for line in lines[1:]}
    assert by_name["videomme"][1] == "256" and by_name["vnbench"][1] == "128"
    assert by_name["mvbench"][1:3] == ["32", "mvbench"]


def test_names_count_once() -> None:
    assert [p.name for p in chosen("vnbench_val, vnbench,mlvu")] == ["vnbench", "mlvu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "--tasks is needed"),
        (
            ["--tasks", "videome", "--out", "x"],
            "no benchmark 'videome' (did you mean 'videomme'?); there are",
        ),
        (["--tasks", "mlvu"], "--out is needed"),
        (["--tasks", "mlvu", "--out", "x", "--data", "mlvu"], "wants TASK=FOLDER, got 'mlvu'"),
        (["--tasks", "mlvu", "--out", "x", "--data", "=/"], "wants TASK=FOLDER, got '=/'"),
        (["--tasks", "mlvu", "--out", "x", "--data", "mlvu,vnbench=/"], "wants TASK=FOLDER"),
        (["--tasks", "mlvu", "--out", "x", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["--tasks", "mlvu", "--out", "x", "--frames", "-1"], "--frames must be at least 1"),
        (["--tasks", "mlvu", "--out", "x", "--seed", "-1"], "--seed must be 0 to"),
        (["--tasks", "mlvu", "--out", "x", "--device", "foo"], "torch knows no such device"),
        (["--tasks", "mlvu", "--out", "x", "--seq-parallel-size", "2"], "torchrun starts more"),
        (["--tasks", "mlvu", "--out", __file__], "is a file; give a folder"),
        (["--tasks", "mlvu", "--out", "x", "--data", "vnbench=/"], "not among --tasks"),
        (["--tasks", "mlvu", "--out", "x", "--data", "mlvu=/none"], "there is no folder /none"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_folders(tmp_path: Path) -> None:
    presets = chosen("vnbench")
    assert folders((f"vnbench_val={tmp_path}",), presets) == {"vnbench": tmp_path}


def test_without_lmms_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "lmms_eval", raising=False)
    assert main(["eval", "--tasks", "mlvu", "--out", str(tmp_path)]) == 1
    assert "pip install 'longvila[eval]'" in capsys.readouterr().err
