"""Reading videos end to end: sampling, memory, and files that are broken."""

from __future__ import annotations

import itertools
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from longvila.errors import VideoError
from longvila.media.reader import fit
from longvila.media.sampling import uniform_indices
from longvila.media.synthetic import (
    audio_only,
    clip,
    damage,
    numbered_frame,
    read_number,
    truncate,
)
from longvila.media.video import open_video, read_frames

Draw = Callable[[str], Path]


def numbers(frames: np.ndarray) -> list[int | None]:
    return [read_number(frame) for frame in frames]


def test_uniform_sampling(draw: Draw) -> None:
    got = read_frames(draw("h264_gop60"), num_frames=16)
    assert numbers(got.frames) == uniform_indices(300, 16).tolist() == got.indices.tolist()
    assert np.allclose(got.timestamps_s, got.indices / 24)
    assert got.missing == ()


def test_a_video_shorter_than_asked(tmp_path: Path) -> None:
    path = clip(tmp_path / "short.mp4", 3)
    assert numbers(read_frames(path, num_frames=5).frames) == [0, 0, 1, 2, 2]
    assert numbers(read_frames(path, num_frames=5, short="all").frames) == [0, 1, 2]


def test_one_frame(tmp_path: Path) -> None:
    got = read_frames(clip(tmp_path / "one.mp4", 1), num_frames=4)
    assert numbers(got.frames) == [0, 0, 0, 0]
    assert got.metadata.fps > 0 and got.metadata.duration_s > 0


def test_fps_and_timestamps_follow_the_clock_of_variable_rate(draw: Draw) -> None:
    path = draw("h264_vfr")
    shown = np.array([i * i * 3 + i * 7 for i in range(160)]) / 1000
    got = read_frames(path, timestamps_s=[0, 1.0, 30.0, 1e6])
    expected = [int(np.searchsorted(shown, t + 1e-4, "right") - 1) for t in (0, 1.0, 30.0, 1e6)]
    assert numbers(got.frames) == got.indices.tolist() == expected
    got = read_frames(path, fps=0.2)
    assert np.abs(np.diff(got.timestamps_s) - 5).max() < 1.0
    assert numbers(got.frames) == got.indices.tolist()
    limited = read_frames(path, fps=0.2, num_frames=4)
    assert len(limited.frames) == 4
    assert limited.indices[-1] == got.indices[-1]


def test_frames_come_in_the_order_asked(draw: Draw) -> None:
    got = read_frames(draw("h264_gop60"), indices=[200, 3, 200, 61])
    assert numbers(got.frames) == [200, 3, 200, 61] == got.indices.tolist()


