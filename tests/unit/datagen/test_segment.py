"""Segments: cuts are found where pictures change, bounds keep their promises for any cuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longvila.datagen.segment import SegmentOptions, arrange, cut_video, scene_cuts
from longvila.errors import VideoError
from longvila.media.synthetic import clip


@settings(deadline=None)
@given(
    st.floats(0.5, 500),
    st.lists(st.floats(0.01, 499), max_size=30),
    st.floats(2, 30),
    st.floats(0, 0.5),
)
def test_bounds_keep_their_promises(
    duration: float, cuts: list[float], length: float, share: float
) -> None:
    least = share * length
    bounds = arrange(duration, sorted(set(cuts)), length_s=length, min_s=least)
    parts = np.diff(bounds)
    assert bounds[0] == 0 and bounds[-1] == duration and (parts > 0).all()
    assert (parts <= 1.5 * length * (1 + 1e-9)).all()
    assert len(parts) == 1 or (parts >= least * (1 - 1e-9)).all()


def test_without_cuts_a_video_is_cut_evenly() -> None:
    assert arrange(60, [], length_s=10, min_s=2) == [0, 10, 20, 30, 40, 50, 60]
    assert arrange(14.9, [], length_s=10, min_s=2) == [0, 14.9]
    assert arrange(16, [], length_s=10, min_s=2) == [0, 8, 16]


def test_scenes_are_joined_up_to_the_length() -> None:
    assert arrange(40, [4, 9, 18, 19, 31], length_s=10, min_s=2) == [0, 9, 19, 31, 40]
    # A last scene that is too short goes to the one before.
    assert arrange(21, [10, 20], length_s=10, min_s=2) == [0, 10, 21]


def test_cuts_stand_out_of_their_neighbours() -> None:
    still = [0.0] + [0.01] * 9
    still[5] = 0.3
    assert scene_cuts(still, threshold=0.08, contrast=3) == [5]
    moving = [0.0] + [0.2] * 9
    assert scene_cuts(moving, threshold=0.08, contrast=3) == []
    moving[4] = 0.7
    assert scene_cuts(moving, threshold=0.08, contrast=3) == [4]
    # Of a flash's two changes the larger is taken.
    assert scene_cuts([0, 0, 0.2, 0.3, 0, 0], threshold=0.08, contrast=3) == [3]
    assert scene_cuts([0, 0.5], threshold=0.08, contrast=3) == [1]


def two_scenes(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(48):
            picture = np.full((48, 64, 3), 30 if number < 20 else 220, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return path


def test_a_scene_change_is_found_in_a_file(tmp_path: Path) -> None:
    path = two_scenes(tmp_path / "two.mp4")
    cut = cut_video(path, SegmentOptions(length_s=6, min_s=1))
    assert cut.duration_s == pytest.approx(12) and (cut.width, cut.height) == (64, 48)
    assert cut.scenes_s == (5.0,)
    assert cut.bounds_s == pytest.approx((0, 5, 12))
    even = cut_video(path, SegmentOptions(by="length", length_s=6, min_s=1))
    assert even.scenes_s == () and even.bounds_s == pytest.approx((0, 6, 12))


def test_a_moving_picture_makes_no_cut(tmp_path: Path) -> None:
    # Every frame has another number, so every picture differs from the one before.
    cut = cut_video(clip(tmp_path / "a.mp4", 40, fps=4), SegmentOptions(length_s=4, min_s=1))
    assert cut.bounds_s[0] == 0 and cut.bounds_s[-1] == pytest.approx(10)
    assert max(np.diff(cut.bounds_s)) <= 6


def test_wrong_options_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most half of it, got 10 and 6 s"):
        SegmentOptions(min_s=6)
    with pytest.raises(ValueError, match="by must be one of"):
        SegmentOptions(by="shot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold between"):
        SegmentOptions(threshold=0)
    (tmp_path / "x.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"x\.mp4"):
        cut_video(tmp_path / "x.mp4", SegmentOptions())
