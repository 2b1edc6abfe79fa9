"""A benchmark that needs no download but Python packages: film, drawings, questions with answers.

What is shown is a part of a film that the small model's training never saw, and drawings pasted
into it whose names are known. What is asked, at every length from 32 to 6,000 frames:

| task | asked | from |
| --- | --- | --- |
| retrieval, grounding, presence, ordering, counting, listing | of pasted drawings | the drawings |
| film, at a time | which of four scenes of the film is shown then | ``tasks/`` |
| film, order | which of two scenes comes first | ``tasks/`` |
| caption | what a single picture shows, one frame long | the drawings |

Tiers are by concept and never averaged: drawings of names that the small model was trained on with
other drawings (``unseen``), and names it was never trained on (``new-name``). For other models both
are just drawings. Scenes of the film were described by looking at it.

The film is spread over the frames of each length, so a longer video is a slower one. Prompts that
have times say one second a frame, or the film's own time where that is longer.

Controls, intervals, records and pages are those of the needle test, of which this is a fixed plan
with fixed material.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from longvila.evaluation.measure import About, Part, measure_model
from longvila.evaluation.needle_plan import (
    WAYS,
    Grid,
    Stage,
    Words,
    check_strict,
    merged,
    strict_scenes,
)
from longvila.evaluation.needle_read import reading_order
from longvila.evaluation.needle_sets import Haystack, Needle, NeedleError
from longvila.evaluation.summary import Group
from longvila.evaluation.task import Question, Scene
from longvila.inference.sight import sampler_of

#: Options of a choice among captions.
CAPTION_WAYS = 20
_SIDE = 160


@dataclass(frozen=True)
class Event:
    """A scene of a film.

    Attributes:
        time_s: A moment that shows it.
        text: What it shows, as an answer.
    """

    time_s: float
    text: str


@dataclass(frozen=True)
class Material:
    """What is shown.

    Attributes:
        haystack: The part of the film, at the largest number of frames.
        start_s: Where the part begins in the film.
        duration_s: How long it is.
        pictures: Drawings with names.
        events: Scenes of this part, by time.
    """

    haystack: Haystack
    start_s: float
    duration_s: float
    pictures: list[Needle]
    events: list[Event] = field(default_factory=list)


@dataclass(frozen=True)
class BenchPlan:
    """What is asked.

    Attributes:
        lengths: Numbers of frames.
        depths: Depths of the pictures that are asked about.
        trials: Films with pictures for each length and depth.
        per_film: Pictures in each.
        captions: Single pictures of each tier.
        control: Whether films without pictures, and grey ones, are asked about too.
        seed: Decides all that is random.
    """

    lengths: tuple[int, ...] = (32, 128, 512, 2048, 6000)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    trials: int = 4
    per_film: int = 4
    captions: int = 40
    control: bool = True
    seed: int = 0


def bench_scenes(material: Material, plan: BenchPlan, processor: Any) -> list[Scene]:
    """Put all scenes together.

    Args:
        material: What is shown.
        plan: What is asked.
        processor: The model's.

    Returns:
        Scenes in reading order.

    Raises:
        NeedleError: If a length is more than the film's frames.
    """
    book = material.haystack.book
    square = sampler_of(processor).square
    scenes: list[Scene] = []
    for length in sorted(plan.lengths):
        if length > book.num_frames:
            raise NeedleError(f"{length} frames are asked for, the film gives {book.num_frames}")
        stage = Stage(
            material.haystack, material.pictures, square, insert="paste",
            times=getattr(processor, "timestamps", False), seed=plan.seed, words=Words(),
            step_s=max(1.0, material.duration_s / length), stride=Fraction(book.num_frames, length),
        )  # fmt: skip
        films, controls = strict_scenes(
            stage, _grid(plan, length), trials=plan.trials, per_film=plan.per_film
        )
        scenes += [*films, *(controls if plan.control else [])]
        scenes += event_scenes(stage, material, length)
    scenes += caption_scenes(stage, plan.captions)
    return reading_order(merged(scenes), book.num_frames)


def _grid(plan: BenchPlan, length: int) -> Grid:
    return Grid((length,), tuple(Fraction(depth).limit_denominator(1000) for depth in plan.depths))


def check_bench(plan: BenchPlan, pictures: Sequence[Needle]) -> None:
    """Refuse what cannot be asked, before a model is loaded for it.

    Args:
        plan: What is to be asked.
        pictures: Drawings with names.

    Raises:
        NeedleError: As `longvila.evaluation.needle_plan.check_strict`.
    """
    grid = _grid(plan, min(plan.lengths))
    check_strict(pictures, grid, per_film=plan.per_film, trials=plan.trials, ways=WAYS)


def event_scenes(stage: Stage, material: Material, length: int) -> list[Scene]:
    """Return the film itself with questions about its scenes.

    Args:
        stage: Film and frame rate.
        material: Scenes and times.
        length: Frames.

    Returns:
        One scene, or none if there are fewer than four events, or no room to tell them apart.
    """
    book, events = stage.book, material.events
    frames = list(stage.film(0, length))
    at: dict[int, Event] = {}
    for event in events:
        share = (event.time_s - material.start_s) / material.duration_s
        place = min(round(share * length), length - 1)
        # The frame nearest in the sample is replaced by the one that shows it.
        frames[place] = min(round(share * book.num_frames), book.num_frames - 1)
        at[place] = event
    if len(at) < max(4, len(events)):
        return []
    name = f"film/{length}"
    rng = stage.rng(name)
    shape = {"frames": length, "depth": None, "tier": "", "control": None}
    asked: list[Question] = []
    texts = [event.text for event in events]
    for place, event in at.items():
        if not stage.times:
            continue
        others = [text for text in texts if text != event.text]
        options = [event.text, *(str(text) for text in rng.permutation(others)[:3])]
        rng.shuffle(options)
        asked.append(
            Question(
                f"{name}/at/{place}", "film", "choice", f"What is shown at {stage.time(place)}?",
                event.text, tuple(options), chance=1 / 4, shape=shape,
            )
        )  # fmt: skip
    order = rng.permutation(len(events))
    for number in range(len(order)):
        pair = sorted((int(order[number]), int(order[(number + 1) % len(order)])))
        first, second = texts[pair[0]], texts[pair[1]]
        options = [first, second]
        rng.shuffle(options)
        asked.append(
            Question(
                f"{name}/order/{number}", "film-order", "choice",
                f"Which is shown first: {options[0]}, or {options[1]}?",
                first, tuple(options), chance=1 / 2, shape=shape,
            )
        )  # fmt: skip
    return [Scene(name, tuple(frames), stage.step_s, tuple(asked))]


def caption_scenes(stage: Stage, count: int) -> list[Scene]:
    """Return single pictures to be named.

    Args:
        stage: Pictures, and how they become frames.
        count: Pictures of each tier.
    """
    scenes = []
    for tier in sorted({needle.tier for needle in stage.needles}):
        pool = [needle for needle in stage.needles if needle.tier == tier]
        names = sorted({needle.answer for needle in pool})
        rng = stage.rng("captions", tier)
        for index in rng.permutation(len(pool))[:count]:
            needle = pool[int(index)]
            others = [name for name in names if name != needle.answer]
            picked = [str(name) for name in rng.permutation(others)[: CAPTION_WAYS - 1]]
            options = [needle.answer, *picked]
            rng.shuffle(options)
            name = f"caption/{needle.id}"
            choice = Question(
                f"{name}/choice", "caption", "choice", "What is shown in the picture?",
                needle.answer, tuple(options), reader="name", names=tuple(names),
                chance=1 / len(options),
                shape={"frames": 1, "depth": None, "tier": tier, "control": None},
            )  # fmt: skip
            free = replace(
                choice, id=f"{name}/free", ask="free", options=tuple(names), chance=1 / len(names)
            )
            frame = stage.whole(needle)
            scenes.append(Scene(name, (frame,), stage.step_s, (choice, free)))
    return scenes


def run_bench(
    model: Any,
    processor: Any,
    plan: BenchPlan,
    material: Material,
    *,
    out: Path,
    name: str,
    **options: Any,
) -> list[Group]:
    """Measure a model; goes on where an interrupted run stopped.

    Args:
        model: A model with its head, in evaluation mode, on its device.
        processor: Its processor.
        plan: What is asked.
        material: What is shown.
        out: Folder for records, result and pages.
        name: What results call the model.
        **options: Of `longvila.evaluation.measure.measure_model`: mesh, progress and so on.

    Returns:
        The summary.

    Raises:
        RecordsError: If ``out`` holds answers of other settings.
        ContextLengthError: If the longest scene does not fit the model's context.
    """
    parts = [Part("model", bench_scenes(material, plan, processor))]
    return measure_model(
        model, processor, material.haystack, parts, settings_of(plan, material, name),
        about=about(material, name), out=out, **options,
    )  # fmt: skip


def settings_of(plan: BenchPlan, material: Material, model: str) -> dict[str, Any]:
    """Return what answers depend on.

    Args:
        plan: What is asked.
        material: What is shown.
        model: What results call the model.
    """
    return {
        "model": model,
        "film": material.haystack.key,
        "haystack": material.haystack.label,
        "repeats": material.haystack.repeats,
        "start_s": round(material.start_s, 3),
        "duration_s": round(material.duration_s, 3),
        "frames": material.haystack.book.num_frames,
        "pictures": [[p.id, p.answer, p.tier, p.digest()] for p in material.pictures],
        "events": [[event.time_s, event.text] for event in material.events],
        **asdict(plan),
    }


def about(material: Material, model: str) -> About:
    """Return what results say of themselves.

    Args:
        material: What is shown.
        model: What results call the model.
    """
    notes = [f"{model}; film: {material.haystack.label}, {len(material.pictures)} pictures"]
    if material.haystack.label.startswith("synthetic"):
        notes.append("The film was drawn in code: these figures say nothing about real video.")
    return About(
        "builtin", "Built-in benchmark", "What does the model know of film and pictures in it?",
        tuple(notes),
    )  # fmt: skip


# ---- material ---------------------------------------------------------------------------------


def load_events(start_s: float, stop_s: float) -> list[Event]:
    """Return the described scenes of Big Buck Bunny that lie in a part of it.

    Args:
        start_s: Where the part begins.
        stop_s: Where it ends.
    """
    text = (resources.files("longvila.evaluation") / "tasks" / "big_buck_bunny.json").read_text(
        encoding="utf-8"
    )
    events = [Event(float(entry["time_s"]), entry["text"]) for entry in json.loads(text)]
    return [event for event in events if start_s < event.time_s < stop_s]


def draw_emoji(font: Path, code: int) -> Image.Image:
    """Draw one character of a colour font.

    Args:
        font: The font's file.
        code: Code point.

    Returns:
        RGBA, transparent around the drawing.
    """
    face = ImageFont.truetype(str(font), _SIDE)
    picture = Image.new("RGBA", (2 * _SIDE, 2 * _SIDE), (255, 255, 255, 0))
    ImageDraw.Draw(picture).text(
        (_SIDE // 2, _SIDE // 2), chr(code), font=face, embedded_color=True
    )
    box = picture.getbbox()
    return picture.crop(box) if box else picture


def emoji_needles(font: Path, *, per_tier: int, rng: Any) -> list[Needle]:
    """Return drawings of the packaged font with the names and tiers of ``tasks/openmoji.tsv``.

    Args:
        font: The font's file.
        per_tier: How many of each tier, or all there are.
        rng: Decides which.
    """
    text = (resources.files("longvila.evaluation") / "tasks" / "openmoji.tsv").read_text(
        encoding="utf-8"
    )
    tiers: dict[str, list[Needle]] = {}
    for line in text.splitlines():
        code, name, tier = line.split("\t")
        number = int(code, 16)
        needle = Needle(f"openmoji-{code}", name, partial(draw_emoji, font, number), tier=tier)
        tiers.setdefault(tier, []).append(needle)
    return [
        pool[int(index)]
        for _, pool in sorted(tiers.items())
        for index in sorted(rng.permutation(len(pool))[:per_tier])
    ]


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return lengths in order.

    Args:
        lengths: Numbers of frames.

    Raises:
        ValueError: If there is none, or one is not positive.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be positive numbers of frames, got {list(lengths)}")
    return tuple(sorted(set(lengths)))
