"""What the packaged task files call."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvila.evaluation import lmms_tasks as tasks
from longvila.media.synthetic import clip

DOC = {
    "videoID": "film",
    "question": "Who?",
    "options": ["A. I", "B. You", "C. He", "D. She"],
    "answer": "B",
    "duration": "short",
}


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    assert tasks.media_folder({"media": "videomme"}) == tmp_path / "videomme"
    assert tasks.media_folder({"media": "$DATA/x"}) == Path("/data/x")


def test_videos_are_found_where_data_sets_put_them(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    clip(tmp_path / "videos" / "a.b.mkv", 2)
    assert tasks.find_video(tmp_path, "a.b.mp4") == str(tmp_path / "videos" / "a.b.mkv")
    # VNBench's paths begin with a slash, and are not the machine's.
    assert tasks.find_video(tmp_path, "/videos/a.b.mp4") == str(tmp_path / "videos" / "a.b.mkv")
    # A dot of a name without an ending: the second clip is not the only file that begins so.
    clip(tmp_path / "clip.mp4", 2)
    with pytest.raises(FileNotFoundError):
        tasks.find_video(tmp_path, "clip.2")
    clip(tmp_path / "clip.2.mp4", 2)
    assert tasks.find_video(tmp_path, "clip.2") == str(tmp_path / "clip.2.mp4")
    with pytest.raises(FileNotFoundError, match=r"no video c\.mp4 in .*--data TASK=FOLDER"):
        tasks.find_video(tmp_path, "c.mp4")


def test_prompts_of_videomme(tmp_path: Path) -> None:
    clip(tmp_path / "film.mp4", 24, fps=8)  # three seconds
    kwargs = {"media": str(tmp_path), "frames": 2}
    assert tasks.videomme_visual(DOC, kwargs) == [str(tmp_path / "film.mp4")]
    plain = tasks.videomme_text(DOC, kwargs)
    assert plain.endswith("option.\nWho?\nA. I\nB. You\nC. He\nD. She\nThe best answer is:")
    assert "based on the video. " in plain
    assert tasks.videomme_subtitle_text(DOC, kwargs) == plain  # there are none
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / "film.srt").write_text(
        "1\n00:00:00,000 --> 00:00:00,500\nstart\n\n"
        "2\n00:00:01,000 --> 00:00:02,000\nmiddle\n\n"
        "3\n00:00:02,500 --> 00:00:09,000\nend\n"
    )
    text = tasks.videomme_subtitle_text(DOC, kwargs)
    assert text.startswith("This video's subtitles are listed below:\nstart\nend\nSelect the best")
    assert "based on the video and the subtitles. " in text
    missing = {**DOC, "videoID": "gone"}
    (tmp_path / "subtitle" / "gone.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nx\n")
    assert tasks.videomme_subtitle_text(missing, kwargs) == plain
    more = tasks.videomme_subtitle_text(DOC, {**kwargs, "frames": 3})
    assert "\nstart\nmiddle\nend\n" in more


def test_other_prompts() -> None:
    asked = "Who?\nA. 1\nB. two\nAnswer with the option's letter from the given choices directly."
    assert tasks.vnbench_text({"question": "Who?", "options": [1, "two"]}) == asked
    assert tasks.eventbench_text({"question": "Who?", "candidates": ["1", "two"]}) == asked
    assert tasks.needle_text({"question": "Who?", "options": [1, "two"]}) == asked
    assert "single word" in tasks.needle_text({"question": "Who?", "options": None})


def test_a_needle_is_named_not_read() -> None:
    doc = {"haystack": "film.mp4", "needle": "n.png", "frames": 10, "depth": 0.25}
    (shown,) = tasks.needle_visual(doc, {"media": "/data"})
    assert shown["url"] == {
        "splice": {"haystack": "/data/film.mp4", "frames": 10, "pictures": [[2, "/data/n.png"]]}
    }
    (shown,) = tasks.needle_visual({**doc, "frames": 100, "depth": 0.29}, {"media": "/data"})
    assert shown["url"]["splice"]["pictures"] == [[29, "/data/n.png"]]


def test_scores() -> None:
    right = tasks.videomme_results(DOC, ["B. You"])
    assert right["accuracy"]["score"] == 1.0 and right["unparsable"]["score"] == 0.0
    nothing = tasks.videomme_results(DOC, ["who knows"])
    assert nothing["accuracy"]["score"] == 0.0 and nothing["unparsable"]["score"] == 1.0
    assert nothing["accuracy"]["video"] == "film"
    assert tasks.videomme_target(DOC) == "B"
    entries = [{"group": "x", "score": 1.0}, {"group": "x", "score": 0.0}]
    entries.append({"group": "y", "score": 1.0})
    assert tasks.mean_score(entries) == pytest.approx(2 / 3)
    assert tasks.group_score(entries) == 0.5
