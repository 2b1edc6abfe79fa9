"""Plans put needles where the paper does, and depend on the seed alone."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from longvila.evaluation.needle import PRESETS, Plan, make_parts
from longvila.evaluation.needle_plan import (
    Stage,
    Words,
    check_strict,
    make_grid,
    merged,
    paper_scenes,
    place_of,
    strict_scenes,
)
from longvila.evaluation.needle_sets import NeedleError
from longvila.evaluation.task import Question, Scene
from longvila.testing.tiny import tiny_processor

from .cases import film, needles


def _stage(frames: int = 60, count: int = 8, **options: Any) -> Stage:
    processor = tiny_processor(timestamps=True)
    options = {"times": True, **options}
    square = processor.video_processor.square
    return Stage(film(processor, frames), needles(count), square, **options)


def test_the_papers_grids() -> None:
    large = Plan(**PRESETS["paper-6000"]).grid
    assert len(large.lengths) == 20 and large.lengths[-1] == 6000
    assert [float(d) for d in large.depths] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert Plan(**PRESETS["paper-1400"]).grid.lengths[-1] == 1400
    with pytest.raises(ValueError, match=r"must divide 1, .* got 0\.3"):
        make_grid(10, 5, 0.3)
    with pytest.raises(ValueError, match="in 1000 steps at most, got 1e-05"):
        make_grid(10, 5, 1e-5)
    with pytest.raises(ValueError, match="1 to 10 frames, got 11"):
        make_grid(10, 11, 0.5)


def test_places_are_those_of_the_original() -> None:
    for length in range(1, 400):
        for step in range(6):
            exact = length * step // 5
            assert place_of(length, Fraction(step, 5)) == exact
            # What floating point makes of it, at most one frame off.
            assert exact - 1 <= int(np.float64(step) * 0.2 * length) <= exact


def test_names_that_answers_cannot_tell_apart_are_refused() -> None:
    grid = make_grid(60, 30, 0.5)
    options: dict[str, Any] = {"per_film": 3, "trials": 1, "ways": 4}
    first, *rest = needles(8)
    for name, message in (("A", "'A' has no word"), ("Teddy-Bear", "and 'teddy bear' read alike"),
                          ("狮", None)):  # fmt: skip
        found = [*rest, replace(first, answer=name)]
        if message is None:
            check_strict(found, grid, **options)
            continue
        with pytest.raises(NeedleError, match=message):
            check_strict(found, grid, **options)
    other = [replace(each, tier="b") for each in (*rest, replace(first, answer="Teddy Bear"))
             if each.answer != "teddy bear"]  # fmt: skip
    check_strict([*needles(8), *other], grid, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"at": "What is at {times}?"}, r"'at' may hold {time}, a brace is written twice"),
        ({"every": "Which {"}, r"'every' may hold no blank, a brace is written twice"),
        ({"count": "How often?"}, r"'count' must hold {name}: 'How often\?'"),
        ({"presence": "Is it there?"}, r"'presence' must hold {name} or {a_name}"),
    ],
)
def test_words_that_cannot_be_filled_are_refused(words: dict[str, str], message: str) -> None:
    with pytest.raises(NeedleError, match=message):
        Words(**words)
    assert Words(presence="Ist {name} da?", only="Welches Bild {{?}}?").only.format() == (
        "Welches Bild {?}?"
    )


def test_options_of_a_needles_own_question_are_what_a_guess_draws_from() -> None:
    stage = _stage(count=8)
    stage.needles[0] = replace(
        stage.needles[0], answer="B", question="At {time}? A or B", options=("A", "B")
    )
    first, second = paper_scenes(stage, make_grid(60, 60, 1.0))[:2]
    assert first.questions[0].options == ("A", "B") and first.questions[0].chance == 0.5
    assert first.questions[0].text == "At 00:00? A or B" and second.questions[0].chance == 1 / 8


@pytest.mark.parametrize("insert", ["frame", "paste"])
def test_one_needle_a_scene_at_its_depth(insert: str) -> None:
    stage = _stage(count=2, insert=insert)
    scenes = paper_scenes(stage, make_grid(60, 30, 0.5))
    assert len(scenes) == 2 * 3 * 2
    for scene in scenes:
        (question,) = scene.questions
        length, depth = question.shape["frames"], question.shape["depth"]
        strange = [k for k, number in enumerate(scene.frames) if number >= 60]
        at = int(length * depth)
        assert strange == [min(at, length - 1) if insert == "paste" else at]
        assert len(scene.frames) == length + (insert == "frame")
        film_frames = [number for number in scene.frames if number < 60]
        kept = [k for k in range(length) if insert == "frame" or k != strange[0]]
        assert film_frames == kept
        assert question.text == f"What is shown at {stage.time(strange[0])}?"
        assert question.chance == 0.5
    assert Counter(s.questions[0].answer for s in scenes) == {"apple": 6, "cucumber": 6}


def test_own_questions_come_before_made_ones() -> None:
    stage = _stage(count=2, times=False, words=Words(only="Which?"))
    assert {s.questions[0].text for s in paper_scenes(stage, make_grid(8, 8, 1.0))} == {"Which?"}
    own = type(stage.needles[0])("x", "C", stage.needles[0].open, "At {time}, which?")
    stage.needles = [own]
    scenes = paper_scenes(stage, make_grid(8, 8, 1.0))
    assert [s.questions[0].text for s in scenes] == ["At 00:00, which?", "At 00:08, which?"]


def _strict(**options: Any) -> tuple[list[Scene], list[Scene]]:
    stage = _stage(insert="paste", **options)
    return strict_scenes(stage, make_grid(60, 30, 0.25), trials=3, per_film=4)


def test_strict_films_hold_the_target_at_its_depth_and_others_apart() -> None:
    scenes, controls = _strict()
    assert len(scenes) == 2 * 2 * 5 * 3 and len(controls) == 2 * 2 * 5 * 3
    targets = Counter(scene.questions[0].shape["needle"] for scene in scenes)
    assert max(targets.values()) - min(targets.values()) <= 2 and len(targets) == 8
    for scene in scenes:
        shape = scene.questions[0].shape
        strange = [k for k, number in enumerate(scene.frames) if number >= 60]
        assert min(int(shape["frames"] * shape["depth"]), shape["frames"] - 1) in strange
        assert all(b - a >= 2 for a, b in itertools.pairwise(strange))
        if scene.id.endswith("count"):
            assert scene.questions[0].answer == str(len(strange))
        else:
            assert len(strange) == 4
            names = next(q for q in scene.questions if q.task == "retrieval").options
            by_task = {q.task: q for q in scene.questions if q.ask == "choice"}
            assert set(by_task) == {"retrieval", "grounding", "presence", "ordering"}
            # Wrong options are what the film shows elsewhere.
            assert set(by_task["ordering"].names) <= set(names)
            assert len(by_task["ordering"].options) == 6
    for scene in controls:
        assert all(n < 60 for n in scene.frames) or len(set(scene.frames)) == 1
        assert {q.shape["control"] for q in scene.questions} in ({"no needle"}, {"grey"})


def test_a_time_that_several_needles_share_is_not_asked_about() -> None:
    # Eight frames a second: needles of a short film may stand in one second.
    stage = _stage(24, insert="paste", step_s=1 / 8)
    for seed in range(20):
        stage.seed = seed
        films, _ = strict_scenes(stage, make_grid(24, 24, 0.5), trials=1, per_film=4)
        for scene in films:
            shown = Counter(stage.time(k) for k, n in enumerate(scene.frames) if n >= 24)
            asked = {q.text for q in scene.questions if q.task == "retrieval"}
            assert not {f"What is shown at {t}?" for t, n in shown.items() if n > 1} & asked
    # All in one second: there is no other time to choose from.
    scenes, _ = strict_scenes(
        _stage(24, step_s=1 / 50), make_grid(24, 24, 0.5), trials=1, per_film=4
    )
    assert "grounding" not in {q.task for scene in scenes for q in scene.questions}


def test_options_do_not_tell_the_answer() -> None:
    scenes, _ = _strict()
    places: dict[str, Counter[int]] = {}
    for scene in scenes:
        for question in scene.questions:
            if question.ask == "choice" and question.task != "presence":
                where = question.options.index(question.answer)
                places.setdefault(question.task, Counter())[where] += 1
    assert set(places) == {"retrieval", "grounding", "ordering", "counting"}
    assert all(len(where) >= 4 for where in places.values())


def test_a_plan_depends_on_the_seed_and_nothing_else() -> None:
    assert _strict() == _strict()
    assert _strict()[0] != _strict(seed=1)[0]
    # A cell's film does not depend on which other cells there are, but for who is the target.
    small = strict_scenes(_stage(insert="paste"), make_grid(30, 30, 0.25), trials=3, per_film=4)
    assert small[0] == _strict()[0][: len(small[0])]


def test_scenes_with_the_same_frames_are_one() -> None:
    def scene(name: str, frames: tuple[int, ...]) -> Scene:
        return Scene(name, frames, 1.0, (Question(name, "t", "free", "?", "x"),))

    first, second = merged([scene("a", (1, 2)), scene("b", (2,)), scene("c", (1, 2))])
    assert (first.id, [q.id for q in first.questions]) == ("a", ["a", "c"]) and second.id == "b"


def test_layouts_are_read_apart() -> None:
    processor = tiny_processor(timestamps=True)
    plan = Plan(max_frames=20, interval=20, depth_interval=1.0)
    parts = make_parts(plan, film(processor, 20), needles(), processor)
    assert [part.layout for part in parts] == ["needle", "model"]
    assert {q.task for s in parts[0].scenes for q in s.questions} == {"paper"}
    one = Plan(max_frames=20, interval=20, depth_interval=1.0, layout="model")
    (part,) = make_parts(one, film(processor, 20), needles(), processor)
    assert {q.task for s in part.scenes for q in s.questions} > {"paper", "retrieval"}


def test_what_cannot_be_put_together_is_an_error() -> None:
    with pytest.raises(ValueError, match="frame or paste, got 'glue'"):
        _stage(insert="glue")
    with pytest.raises(ValueError, match="need 5 different names, the set has 4"):
        strict_scenes(_stage(count=4), make_grid(30, 30, 0.5), trials=1, per_film=4)
    with pytest.raises(ValueError, match="15 frames have no room for 4"):
        strict_scenes(_stage(), make_grid(30, 15, 0.5), trials=1, per_film=4)


def test_lengths_tasks_and_ways_are_chosen() -> None:
    processor = tiny_processor(timestamps=True)
    options: dict[str, Any] = {"protocol": "strict", "depth_interval": 1.0}
    plan = Plan(lengths=(60, 20), tasks=("retrieval", "grounding"), ways=6, **options)
    assert plan.frames == 60 and plan.grid.lengths == (20, 60)
    (part,) = make_parts(plan, film(processor, 60), needles(8), processor)
    questions = [question for scene in part.scenes for question in scene.questions]
    assert {q.task for q in questions} == {"retrieval", "grounding"}
    assert {q.shape["frames"] for q in questions} == {20, 60}
    chosen = [q for q in questions if q.task == "retrieval" and q.ask == "choice"]
    assert chosen and all(len(set(q.options)) == 6 and q.chance == 1 / 6 for q in chosen)
    with pytest.raises(ValueError, match="there is no task retreival"):
        make_parts(Plan(lengths=(20,), tasks=("retreival",), **options), film(processor, 60),
                   needles(8), processor)  # fmt: skip
    with pytest.raises(ValueError, match="need 9 different names"):
        make_parts(Plan(lengths=(20,), ways=9, **options), film(processor, 60), needles(8),
                   processor)  # fmt: skip
