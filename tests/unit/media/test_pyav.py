"""The PyAV reader gives the frames of a sequential decode, for less work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from longvila.media._index import INDEX_CACHE, build_index
from longvila.media._pyav import PyAVReader
from longvila.media.sources import resolve
from longvila.media.synthetic import clip, damage, read_number, truncate
from longvila.media.video import open_video, read_frames

Draw = Callable[[str], Path]
InOrder = Callable[[Path], list[np.ndarray]]
TURNS = {"rotated_90": -1, "rotated_180": 2, "rotated_270": 1}


def choices(count: int, seed: int) -> list[list[int]]:
    """Ways of asking: ends, spread, clusters, random, all."""
    rng = np.random.default_rng(seed)
    return [
        [0],
        [count - 1],
        np.linspace(0, count - 1, 7).round().astype(int).tolist(),
        list(range(count // 2, count // 2 + 5)),
        sorted(rng.choice(count, size=min(20, count), replace=False).tolist()),
        sorted(rng.choice(count, size=3, replace=False).tolist()),
        list(range(count)),
    ]


@pytest.mark.parametrize("threads", [1, 3])
def test_frames_equal_a_sequential_decode(
    every_clip: tuple[str, Path, int], in_order: InOrder, threads: int
) -> None:
    kind, path, count = every_clip
    expected = [np.rot90(frame, TURNS.get(kind, 0)) for frame in in_order(path)]
    assert len(expected) == count
    with PyAVReader(resolve(path), threads=threads) as reader:
        assert reader.metadata.num_frames == count
        shape = (reader.metadata.height, reader.metadata.width)
        assert shape == expected[0].shape[:2]
        # One reader asked again and again, so that the state it is left in matters.
        for wanted in choices(count, seed=threads):
            got = list(reader.frames(wanted))
            assert [frame.index for frame in got] == wanted, kind
            for frame in got:
                assert read_number(frame.image) == frame.index, kind
                assert np.array_equal(frame.image, expected[frame.index]), (kind, frame.index)


def test_each_fresh_reader_agrees(every_clip: tuple[str, Path, int]) -> None:
    kind, path, count = every_clip
    for wanted in choices(count, seed=9)[:6]:
        got = read_frames(path, indices=wanted)
        assert got.indices.tolist() == wanted
        assert [read_number(frame) for frame in got.frames] == wanted, kind
        assert got.missing == ()


def test_timestamps_of_variable_rate(draw: Draw) -> None:
    with open_video(draw("h264_vfr")) as reader:
        times = reader.metadata.timestamps_s
    expected = [(i * i * 3 + i * 7) / 1000 for i in range(160)]
    assert np.allclose(times, expected, atol=1e-3)
    assert reader.metadata.fps == pytest.approx(159 / expected[-1], rel=1e-3)
    assert reader.metadata.duration_s >= expected[-1]


def test_metadata(draw: Draw) -> None:
    with open_video(draw("h264_gop60")) as reader:
        found = reader.metadata
    assert (found.num_frames, found.header_frames) == (300, 300)
    assert found.fps == pytest.approx(24)
    assert found.duration_s == pytest.approx(12.5)
    assert (found.height, found.width, found.rotation) == (48, 64, 0)
    assert (found.codec, found.backend) == ("h264", "pyav")
    assert found.name == str(draw("h264_gop60"))


@pytest.mark.parametrize(("kind", "rotation"), [("rotated_90", 90), ("rotated_180", 180)])
def test_rotation_is_reported(draw: Draw, kind: str, rotation: int) -> None:
    with open_video(draw(kind)) as reader:
        assert reader.metadata.rotation == rotation


def rgb_of(y: float, cb: float, cr: float, red: float, blue: float) -> list[float]:
    """Turn limited-range levels into RGB with a matrix given by its red and blue weights."""
    luma, pb, pr = (y - 16) / 219, (cb - 128) / 224, (cr - 128) / 224
    r, b = luma + 2 * (1 - red) * pr, luma + 2 * (1 - blue) * pb
    g = (luma - red * r - blue * b) / (1 - red - blue)
    return [255 * value for value in (r, g, b)]


@pytest.mark.parametrize(
    ("tag", "weights"), [({}, (0.299, 0.114)), ({"colorspace": "bt709"}, (0.2126, 0.0722))]
)
def test_colours_follow_the_tags_of_the_stream(
    tmp_path: Path, tag: dict[str, str], weights: tuple[float, float]
) -> None:
    levels = (110, 90, 170)
    path = tmp_path / "flat.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": "1", **tag})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        planes = [
            np.full((48, 64), levels[0], np.uint8),
            np.full((12, 64), levels[1], np.uint8),
            np.full((12, 64), levels[2], np.uint8),
        ]
        frame = av.VideoFrame.from_ndarray(np.concatenate(planes), format="yuv420p")
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    found = read_frames(path, indices=[0]).frames[0].reshape(-1, 3).mean(axis=0)
    assert np.abs(found - rgb_of(*levels, *weights)).max() < 2.5


# Work: neither decode what can be jumped over, nor jump where decoding on is cheaper.


def test_a_sparse_sample_seeks_and_decodes_little(draw: Draw) -> None:
    with open_video(draw("h264_gop60")) as reader:
        list(reader.frames([70, 250]))
        # Two groups of pictures of 60, entered at 60 and 240.
        assert reader.stats.seeks == 2
        assert reader.stats.packets <= (70 - 60 + 4) + (250 - 240 + 4)
        assert reader.stats.decoded_frames <= reader.stats.packets


def test_a_dense_sample_never_seeks(draw: Draw) -> None:
    with open_video(draw("h264_gop60")) as reader:
        list(reader.frames(range(0, 300, 5)))
        assert reader.stats.seeks == 0
        assert reader.stats.packets <= 300


def test_one_frame_inside_a_long_group_does_not_seek_twice(draw: Draw) -> None:
    with open_video(draw("h264_gop250")) as reader:
        list(reader.frames([260, 300, 340]))
        assert reader.stats.seeks == 1
        assert reader.stats.packets <= 340 - 250 + 5


def test_unneeded_frames_that_nothing_refers_to_are_passed_over(draw: Draw) -> None:
    with open_video(draw("h264_gop250")) as reader:
        list(reader.frames([249]))
        sparse = reader.stats.decoded_frames
    assert sparse < 0.85 * 250


def test_an_hour_is_not_decoded_for_1024_frames(tmp_path: Path) -> None:
    # An hour's number of frames at two a second; the counters, not the clock, tell.
    path = clip(tmp_path / "long.mp4", 7200, fps=20, gop=100, height=32)
    with open_video(path) as reader:
        wanted = np.linspace(0, 7199, 36).round().astype(int).tolist()
        assert [read_number(f.image) for f in reader.frames(wanted)] == wanted
        assert reader.stats.seeks >= 34
        assert reader.stats.packets < 36 * 104 and reader.stats.packets < 7200 * 0.6
    with open_video(path) as reader:
        wanted = np.linspace(0, 7199, 1024).round().astype(int).tolist()
        assert [read_number(f.image) for f in reader.frames(wanted)] == wanted
        # Some seven frames apart: a seek pays only where it lands right before a wanted one.
        assert reader.stats.seeks < 10
        assert 7100 < reader.stats.packets <= 7200
        assert reader.stats.decoded_frames < 0.8 * 7200


def test_index_is_cached_until_the_file_changes(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 20)
    with open_video(path) as first, open_video(path) as second:
        assert first._index is second._index  # type: ignore[attr-defined]
    clip(path, 30)
    with open_video(path) as third:
        assert third.metadata.num_frames == 30
    assert INDEX_CACHE.get(INDEX_CACHE.key(path)) is not None


# Broken files


def test_a_cut_tail_gives_what_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = clip(tmp_path / "cut.mp4", 200, gop=20, container_options={"movflags": "faststart"})
    truncate(path, 0.6)
    with caplog.at_level(logging.WARNING):
        got = read_frames(path, num_frames=16)
    count = got.metadata.num_frames
    assert 40 < count < 200
    assert got.metadata.header_frames == 200
    assert got.indices[0] == 0 and got.indices[-1] == count - 1
    assert got.missing == ()
    # The very last packets may be damaged by the cut, the others are whole.
    numbers = [read_number(frame) for frame in got.frames]
    assert numbers[:-1] == got.indices.tolist()[:-1]
    assert "cut.mp4: the header promises 200 frames" in caplog.text


def test_noise_in_the_middle_loses_only_what_it_hit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = damage(clip(tmp_path / "noise.mp4", 240, gop=12, height=96, width=128), 0.45, 0.5)
    with caplog.at_level(logging.WARNING):
        got = read_frames(path, indices=range(240))
    assert got.metadata.num_frames == 240
    assert sorted([*got.indices.tolist(), *got.missing]) == list(range(240))
    assert len(got.missing) < 40
    right = sum(read_number(f) == i for i, f in zip(got.indices.tolist(), got.frames, strict=True))
    assert right >= 190
    if got.missing:
        assert "noise.mp4" in caplog.text and "cannot be decoded" in caplog.text


def test_using_an_old_iterator_after_a_new_one_is_an_error(draw: Draw) -> None:
    with open_video(draw("h264_gop60")) as reader:
        old = reader.frames([0, 100])
        next(old)
        assert [f.index for f in reader.frames([5])] == [5]
        with pytest.raises(RuntimeError, match="called again"):
            next(old)


def test_closed_reader(draw: Draw) -> None:
    reader = open_video(draw("h264_gop60"))
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.frames([0])


def stamped(path: Path, out: Path, stamps: Iterable[int]) -> Path:
    """The packets of a file in another one, at given fortieths of a second."""
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, 40)
        packets = (packet for packet in source.demux(video=0) if packet.size)
        for packet, stamp in zip(packets, stamps, strict=True):
            packet.stream, packet.time_base = stream, Fraction(1, 40)
            packet.pts = packet.dts = stamp
            target.mux(packet)
    return out


def test_avi_with_reordered_frames_keeps_its_clock(tmp_path: Path) -> None:
    """A container that counts half frames looks as if its rate were twice as high."""
    path = clip(tmp_path / "a.h264", 40, fps=20, gop=10)
    with open_video(stamped(path, tmp_path / "a.avi", range(0, 80, 2))) as reader:
        assert np.allclose(reader.metadata.timestamps_s, np.arange(40) / 20)
        assert reader.metadata.duration_s == pytest.approx(2.0)


def test_without_timestamps_the_rate_is_the_streams_own(tmp_path: Path) -> None:
    with open_video(clip(tmp_path / "a.h264", 40, fps=20)) as reader:
        assert np.allclose(reader.metadata.timestamps_s, np.arange(40) / 20)


def test_frames_stamped_alike_follow_the_rate(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.h264", 12, fps=20, bframes=0)
    with open_video(stamped(path, tmp_path / "a.mkv", [0] * 12)) as reader:
        times = reader.metadata.timestamps_s
        assert len(times) == 12 and (np.diff(times) > 0).all()


def test_an_index_of_a_file_that_grew_meanwhile_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clip(tmp_path / "a.mkv", 48)
    whole = path.read_bytes()
    truncate(path, 0.5)

    def read_and_finish(*given: object) -> object:
        index = build_index(*given)  # type: ignore[arg-type]
        path.write_bytes(whole)
        return index

    monkeypatch.setattr("longvila.media._pyav.build_index", read_and_finish)
    with open_video(path) as reader:
        assert reader.metadata.num_frames < 48
    with open_video(path) as reader:
        assert reader.metadata.num_frames == 48
