"""Trackers: numbers of two sittings of one run are found again in what each tracker keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longvila.train.trackers import TrackerError, open_trackers

SITTING = """
import json, sys
from pathlib import Path
from longvila.train.trackers import open_trackers
(tracker,) = open_trackers([sys.argv[1]], Path(sys.argv[2]), {"rate": 0.5})
for step in json.loads(sys.argv[3]):
    tracker.write(step, {"train/loss": 10.0 * step})
tracker.close()
"""


def sit(name: str, folder: Path, steps: list[int], **environment: str) -> None:
    """Write some steps in a process of its own: trackers start threads and hooks."""
    done = subprocess.run(
        [sys.executable, "-c", SITTING, name, str(folder), json.dumps(steps)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_wandb_keeps_the_numbers_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    for steps in ([1, 2], [3]):
        sit("wandb", tmp_path / "out", steps, WANDB_MODE="offline", WANDB_SILENT="true")
    name = (tmp_path / "out" / "run-name").read_text()
    files = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{name}.wandb"}
    data = b"".join(file.read_bytes() for file in files)
    assert data.count(b"train/loss") >= 3 and b"rate" in data


def test_trackio_keeps_the_numbers_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="Trackio is not installed")
    import sqlite3

    for steps in ([1, 2], [3]):
        sit("trackio", tmp_path / "out", steps, TRACKIO_DIR=str(tmp_path / "kept"))
    (base,) = (tmp_path / "kept").glob("*.db")
    with sqlite3.connect(base) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by step")
        found = [(name, step, json.loads(text)["train/loss"]) for name, step, text in rows]
    connection.close()
    name = (tmp_path / "out" / "run-name").read_text()
    assert found == [(name, 1, 10.0), (name, 2, 20.0), (name, 3, 30.0)]


def test_tensorboard_keeps_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    (tracker,) = open_trackers(None, tmp_path, {})
    tracker.write(3, {"train/loss": 1.0})
    tracker.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_wrong_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrackerError, match="no tracker 'wandbb'; there are"):
        open_trackers(["wandbb"], tmp_path, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrackerError, match="wandb is not installed: pip install wandb"):
        open_trackers(["wandb"], tmp_path, {})
    assert open_trackers(None, tmp_path, {}) == []
