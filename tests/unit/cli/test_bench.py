"""The verb on a tiny model, with material drawn in code or handed in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from longvila.cli import bench
from longvila.cli.main import main
from longvila.errors import LongVILAError
from longvila.media.synthetic import clip
from longvila.testing.tiny import save_tiny, tiny_processor


def test_the_small_benchmark_runs_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model")
    arguments = ["bench", "--small", "--model", str(folder), "--out", str(tmp_path / "out")]
    arguments += ["--captions", "2", "--no-control"]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "caption, choice | seen" in first.out and "counting, free | unseen" in first.out
    assert main(arguments) == 0
    assert capsys.readouterr().out == first.out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["benchmark"] == "builtin"
    assert {row["shape"]["frames"] for row in result["rows"]} == {None, 1, 16, 32}


def test_a_film_is_spread_over_the_frames(tmp_path: Path) -> None:
    film = clip(tmp_path / "film.mp4", 24 * 9)
    options = bench.Options(
        film=str(film), part=(1 / 3, 1.0), lengths=(8, 36), pictures=str(_pictures())
    )
    plan = bench.plan_of(options)
    processor = tiny_processor(size={"height": 48, "width": 64})
    material = bench.material_of(options, plan, processor, bench.pictures_of(options))
    assert material.haystack.book.num_frames == 36 and material.events == []
    assert (material.start_s, material.duration_s) == pytest.approx((3.0, 6.0))
    from longvila.media.synthetic import read_number

    numbers = [read_number(material.haystack.book.frame(k)) for k in (0, 18, 35)]
    assert numbers[0] == 72 and abs(numbers[1] - 144) <= 1 and numbers[2] >= 208  # type: ignore[operator]


def test_films_of_a_folder_are_spread_together(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    for number in (1, 2):
        clip(tmp_path / "films" / f"{number}.mp4", 24 * number, first_number=1000 * number)
    options = bench.Options(film=str(tmp_path / "films"), lengths=(6, 12))
    plan = bench.plan_of(options)
    processor = tiny_processor(size={"height": 48, "width": 64})
    material = bench.material_of(options, plan, processor, [])
    assert material.duration_s == pytest.approx(3.0)
    from longvila.media.synthetic import read_number

    numbers = [read_number(material.haystack.book.frame(k)) or 0 for k in range(12)]
    assert numbers == sorted(numbers) and numbers[3] < 1024 and numbers[-1] >= 2030
    (tmp_path / "stills").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "stills" / "a.png")
    options = bench.Options(film=str(tmp_path / "stills"), lengths=(6, 12))
    with pytest.raises(LongVILAError, match=r"stills has 1 pictures and 12 frames are needed"):
        bench.material_of(options, plan, processor, [])


def _pictures() -> Path:
    from longvila.cli._measuring import shipped

    return shipped()


def test_bad_lengths_are_told_first() -> None:
    with pytest.raises(LongVILAError, match="--lengths: lengths must be positive"):
        bench.main(["--lengths", "0"])


def test_what_is_wrong_is_told_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, message in (
        (["--film", "none.mp4", "--pictures", str(_pictures())], "there is no haystack none.mp4"),
        (["--pictures", "none"], "no needles at none"),
        (["--captions", "-1"], "--captions must be 0 or more"),
        (["--per-tier", "0"], "--per-tier 1 or more"),
        (["--pictures", str(_pictures()), "--trials", "0"], "at least one film a cell"),
    ):
        assert main(["bench", "--model", "no-such-model", *arguments]) == 1
        assert message in capsys.readouterr().err
