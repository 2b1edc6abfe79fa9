"""Needles in a film: can a model find one picture among thousands of frames?

1. `Plan` says what is shown and asked: the paper's grid, the stricter one, or both, with controls.
   All of it follows from the settings, so every rank and every run makes the same.
2. `run_needle` lets an engine read frame numbers in place of pixels
   (`longvila.evaluation.needle_frames`), and scenes in the order of their cuts, so that what they
   share is read once (`longvila.evaluation.needle_read`).
3. `longvila.evaluation.measure` asks, keeps every answer on disk, and writes results and pages.

The paper's layout of a prompt has neither newlines nor times between frames; the model's own is
what its processor writes. Either may be asked for by name; results say which.

Cost of the paper's grid of L lengths up to N frames and D depths with n needles: the film once
through the tower; one reading of N frames; and for every cell and needle what comes after the
needle, together n * D * L * N / 4 frames, where reading all scenes whole would be twice that, and
the tower n * D times over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from longvila.evaluation.families import layout_for
from longvila.evaluation.measure import About, LayoutName, Part, measure_model
from longvila.evaluation.needle_plan import (
    WAYS,
    Grid,
    Stage,
    Words,
    check_strict,
    make_grid,
    merged,
    paper_scenes,
    strict_scenes,
)
from longvila.evaluation.needle_read import reading_order
from longvila.evaluation.needle_sets import Haystack, Needle, NeedleError
from longvila.evaluation.summary import Group
from longvila.evaluation.task import Scene
from longvila.inference.sight import sampler_of

Protocol = Literal["paper", "strict", "both"]
#: Tasks of the stricter protocol.
TASKS = ("retrieval", "grounding", "presence", "ordering", "counting", "listing")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        max_frames: Largest number of haystack frames.
        interval: Step of lengths, and the smallest.
        depth_interval: Step of depths.
        protocol: Which protocol.
        insert: How needles are shown under the paper's protocol.
        strict_insert: How under the stricter one.
        layout: Layout of prompts under the paper's protocol.
        strict_layout: Layout under the stricter one.
        trials: Films a cell of the stricter protocol.
        per_film: Needles in each.
        control: Whether the stricter protocol's controls are run.
        fps: Frames taken from the film each second.
        step_s: Seconds between frames as prompts say; None as in the film.
        seed: Decides all that is random.
        words: How questions are put.
        lengths: Lengths instead of evenly spaced ones.
        tasks: Tasks of the stricter protocol that are asked; none for all.
        ways: Names that the stricter protocol offers where one is shown.
    """

    max_frames: int = 6000
    interval: int = 300
    depth_interval: float = 0.2
    protocol: Protocol = "both"
    insert: Literal["frame", "paste"] = "frame"
    strict_insert: Literal["frame", "paste"] = "paste"
    layout: LayoutName = "needle"
    strict_layout: LayoutName = "model"
    trials: int = 1
    per_film: int = 4
    control: bool = True
    fps: float = 1.0
    step_s: float | None = None
    seed: int = 0
    words: Words = field(default_factory=Words)
    lengths: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    ways: int = WAYS

    @property
    def grid(self) -> Grid:
        """Its lengths and depths."""
        if not self.lengths:
            return make_grid(self.max_frames, self.interval, self.depth_interval)
        grid = make_grid(1, 1, self.depth_interval)
        return replace(grid, lengths=tuple(sorted(set(self.lengths))))

    @property
    def frames(self) -> int:
        """The longest length."""
        return max(self.lengths, default=self.max_frames)


#: Settings by name: the paper's two figures.
PRESETS: dict[str, dict[str, Any]] = {
    "paper-6000": {"max_frames": 6000, "interval": 300, "depth_interval": 0.2},
    "paper-1400": {"max_frames": 1400, "interval": 200, "depth_interval": 0.2},
}


def make_parts(
    plan: Plan, haystack: Haystack, needles: Sequence[Needle], processor: Any
) -> list[Part]:
    """Put all scenes together.

    Args:
        plan: What is measured.
        haystack: The film, of at least the plan's frames.
        needles: The set.
        processor: The model's.

    Returns:
        A part for each layout that is used.
    """
    scenes: dict[LayoutName, list[Scene]] = {}

    def stage(layout: LayoutName, insert: str) -> Stage:
        return Stage(
            haystack, needles, sampler_of(processor).square, insert=insert,
            times=layout == "model" and getattr(processor, "timestamps", False),
            seed=plan.seed, words=plan.words,
            step_s=plan.step_s, ways=plan.ways,
        )  # fmt: skip

    if plan.protocol in ("paper", "both"):
        found = paper_scenes(stage(plan.layout, plan.insert), plan.grid)
        scenes.setdefault(plan.layout, []).extend(found)
    if plan.protocol in ("strict", "both"):
        films, controls = strict_scenes(
            stage(plan.strict_layout, plan.strict_insert), plan.grid,
            trials=plan.trials, per_film=plan.per_film,
        )  # fmt: skip
        films, controls = (_asking(found, plan.tasks) for found in (films, controls))
        scenes.setdefault(plan.strict_layout, []).extend(films)
        if plan.control:
            scenes[plan.strict_layout].extend(controls)
    total = haystack.book.num_frames
    return [Part(layout, reading_order(merged(found), total)) for layout, found in scenes.items()]


