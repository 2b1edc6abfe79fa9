"""Media: bounded before they are decoded, kept afterwards, known by their pixels."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longvila.inference.serving import media as media_module
from longvila.inference.serving.access import Gate
from longvila.inference.serving.errors import Cancelled, RequestError
from longvila.inference.serving.media import MediaLoader, Wanted
from longvila.inference.serving.settings import Access
from longvila.inference.serving.uploads import Uploads
from longvila.testing import tiny

from .serving_cases import LIMITS, clip, data_uri, replace


def loader(root: Path, **limits: Any) -> MediaLoader:
    bounds = replace(LIMITS, **limits)
    gate = Gate(Access(roots=(root,)), bounds, Uploads(1))
    return MediaLoader(tiny.tiny_processor(), gate, bounds, frames=4, cache_bytes=20_000)


def test_a_file_is_decoded_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip(tmp_path / "a.mp4")
    load = loader(tmp_path)
    first = load.load(Wanted("video", "a.mp4"))
    assert first.count == 4 and load.load(Wanted("video", "a.mp4")) is first
    assert load.load(Wanted("video", "a.mp4", num_frames=5)) is not first
    data = load.load(Wanted("video", data_uri(tmp_path / "a.mp4")))
    assert data is not first and (data.digests == first.digests).all()
    clip(tmp_path / "b.mp4", seed=1)
    shutil.copy(tmp_path / "b.mp4", tmp_path / "a.mp4")
    changed = load.load(Wanted("video", "a.mp4"))
    assert changed is not first and (changed.digests != first.digests).any()
    assert load.kept.weight <= 20_000


def test_a_file_copied_over_another_is_noticed_whatever_its_time(tmp_path: Path) -> None:
    path, load = tmp_path / "a.bmp", loader(tmp_path)
    found = []
    for colour in ("red", "blue"):
        Image.new("RGB", (20, 20), colour).save(path)
        os.utime(path, ns=(10**18, 10**18))
        found.append(load.load(Wanted("image", "a.bmp")).whole)
        time.sleep(0.02)  # file systems keep time in ticks
    assert found[0] != found[1]


def test_digests_are_of_pixels_and_secret(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    ours, theirs = (loader(tmp_path).load(Wanted("video", "a.mp4")) for _ in range(2))
    assert (ours.digests < 0).all() and ours.whole < 0
    assert np.array_equal(ours.video.frames, theirs.video.frames)  # type: ignore[union-attr]
    assert not np.array_equal(ours.digests, theirs.digests)


def test_frames_of_other_shapes_are_others_whatever_their_bytes(tmp_path: Path) -> None:
    processor = tiny.tiny_processor(tiny.tiny_config(image_aspect_ratio="pad"))
    load = MediaLoader(processor, loader(tmp_path).gate, LIMITS, frames=2, cache_bytes=0)
    found = []
    for name, size in (("lies.gif", (40, 20)), ("stands.gif", (20, 40))):
        dark = Image.new("RGB", size)
        dark.save(tmp_path / name, save_all=True, append_images=[dark, dark])
        found.append(load.load(Wanted("video", name)))
    lies, stands = (medium.video.frames for medium in found)  # type: ignore[union-attr]
    assert lies.tobytes() == stands.tobytes() and lies.shape != stands.shape
    assert not set(found[0].digests) & set(found[1].digests)


def test_frames_are_counted_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip(tmp_path / "a.mp4")
    load = loader(tmp_path)
    monkeypatch.setattr(
        load.processor.video_processor, "sample", lambda *a, **k: pytest.fail("decoded")
    )
    with pytest.raises(RequestError, match=r"fps of at most 21\.3") as caught:
        load.load(Wanted("video", "a.mp4", num_frames=65))
    assert caught.value.code == "too_many_frames" and caught.value.param == "num_frames"
    with pytest.raises(RequestError, match="2 of the 64 frames"):
        load.load(Wanted("video", "a.mp4"), frames_left=2)


@pytest.mark.parametrize("short", ["repeat", "all"])
@pytest.mark.parametrize(
    ("num_frames", "fps"), [(3, None), (64, None), (None, 0.1), (None, 7.3), (20, 7.3), (2, 7.3)]
)
def test_frames_are_estimated_as_they_are_sampled(
    tmp_path: Path, short: str, num_frames: int | None, fps: float | None
) -> None:
    clip(tmp_path / "a.mp4")
    load = loader(tmp_path)
    part = load.processor.video_processor
    part.short = short
    video = part.sample(str(tmp_path / "a.mp4"), num_frames=num_frames, fps=fps)
    count = media_module._most_frames(video.metadata, num_frames, fps, short)
    assert 0 <= count - len(video.frames) <= 1


def test_a_kept_video_is_counted_too(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    load = loader(tmp_path)
    load.load(Wanted("video", "a.mp4"))
    with pytest.raises(RequestError, match="ask for fewer"):
        load.load(Wanted("video", "a.mp4"), frames_left=3)


def test_messages_do_not_tell_where_files_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + b"x" * 500)
    clip(tmp_path / "b.mp4")
    whole = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(media_module, "check_video", lambda *a: None)
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(RequestError) as caught:
            loader(tmp_path).load(Wanted("video", name))
        assert name in caught.value.message and str(tmp_path) not in caught.value.message


def test_decoding_ends_in_time_and_when_nobody_waits(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    with pytest.raises(RequestError, match="fewer frames") as caught:
        loader(tmp_path).load(Wanted("video", "a.mp4"), deadline=time.monotonic() - 1)
    assert caught.value.code == "media_timeout"

    def leave(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        loader(tmp_path).load(Wanted("video", "a.mp4"), progress=leave)


def test_a_file_exchanged_while_it_is_read_is_not_answered_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    clip(root / "a.mp4")
    clip(tmp_path / "secret.mp4", seed=1)
    load = loader(root)
    sample = load.processor.video_processor.sample

    def exchanged(source: Any, **options: Any) -> Any:
        (root / "a.mp4").unlink()
        (root / "a.mp4").symlink_to(tmp_path / "secret.mp4")
        return sample(source, **options)

    monkeypatch.setattr(load.processor.video_processor, "sample", exchanged)
    with pytest.raises(RequestError, match="changed while it was read"):
        load.load(Wanted("video", "a.mp4"))
    assert not len(load.kept)


def test_pictures_for_other_families_are_upright_and_videos_bounded(tmp_path: Path) -> None:
    load = loader(tmp_path, decoded_bytes=4 * 64 * 48 * 3)
    part = SimpleNamespace(num_frames=4, fps=None, size={"height": 28, "width": 28})
    processor = SimpleNamespace(video_processor=part)
    load = MediaLoader(processor, load.gate, load.limits, frames=None, cache_bytes=0)
    upright = Image.Exif()
    upright[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=upright)
    assert load.load(Wanted("image", "a.jpg")).picture.size == (20, 30)
    clip(tmp_path / "a.mp4")
    assert load.load(Wanted("video", "a.mp4")).count == 4
    with pytest.raises(RequestError, match="46080 bytes, at most 36864 are taken"):
        load.load(Wanted("video", "a.mp4", num_frames=5))


def test_a_video_without_a_length_is_advised_about_too(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"or a lower fps$"):
        loader(tmp_path)._check_frames(5, 4, 0.0)
