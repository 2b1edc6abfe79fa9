"""A name that can be no checkpoint's is refused at once, by a process that has loaded nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from longvila.errors import CheckpointError
from longvila.model import source
from longvila.model.source import check_source
from longvila.testing.tiny import save_tiny


def refused(name: Any) -> str:
    with pytest.raises(CheckpointError) as found:
        check_source(str(name), label="--model")
    message = str(found.value)
    assert message.startswith(f"--model {name}: ")
    return message


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    assert "there is no config.json in this folder" in refused(tmp_path)
    (tmp_path / "film.mp4").touch()
    assert "is a file; expected the folder" in refused(tmp_path / "film.mp4")
    assert "there is no such folder" in refused(tmp_path / "gone")


@pytest.mark.parametrize("name", ["runs--1", "out..2", "somebody/x--y", "model.git", "run-"])
def test_names_that_the_hub_does_not_take(name: str) -> None:
    assert "there is no such folder" in refused(name)


def test_folders_of_every_kind(tmp_path: Path) -> None:
    check_source(str(save_tiny(tmp_path / "model")))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    check_source(str(tmp_path / "adapter"))


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def offline(url: str, **options: Any) -> None:
        asked.append(url)
        raise huggingface_hub.errors.OfflineModeIsEnabled("nobody answers")

    monkeypatch.setattr(source, "get_hf_file_metadata", offline)
    message = refused("somebody/nothing-of-this-name")
    assert message.endswith("no such folder, and the Hub cannot be asked: nobody answers")
    assert len(asked) == 1


def test_what_only_starts_ranks_loads_no_models(tmp_path: Path) -> None:
    data = tmp_path / "data.yaml"
    data.write_text("datasets:\n  a: {adapter: llava, path: a.jsonl}\n")
    (tmp_path / "a.jsonl").write_text("{}\n")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from longvila.cli.train import Options, check_files, settings_of\n"
        "from longvila.errors import CheckpointError\n"
        "stage = settings_of(Options('sft', set=('mixture=a',)))\n"
        "try: check_files('/nowhere/gone', Path(sys.argv[1]), stage)\n"
        "except CheckpointError as fault: print(fault)\n"
        "print({'torch', 'transformers'} & set(sys.modules))\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[3] / "src"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, str(data)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["--model /nowhere/gone: there is no such folder", "set()"]
