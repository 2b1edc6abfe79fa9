"""What a file is, before a decoder sees it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longvila.errors import VideoError
from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.formats import check_video, open_picture, video_format
from longvila.inference.serving.settings import Limits
from longvila.media import synthetic
from longvila.media.video import open_video

LIMITS = Limits(pixels=100 * 100, duration_s=5.0)


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".mp4", "mp4"), (".mov", "mp4"), (".mkv", "matroska"), (".avi", "avi"), (".ts", "mpegts"),
     (".flv", "flv"), (".mpg", "mpeg")],
)  # fmt: skip
@pytest.mark.parametrize("as_bytes", [False, True])
def test_containers_are_known_by_their_signature(
    tmp_path: Path, suffix: str, name: str, as_bytes: bool
) -> None:
    path = tmp_path / f"film{suffix}"
    options: dict[str, Any] = {"codec": "mpeg2video"} if suffix == ".mpg" else {}
    synthetic.clip(path, num_frames=12, fps=24, width=64, height=48, **options)
    source = path.read_bytes() if as_bytes else path
    assert video_format(path.read_bytes()[:1024]) == name
    check_video(source, "film", LIMITS)
    with open_video(source) as reader:
        assert reader.metadata.width == 64


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '/etc/passwd'\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "[playlist]\nFile1=/etc/passwd\n",
        "<html><video src=a.mp4></video></html>",
        "%PDF-1.7",
        "",
    ],
)
def test_lists_of_places_to_read_from_are_refused_unopened(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    def opened(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a decoder saw it")

    monkeypatch.setattr(av, "open", opened)
    path = tmp_path / "film.mp4"
    path.write_text(text)
    for source in (path, text.encode()):
        with pytest.raises(RequestError, match="not a video that is read here"):
            check_video(source, "film", LIMITS)


def test_what_only_begins_like_a_video(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42" + b"#EXTM3U\nfile:///etc/passwd\n" * 10)
    with pytest.raises(RequestError, match="cannot be opened") as caught:
        check_video(path, "film", LIMITS)
    assert str(tmp_path) not in caught.value.message


def test_videos_that_are_too_large_or_too_long(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    synthetic.clip(path, num_frames=12, fps=24, width=160, height=96)
    with pytest.raises(RequestError, match="scale it down"):
        check_video(path, "film", LIMITS)
    synthetic.clip(path, num_frames=12, fps=2, width=64, height=48)
    with pytest.raises(RequestError, match="shorter cut"):
        check_video(path, "film", LIMITS)


def picture(kind: str, side: int = 20) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_pictures(kind: str, tmp_path: Path) -> None:
    assert open_picture(picture(kind), "it", LIMITS).size == (20, 20)
    (tmp_path / "x").write_bytes(picture(kind))
    assert open_picture(tmp_path / "x", "it", LIMITS).size == (20, 20)


def test_pictures_that_are_refused() -> None:
    with pytest.raises(RequestError, match="scale it down"):
        open_picture(picture("PNG", 101), "it", LIMITS)
    for data in (picture("EPS"), picture("TIFF"), picture("PNG")[:45], b"<svg/>", b""):
        with pytest.raises(RequestError, match="send JPEG, PNG"):
            open_picture(data, "it", LIMITS)


def test_a_stream_without_a_decoder_is_refused_where_it_is_read(tmp_path: Path) -> None:
    path = synthetic.clip(tmp_path / "a.mp4", 8)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    check_video(path, "film", LIMITS)
    with pytest.raises(VideoError, match="no decoder for its video stream"):
        open_video(path)
