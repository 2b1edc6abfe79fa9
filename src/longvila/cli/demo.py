"""Find pictures that were pasted into a real film, and say how many were found.

1. The small default model is assembled once from weights inside Python packages and the trained
   delta of this package; the film comes from a package too. All are pinned and cached.
2. Pictures are pasted into a part of the film that training never saw, at times drawn from a seed,
   and written as ordinary video files.
3. Each video goes through the model once. Then it is asked, for each picture, what is shown at its
   time: once in its own words, and once as a choice of 20 names by likelihood (guessing: 5 %).
4. Answers are printed beside the truth, pictures seen in training apart from those never seen, and
   a contact sheet of the very frames is written.
5. A small grid of the needle test (``longvila needle``) follows: frames across, depths down.

What is asked, and how much of it must be right, is `GOAL`; with fewer the exit status is 1.

    longvila demo --out demo
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longvila.cli._measuring import quieten_loading
from longvila.cli._options import parse
from longvila.errors import LongVILAError
from longvila.packaged import DELTA, asset, default_model, fetch

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from longvila.evaluation.summary import Share

WAYS = 20
QUESTION = "What is shown at {time}?"
#: Size of the written videos, and their frames a second.
SIZE, RATE = (640, 360), 12
#: Seconds that a picture stays, and that a video has for each of its pictures.
STAY_S, EACH_S = 2.0, 6.0
#: Pictures in each film of the heat map.
GRID_NEEDLES = 3
#: The part of the film that training never saw.
UNSEEN_PART = (2 / 3, 1.0)


@dataclass(frozen=True)
class Goal:
    """What is asked of a model, and what it should reach.

    Attributes:
        seen: Pictures from its training.
        unseen: Pictures it never saw.
        right: Of the first, so many must be right.
        by: In its own words (``free``), or the likeliest of `WAYS` names (``choice``).
        videos: Videos that share the pictures.
        grid: Frames of the heat map's columns.
        depth_interval: Step of its rows.
    """

    seen: int
    unseen: int
    right: int
    by: Literal["free", "choice"]
    videos: int
    grid: tuple[int, ...]
    depth_interval: float


#: For the delta that ships, with as few frames as a CPU is through with in minutes.
GOAL = Goal(seen=10, unseen=5, right=8, by="free", videos=3, grid=(12, 20, 32), depth_interval=0.5)


@dataclass(frozen=True)
class Options:
    """Find pictures that were pasted into a real film, and say how many were found."""

    out: Path = Path("out/demo")
    """Folder for the videos, the contact sheet, the heat map and the answers."""
    model: str | None = None
    """Checkpoint to ask; the small model of this package if absent."""
    film: Path | None = None
    """Film to paste into; a packaged one if absent."""
    seen: int = GOAL.seen
    """Pictures from the training of the small model."""
    unseen: int = GOAL.unseen
    """Pictures it never saw."""
    right: int = GOAL.right
    """Pictures from the training that must be right; the exit status is 1 with fewer."""
    videos: int = GOAL.videos
    """Videos that the pictures are dealt to."""
    grid: tuple[int, ...] = GOAL.grid
    """Numbers of frames of the heat map; none leaves it out."""
    fps: float = 1.0
    """Frames a second that the model sees."""
    seed: int = 0
    """Decides order, times and places."""


@dataclass
class Needle:
    """A pasted picture and what the model said of it."""

    name: str
    file: str
    seen: bool
    video: str = ""
    time_s: float = 0.0
    answer: str = ""
    choice: str = ""

    @property
    def clock(self) -> str:
        """Its time as the questions write it."""
        from longvila.model.processing_longvila import clock

        return clock(self.time_s)


def choose_needles(folder: Path, seen: int, unseen: int, seed: int) -> list[Needle]:
    """Choose pictures, in an order that mixes those seen with the others.

    Args:
        folder: Holds ``needles.json`` and its pictures.
        seen: How many from training.
        unseen: How many others.
        seed: Decides which, and the order.

    Returns:
        The needles in the order they are pasted.

    Raises:
        LongVILAError: If there are not so many.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    entries = json.loads((folder / "needles.json").read_text(encoding="utf-8"))
    chosen: list[Needle] = []
    for wanted, kind in ((seen, True), (unseen, False)):
        tier = [Needle(e["name"], e["file"], kind) for e in entries if e["seen"] == kind]
        if wanted > len(tier):
            name = "from training" if kind else "never seen"
            raise LongVILAError(f"there are {len(tier)} pictures {name}, not {wanted}")
        chosen += [tier[int(k)] for k in rng.permutation(len(tier))[:wanted]]
    return [chosen[int(k)] for k in rng.permutation(len(chosen))]