def test_resizing_while_decoding_is_pil_bicubic(draw: Draw) -> None:
    path = draw("h264_gop60")
    plain = read_frames(path, num_frames=4)
    small = read_frames(path, num_frames=4, size=(32, 40))
    for whole, resized in zip(plain.frames, small.frames, strict=True):
        assert np.array_equal(fit(whole, (32, 40)), resized)
        picture = Image.fromarray(whole).resize((40, 48), Image.Resampling.BICUBIC)
        picture = picture.resize((40, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(picture), resized)


def test_indices_may_be_whole_numbers_of_any_kind(draw: Draw) -> None:
    for indices in ([3, 1], np.array([3.0, 1.0]), (np.uint8(3), np.int64(1))):
        assert read_frames(draw("h264_gop60"), indices=indices).indices.tolist() == [3, 1]


def test_progress(draw: Draw) -> None:
    seen: list[tuple[int, int]] = []
    read_frames(draw("h264_gop60"), num_frames=3, progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_memory_does_not_grow_with_the_frames(tmp_path: Path) -> None:
    path = clip(tmp_path / "large.mp4", 64, height=240, width=320)
    peaks = []
    for count in (8, 64):
        with open_video(path) as reader:
            tracemalloc.start()
            for frame in reader.frames(uniform_indices(64, count).tolist(), size=(32, 32)):
                assert frame.image.shape == (32, 32, 3)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    frame_bytes = 240 * 320 * 3
    assert peaks[1] < peaks[0] + frame_bytes
    assert peaks[1] < 8 * frame_bytes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "expected one way of sampling"),
        ({"num_frames": 2, "indices": [1]}, ValueError, "expected one way of sampling"),
        ({"fps": 2.0, "timestamps_s": [1.0]}, ValueError, "expected one way of sampling"),
        ({"indices": []}, ValueError, "no frame was asked for"),
        ({"indices": [0.0, 1.5]}, ValueError, r"whole numbers, got \[0.0, 1.5\]"),
        ({"indices": "01"}, ValueError, "whole numbers, got"),
        ({"indices": [300]}, IndexError, "there is no frame 300; the video has frames 0 to 299"),
        ({"num_frames": 2, "backend": "decord"}, ValueError, "backend must be auto, pyav"),
    ],
)
def test_messages(draw: Draw, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_frames(draw("h264_gop60"), **options)


# Broken inputs: one error that names the file, and never a hang.


def write(content: bytes) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return build


def empty_folder(path: Path) -> Path:
    path.mkdir()
    (path / "readme.txt").write_text("no frames here")
    return path


def sound_with_a_cover(path: Path) -> Path:
    """A file of sound that carries one picture, as music does."""
    with av.open(str(path), "w") as out:
        sound: Any = out.add_stream("libmp3lame", rate=44100, layout="mono")
        cover: Any = out.add_stream("mjpeg")
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        picture = av.VideoFrame.from_ndarray(numbered_frame(1), format="rgb24")
        out.mux(cover.encode(picture.reformat(format="yuvj420p")))
        out.mux(cover.encode(None))
        silence = np.zeros((1, 1152), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    return path


BROKEN: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "empty": ("a.mp4", write(b""), "file is empty"),
    "text": ("a.mp4", write(b"this is not a video\n" * 100), "cannot be opened as a video"),
    "zeros": (
        "a.mp4",
        write(bytes(100_000)),
        r"cannot be opened as a video \(Invalid data found when processing input\); is it",
    ),
    "noise": (
        "a.mp4",
        write(np.random.default_rng(0).bytes(100_000)),
        "cannot be opened as a video",
    ),
    "head only": ("a.mp4", lambda p: truncate(clip(p, 50), 0.01), "cannot be opened as a video"),
    "no index": ("a.mp4", lambda p: truncate(clip(p, 50), 0.7), "was its recording or copying"),
    "sound only": ("a.m4a", audio_only, r"has no video stream \(found: audio\)"),
    "sound with a cover": (
        "a.mp3",
        sound_with_a_cover,
        r"has no video stream \(found: a cover picture, audio\)",
    ),
    "no frames": ("a.mp4", lambda p: clip(p, 0), "a.mp4"),
    "folder": ("frames", empty_folder, "folder without pictures"),
    "all noise inside": (
        "a.mp4",
        lambda p: damage(clip(p, 50, container_options={"movflags": "faststart"}), 0.3, 1.0),
        "a.mp4",
    ),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_inputs_give_one_clear_error(tmp_path: Path, case: str) -> None:
    name, build, message = BROKEN[case]
    path = build(tmp_path / name)
    with pytest.raises(VideoError, match=message) as caught:
        read_frames(path, num_frames=4)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nclip.ts\n#EXT-X-ENDLIST\n"),
        ("list.mp4", "ffconcat version 1.0\nfile clip.ts\n"),
    ],
)
def test_a_list_of_files_is_not_followed(tmp_path: Path, name: str, text: str) -> None:
    clip(tmp_path / "clip.ts", 8)
    (tmp_path / name).write_text(text)
    with pytest.raises(VideoError, match=rf"{name}: is a list of other files"):
        open_video(tmp_path / name)


def test_a_text_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("What happens in the film, line by line.\n" * 300)
    with pytest.raises(VideoError, match=r"notes\.txt: cannot be opened as a video"):
        open_video(tmp_path / "notes.txt")


