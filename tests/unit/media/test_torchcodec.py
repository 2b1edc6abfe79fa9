"""The torchcodec reader, where torchcodec loads; and the message where it does not."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longvila.errors import VideoError
from longvila.media.synthetic import read_number
from longvila.media.video import open_video, read_frames


def loads() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not loads(), reason="torchcodec does not load here")


@needs_torchcodec
def test_frames_are_right_or_refused(every_clip: tuple[str, Path, int]) -> None:
    kind, path, count = every_clip
    rng = np.random.default_rng(0)
    refused = 0
    for amount in (1, 5, 20, count):
        wanted = sorted(rng.choice(count, size=min(amount, count), replace=False).tolist())
        try:
            got = read_frames(path, indices=wanted, backend="torchcodec")
        except VideoError as error:
            # Containers and streams in which torchcodec finds other frames than were asked for.
            assert "use backend='pyav'" in str(error) or "cannot open" in str(error)
            refused += 1
            continue
        assert [read_number(frame) for frame in got.frames] == wanted, kind
    if kind in ("h264_gop250", "h264_gop60", "h264_vfr", "mpeg4", "rotated_90", "h264_odd_size"):
        assert refused == 0


@needs_torchcodec
def test_both_back_ends_describe_a_file_alike(draw: Callable[[str], Path]) -> None:
    found = []
    for backend in ("pyav", "torchcodec"):
        with open_video(draw("rotated_90"), backend=backend) as reader:  # type: ignore[arg-type]
            found.append(reader.metadata)
    assert found[0].num_frames == found[1].num_frames
    assert (found[0].height, found[0].width) == (found[1].height, found[1].width)
    assert np.array_equal(found[0].timestamps_s, found[1].timestamps_s)
    assert [one.backend for one in found] == ["pyav", "torchcodec"]


def test_message_without_torchcodec(
    draw: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ImportError, match="use backend='pyav'"):
        open_video(draw("h264_gop60"), backend="torchcodec")


def test_a_first_frame_that_is_damaged_is_a_video_error(
    draw: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Decoder:
        def __init__(self, *given: object, **named: object) -> None:
            """Open anything."""

        def __len__(self) -> int:
            return count

        def get_frame_at(self, index: int) -> object:
            raise RuntimeError(f"frame {index} cannot be decoded")

    path = draw("h264_gop60")
    with open_video(path) as reader:
        count = reader.metadata.num_frames
    module = types.ModuleType("torchcodec.decoders")
    module.VideoDecoder = Decoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    with pytest.raises(VideoError, match="frame 0 cannot be decoded"):
        open_video(path, backend="torchcodec")