def place(count: int, duration_s: float, rng: np.random.Generator) -> list[float]:
    """Draw times of pictures that do not overlap.

    Args:
        count: How many pictures.
        duration_s: Length of the video.
        rng: Source of chance.

    Returns:
        Whole seconds, ascending, one in each of ``count`` equal parts.

    Raises:
        ValueError: If the parts are too short for the pictures.
    """
    part = duration_s / count
    if part < STAY_S + 2:
        raise ValueError(f"{count} pictures do not fit into {duration_s} s; {STAY_S + 2} s each")
    return [float(int(k * part + 1 + rng.uniform(0, part - STAY_S - 2))) for k in range(count)]


def paste(frame: Image.Image, picture: Image.Image, where: tuple[float, float]) -> Image.Image:
    """Paste a picture on a white card into a frame.

    Args:
        frame: The frame, RGB.
        picture: The picture, RGBA.
        where: Place of the card as fractions of the free room (right, down).

    Returns:
        A new frame.
    """
    from PIL import Image

    out = frame.copy()
    side = int(0.78 * frame.height)
    picture = picture.copy()
    scale = side / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    margin = side // 20
    card = Image.new("RGB", (size[0] + 2 * margin, size[1] + 2 * margin), "white")
    card.paste(picture, (margin, margin), picture)
    left = int(where[0] * (frame.width - card.width))
    top = int(where[1] * (frame.height - card.height))
    out.paste(card, (left, top))
    return out


