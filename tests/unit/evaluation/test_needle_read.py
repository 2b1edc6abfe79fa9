"""A scene read behind a forked trunk is the scene read whole, by the processor and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longvila.evaluation.answerer import Answerer
from longvila.evaluation.needle_frames import FrameRows
from longvila.evaluation.needle_plan import Stage
from longvila.evaluation.needle_read import SceneReader, cut_of, reading_order
from longvila.evaluation.task import Scene
from longvila.inference.engine import Engine
from longvila.media.video import read_frames
from longvila.parallel.families.longvila import LONGVILA
from longvila.sp.mesh import build_mesh
from longvila.testing.ranks import Rank, ranks
from longvila.testing.tiny import tiny_model, tiny_processor

from .cases import film, needles


def _scenes(processor: Any, insert: str = "frame") -> tuple[Any, list[Scene]]:
    haystack = film(processor, 9, block=4)
    stage = Stage(
        haystack, needles(3), processor.video_processor.square, insert=insert, times=True, seed=1
    )
    apple, cucumber, ink = stage.needles
    shown: list[tuple[int, list[tuple[int, Any]]]] = [
        (9, [(4, apple)]),
        (6, [(2, cucumber), (5, ink)]),
        (9, [(4, ink)]),
        (6, [(0, apple)]),
        (9, []),
        (6, [(6, apple)]),
        (5, []),
    ]
    scenes = []
    for number, (length, pairs) in enumerate(shown):
        frames, _ = stage.compose(length, pairs, str(number))
        scenes.append(Scene(str(number), frames, 1.0, ()))
    scenes.append(Scene("grey", (stage.grey(),) * 3, 1.0, ()))
    return haystack.book, scenes


def _whole(model: Any, processor: Any, book: Any, scene: Scene, **layout: Any) -> Any:
    """The oracle: pixels of the whole scene through processor and model, and a question."""
    frames = np.stack([book.frame(number) for number in scene.frames])
    video = read_frames(frames, indices=range(len(frames)))
    content = [{"type": "video", "video": video}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt", processor_kwargs=layout,
    )  # fmt: skip
    with torch.no_grad():
        return inputs["input_ids"], model(**inputs).logits[0, -1]


@pytest.mark.parametrize("insert", ["frame", "paste"])
@pytest.mark.parametrize("layout", ["model", "needle"])
def test_every_scene_is_what_reading_it_whole_gives(insert: str, layout: str) -> None:
    model, processor = tiny_model(2, dtype=torch.float64), tiny_processor(timestamps=True)
    book, scenes = _scenes(processor, insert)
    options = {} if layout == "model" else {"frame_separator": "", "timestamps": False}
    wanted = {s.id: _whole(model, processor, book, s, **options) for s in scenes}
    rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
    with Engine(model, family=rows.family, chunk_tokens=37) as engine:
        answerer = Answerer(engine, processor, **options)
        ordered = reading_order(scenes, book.num_frames)
        reader = SceneReader(answerer, rows, ordered)
        for scene in ordered:
            watched = reader.watch(scene)
            tail = answerer._tail(watched, "What?")
            before = watched.cache.input_ids
            logits = engine.decode(engine.fork(watched.cache), tail)
            ids, whole = wanted[scene.id]
            assert torch.cat([before, tail], 1).tolist() == ids.tolist()
            torch.testing.assert_close(logits[0], whole, rtol=1e-9, atol=1e-9)
    total = sum(len(scene.frames) for scene in scenes)
    assert reader.frames_read < total - 12
    # Nine of the film and what was put in or pasted, each once.
    made = len({number for scene in scenes for number in scene.frames if number >= 9})
    assert rows.encoded == 9 + made


def test_pooled_videos_are_read_whole() -> None:
    pools = [[2, 1, 1], [4, 2, 2]]
    model = tiny_model(2, dtype=torch.float64, pool_sizes=pools)
    processor = tiny_processor(model.config)
    book, scenes = _scenes(processor)
    rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
    with Engine(model, family=rows.family) as engine:
        answerer = Answerer(engine, processor)
        reader = SceneReader(answerer, rows, scenes)
        for scene in scenes:
            watched = reader.watch(scene)
            logits = engine.decode(engine.fork(watched.cache), answerer._tail(watched, "What?"))
            ids, whole = _whole(model, processor, book, scene)
            assert watched.cache.input_ids[0].tolist() == ids[0, : watched.tokens].tolist()
            torch.testing.assert_close(logits[0], whole, rtol=1e-9, atol=1e-9)
    assert reader.frames_read == sum(len(scene.frames) for scene in scenes)


def test_a_part_of_the_scenes_gives_the_same_bits() -> None:
    """An interrupted run reads what is left to the bit as an unbroken one does."""
    model, processor = tiny_model(2), tiny_processor(timestamps=True)
    found = []
    for keep in (range(8), (6, 7)):
        book, scenes = _scenes(processor)
        rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
        with Engine(model, family=rows.family, chunk_tokens=50) as engine:
            answerer = Answerer(engine, processor)
            ordered = reading_order(scenes, book.num_frames)
            reader = SceneReader(answerer, rows, ordered)
            read = [reader.watch(scene) for number, scene in enumerate(ordered) if number in keep]
            found.append([engine.decode(w.cache, answerer._tail(w, "What?")) for w in read[-2:]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@ranks(2)
def test_two_ranks_read_what_one_reads(rank: Rank) -> None:
    model, processor = tiny_model(2, dtype=torch.float64), tiny_processor(timestamps=True)
    book, scenes = _scenes(processor)
    wanted = {s.id: _whole(model, processor, book, s)[1] for s in scenes}
    rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
    mesh = build_mesh(2, num_heads=4, num_kv_heads=2)
    with Engine(model, mesh, family=rows.family, chunk_tokens=24) as engine:
        answerer = Answerer(engine, processor)
        ordered = reading_order(scenes, book.num_frames)
        reader = SceneReader(answerer, rows, ordered)
        for scene in ordered:
            watched = reader.watch(scene)
            logits = engine.decode(engine.fork(watched.cache), answerer._tail(watched, "What?"))
            torch.testing.assert_close(logits[0], wanted[scene.id], rtol=1e-8, atol=1e-8)
    assert reader.stops == [2, 4, 5, 6, 9]
    assert reader.frames_read < sum(len(scene.frames) for scene in scenes) - 12


def test_kept_rows_are_not_encoded_again(tmp_path: Path) -> None:
    model, processor = tiny_model(2), tiny_processor(timestamps=True)
    found = []
    for run in range(2):
        book, scenes = _scenes(processor)
        pixels = processor.video_processor.pixels
        rows = FrameRows(LONGVILA, book, pixels, folder=tmp_path / "rows")
        with Engine(model, family=rows.family) as engine:
            reader = SceneReader(Answerer(engine, processor), rows, scenes)
            found.append(reader.watch(scenes[0]).cache.logits)
        # The needle is not the film's; the film's blocks come from the folder.
        assert rows.encoded == (1 if run else 10)
    assert torch.equal(*found)
    names = sorted(path.name for path in (tmp_path / "rows").iterdir())
    assert names == [f"{a:06d}-{b:06d}.safetensors" for a, b in ((0, 4), (4, 8), (8, 9))]


def test_scenes_out_of_order_are_an_error() -> None:
    processor = tiny_processor(timestamps=True)
    book, scenes = _scenes(processor)
    rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
    with Engine(tiny_model(), family=rows.family) as engine:
        answerer = Answerer(engine, processor)
        reader = SceneReader(answerer, rows, scenes)
        reader.watch(scenes[0])
        with pytest.raises(ValueError, match="scene 1 shares 2 frames with the film, but 4"):
            reader.watch(scenes[1])


def test_a_scene_of_another_speed_is_read_whole() -> None:
    model, processor = tiny_model(2, dtype=torch.float64), tiny_processor(timestamps=True)
    book, scenes = _scenes(processor)
    slow = Scene("slow", tuple(range(5)), 3.0, ())
    rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
    with Engine(model, family=rows.family) as engine:
        answerer = Answerer(engine, processor)
        ordered = reading_order([*scenes, slow], book.num_frames)
        reader = SceneReader(answerer, rows, ordered)
        for scene in ordered:
            watched = reader.watch(scene)
            if scene is slow:
                break
        head, times = len(answerer.head_ids()), [answerer.frame_ids(3.0 * k) for k in range(5)]
        assert watched.tokens == head + sum(map(len, times)) == reader.tokens_of(slow)
        tail = answerer._tail(watched, "What?")
        frames = np.stack([book.frame(number) for number in slow.frames])
        ids = [*answerer.head_ids(), *(token for frame in times for token in frame)]
        with torch.no_grad():
            wanted = model(
                input_ids=torch.cat([torch.tensor([ids]), tail], 1),
                pixel_values_videos=processor.video_processor.pixels(frames),
                video_num_frames=torch.tensor([5]),
            ).logits[0, -1]
        torch.testing.assert_close(engine.decode(engine.fork(watched.cache), tail)[0], wanted)


def test_cut() -> None:
    assert cut_of((0, 1, 9, 2), 9) == 2
    assert cut_of((0, 1, 2), 9) == 3
    assert cut_of((9, 0), 9) == 0
    assert cut_of((0, 1, 2), 2) == 2
