"""Media of messages: named, compared, decoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longvila.errors import VideoError
from longvila.evaluation.lmms_media import (
    leads,
    media_of,
    name_of,
    named_messages,
    normal_messages,
    read_image,
    read_video,
    words_of,
)
from longvila.media.synthetic import clip, numbered_frame, read_number
from longvila.model.video_processing_longvila import LongVILAVideoProcessor

SAMPLER = LongVILAVideoProcessor(size={"height": 96, "width": 96}, image_aspect_ratio="resize")


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_one_form_for_all_messages() -> None:
    given = user(
        {"type": "video", "url": "a.mp4"},
        {"type": "video", "url": {"url": "b.mp4", "video_start": 1, "video_end": 2}},
        {"type": "video", "url": Path("c.mp4"), "start_time": 3},
        {"type": "video", "url": ["1.png", "2.png"]},
        {"type": "video", "url": {"splice": {"frames": 2}}},
        text("Who?"),
    )
    (message,) = normal_messages(given)
    assert [part.get("source") for part in message["content"]] == [
        "a.mp4",
        {"path": "b.mp4", "start_s": 1, "end_s": 2},
        {"path": "c.mp4", "start_s": 3, "end_s": None},
        {"pictures": ["1.png", "2.png"]},
        {"splice": {"frames": 2}},
        None,
    ]
    assert words_of(message) == "Who?"
    assert len(media_of([message])) == 5
    (plain,) = normal_messages([{"role": "system", "content": "Be good"}])
    assert plain == {"role": "system", "content": [text("Be good")]}
    with pytest.raises(ValueError, match="task shows audio"):
        normal_messages(user({"type": "audio", "url": "a.wav"}))


def test_pictures_in_a_row_may_be_a_video() -> None:
    images = [{"type": "image", "url": f"{i}.png"} for i in range(3)]
    given = user(*images, text("a"), images[0], text("b"))
    (message,) = normal_messages(given, frames_as_video=True)
    assert message["content"] == [
        {"type": "video", "source": {"pictures": ["0.png", "1.png", "2.png"]}},
        text("a"),
        {"type": "image", "source": "0.png"},
        text("b"),
    ]
    (apart,) = normal_messages(given)
    assert [part["type"] for part in apart["content"]].count("image") == 4


def test_equal_media_have_equal_names() -> None:
    red, also, blue = (Image.new("RGB", (2, 3), c) for c in ("red", "red", "blue"))
    assert name_of(red) == name_of(also) != name_of(blue)
    assert name_of({"pictures": [red, "a"]}) == name_of({"pictures": [also, "a"]})
    assert name_of(Image.new("RGB", (3, 2), "red")) != name_of(red)
    (message,) = named_messages(normal_messages(user({"type": "image", "url": red}, text("x"))))
    assert message["content"][0]["source"] == name_of(also)
    with pytest.raises(TypeError, match="not bytes"):
        name_of(b"x")


def test_media_that_can_be_read_first() -> None:
    video = {"type": "video", "url": "a.mp4"}
    assert leads(normal_messages(user(video, video, text("x"), text("y"))))
    assert leads(normal_messages(user(text("x"))))
    assert not leads(normal_messages(user(text("x"), video)))
    assert not leads(normal_messages(user(video, text("x"), video, text("y"))))
    assert not leads(normal_messages(user(video)))
    assert not leads(normal_messages([*user(video, text("x")), *user(text("y"))]))


def test_parts_of_videos(tmp_path: Path) -> None:
    file = str(clip(tmp_path / "a.mp4", 20, fps=10, height=96, width=96))
    whole = read_video(SAMPLER, file, 3)
    assert [read_number(frame) for frame in whole.frames] == [0, 10, 19]
    part = read_video(SAMPLER, {"path": file, "start_s": 0.5, "end_s": 1.05}, 3)
    assert [read_number(frame) for frame in part.frames] == [5, 7, 10]
    assert part.timestamps_s.tolist() == pytest.approx([0.5, 0.7, 1.0])
    rest = read_video(SAMPLER, {"path": file, "start_s": 1.8, "end_s": None}, 2)
    assert [read_number(frame) for frame in rest.frames] == [18, 19]
    with pytest.raises(VideoError, match="no frame from 5 s to 6 s"):
        read_video(SAMPLER, {"path": file, "start_s": 5, "end_s": 6}, 2)
    assert len(read_video(SAMPLER, file, 100, fps=5).frames) == 10


def test_pictures_as_a_video_and_alone(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(numbered_frame(number, 96, 96)).save(paths[-1])
    video = read_video(SAMPLER, {"pictures": paths}, 3)
    assert [read_number(frame) for frame in video.frames] == [0, 2, 5]
    assert read_number(np.asarray(read_image(paths[4]).convert("RGB"))) == 4
    with Image.open(paths[1]) as picture:
        assert read_image(picture) is picture


def test_needles_are_put_in(tmp_path: Path) -> None:
    file = str(clip(tmp_path / "hay.mp4", 8, fps=4, height=96, width=96))
    Image.fromarray(numbered_frame(999, 192, 192)).save(tmp_path / "n.png")
    needle = str(tmp_path / "n.png")
    splice = {"haystack": file, "frames": 4, "pictures": [[0, needle], [2, needle], [4, needle]]}
    video = read_video(SAMPLER, {"splice": splice}, 77)
    assert [read_number(frame) for frame in video.frames] == [999, 0, 2, 999, 5, 7, 999]
    assert video.indices.tolist() == [-1, 0, 2, -1, 5, 7, -1]
    assert video.timestamps_s.tolist() == [0.0, 0.0, 0.5, 1.25, 1.25, 1.75, 1.75]


def test_a_picture_at_the_end_of_a_damaged_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(clip(tmp_path / "hay.mp4", 8))
    Image.new("RGB", (8, 8)).save(tmp_path / "n.png")
    whole = SAMPLER.sample(file, num_frames=8)
    part = replace(
        whole, frames=whole.frames[:6], indices=whole.indices[:6],
        timestamps_s=whole.timestamps_s[:6], missing=(6, 7),
    )  # fmt: skip
    monkeypatch.setattr(SAMPLER, "sample", lambda *_, **__: part, raising=False)
    splice = {"haystack": file, "frames": 8, "pictures": [[4, str(tmp_path / "n.png")]]}
    for place, found in ((4, 3), (8, 6)):
        splice["pictures"][0][0] = place
        video = read_video(SAMPLER, {"splice": splice}, 1)
        assert video.indices.tolist().index(-1) == found and len(video.frames) == 7