def film_frames(film: Path, start_s: float, duration_s: float) -> Iterator[Image.Image]:
    """Decode a part of a film at the demo's rate and size.

    Args:
        film: The file.
        start_s: Where the part starts.
        duration_s: How long it is.

    Yields:
        Frames, RGB.
    """
    import av

    from longvila.errors import VideoError

    given = 0
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        container.seek(int(start_s / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            while frame.time >= start_s + given / RATE:
                if given >= duration_s * RATE:
                    return
                yield frame.to_image(width=SIZE[0], height=SIZE[1])
                given += 1
    if given < duration_s * RATE:
        raise VideoError(f"{film} ends before {start_s + duration_s:.0f} s")


def write_video(
    path: Path,
    film: Path,
    start_s: float,
    duration_s: float,
    needles: Sequence[Needle],
    folder: Path,
    rng: np.random.Generator,
) -> None:
    """Write a part of the film with pictures pasted in; times are set on the needles.

    Args:
        path: The file to make.
        film: The film.
        start_s: Where the part starts.
        duration_s: How long it is.
        needles: What is pasted, in order.
        folder: Holds their pictures.
        rng: Source of chance.
    """
    import av
    from PIL import Image

    for needle, time_s in zip(needles, place(len(needles), duration_s, rng), strict=True):
        needle.time_s, needle.video = time_s, path.name
    pictures = [Image.open(folder / needle.file).convert("RGBA") for needle in needles]
    places = [(float(rng.uniform(0.1, 0.9)), float(rng.uniform(0.2, 0.8))) for _ in needles]
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(
            "libx264", rate=RATE, options={"preset": "veryfast", "crf": "20"}
        )
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(film_frames(film, start_s, duration_s)):
            now = number / RATE
            for needle, picture, where in zip(needles, pictures, places, strict=True):
                if needle.time_s <= now < needle.time_s + STAY_S:
                    frame = paste(frame, picture, where)
            out.mux(stream.encode(av.VideoFrame.from_image(frame)))
        out.mux(stream.encode(None))


def contact_sheet(cells: Sequence[tuple[np.ndarray, Needle]], path: Path, columns: int = 4) -> None:
    """Draw each needle's frame with its time, the truth and the answer.

    Args:
        cells: The frame the model saw, and the needle.
        path: The PNG to write.
        columns: Pictures in a row.
    """
    from PIL import Image, ImageDraw

    width, height, text = 320, 180, 46
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (frame, needle) in enumerate(cells):
        left, top = number % columns * width, number // columns * (height + text)
        sheet.paste(Image.fromarray(frame).resize((width, height)), (left, top))
        colour = "darkgreen" if needle.answer == needle.name else "firebrick"
        tier = "seen in training" if needle.seen else "never seen"
        draw.text((left + 6, top + height + 4), f"{needle.clock}  {needle.name} ({tier})", "black")
        draw.text((left + 6, top + height + 22), f"says: {needle.answer}", colour)
    sheet.save(path)


def report(needles: Sequence[Needle], out: Any) -> dict[str, Any]:
    """Print the two tiers apart, and return their figures.

    Args:
        needles: Asked needles.
        out: Where to print.

    Returns:
        Counts by tier.
    """
    figures: dict[str, Any] = {}
    for seen, title in ((True, "Pictures seen in training, in unseen film"),
                        (False, "Pictures never seen in training")):  # fmt: skip
        tier = [needle for needle in needles if needle.seen == seen]
        if not tier:
            continue
        print(f"\n{title}\n  {'video':<12}{'at':<7}{'truth':<18}{'answer':<26}  choice of {WAYS}",
              file=out)  # fmt: skip
        for needle in tier:
            mark = "right" if needle.answer == needle.name else "wrong"
            pick = "right" if needle.choice == needle.name else needle.choice
            print(
                f"  {needle.video:<12}{needle.clock:<7}{needle.name:<18}"
                f"{needle.answer + ' (' + mark + ')':<26}  {pick}",
                file=out,
            )
        named = sum(needle.answer == needle.name for needle in tier)
        chosen = sum(needle.choice == needle.name for needle in tier)
        print(
            f"  named: {named} of {len(tier)}; chosen among {WAYS}: {chosen} of {len(tier)} "
            f"= {chosen / len(tier):.0%}, guessing gives {1 / WAYS:.0%}",
            file=out,
        )
        figures["seen" if seen else "unseen"] = {
            "n": len(tier), "named": named, "chosen": chosen, "chance": 1 / WAYS,
        }  # fmt: skip
    return figures


def verdict(figures: Mapping[str, Any], options: Options) -> tuple[bool, str]:
    """Compare what was found with what should be.

    Args:
        figures: What `report` returned.
        options: With the number wanted.

    Returns:
        Whether it was reached, and a sentence that says so.
    """
    seen = figures.get("seen")
    if seen is None:
        return options.right == 0, "No picture from training was asked about."
    way = "named" if GOAL.by == "free" else "chosen"
    reached = seen[way] >= options.right
    return reached, (
        f"Of {seen['n']} pictures seen in training {seen[way]} were {way} right, at least "
        f"{options.right} were wanted: {'reached' if reached else 'NOT REACHED'}."
    )


def draw_grid(grid: Mapping[tuple[int, float], Share]) -> str:
    """Return a heat map for a terminal: right answers of those in each cell.

    Args:
        grid: For each (frames, depth) its share.
    """
    lengths = sorted({frames for frames, _ in grid})
    lines = ["  depth    " + "".join(f"{frames:>8}" for frames in lengths) + "  frames"]
    for depth in sorted({depth for _, depth in grid}):
        cells = []
        for frames in lengths:
            one = grid.get((frames, depth))
            mark = (
                "" if one is None else "#" if one.correct == one.n else "+" if one.correct else "."
            )
            cells.append(f"{mark} {one.correct}/{one.n}".rjust(8) if one else " " * 8)
        lines.append(f"  {depth:>6.0%}   {''.join(cells)}")
    return "\n".join(lines)


def measure_grid(model: Any, processor: Any, film: Path, folder: Path, options: Options) -> str:
    """Run a small grid of the needle test on pictures seen in training.

    Args:
        model: The model.
        processor: Its processor.
        film: The film; its unseen part is the haystack.
        folder: Holds ``needles.json`` and its pictures.
        options: The options.

    Returns:
        The heat map as text; PNG and page lie in ``OUT/grid``.
    """
    from longvila.evaluation.needle import Plan, run_needle
    from longvila.evaluation.needle_sets import load_needles, open_haystack
    from longvila.evaluation.runner import read_records
    from longvila.evaluation.summary import cells

    needles = load_needles(folder, tier="seen")
    plan = Plan(
        lengths=options.grid, depth_interval=GOAL.depth_interval, protocol="strict",
        per_film=GRID_NEEDLES,
        tasks=("retrieval",), control=False, fps=options.fps, seed=options.seed,
        ways=min(WAYS, len({needle.answer for needle in needles})),
    )  # fmt: skip
    haystack = open_haystack(
        film, num_frames=plan.frames, fps=plan.fps, processor=processor.video_processor,
        part=UNSEEN_PART,
    )  # fmt: skip
    out = options.out / "grid"
    # A demo asks anew each time, where a measurement would go on.
    (out / "records.jsonl").unlink(missing_ok=True)
    groups = run_needle(
        model, processor, plan, haystack, needles, out=out, name=options.model or "small model"
    )
    records = read_records(out / "records.jsonl")
    (group,) = [each for each in groups if each.ask == GOAL.by]
    way = "in its own words" if GOAL.by == "free" else f"among {plan.ways} names"
    return (
        f"What is shown at its time, {way}, by frames and depth: {group.all.correct} of "
        f"{group.all.n} right, a guess {group.all.chance:.0%}\n{draw_grid(cells(records, group))}"
    )


def ask(
    engine: Any,
    processor: Any,
    film: Path,
    groups: Sequence[Sequence[Needle]],
    folder: Path,
    options: Options,
) -> list[tuple[np.ndarray, Needle]]:
    """Write the videos, let the model watch each once, and ask about its pictures.

    Args:
        engine: An engine of the model.
        processor: Its processor.
        film: The film.
        groups: Pictures of each video; answers are set on them.
        folder: Holds the pictures.
        options: The options.

    Returns:
        The frame the model saw of each picture, and the picture.
    """
    import numpy as np

    from longvila.evaluation.answerer import Answerer
    from longvila.media.video import open_video

    names_file = asset("names.json")
    if names_file is None:
        raise LongVILAError("this build of longvila has no names (longvila/assets)")
    names = json.loads(names_file.read_text(encoding="utf-8"))
    rng = np.random.default_rng(options.seed)
    with open_video(str(film)) as reader:
        film_s = reader.metadata.duration_s
    durations_s = [EACH_S * len(group) for group in groups]
    first_s, last_s = (film_s * share for share in UNSEEN_PART)
    starts = np.linspace(first_s + 1, last_s - max(durations_s) - 1, len(groups))
    cells = []
    answerer = Answerer(engine, processor)
    for number, (group, start_s) in enumerate(zip(groups, starts, strict=True)):
        path = options.out / f"video{number}.mp4"
        write_video(path, film, float(start_s), durations_s[number], group, folder, rng)
        written = time.time()
        watched = processor.video_processor.sample(str(path), fps=options.fps)
        seen = answerer.watch(watched)
        for needle in group:
            # The time of the first frame the model sees of it.
            frame = int(np.searchsorted(watched.timestamps_s, needle.time_s + 0.25))
            needle.time_s = float(watched.timestamps_s[frame])
            others = [name for name in names if name != needle.name]
            picked = [str(n) for n in rng.choice(others, WAYS - 1, replace=False)]
            choices = [needle.name, *picked]
            rng.shuffle(choices)
            question = QUESTION.format(time=needle.clock)
            needle.answer = answerer.answer(seen, question, max_new_tokens=16)
            scores = answerer.choose(seen, question, choices)
            needle.choice = choices[int(np.argmax(scores))]
            cells.append((watched.frames[frame], needle))
        print(
            f"{path.name}: film from {start_s:.0f} s, {len(watched.frames)} frames, "
            f"{len(group)} pictures asked in {time.time() - written:.1f} s",
            file=sys.stderr,
        )
    return cells


def check(options: Options) -> None:
    """Refuse options that would fail after the model has answered.

    Args:
        options: The options.

    Raises:
        LongVILAError: If one is wrong; the message names it.
    """
    for name, least in (("seen", 0), ("unseen", 0), ("seed", 0), ("fps", 1 / STAY_S)):
        if not least <= getattr(options, name) < math.inf:
            # At a lower rate a picture comes and goes between two frames.
            raise LongVILAError(f"--{name} must be {least:g} or more, got {getattr(options, name)}")
    if options.grid and min(options.grid) < 4 * GRID_NEEDLES:
        raise LongVILAError(
            f"--grid: {min(options.grid)} frames have no room for {GRID_NEEDLES} pictures, "
            f"{4 * GRID_NEEDLES} do"
        )
    if options.film is not None and not options.film.exists():
        raise LongVILAError(f"--film: there is no film {options.film}")


def main(argv: list[str]) -> int:
    """Run the verb."""
    options = parse(Options, argv, "demo", __doc__)
    check(options)
    folder = asset("needles")
    if folder is None:
        raise LongVILAError("this build of longvila has no demo pictures (longvila/assets)")
    needles = choose_needles(folder, options.seen, options.unseen, options.seed)
    if not 1 <= options.videos <= len(needles):
        raise LongVILAError(f"--videos must be 1 to {len(needles)}, got {options.videos}")
    film = options.film or fetch("film-bbb")
    source = options.model or str(default_model())
    began = time.time()
    from longvila.inference.engine import Engine
    from longvila.model.opening import open_checkpoint
    from longvila.model.processing_longvila import LongVILAProcessor

    if options.model is None and asset(DELTA) is None:
        print("No trained delta ships with this build: the projector is UNTRAINED and the answers "
              "below are noise.")  # fmt: skip
    quieten_loading()
    model, processor = open_checkpoint(source, device="cpu", dtype="float32", label="--model")
    if not isinstance(processor, LongVILAProcessor):
        raise LongVILAError(
            f"--model {source}: the demo asks LongVILA; longvila needle takes models of any family"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    groups = [needles[number :: options.videos] for number in range(options.videos)]
    with Engine(model) as engine:
        cells = ask(engine, processor, film, groups, folder, options)
    figures = report(needles, sys.stdout)
    contact_sheet(cells, options.out / "contact_sheet.png")
    reached, sentence = verdict(figures, options)
    answers = {
        "model": source, "seed": options.seed, "tiers": figures, "reached": reached,
        "needles": [asdict(needle) for needle in needles],
    }  # fmt: skip
    (options.out / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    print(f"\n{sentence}")
    if options.grid:
        print(f"\n{measure_grid(model, processor, film, folder, options)}")
        print(f"heat map: {options.out / 'grid' / 'page.html'}")
    print(f"\nframes with answers: {options.out / 'contact_sheet.png'}   "
          f"({time.time() - began:.0f} s)")  # fmt: skip
    return 0 if reached else 1