def check_plan(plan: Plan, needles: Sequence[Needle]) -> None:
    """Refuse a plan that cannot be carried out, before a model is loaded for it.

    Args:
        plan: What is to be measured.
        needles: The set.

    Raises:
        NeedleError: If steps, lengths, tasks or numbers are wrong, or the set is too small.
    """
    grid = plan.grid
    if grid.lengths[0] < 1:
        raise NeedleError(f"lengths must be positive numbers of frames, got {list(plan.lengths)}")
    if plan.step_s is not None and not 0 < plan.step_s < math.inf:
        raise NeedleError(
            f"seconds between frames must be a number above zero, got {plan.step_s:g}"
        )
    _check_tasks(plan.tasks)
    if plan.protocol != "paper":
        check_strict(needles, grid, per_film=plan.per_film, trials=plan.trials, ways=plan.ways)


def _check_tasks(tasks: Sequence[str]) -> None:
    absent = set(tasks) - set(TASKS)
    if absent:
        known = ", ".join(TASKS)
        raise NeedleError(f"there is no task {', '.join(sorted(absent))}; there are {known}")


def _asking(scenes: list[Scene], tasks: Sequence[str]) -> list[Scene]:
    """Return scenes with the questions of some tasks, without those that have none."""
    if not tasks:
        return scenes
    _check_tasks(tasks)
    asked = [
        replace(scene, questions=tuple(q for q in scene.questions if q.task in tasks))
        for scene in scenes
    ]
    return [scene for scene in asked if scene.questions]


def settings_of(
    plan: Plan,
    haystack: Haystack,
    needles: Sequence[Needle],
    model: str,
) -> dict[str, Any]:
    """Return what answers depend on; records of another run do not mix with these.

    Args:
        plan: What is measured.
        haystack: The film.
        needles: The set.
        model: What results call the model.
    """
    return {
        "model": model,
        "haystack": haystack.label,
        "film": haystack.key,
        "repeats": haystack.repeats,
        "needles": [[each.id, each.answer, each.tier, each.digest()] for each in needles],
        **asdict(plan),
    }


def run_needle(
    model: Any,
    processor: Any,
    plan: Plan,
    haystack: Haystack,
    needles: Sequence[Needle],
    *,
    out: Path,
    name: str,
    **options: Any,
) -> list[Group]:
    """Measure a model; goes on where an interrupted run stopped.

    Args:
        model: A model with its head, in evaluation mode, on its device.
        processor: Its processor.
        plan: What is measured.
        haystack: The film.
        needles: The set.
        out: Folder for records, result and pages.
        name: What results call the model.
        **options: Of `longvila.evaluation.measure.measure_model`: mesh, progress and so on.

    Returns:
        The summary, the same on every rank of a file system that all share.

    Raises:
        RecordsError: If ``out`` holds answers of other settings.
        ContextLengthError: If the longest scene does not fit the model's context.
    """
    # A family whose processor writes prompts itself has one layout, and settings say which.
    plan = replace(
        plan,
        layout=layout_for(processor, plan.layout),
        strict_layout=layout_for(processor, plan.strict_layout),
    )
    return measure_model(
        model, processor, haystack, make_parts(plan, haystack, needles, processor),
        settings_of(plan, haystack, needles, name), about=about(haystack, name), out=out, **options,
    )  # fmt: skip


def about(haystack: Haystack, model: str) -> About:
    """Return what results say of themselves.

    Args:
        haystack: The film.
        model: What results call the model.
    """
    notes = [f"{model}; film: {haystack.label}"]
    if haystack.repeats > 1:
        notes.append(f"The film is shown {haystack.repeats} times over.")
    if haystack.label.startswith("synthetic"):
        notes.append("The film was drawn in code: these figures say nothing about real video.")
    return About(
        "needle",
        "Needles in a film",
        "Are pictures found among so many frames, wherever they are?",
        tuple(notes),
    )
