"""The verb writes what ask reads, alone and with two processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longvila.cli import ask
from longvila.cli.main import main
from longvila.errors import LongVILAError
from longvila.media.synthetic import clip
from longvila.testing.tiny import save_tiny


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_what_cannot_be_written_is_said_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    film = str(clip(tmp_path / "film.mp4", 4))
    monkeypatch.setattr(ask, "open_engine", lambda *args: pytest.fail("it was loaded"))
    for output in (film, f"{film}/x/y"):
        status, _, err = run(capsys, "index", film, "--output", output)
        assert status == 1 and "film.mp4 is a file; a stored prompt is a folder" in err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    status, _, err = run(capsys, "index", film, "--output", str(tmp_path / "x" / "y"))
    assert status == 1 and f"{tmp_path} cannot be written to" in err


def test_index_then_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save_tiny(tmp_path / "model"))
    film = str(clip(tmp_path / "film.mp4", 40))
    first, second = str(tmp_path / "one.index"), str(tmp_path / "two.index")
    options = ("--model", model, "--device", "cpu")
    asked = ("What is shown?", "--max-new-tokens", "6", "--device", "cpu")
    _, expected, _ = run(capsys, "ask", film, *asked, "--model", model, "--frames", "5")
    status, _, err = run(capsys, "index", film, "--output", first, *options, "--frames", "5")
    assert status == 0 and "tokens" in err and "MiB" in err
    # The model is the one it was made with, unless another is named.
    status, out, err = run(capsys, "ask", first, *asked)
    assert status == 0 and out == expected and "read before" in err and "5 frames" in err
    status, _, _ = run(
        capsys, "index", film, "--output", second, *options, "--frames", "5", "--gpus", "2"
    )
    assert status == 0 and len(list(Path(second).glob("*.safetensors"))) == 2
    assert run(capsys, "ask", second, *asked)[1] == expected
    status, _, err = run(capsys, "index", film, "--output", first, *options)
    assert status == 1 and "--overwrite" in err
    status, _, err = run(capsys, "ask", film, first, *asked, "--model", model)
    assert status == 1 and "comes before other media" in err
    for sampling in (("--frames", "9"), ("--fps", "2")):
        status, _, err = run(capsys, "ask", first, *asked, *sampling)
        assert status == 1 and "holds the frames that longvila index took" in err
    # A model that was named from its folder is found from another one.
    monkeypatch.chdir(tmp_path)
    argv = ("film.mp4", "--output", "three.index", "--model", "model", "--frames", "5")
    assert run(capsys, "index", *argv, "--device", "cpu")[0] == 0
    monkeypatch.chdir(tmp_path.parent)
    assert run(capsys, "ask", str(tmp_path / "three.index"), *asked)[1] == expected
    other = str(save_tiny(tmp_path / "other", seed=1))
    status, _, err = run(capsys, "ask", first, *asked, "--model", other)
    assert status == 1 and "model.weights" in err


def test_an_index_that_was_not_written_to_the_end_is_no_folder_of_frames(tmp_path: Path) -> None:
    (tmp_path / "cache-00000-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(LongVILAError, match="it was not written to the end"):
        ask.find_index([str(tmp_path)])
