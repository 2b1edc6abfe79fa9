"""The verb on a tiny model: runs, goes on, and says what is wrong before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

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
    words.write_bytes(b'\xef\xbb\xbf{"at": "What {is} it?"}')
    with pytest.raises(LongVILAError, match=r"'at' may hold {time}"):
        needle.plan_of(needle.Options(words=words))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--haystack", "none.mp4"], "there is no haystack none.mp4"),
        (["--haystack", "synthetic", "--fps", "0"], "frames a second must be a number above"),
        (["--part", "0.5", "0.2"], "two shares of it in order"),
        (["--lengths", "0", "16"], "lengths must be positive"),
        (["--tasks", "foo"], "there is no task foo; there are retrieval, grounding"),
        (["--trials", "0"], "at least one film a cell"),
        (["--ways", "1"], "a choice of at least 2"),
        (["--per-film", "9"], "3 to 8 needles a film"),
        (["--lengths", "15"], "15 frames have no room for 4 needles: 16 do"),
        (["--step-s", "0"], "seconds between frames must be a number above zero"),
        (["--step-s", "inf"], "must be a number above zero, got inf"),
        (["--depth-interval", "1e-12"], "must divide 1"),
        (["--seed", "-1"], "--seed must be 0 to 2**32 - 1, got -1"),
        (["--device", "foo"], "torch knows no such device"),
        (["--seq-parallel-size", "4"], "1 process can share a sequence; torchrun starts more"),
        (["--seq-parallel-size", "0"], "--seq-parallel-size 0"),
        (["--chunk-tokens", "0"], "--chunk-tokens must be at least 1"),
        (["--preset", "paper-1400", "--lengths", "32"], "give one"),
        (["--needles", "none"], "neither a file, a folder nor"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["needle", "--model", "no-such-model", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_few_pictures_get_to_know_what_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog", "fish", "bird"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert main(["needle", "--needles", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "take --per-film 3, more pictures, or the paper's test alone (--protocol paper)" in said
    (tmp_path / "words.json").write_text("{")
    assert main(["needle", "--words", str(tmp_path / "words.json")]) == 1
    assert "is no JSON" in capsys.readouterr().err
    assert main(["needle", "--out", str(tmp_path / "words.json")]) == 1
    assert "is a file; give a folder" in capsys.readouterr().err


def test_beyond_the_context_only_if_asked(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "short", text_config={"max_position_embeddings": 96})
    tiny_processor(tiny_config()).save_pretrained(folder)
    arguments = ["--model", str(folder), "--out", str(tmp_path / "o"), "--protocol", "paper", *GRID]
    with pytest.raises(ContextLengthError, match=r"the longest scene, 17 frames, .*context of 96"):
        needle.main(arguments)
    assert needle.main([*arguments, "--beyond-context"]) == 0


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "longvila needle: interrupted"),
        (PermissionError(13, "Permission denied", "film.mp4"), 1, "Permission denied: 'film.mp4'"),
    ],
)
def test_stopping_and_paths_that_cannot_be_used_leave_no_traceback(
    fault: BaseException, status: int, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(argv: list[str]) -> int:
        raise fault

    monkeypatch.setattr(needle, "main", fails)
    assert main(["needle"]) == status
    assert message in capsys.readouterr().err
