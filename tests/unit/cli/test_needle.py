"""The verb on a tiny model: runs, goes on, and says what is wrong before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longvila.cli import needle
from longvila.cli.main import main
from longvila.errors import ContextLengthError, LongVILAError
from longvila.evaluation.needle import PRESETS, Plan
from longvila.media.synthetic import clip
from longvila.testing.tiny import save_tiny, tiny_config, tiny_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


GRID = ["--max-frames", "16", "--interval", "16", "--depth-interval", "1"]


def test_a_run_and_the_same_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = clip(tmp_path / "film.mp4", 16, fps=1)
    arguments = ["--model", str(checkpoint), "--haystack", str(film), "--out", str(tmp_path / "o")]
    arguments += [*GRID, "--tier", "seen", "--no-control", "--keep-rows"]
    assert main(["needle", *arguments]) == 0
    first = capsys.readouterr()
    assert "paper, forced | seen" in first.out and "page.html" in first.out
    assert "left" in first.err and "paper/16/0/" in first.err
    before = (tmp_path / "o" / "records.jsonl").read_bytes()
    assert main(["needle", *arguments]) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "paper/16" not in again.err
    assert (tmp_path / "o" / "records.jsonl").read_bytes() == before
    assert main(["needle", *arguments, "--seed", "3"]) == 1
    assert "seed was 0, is 3" in capsys.readouterr().err
    (kept,) = (tmp_path / "o").glob("rows-*/*.safetensors")
    assert kept.name == "000000-000016.safetensors"
    # Other weights under the same name are another model.
    save_tiny(checkpoint, seed=1)
    assert main(["needle", *arguments]) == 1
    assert "identity was" in capsys.readouterr().err
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["settings"]["haystack"] == "film.mp4"


def test_options_become_the_plan(tmp_path: Path) -> None:
    assert needle.plan_of(needle.Options()) == Plan()
    preset = needle.plan_of(needle.Options(preset="paper-1400", seed=2))
    assert preset == Plan(**PRESETS["paper-1400"], seed=2)
    words = tmp_path / "words.json"
    words.write_text('{"at": "What at {time}?"}')
    assert needle.plan_of(needle.Options(words=words)).words.at == "What at {time}?"
    words.write_text('{"att": "?"}')
    with pytest.raises(LongVILAError, match="must map some of"):
        needle.plan_of(needle.Options(words=words))


def test_beyond_the_context_only_if_asked(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "short", text_config={"max_position_embeddings": 96})
    tiny_processor(tiny_config()).save_pretrained(folder)
    arguments = ["--model", str(folder), "--out", str(tmp_path / "o"), "--protocol", "paper", *GRID]
    with pytest.raises(ContextLengthError, match="context of 96"):
        needle.main(arguments)
    assert needle.main([*arguments, "--beyond-context"]) == 0
