"""`longvila train` begun again on other data: what changed is said, and a way out works."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stage_files import SMALL, write_data, write_files

from longvila.cli.main import main


def arguments(files: Path, model: Path, output: Path, *sets: str) -> list[str]:
    small = (*SMALL, "epochs=null", "samples_per_step=3", "max_steps=4", *sets)
    return [
        "train", "sft", "--model", str(model), "--data", str(files / "data.yaml"),
        "--output", str(output), *(part for each in small for part in ("--set", each)),
    ]  # fmt: skip


def test_rows_that_were_added_are_named_and_the_way_out_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_files(tmp_path)
    output, further = tmp_path / "out", tmp_path / "further"
    begun = arguments(files, files / "base", output)
    assert main([*begun, "--stop-after", "2"]) == 0
    texts = files / "texts.jsonl"
    texts.write_text(texts.read_text() * 2)

    capsys.readouterr()
    assert main(begun) == 1
    said = capsys.readouterr().err
    assert f"{output}/saves/step-2: the data are not those of the save" in said
    assert "texts: 6 rows (3 an epoch) when saved, 12 rows (6 an epoch) now. Restore" in said
    assert "clips:" not in said.partition("the data are not")[2]

    # What the message advises: end it here, and begin anew with what it learnt.
    assert f"--set optimizer.max_steps=2 ends it here and writes its model to {output}" in said
    assert main([*begun, "--set", "optimizer.max_steps=2"]) == 0
    assert (output / "config.json").is_file()
    assert main([*arguments(files, output, further), "--stop-after", "1"]) == 0
    assert (further / "saves" / "step-1").is_dir()


def test_data_that_are_restored_go_on(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    begun = arguments(files, files / "base", tmp_path / "out")
    assert main([*begun, "--stop-after", "2"]) == 0
    (files / "texts.jsonl").write_text("")
    assert main(begun) == 1
    write_data(files)
    assert main(begun) == 0
    assert (tmp_path / "out" / "config.json").is_file()
