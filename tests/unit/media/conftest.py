"""Clips shared by the tests of this room; drawn once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from longvila.media._index import INDEX_CACHE
from longvila.media.synthetic import clip

#: Name: (file suffix, options of ``clip``). Each is hard to read in its own way.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "h264_gop250": (".mp4", {"num_frames": 520, "gop": 250}),
    "h264_gop60": (".mp4", {"num_frames": 300, "gop": 60}),
    "h264_audio": (".mp4", {"num_frames": 96, "gop": 24, "audio": True}),
    "h264_no_bframes": (".mp4", {"num_frames": 120, "gop": 20, "bframes": 0}),
    "h264_open_gop": (
        ".mp4",
        {"num_frames": 200, "gop": 12, "options": {"x264-params": "open-gop=1"}},
    ),
    "h264_intra_refresh": (
        ".mp4",
        {"num_frames": 200, "gop": 24, "options": {"intra-refresh": "1"}},
    ),
    "h264_odd_size": (
        ".mp4",
        {"num_frames": 60, "gop": 20, "height": 47, "width": 67, "pixel_format": "yuv444p"},
    ),
    "h264_vfr": (
        ".mp4",
        {"num_frames": 160, "gop": 16, "times_ms": [500 + i * i * 3 + i * 7 for i in range(160)]},
    ),
    "h264_mkv": (".mkv", {"num_frames": 160, "gop": 30}),
    "h264_ts": (".ts", {"num_frames": 160, "gop": 30}),
    "h264_avi": (".avi", {"num_frames": 100, "gop": 30}),
    "h264_raw": (".h264", {"num_frames": 60}),
    "mpeg4": (".mp4", {"num_frames": 160, "gop": 30, "codec": "mpeg4", "bframes": 2}),
    "mpeg4_avi": (".avi", {"num_frames": 160, "gop": 30, "codec": "mpeg4", "bframes": 2}),
    "hevc": (".mp4", {"num_frames": 100, "gop": 20, "codec": "libx265"}),
    "vp9": (".webm", {"num_frames": 60, "gop": 20, "codec": "libvpx-vp9"}),
    "mjpeg": (".mp4", {"num_frames": 60, "codec": "mjpeg", "pixel_format": "yuvj420p"}),
    "rotated_90": (".mp4", {"num_frames": 40, "gop": 20, "quarter_turns": 1}),
    "rotated_180": (".mp4", {"num_frames": 40, "gop": 20, "quarter_turns": 2}),
    "rotated_270": (".mp4", {"num_frames": 40, "gop": 20, "quarter_turns": 3}),
}


@pytest.fixture(scope="session")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a kind's name to its clip, drawn when first asked for."""
    folder = tmp_path_factory.mktemp("clips")
    drawn: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in drawn:
            suffix, options = KINDS[kind]
            drawn[kind] = clip(folder / f"{kind}{suffix}", **options)
        return drawn[kind]

    return of


@pytest.fixture(scope="session", params=sorted(KINDS))
def every_clip(
    request: pytest.FixtureRequest, draw: Callable[[str], Path]
) -> tuple[str, Path, int]:
    """Each kind in turn: its name, its file, its number of frames."""
    return request.param, draw(request.param), KINDS[request.param][1]["num_frames"]


@pytest.fixture(scope="session")
def in_order() -> Callable[[Path], list[np.ndarray]]:
    """Return the oracle: every stored frame of a file, decoded in order by PyAV's own loop."""

    def decode(path: Path) -> list[np.ndarray]:
        with av.open(str(path)) as container:
            context = container.streams.video[0].codec_context
            context.thread_type = "NONE"
            return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]

    return decode


@pytest.fixture(autouse=True)
def no_cached_index() -> None:
    """Each test opens its files for the first time."""
    INDEX_CACHE.clear()
