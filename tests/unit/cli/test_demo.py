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
from longvila.errors import VideoError
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


def test_shipped_pictures_are_half_unseen_and_named_once() -> None:
    folder = asset("needles")
    assert folder is not None
    needles = demo.choose_needles(folder, 24, seed=0)
    assert sum(needle.seen for needle in needles) == 12
    assert len({needle.name for needle in needles}) == 24
    assert demo.choose_needles(folder, 24, seed=0) == needles
    names_file = asset("names.json")
    assert names_file is not None
    names = json.loads(names_file.read_text())
    assert {needle.name for needle in needles} <= set(names)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000


def test_shipped_delta_is_small_and_says_its_base() -> None:
    from longvila.model.delta import read_delta_metadata

    delta = asset(DELTA)
    assert delta is not None and delta.stat().st_size < 20_000_000
    assert read_delta_metadata(delta)["init"]["llm"] == "smollm2-135m"


def test_written_video_shows_the_picture_at_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CLIP_S", 8.0)
    folder = tmp_path / "needles"
    folder.mkdir()
    Image.new("RGBA", (40, 40), "red").save(folder / "red.webp")
    film = clip(tmp_path / "film.mp4", 24 * 12, height=48, width=64)
    needle = demo.Needle("red", "red.webp", seen=False)
    rng = np.random.default_rng(0)
    demo.write_video(tmp_path / "v.mp4", film, 2.0, [needle], folder, rng)
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


def test_whole_demo_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "CLIP_S", 9.0)
    monkeypatch.setattr(demo, "SIZE", (64, 48))
    film = clip(tmp_path / "film.mp4", 24 * 40, height=48, width=64)
    tiny_model(0).save_pretrained(tmp_path / "model")
    tiny_processor(timestamps=True).save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--film", str(film), "--pictures", "4"]
    out = tmp_path / "out"
    assert demo.main([*arguments, "--per-video", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "never seen in training" in printed
    answers = json.loads((out / "answers.json").read_text())
    assert answers["tiers"]["seen"]["n"] == answers["tiers"]["unseen"]["n"] == 2
    assert {needle["video"] for needle in answers["needles"]} == {"video0.mp4", "video1.mp4"}
    assert (out / "contact_sheet.png").stat().st_size > 1000
