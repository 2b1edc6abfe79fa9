"""Which films are put together and what is asked about them: the paper's grid and a stricter one.

**The paper's** (`paper_scenes`): for every length N and depth d one needle is put before frame
``int(d * N)`` and asked about by teacher forcing. One scene a needle and cell. Depths are exact
fractions here, where a product of floating-point numbers can fall one frame short.

**The strict one** (`strict_scenes`), in every cell and for every trial a film with several needles,
of which the target stands at the cell's depth and the others anywhere:

| task | question | options |
| --- | --- | --- |
| retrieval | which alone is shown at a time, or is k-th | other needles of the film, then others |
| grounding | when a needle appears (if prompts have times) | times of the others, then others |
| presence | whether one appears: one that does, one that does not | yes, no |
| ordering | in which order three of them appear | all six orders |
| counting | how often the target appears, in a film of its own | 1 to 4 |
| listing | which needles appear (free words only, scored by F1) | |

Each is asked in free words, graded by a strict reader, and as a choice among answers. Wrong options
are needles of the same film first: a model that knows what was in the film but not where scores no
better than chance among them. A film's needles are of one tier.

**Controls** (`control_scenes`): the same questions about the film without needles and about a grey
one. What a model scores there it has from somewhere else than the film.

Everything random is drawn from the seed and the scene's id, so a plan is the same on every rank and
in every run, and does not change where other cells are left out.

Letters: N frames of the haystack, d depth.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from longvila.evaluation.needle_frames import FrameBook, Picture
from longvila.evaluation.needle_sets import (
    Haystack,
    Needle,
    NeedleError,
    pasted,
    whole_frame,
)
from longvila.evaluation.task import Question, Scene, plain, seconds_of
from longvila.model.processing_longvila import clock

#: Options of a choice among names.
WAYS = 4
_MOST_DEPTHS = 1000
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


#: What is filled into each question.
_BLANKS = {
    "only": ("time",), "at": ("time",), "ordinal": ("ordinal",), "when": ("name",),
    "presence": ("name", "a_name"), "order": ("names",), "count": ("name",), "every": (),
}  # fmt: skip


@dataclass(frozen=True)
class Words:
    """How questions are put.

    Attributes:
        only: About the only needle, if it has no question of its own and frames have no times.
        at: About the needle at a time.
        ordinal: About the k-th needle.
        when: About a needle's time.
        presence: About whether a needle appears.
        order: About the order of several.
        count: About how often one appears.
        every: About all of them.
    """

    only: str = "Which picture was put into the film? Answer with its name."
    at: str = "What is shown at {time}?"
    ordinal: str = "Which is the {ordinal} picture that was put into the film?"
    when: str = "When does the {name} appear?"
    presence: str = "Is there {a_name}?"
    order: str = "In which order do these appear: {names}?"
    count: str = "How many times does the {name} appear?"
    every: str = "Which pictures appear in the video?"

    def __post_init__(self) -> None:
        for name, wanted in _BLANKS.items():
            text = getattr(self, name)
            told = " or ".join(f"{{{each}}}" for each in wanted) or "no blank"
            try:
                # Filled in two ways; a text that ignores what is filled in asks about nothing.
                first, second = (text.format(**dict.fromkeys(wanted, fill)) for fill in "xy")
            except (KeyError, ValueError, IndexError, AttributeError) as fault:
                raise NeedleError(
                    f"the question {name!r} may hold {told}, a brace is written twice: {text!r}"
                ) from fault
            if wanted and first == second and name != "only":
                raise NeedleError(f"the question {name!r} must hold {told}: {text!r}")


@dataclass(frozen=True)
class Grid:
    """Lengths and depths.

    Attributes:
        lengths: N of each column, ascending.
        depths: d of each row, 0 to 1.
    """

    lengths: tuple[int, ...]
    depths: tuple[Fraction, ...]


def make_grid(max_frames: int, interval: int, depth_interval: float) -> Grid:
    """Make the grid of evenly spaced lengths and depths.

    Args:
        max_frames: Largest length.
        interval: Step of lengths, and the smallest.
        depth_interval: Step of depths; must divide 1.

    Raises:
        NeedleError: If a step is not positive, or depths do not end at 1.
    """
    if not 0 < interval <= max_frames:
        raise NeedleError(f"the interval must be 1 to {max_frames} frames, got {interval}")
    steps = round(1 / depth_interval) if depth_interval > 1e-6 else 0
    if not 1 <= steps <= _MOST_DEPTHS or not math.isclose(steps * depth_interval, 1.0):
        raise NeedleError(
            f"the depth interval must divide 1, in {_MOST_DEPTHS} steps at most, "
            f"got {depth_interval:g}"
        )
    return Grid(
        tuple(range(interval, max_frames + 1, interval)),
        tuple(Fraction(step, steps) for step in range(steps + 1)),
    )


class Stage:
    """Puts scenes together: a film, its needles, how they are shown and asked about.

    Args:
        haystack: The film.
        needles: The set.
        square: Brings a picture to the size of a frame, as the processor does.
        insert: ``"frame"`` puts a frame of its own between two of the film's, ``"paste"`` pastes
            the picture on a frame of the film.
        times: Whether the prompt has times, so that questions can name them.
        seed: Decides all that is random.
        words: How questions are put.
        step_s: Seconds that the prompt's times say lie between two frames; None as in the film.
        stride: Frames of the book from one frame of the film to the next; may be a fraction.
        ways: Names to choose from where one is shown.

    Raises:
        NeedleError: If ``insert`` is neither.
    """

    def __init__(
        self,
        haystack: Haystack,
        needles: Sequence[Needle],
        square: Callable[[Image.Image], Image.Image],
        *,
        insert: str = "frame",
        times: bool,
        seed: int = 0,
        words: Words | None = None,
        step_s: float | None = None,
        stride: int | Fraction = 1,
        ways: int = WAYS,
    ) -> None:
        if insert not in ("frame", "paste"):
            raise NeedleError(f"insert must be frame or paste, got {insert!r}")
        self.haystack, self.needles, self.square = haystack, list(needles), square
        self.insert, self.times, self.seed = insert, times, seed
        self.words = words or Words()
        self.step_s = haystack.step_s if step_s is None else step_s
        self.book: FrameBook = haystack.book
        self.stride, self.ways = stride, ways

    def rng(self, *names: object) -> np.random.Generator:
        """Chance that depends on the seed and some names, and nothing else."""
        return np.random.default_rng([self.seed, zlib.crc32("/".join(map(str, names)).encode())])

    def compose(
        self, length: int, shown: Sequence[tuple[int, Needle]], scene: str
    ) -> tuple[tuple[int, ...], list[int]]:
        """Put needles into the first frames of the film.

        Args:
            length: N.
            shown: Places in the film, 0 to N, ascending, and what is put there.
            scene: Decides where on a frame pictures are pasted.

        Returns:
            Numbers of the frames, and the place of each needle in the scene.
        """
        frames: list[int] = []
        places: list[int] = []
        at = 0
        for place, needle in shown:
            if self.insert == "paste":
                place = min(place, length - 1)
            frames += self.film(at, place)
            places.append(len(frames))
            frames.append(self._needle_frame(place, needle, scene))
            at = place + (self.insert == "paste")
        return (*frames, *self.film(at, length)), places

    def film(self, start: int, stop: int) -> list[int]:
        """Numbers of the film's frames from one place up to another."""
        up, down = self.stride.numerator, self.stride.denominator
        return [place * up // down for place in range(start, stop)]

    def whole(self, needle: Needle) -> int:
        """Number of the frame that shows a needle and nothing else."""
        return self.book.add(f"frame/{needle.id}", lambda: whole_frame(needle, self.square))

    def grey(self) -> int:
        """Number of the grey frame."""
        return self.book.add("grey", lambda: np.full((*self.book.size, 3), 128, np.uint8))

    def time(self, place: int) -> str:
        """The time of a frame, as the prompt and the questions write it."""
        return clock(place * self.step_s)

    def _needle_frame(self, place: int, needle: Needle, scene: str) -> int:
        if self.insert == "frame":
            return self.whole(needle)
        where = tuple(float(x) for x in self.rng("where", scene, place).uniform(0, 1, 2))
        (under,) = self.film(place, place + 1)

        def paste() -> Picture:
            return pasted(self.book.frame(under), needle, (where[0], where[1]), share=0.8)

        return self.book.add(f"paste/{needle.id}/{under}/{where}", paste)


def place_of(length: int, depth: Fraction) -> int:
    """Return the frame before which a needle at some depth stands."""
    return int(depth * length)


# ---- the paper's grid --------------------------------------------------------------------------


def paper_scenes(stage: Stage, grid: Grid) -> list[Scene]:
    """Return the scenes of the paper's protocol.

    Args:
        stage: Film and needles.
        grid: Lengths and depths.
    """
    answers = tuple(dict.fromkeys(needle.answer for needle in stage.needles))
    scenes: list[Scene] = []
    for length, depth, needle in itertools.product(grid.lengths, grid.depths, stage.needles):
        name = f"paper/{length}/{float(depth):g}/{needle.id}"
        shown = [(place_of(length, depth), needle)]
        frames, places = stage.compose(length, shown, name)
        question = _forced(stage, name, needle, places[0], needle.options or answers)
        shape = {**question.shape, "frames": length, "depth": float(depth)}
        scenes.append(Scene(name, frames, stage.step_s, (replace(question, shape=shape),)))
    return scenes


def _forced(
    stage: Stage, name: str, needle: Needle, place: int, options: tuple[str, ...]
) -> Question:
    time = stage.time(place)
    if needle.question:
        text = needle.question.replace("{time}", time)
    else:
        text = (stage.words.at if stage.times else stage.words.only).format(time=time)
    return Question(
        id=f"{name}/forced",
        task="paper",
        ask="forced",
        text=text,
        answer=needle.answer,
        options=options,
        chance=1 / len(options),
        shape={"tier": needle.tier, "needle": needle.id, "control": None},
    )


# ---- the stricter grid -------------------------------------------------------------------------


def strict_scenes(
    stage: Stage, grid: Grid, *, trials: int, per_film: int
) -> tuple[list[Scene], list[Scene]]:
    """Return the scenes of the stricter protocol, and those of its controls.

    Args:
        stage: Film and needles; every needle's name must be its answer.
        grid: Lengths and depths.
        trials: Films a cell.
        per_film: Needles in each.

    Raises:
        NeedleError: As `check_strict`.
    """
    names = check_strict(stage.needles, grid, per_film=per_film, trials=trials, ways=stage.ways)
    order = stage.rng("targets").permutation(len(stage.needles))
    scenes: list[Scene] = []
    controls: list[Scene] = []
    every = itertools.product(grid.lengths, grid.depths, range(trials))
    for turn, (length, depth, trial) in enumerate(every):
        target = stage.needles[order[turn % len(order)]]
        film = _film(stage, length, depth, trial, target, sorted(names[target.tier]), per_film)
        scenes.append(film)
        controls += control_scenes(stage, film, length)
        scenes.append(_counting(stage, length, depth, trial, target))
    return scenes, controls


def check_strict(
    needles: Sequence[Needle], grid: Grid, *, per_film: int, trials: int, ways: int
) -> dict[str, list[str]]:
    """Refuse what the stricter protocol cannot be made of.

    Args:
        needles: The set.
        grid: Lengths and depths.
        per_film: Needles in each film.
        trials: Films a cell.
        ways: Names to choose from.

    Returns:
        The different names of each tier.

    Raises:
        NeedleError: If there is no room, or there are too few names; says what would do.
    """
    if trials < 1 or ways < 2 or not 3 <= per_film <= len(_ORDINALS):
        raise NeedleError(
            f"the strict test needs at least one film a cell, a choice of at least 2 and 3 to "
            f"{len(_ORDINALS)} needles a film; got {trials}, {ways} and {per_film}"
        )
    names: dict[str, list[str]] = {}
    read: dict[tuple[str, str], str] = {}
    for needle in needles:
        known = names.setdefault(needle.tier, [])
        if needle.answer not in known:
            known.append(needle.answer)
        words = plain(needle.answer)
        other = read.setdefault((needle.tier, words), needle.answer)
        if not words or other != needle.answer:
            alike = f"and {other!r} read alike" if words else "has no word"
            raise NeedleError(
                f"the strict test finds names in answers, but {needle.answer!r} {alike}: take "
                "other names, or the paper's test alone (--protocol paper)"
            )
    wanted = max(per_film + 1, ways)
    for tier, found in names.items():
        if len(found) < wanted:
            enough = "--per-film 3, " if per_film > 3 and len(found) >= max(4, ways) else ""
            raise NeedleError(
                f"films of {per_film} needles and a choice of {ways} need {wanted} different "
                f"names, the set has {len(found)}" + (f" of tier {tier!r}" if tier else "")
                + f": take {enough}more pictures, or the paper's test alone (--protocol paper)"
            )  # fmt: skip
    if grid.lengths[0] < 4 * per_film:
        raise NeedleError(
            f"{grid.lengths[0]} frames have no room for {per_film} needles: {4 * per_film} do"
        )
    return names


def _film(
    stage: Stage, length: int, depth: Fraction, trial: int, target: Needle,
    names: Sequence[str], per_film: int,
) -> Scene:  # fmt: skip
    scene = f"strict/{length}/{float(depth):g}/{trial}"
    rng = stage.rng(scene)
    others = [
        needle
        for needle in stage.needles
        if needle.answer != target.answer and needle.tier == target.tier
    ]
    companions: list[Needle] = []
    for index in rng.permutation(len(others)):
        if others[index].answer not in {each.answer for each in companions}:
            companions.append(others[index])
        if len(companions) == per_film - 1:
            break
    at = min(place_of(length, depth), length - 1)
    places = _apart(rng, length, at, per_film - 1, stage)
    shown = sorted([(at, target), *zip(places, companions, strict=True)], key=lambda pair: pair[0])
    frames, where = stage.compose(length, shown, scene)
    shape = {
        "frames": length, "depth": float(depth), "tier": target.tier, "needle": target.id,
        "control": None,
    }  # fmt: skip
    asked = list(
        _questions(stage, scene, rng, [each for _, each in shown], where, target, names, shape)
    )
    return Scene(scene, frames, stage.step_s, tuple(asked))


def _apart(
    rng: np.random.Generator, length: int, taken: int, count: int, stage: Stage
) -> list[int]:
    """Draw places that are not next to each other, nor to the one taken, nor in its second."""
    gap = 2
    if stage.times and stage.step_s < 1:
        gap = max(gap, min(math.ceil(2 / stage.step_s), length // (2 * count + 4)))
    places = [taken]
    for _ in range(count):
        free = [p for p in range(length) if all(abs(p - other) >= gap for other in places)]
        places.append(int(rng.choice(free)))
    return places[1:]


def _questions(
    stage: Stage, scene: str, rng: np.random.Generator, shown: Sequence[Needle],
    where: Sequence[int], target: Needle, names: Sequence[str], shape: dict[str, Any],
) -> Iterator[Question]:  # fmt: skip
    words, here = stage.words, [needle.answer for needle in shown]
    place = where[here.index(target.answer)]
    # At high rates several share a second; which of them is meant then, their order says.
    if stage.times and [stage.time(k) for k in where].count(stage.time(place)) == 1:
        text = words.at.format(time=stage.time(place))
    else:
        text = words.ordinal.format(ordinal=_ORDINALS[here.index(target.answer)])
    # Needles of the same film first, so that knowing what was there does not help.
    near = [name for name in here if name != target.answer]
    far = [name for name in names if name not in here]
    rng.shuffle(near)
    rng.shuffle(far)
    options = [target.answer, *near, *far][: stage.ways]
    rng.shuffle(options)
    choice, free = _both(
        scene, "retrieval", text, target.answer, options, "name", shape, names=tuple(names)
    )
    yield choice
    # Nobody tells who answers freely what there is to choose from but the set's names.
    yield replace(free, options=tuple(names), chance=1 / len(names))
    if stage.times:
        yield from _grounding(stage, scene, rng, where, place, target, shape)
    for absent in (False, True):
        name = far[0] if absent else target.answer
        article = "an" if name[0].lower() in "aeiou" else "a"
        yield from _both(
            scene, f"presence-{'absent' if absent else 'present'}",
            words.presence.format(name=name, a_name=f"{article} {name}"),
            "no" if absent else "yes", ["yes", "no"], "name", shape,
            names=("yes", "no"), task="presence",
        )  # fmt: skip
    three = [target.answer, *near[:2]]
    truth = ", ".join(sorted(three, key=here.index))
    orders = [", ".join(each) for each in itertools.permutations(sorted(three))]
    rng.shuffle(orders)
    yield from _both(
        scene, "ordering", words.order.format(names=", ".join(sorted(three))), truth, orders,
        "order", shape, names=tuple(three),
    )  # fmt: skip
    yield Question(
        id=f"{scene}/listing/free", task="listing", ask="free", text=words.every,
        answer=", ".join(here), reader="list", names=tuple(names), chance=len(here) / len(names),
        shape=shape, max_new_tokens=16 * len(here),
    )  # fmt: skip


def _grounding(
    stage: Stage, scene: str, rng: np.random.Generator, where: Sequence[int], place: int,
    target: Needle, shape: dict[str, Any],
) -> Iterator[Question]:  # fmt: skip
    length = shape["frames"]
    every = list(dict.fromkeys(stage.time(k) for k in range(length)))
    truth = stage.time(place)
    if set(every) <= {truth}:
        return  # The whole film is in one second.
    near = [stage.time(k) for k in where if stage.time(k) != truth]
    far = [time for time in every if time not in (truth, *near)]
    rng.shuffle(near)
    rng.shuffle(far)
    options = [truth, *dict.fromkeys([*near, *far])][:WAYS]
    rng.shuffle(options)
    text = stage.words.when.format(name=target.answer)
    choice, free = _both(scene, "grounding", text, truth, options, "time", shape)
    yield choice
    tolerance_s = max(1.0, stage.step_s)
    every = list(dict.fromkeys([truth, *every]))
    hits = sum(abs(seconds_of(time) - seconds_of(truth)) <= tolerance_s for time in every)
    yield replace(free, tolerance_s=tolerance_s, chance=hits / len(every), options=tuple(every))


def _counting(stage: Stage, length: int, depth: Fraction, trial: int, target: Needle) -> Scene:
    scene = f"strict/{length}/{float(depth):g}/{trial}/count"
    rng = stage.rng(scene)
    times = int(rng.integers(1, WAYS + 1))
    at = min(place_of(length, depth), length - 1)
    places = sorted([at, *_apart(rng, length, at, times - 1, stage)])
    frames, _ = stage.compose(length, [(place, target) for place in places], scene)
    shape = {
        "frames": length, "depth": float(depth), "tier": target.tier, "needle": target.id,
        "control": None,
    }  # fmt: skip
    asked = _both(
        scene, "counting", stage.words.count.format(name=target.answer), str(times),
        [str(n) for n in range(1, WAYS + 1)], "number", shape,
    )  # fmt: skip
    return Scene(scene, frames, stage.step_s, tuple(asked))


def control_scenes(stage: Stage, film: Scene, length: int) -> list[Scene]:
    """Return the film without its needles, and a grey one, with the same questions.

    Args:
        stage: Gives the grey frame.
        film: A scene with needles.
        length: N.
    """
    kept = [q for q in film.questions if q.task in ("retrieval", "ordering")]
    scenes = []
    for control, frames in (
        ("no needle", tuple(stage.film(0, length))),
        ("grey", (stage.grey(),) * length),
    ):
        asked = tuple(
            replace(
                q, id=f"{q.id}/{control.replace(' ', '-')}", shape={**q.shape, "control": control}
            )
            for q in kept
        )
        scenes.append(Scene(f"{film.id}/{control}", frames, film.step_s, asked))
    return scenes


def merged(scenes: Sequence[Scene]) -> list[Scene]:
    """Return scenes that show the same frames as one, with the questions of all.

    Args:
        scenes: Any; the first of equal ones gives its place and its id.
    """
    groups: dict[tuple[Any, ...], list[Scene]] = {}
    for scene in scenes:
        groups.setdefault((scene.frames, scene.step_s), []).append(scene)
    return [
        replace(group[0], questions=tuple(q for scene in group for q in scene.questions))
        for group in groups.values()
    ]


def _both(
    scene: str, name: str, text: str, answer: str, options: Sequence[str], reader: Any,
    shape: dict[str, Any], *, names: tuple[str, ...] = (), task: str | None = None,
) -> list[Question]:  # fmt: skip
    """The same question as a choice and in free words."""
    asked = Question(
        id=f"{scene}/{name}/choice", task=task or name, ask="choice", text=text, answer=answer,
        options=tuple(options), reader=reader, names=names, chance=1 / len(options), shape=shape,
    )  # fmt: skip
    return [asked, replace(asked, id=f"{scene}/{name}/free", ask="free")]
