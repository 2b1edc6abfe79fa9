"""The reading plan against a brute-force search, on invented packet orders."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvila.media._index import IndexCache, Orientation, VideoIndex, plan_runs


def index_of(pts: list[int], keyframes: list[bool]) -> VideoIndex:
    packet_pts = np.asarray(pts, dtype=np.int64)
    frame_packet = np.argsort(packet_pts, kind="stable")
    return VideoIndex(
        packet_pts=packet_pts,
        packet_keyframe=np.asarray(keyframes),
        frame_packet=frame_packet,
        frame_pts=packet_pts[frame_packet],
        tick_s=0.5,
        last_duration_s=0.5,
        seekable=True,
        header_frames=None,
    )


@st.composite
def indices(draw: st.DrawFn) -> VideoIndex:
    """Groups of pictures in stored order: a keyframe, then mini-groups of one P and some B.

    An open group stores B-frames that are shown before its keyframe right after it.
    """
    pts: list[int] = []
    keyframes: list[bool] = []
    clock = draw(st.integers(-50, 50))
    for _ in range(draw(st.integers(1, 6))):
        leading = draw(st.integers(0, 2)) if pts else 0
        key = clock + leading
        pts.append(key)
        keyframes.append(True)
        for back in range(leading):
            pts.append(clock + back)
            keyframes.append(False)
        clock = key + 1
        for _ in range(draw(st.integers(0, 4))):
            bframes = draw(st.integers(0, 3))
            pts.append(clock + bframes)
            pts.extend(range(clock, clock + bframes))
            keyframes.extend([False] * (bframes + 1))
            clock += bframes + 1
    return index_of(pts, keyframes)


def entry(index: VideoIndex, frame: int) -> int:
    """The newest keyframe stored and shown no later than a frame, by trying them all."""
    packet = int(index.frame_packet[frame])
    fit = [
        place
        for place in range(packet + 1)
        if index.packet_keyframe[place] and index.packet_pts[place] <= index.frame_pts[frame]
    ]
    return max(fit, default=0)


@given(indices(), st.data())
def test_a_plan_reaches_every_frame_at_the_least_cost(
    index: VideoIndex, data: st.DataObject
) -> None:
    count = len(index.frame_pts)
    frames = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    fresh = data.draw(st.booleans())
    seek_cost = data.draw(st.integers(0, 10))
    runs = plan_runs(index, frames, fresh=fresh, seek_cost=seek_cost)
    assert [frame for run in runs for frame in run.frames] == frames
    for run in runs:
        for frame in run.frames:
            assert run.start <= entry(index, frame) <= index.frame_packet[frame] < run.stop
        # Nothing is decoded beyond the last frame wanted.
        assert run.stop - 1 == max(int(index.frame_packet[frame]) for frame in run.frames)
        assert run.start == 0 or index.packet_keyframe[run.start]
    assert runs[0].seek == (not fresh or runs[0].start > 0)
    # Between runs a seek pays, inside one it would not.
    for before, after in itertools.pairwise(runs):
        assert after.seek and after.start > before.stop + seek_cost
        assert after.start == entry(index, after.frames[0])
    for run in runs:
        stop = run.start
        for frame in run.frames:
            assert frame == run.frames[0] or entry(index, frame) <= stop + seek_cost
            stop = max(stop, int(index.frame_packet[frame]) + 1)
    if fresh and runs[0].start == 0:
        assert entry(index, frames[0]) <= seek_cost
    else:
        assert runs[0].start == entry(index, frames[0])


@given(indices(), st.data())
def test_lead_begins_that_many_keyframes_earlier(index: VideoIndex, data: st.DataObject) -> None:
    frame = data.draw(st.integers(0, len(index.frame_pts) - 1))
    lead = data.draw(st.integers(0, 3))
    (run,) = plan_runs(index, [frame], fresh=False, lead=lead)
    keyframes = np.flatnonzero(index.packet_keyframe).tolist()
    slot = keyframes.index(entry(index, frame)) - lead
    assert run.start == (keyframes[slot] if slot >= 0 else 0)


@given(indices())
def test_place_finds_packets_by_time(index: VideoIndex) -> None:
    for place, pts in enumerate(index.packet_pts.tolist()):
        assert index.place(pts) == place
    assert index.place(None) is None
    assert index.place(int(index.packet_pts.max()) + 1) is None
    assert index.timestamps_s[0] == 0.0


def test_empty_plan() -> None:
    assert plan_runs(index_of([0], [True]), [], fresh=True) == []


@pytest.mark.parametrize(
    ("matrix", "rotation", "shape"),
    [
        ((1, 0, 0, 1), 0, (2, 3)),
        ((0, 1, -1, 0), 90, (3, 2)),
        ((-1, 0, 0, -1), 180, (2, 3)),
        ((0, -1, 1, 0), 270, (3, 2)),
        ((-1, 0, 0, 1), 0, (2, 3)),  # mirrored
    ],
)
def test_orientation(
    matrix: tuple[int, int, int, int], rotation: int, shape: tuple[int, int]
) -> None:
    class Stored:
        height, width = 2, 3
        side_data = {  # noqa: RUF012
            "DISPLAYMATRIX": np.array([*matrix[:2], 0, *matrix[2:], 0, 0, 0, 0], dtype=np.int32)
            * 65536
        }

    orientation = Orientation.of(Stored())  # type: ignore[arg-type]
    assert orientation.rotation == rotation
    assert (orientation.height, orientation.width) == shape
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    turned = orientation.turn(image)
    assert turned.shape[:2] == shape
    # Every pixel goes where the matrix sends it, up to the shift back into the picture.
    a, b, c, d = matrix
    places = {(x, y): (a * x + c * y, b * x + d * y) for x in range(3) for y in range(2)}
    left = min(x for x, _ in places.values())
    top = min(y for _, y in places.values())
    for (x, y), (x2, y2) in places.items():
        assert np.array_equal(turned[y2 - top, x2 - left], image[y, x])


def test_cache_forgets_the_oldest_and_notices_changes(tmp_path: Path) -> None:
    cache = IndexCache(size=2)
    index = index_of([0], [True])
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"x")
        cache.put(cache.key(file), index)
    assert cache.get(cache.key(files[0])) is None
    assert cache.get(cache.key(files[2])) is index
    os.utime(files[2], ns=(1, 1))
    assert cache.get(cache.key(files[2])) is None
    cache.clear()
    assert cache.get(cache.key(files[1])) is None
