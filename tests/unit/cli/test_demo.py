"""The demo's parts on a tiny model and a tiny film; nothing is downloaded."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvila.cli import demo
from longvila.cli.main import main
from longvila.errors import LongVILAError, VideoError
from longvila.evaluation.summary import Share
from longvila.media.synthetic import clip
from longvila.media.video import read_frames
from longvila.packaged import DELTA, asset
from longvila.testing.tiny import tiny_model, tiny_processor


def test_times_do_not_overlap() -> None:
    times = demo.place(4, 30.0, np.random.default_rng(0))
    assert all(b - a >= demo.STAY_S for a, b in itertools.pairwise(times))
    assert times == sorted(times) and times[-1] + demo.STAY_S < 30
    with pytest.raises(ValueError, match="9 pictures do not fit into 30"):
        demo.place(9, 30.0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fps", "0.1"], "--fps must be 0.5 or more, got 0.1"),
        (["--fps", "inf"], "--fps must be 0.5 or more, got inf"),
        (["--seed", "-1"], "--seed must be 0 or more"),
        (["--seen", "-1"], "--seen must be 0 or more"),
        (["--grid", "32", "3"], "--grid: 3 frames have no room for 3 pictures, 12 do"),
        (["--film", "none.mp4"], "--film: there is no film none.mp4"),
        (["--videos", "0"], "--videos must be 1 to"),
    ],
)
def test_what_is_wrong_is_told_first(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--model", "no-such-model", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = clip(tmp_path / "film.mp4", 4)
    assert main(["demo", "--model", "./no-such-model", "--film", str(film)]) == 1
    assert "--model ./no-such-model" in capsys.readouterr().err


def test_shipped_pictures_are_half_unseen_and_named_once() -> None:
    folder = asset("needles")
    assert folder is not None
    needles = demo.choose_needles(folder, 12, 12, seed=0)
    assert sum(needle.seen for needle in needles) == 12
    assert len({needle.name for needle in needles}) == 24
    assert demo.choose_needles(folder, 12, 12, seed=0) == needles
    some = demo.choose_needles(folder, 10, 5, seed=1)
    assert [sum(needle.seen == kind for needle in some) for kind in (True, False)] == [10, 5]
    with pytest.raises(LongVILAError, match="there are 12 pictures from training, not 13"):
        demo.choose_needles(folder, 13, 0, seed=0)
    names_file = asset("names.json")
    assert names_file is not None
    names = json.loads(names_file.read_text())
    assert {needle.name for needle in needles} <= set(names)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


def test_shipped_delta_is_small_and_says_its_base() -> None:
    from longvila.model.delta import read_delta_metadata

    delta = asset(DELTA)
    assert delta is not None and delta.stat().st_size < 40_000_000
    assert read_delta_metadata(delta)["init"]["llm"] == "smollm2-135m"


def test_written_video_shows_the_picture_at_its_time(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "needles"
    folder.mkdir()
    Image.new("RGBA", (40, 40), "red").save(folder / "red.webp")
    film = clip(tmp_path / "film.mp4", 24 * 12, height=48, width=64)
    needle = demo.Needle("red", "red.webp", seen=False)
    rng = np.random.default_rng(0)
    demo.write_video(tmp_path / "v.mp4", film, 2.0, 8.0, [needle], folder, rng)
    seen = read_frames(str(tmp_path / "v.mp4"), fps=2)
    red = seen.frames.astype(int)
    share = ((red[..., 0] > 180) & (red[..., 1] < 90)).mean((1, 2))
    inside = (seen.timestamps_s >= needle.time_s) & (
        seen.timestamps_s < needle.time_s + demo.STAY_S
    )
    assert inside.any() and (share[inside] > 0.15).all()
    assert (share[~inside] < 0.05).all()
    assert len(seen.frames) == 16


def test_short_film_is_an_error(tmp_path: Path) -> None:
    film = clip(tmp_path / "film.mp4", 24, height=48, width=64)
    with pytest.raises(VideoError, match="ends before 31 s"):
        list(demo.film_frames(film, 1.0, 30.0))


def test_report_keeps_tiers_apart() -> None:
    needles = [
        demo.Needle("cat", "", True, "v", 3, "cat", "cat"),
        demo.Needle("dog", "", True, "v", 5, "cow", "dog"),
        demo.Needle("owl", "", False, "v", 63, "bat", "bat"),
    ]
    out = io.StringIO()
    figures = demo.report(needles, out)
    assert figures["seen"] == {"n": 2, "named": 1, "chosen": 2, "chance": 0.05}
    assert figures["unseen"] == {"n": 1, "named": 0, "chosen": 0, "chance": 0.05}
    text = out.getvalue()
    assert "01:03" in text and "guessing gives 5%" in text and "cow (wrong)" in text


def test_contact_sheet_has_a_cell_for_each(tmp_path: Path) -> None:
    frame = np.full((36, 64, 3), 200, np.uint8)
    cells = [(frame, demo.Needle("cat", "", True, "v", 3, "cat"))] * 5
    demo.contact_sheet(cells, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 320, 2 * (180 + 46))


def test_fewer_than_wanted_is_said_and_fails() -> None:
    figures = {"seen": {"n": 10, "named": 8, "chosen": 8}}
    reached, sentence = demo.verdict(figures, demo.Options(right=8))
    assert reached and sentence.endswith("at least 8 were wanted: reached.")
    reached, sentence = demo.verdict(figures, demo.Options(right=9))
    assert not reached and sentence.endswith("at least 9 were wanted: NOT REACHED.")
    assert not demo.verdict({}, demo.Options())[0]


def test_terminal_map_has_a_cell_for_each_length_and_depth() -> None:
    def cell(right: int, n: int) -> Share:
        return Share(n, right, 0.0, 1.0, right / n, 0.0, 0.1, 0, 7)

    grid = {(32, 0.0): cell(2, 2), (32, 1.0): cell(0, 2), (1024, 1.0): cell(1, 2)}
    head, first, last = demo.draw_grid(grid).splitlines()
    assert head.split() == ["depth", "32", "1024", "frames"]
    assert first.split() == ["0%", "#", "2/2"]
    assert last.split() == ["100%", ".", "0/2", "+", "1/2"]


def test_whole_demo_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIZE", (64, 48))
    monkeypatch.setattr(demo, "EACH_S", 4.5)
    film = clip(tmp_path / "film.mp4", 24 * 50, height=48, width=64)
    tiny_model(0).save_pretrained(tmp_path / "model")
    tiny_processor(timestamps=True).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--model", str(tmp_path / "model"), "--film", str(film), "--out", str(out)]
    arguments += ["--seen", "2", "--unseen", "2", "--videos", "2", "--grid", "12", "14"]
    assert demo.main([*arguments, "--right", "0"]) == 0
    printed = capsys.readouterr().out
    assert "never seen in training" in printed and "at least 0 were wanted: reached." in printed
    answers = json.loads((out / "answers.json").read_text())
    assert answers["tiers"]["seen"]["n"] == answers["tiers"]["unseen"]["n"] == 2
    assert {needle["video"] for needle in answers["needles"]} == {"video0.mp4", "video1.mp4"}
    assert (out / "contact_sheet.png").stat().st_size > 1000
    assert "12      14  frames" in printed and "100%" in printed
    assert (out / "grid" / f"heat-retrieval-{demo.GOAL.by}-seen.png").stat().st_size > 1000

    # A tiny model knows nothing: the demo says so and fails, and asks anew.
    assert demo.main([*arguments[:-3], "--grid", "--right", "2"]) == 1
    assert "2 were wanted: NOT REACHED." in capsys.readouterr().out
    with pytest.raises(LongVILAError, match=r"--videos must be 1 to 4, got 5"):
        demo.main([*arguments, "--videos", "5"])
