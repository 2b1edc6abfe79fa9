"""The built-in benchmark: one that knows is right, one that guesses is not, tiers stay apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longvila.evaluation.builtin import (
    BenchPlan,
    Event,
    Material,
    about,
    bench_scenes,
    check_lengths,
    draw_emoji,
    emoji_needles,
    event_scenes,
    load_events,
    settings_of,
)
from longvila.evaluation.measure import Part, measure
from longvila.evaluation.needle_frames import FrameRows
from longvila.evaluation.needle_plan import Stage
from longvila.evaluation.summary import Group
from longvila.parallel.families.longvila import LONGVILA
from longvila.testing.tiny import tiny_processor

from .cases import ScriptedEngine, film, guessing, knowing, needles

PLAN = BenchPlan(lengths=(16, 48), depths=(0.2, 0.9), trials=1, captions=4)
EVENTS = [Event(110.0 + 40 * k, f"scene {k}") for k in range(5)]


def _material(processor: Any, frames: int = 48) -> Material:
    return Material(film(processor, frames), 100.0, 200.0, needles(), EVENTS)


def _run(out: Path, *, blind: bool = False, plan: BenchPlan = PLAN) -> list[Group]:
    processor = tiny_processor(timestamps=True)
    material = _material(processor)
    scenes = bench_scenes(material, plan, processor)
    book = material.haystack.book

    def knows(question: str, seen: list[str | None], free: bool) -> str:
        if question == "What is shown in the picture?":
            return str(seen[0])
        # A drawn film has no scenes; these answers only say that the right one is rewarded.
        for scene in scenes:
            for q in scene.questions:
                told = q.text == question and q.shape["frames"] == len(seen)
                if told and q.task.startswith("film") and not any(seen):
                    return q.answer
        step_s = max(1.0, 200.0 / (16 if len(seen) == 16 else 48))
        return knowing(step_s)(question, seen, free)

    engine = ScriptedEngine(processor, book, guessing(scenes) if blind else knows)
    rows = FrameRows(LONGVILA, book, processor.video_processor.pixels)
    return measure(
        engine, processor, [Part("model", scenes)], settings_of(plan, material, "script"), rows,
        about=about(material, "script"), out=out,
    )  # fmt: skip


def test_a_model_that_knows_is_right_in_every_task(tmp_path: Path) -> None:
    groups = [group for group in _run(tmp_path) if group.control is None]
    assert {group.task for group in groups} == {
        "retrieval", "grounding", "presence", "ordering", "counting", "listing", "caption",
        "film", "film-order",
    }  # fmt: skip
    assert [group.name for group in groups if group.all.accuracy < 1] == []
    assert "Built-in benchmark" in (tmp_path / "page.html").read_text()


def test_a_blind_model_is_not(tmp_path: Path) -> None:
    plan = replace(PLAN, trials=8, captions=8)
    for group in _run(tmp_path, blind=True, plan=plan):
        spread = 4 * (0.25 / group.all.n) ** 0.5
        assert abs(group.all.score - group.all.chance) < spread, (group.name, group.all)


def test_every_length_shows_the_whole_part_of_the_film() -> None:
    processor = tiny_processor(timestamps=True)
    scenes = bench_scenes(_material(processor), PLAN, processor)
    for scene in scenes:
        length = scene.questions[0].shape["frames"]
        own = [number for number in scene.frames if number < 48]
        if length == 16 and len(own) > 12:
            assert own[0] in (0, 3) and own[-1] >= 42
        assert scene.step_s == max(1.0, 200.0 / (length if length > 1 else 48))
    # A length that the book's frames are no multiple of, too, and with its scenes of the film.
    uneven = bench_scenes(_material(processor), replace(PLAN, lengths=(32,)), processor)
    (whole,) = [scene for scene in uneven if scene.id == "film/32"]
    assert len(whole.frames) == 32 and whole.frames[-1] >= 46
    assert np.abs(np.array(whole.frames) - np.arange(32) * 1.5).max() <= 1.5
    assert list(whole.frames) == sorted(whole.frames)
    with pytest.raises(ValueError, match="99 frames are asked for, the film gives 48"):
        bench_scenes(_material(processor), replace(PLAN, lengths=(99,)), processor)


def test_scenes_of_the_film_are_in_what_is_shown() -> None:
    processor = tiny_processor(timestamps=True)
    material = _material(processor)
    square = processor.video_processor.square
    for length, stride in ((16, 3), (48, 1)):
        stage = Stage(
            material.haystack, material.pictures, square, times=True, step_s=200 / length,
            stride=stride,
        )  # fmt: skip
        (scene,) = event_scenes(stage, material, length)
        moments = [round((event.time_s - 100) / 200 * 48) for event in EVENTS]
        assert set(moments) <= set(scene.frames) and list(scene.frames) == sorted(scene.frames)
        at = [q for q in scene.questions if q.task == "film"]
        assert [q.answer for q in at] == [event.text for event in EVENTS]
        for question, event in zip(at, EVENTS, strict=True):
            minutes, seconds = question.text.removesuffix("?").rpartition(" ")[2].split(":")
            told = 60 * int(minutes) + int(seconds)
            assert abs(told - (event.time_s - 100)) <= 200 / length
    few = replace(material, events=EVENTS[:3])
    assert event_scenes(stage, few, 16) == []


def test_shipped_lists_fit_the_material() -> None:
    events = load_events(0, 10_000)
    assert len({event.text for event in events}) == len(events) > 20
    assert [event.time_s for event in events] == sorted(event.time_s for event in events)
    assert len(load_events(596.5 * 2 / 3, 596.5)) >= 8
    text = (resources.files("longvila.evaluation") / "tasks" / "openmoji.tsv").read_text()
    rows = [line.split("\t") for line in text.splitlines()]
    assert Counter(tier for _, _, tier in rows) == {"unseen": 764, "new-name": 47}
    assert len({name for _, name, _ in rows}) == len(rows)
    # Tiers are those of the training lists.
    splits = Path(__file__).parents[3] / "recipes" / "smol" / "splits"
    trained = {line.split("\t")[0] for line in (splits / "train.tsv").read_text().splitlines()}
    assert all((name in trained) == (tier == "unseen") for _, name, tier in rows)


def test_drawings_are_chosen_by_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(font: Path, code: int) -> Image.Image:
        return Image.new("RGBA", (4, 4), (code % 256, 0, 0, 255))

    monkeypatch.setattr("longvila.evaluation.builtin.draw_emoji", draw)
    found = emoji_needles(tmp_path, per_tier=50, rng=np.random.default_rng(0))
    assert Counter(needle.tier for needle in found) == {"unseen": 50, "new-name": 47}
    again = emoji_needles(tmp_path, per_tier=50, rng=np.random.default_rng(0))
    assert [n.id for n in again] == [n.id for n in found]
    code = int(found[3].id.rpartition("-")[2], 16)
    assert found[3].open().getpixel((0, 0)) == (code % 256, 0, 0, 255)


@pytest.mark.packages
def test_the_packaged_font_draws_every_name() -> None:
    from longvila.packaged import fetch

    font = fetch("openmoji-font")
    missing = draw_emoji(font, 0xE1000).tobytes()
    drawn = emoji_needles(font, per_tier=40, rng=np.random.default_rng(1))
    pictures = {needle.open().tobytes() for needle in drawn}
    assert len(pictures) == len(drawn) and missing not in pictures


def test_lengths() -> None:
    assert check_lengths((64, 8, 8)) == (8, 64)
    with pytest.raises(ValueError, match="positive numbers of frames"):
        check_lengths((0, 3))