@pytest.mark.skipif(not hasattr(av.Packet, "has_sidedata"), reason="PyAV 15 cannot tell")
def test_an_encrypted_video_is_called_so(tmp_path: Path) -> None:
    key = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76" * 16}
    path = clip(tmp_path / "a.mp4", 8, container_options={**key, "encryption_kid": "a7" * 16})
    with pytest.raises(VideoError, match=r"a.mp4: is encrypted"):
        open_video(path)


def test_a_title_need_not_be_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "TITLE"
        stream: Any = out.add_stream("mjpeg", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        picture = av.VideoFrame.from_ndarray(numbered_frame(5), format="rgb24")
        out.mux(stream.encode(picture.reformat(format="yuvj420p")))
        out.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"TITLE", b"\xe9t\xe9\xff\xfe"))
    assert numbers(read_frames(path, num_frames=1).frames) == [5]


def test_a_damaged_timestamp_does_not_make_frames_without_end(tmp_path: Path) -> None:
    path = clip(tmp_path / "far.mkv", 4, times_ms=[0, 100, 200, 10**10])
    with pytest.raises(VideoError, match=r"far.mkv: 10 frames a second of 10000000 s are 1e\+08"):
        read_frames(path, fps=10)
    assert len(read_frames(path, fps=10, num_frames=5).frames) == 5


def test_no_pattern_is_seen_in_a_name(tmp_path: Path) -> None:
    for name, number in (("f0.png", 1), ("f1.png", 2), ("f%d.png", 3)):
        Image.fromarray(numbered_frame(number)).save(tmp_path / name)
    assert numbers(read_frames(tmp_path / "f%d.png", num_frames=1, short="all").frames) == [3]


def test_any_damage_gives_frames_or_one_error(tmp_path: Path) -> None:
    whole = clip(tmp_path / "whole.mp4", 60, gop=12, container_options={"movflags": "faststart"})
    content = whole.read_bytes()
    readable = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        path = tmp_path / f"{seed}.mp4"
        path.write_bytes(content)
        start = float(rng.uniform(0, 0.95))
        damage(path, start, min(start + float(rng.uniform(0.001, 0.2)), 1.0), seed=seed)
        if seed % 3 == 0:
            truncate(path, float(rng.uniform(0.2, 1.0)))
        try:
            got = read_frames(path, num_frames=8)
        except VideoError as error:
            assert path.name in str(error)
            continue
        readable += 1
        assert len(got.frames) + len(got.missing) >= 1
        assert len(got.frames) == len(got.indices) == len(got.timestamps_s)
        assert set(got.missing).isdisjoint(got.indices.tolist())
    assert readable >= 15


def test_frames_that_cannot_be_decoded_are_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Keyframes only, so that damage stays inside the frames it hits.
    path = clip(tmp_path / "hit.mp4", 60, codec="mjpeg", pixel_format="yuvj420p")
    content = bytearray(path.read_bytes())
    starts = [i for i in range(len(content)) if content[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 60
    for start, stop in itertools.pairwise(starts[20:24]):
        content[start:stop] = bytes(stop - start)
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        got = read_frames(path, indices=[10, 20, 21, 22, 30])
    assert got.missing == (20, 21, 22)
    assert numbers(got.frames) == [10, 30] == got.indices.tolist()
    assert "hit.mp4: 3 of 5 frames asked for cannot be decoded" in caplog.text
    with pytest.raises(VideoError, match=r"hit\.mp4: none of the 2 frames asked for"):
        read_frames(path, indices=[20, 21])


def test_a_header_that_promises_too_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = clip(tmp_path / "liar.avi", 40, codec="mpeg4", bframes=0)
    content = bytearray(path.read_bytes())
    where = content.find(b"strh") + 8 + 32
    assert int.from_bytes(content[where : where + 4], "little") == 40
    content[where : where + 4] = (4000).to_bytes(4, "little")
    path.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        got = read_frames(path, num_frames=5)
    assert numbers(got.frames) == uniform_indices(40, 5).tolist()
    assert "promises 4000 frames, the file holds 40" in caplog.text
