"""Draw the data of all stages as ordinary files: pictures, films, conversations, needles.

    python recipes/smol/draw.py PREPARED OUT [--sets images short long needles text] [--share 0.1]

1. ``prepare.py``'s named pictures and film frames are the only material. Everything else follows
   from the seed: item k of a set is the same whoever draws it, and in whichever process.
2. ``images``: a picture on a background, several views of each, as JPEG; a record is an album of
   many (``align.jsonl`` with captions, ``pretrain.jsonl`` with questions, some pictures together).
   Names are learnt by seeing few views often: four times as many views, each once or twice and
   changed in colour and cut, left most pictures of training without their exact name.
3. ``short`` (8 to 32 frames), ``long`` (64 to 2,048, log-uniform), ``longest`` (3,000 to 6,000):
   shots of the film, each panned, mirrored and lit its own way, with pictures pasted at known
   times, encoded a frame every ``step_s`` seconds; the processor takes every frame. Conversations
   of long videos have as many turns as the row has room for: a step costs what its frames cost, and
   teaches what its answers say.
4. ``needles``: pictures of the tiers a (trained), b (unseen pictures of trained names) and c
   (unseen names), and ``haystack.mp4`` of film that training never shows.
5. ``text``: long logs and pages with facts hidden in them, asked for at the end. ``log``: short
   logs, in which finding a time by a word, and a word by its time, is learnt without pictures.

Sets are cut into parts; a part is a file that appears when it is whole, so that whoever is
interrupted goes on. Cost: some hundred frames a second and core.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from questions import IMAGE, Shown, clock, conversation

SIDE, FRAME = 160, 224
#: Samples of a set at full share, and how many a part has.
SIZES = {
    "images": (52000, 520),
    "short": (6000, 60),
    "log": (2400, 120),
    "text": (400, 10),
    "long": (900, 6),
    "longest": (160, 1),
}
#: Tokens that a long video and all that is asked about it must fit, as their stages say; and no
#: more than so many of a frame and of a turn.
ROWS = {"long": 57344, "longest": 147456}
FRAME_TOKENS, TURN_TOKENS = 23, 32
ALBUM = 20
HAYSTACK = 6000
#: Root mean square difference of thumbnails, in [0, 1], below which two pictures are twins.
TWIN = 0.08
Rng = np.random.Generator


@dataclass(frozen=True)
class Store:
    """Pictures and frames of the prepared folder, by number.

    Attributes:
        folder: What ``prepare.py`` wrote.
        entries: Name, size and split of each picture.
        runs: Frame numbers of each clip, for training and for tests.
        frames: All frames, uint8 ``(N, FRAME, FRAME, 3)``, mapped from a file.
        pictures: The pictures' files.
    """

    entries: list[dict[str, Any]]
    runs: dict[str, list[list[int]]]
    frames: np.ndarray
    pictures: list[bytes]

    def of_split(self, split: str) -> list[int]:
        """Numbers of the pictures of a split."""
        return [i for i, entry in enumerate(self.entries) if entry["split"] == split]

    def by_name(self) -> dict[str, list[int]]:
        """Trained pictures by name."""
        found: dict[str, list[int]] = {}
        for i in self.of_split("train"):
            found.setdefault(self.entries[i]["name"], []).append(i)
        return found

    def name(self, picture: int) -> str:
        """What a picture is called."""
        return str(self.entries[picture]["name"])

    def picture(self, number: int) -> Image.Image:
        """A picture, RGBA."""
        return Image.open(io.BytesIO(self.pictures[number])).convert("RGBA")


def open_store(folder: Path, out: Path, limit: int | None = None) -> Store:
    """Open the prepared folder; decoded frames are kept in ``out``.

    Args:
        folder: What ``prepare.py`` wrote.
        out: Folder for the decoded frames.
        limit: Keep so many pictures of each split, to try things out.
    """
    entries = json.loads((folder / "pictures.json").read_text())
    frames = json.loads((folder / "frames.json").read_text())
    if limit is not None:
        seen: dict[str, int] = {}
        for entry in entries:
            seen[entry["split"]] = seen.get(entry["split"], 0) + 1
            if seen[entry["split"]] > limit:
                entry["split"] = "unused"
    pixels = out / "frames.npy"
    if not pixels.exists():
        out.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "frames.zip") as archive:
            blobs = [archive.read(entry["file"]) for entry in frames]
        stack = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in blobs])
        with _whole(pixels) as part, part.open("wb") as file:
            np.save(file, stack)
    runs: dict[str, list[list[int]]] = {"train": [], "test": []}
    for split, found in runs.items():
        for clip in sorted({entry["clip"] for entry in frames}):
            run = [i for i, e in enumerate(frames) if e["clip"] == clip and e["split"] == split]
            if len(run) >= 4:
                found.append(run)
    with zipfile.ZipFile(folder / "pictures.zip") as archive:
        pictures = [archive.read(entry["file"]) for entry in entries]
    return Store(entries, runs, np.load(pixels, mmap_mode="r"), pictures)


class _whole:
    """A path beside another, moved there when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path, self.part = path, path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.part

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            os.replace(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


# ---- what is seen -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paste:
    """How a picture lies on a frame: centre and size as shares of it, turn, mirror, paper."""

    x: float
    y: float
    width: float
    height: float
    angle: float
    mirrored: bool
    paper: str  # "none", "card" or "full"
    colour: tuple[int, int, int]


def draw_paste(size: Sequence[int], rng: Rng, *, small: bool = False) -> Paste:
    """Choose how a picture lies on a frame.

    Args:
        size: Its height and width.
        rng: Chance.
        small: Leave room for others.
    """
    h, w = (float(s) / max(size) for s in size)
    scale = float(rng.uniform(0.3, 0.48) if small else rng.uniform(0.4, 0.95))
    if not small and rng.random() < 0.15:
        scale = float(rng.uniform(0.25, 0.45))
    # A wide film is squeezed into the square input, and with it what was pasted on it.
    squeeze = 9 / 16 if rng.random() < 0.25 else float(rng.uniform(0.8, 1.1))
    width, height = min(1.0, w * scale * squeeze), min(1.0, h * scale)
    white = rng.random() < 0.6
    return Paste(
        x=float(rng.uniform(width / 2, 1 - width / 2)),
        y=float(rng.uniform(height / 2, 1 - height / 2)),
        width=width,
        height=height,
        angle=float(rng.normal(0, 6)),
        mirrored=bool(rng.random() < 0.3),
        paper=str(rng.choice(("none", "card", "full"), p=(0.25, 0.55, 0.2))),
        colour=(255, 255, 255) if white else tuple(int(c) for c in rng.integers(150, 256, 3)),
    )


def paste(frame: np.ndarray, picture: Image.Image, how: Paste) -> np.ndarray:
    """Return a frame with a picture on it."""
    out = Image.fromarray(frame)
    size = (max(8, round(how.width * FRAME)), max(8, round(how.height * FRAME)))
    if how.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.resize(size, Image.Resampling.BILINEAR)
    picture = picture.rotate(how.angle, Image.Resampling.BILINEAR, expand=True)
    left = round(how.x * FRAME - picture.width / 2)
    top = round(how.y * FRAME - picture.height / 2)
    if how.paper == "full":
        out.paste(how.colour, (0, 0, FRAME, FRAME))
    elif how.paper == "card":
        edge = max(2, picture.width // 20)
        box = (left - edge, top - edge, left + picture.width + edge, top + picture.height + edge)
        out.paste(how.colour, (max(0, box[0]), max(0, box[1]), *box[2:]))
    out.paste(picture, (left, top), picture)
    return np.asarray(out)


@dataclass(frozen=True)
class Shot:
    """A run of film frames through one moving window, mirrored and lit alike; None is colour."""

    frames: tuple[int, ...]
    window: tuple[float, float, float, float, float]  # share, x and y at start and end
    mirrored: bool
    gain: float
    shift: float
    colour: tuple[int, int, int] | None = None


def draw_shots(runs: list[list[int]], count: int, rng: Rng) -> list[Shot]:
    """Choose shots that fill a number of frames."""
    weights = np.sqrt([len(run) for run in runs])
    shots: list[Shot] = []
    while count > 0:
        length = min(count, int(rng.integers(4, 64)))
        run = runs[int(rng.choice(len(runs), p=weights / weights.sum()))]
        stride = int(rng.integers(1, 4))
        first = int(rng.integers(len(run)))
        picks = tuple(run[(first + stride * k) % len(run)] for k in range(length))
        plain = rng.random() < 0.04
        shots.append(
            Shot(
                picks,
                (float(rng.uniform(0.55, 1)), *(float(v) for v in rng.random(4))),
                bool(rng.random() < 0.5),
                float(rng.uniform(0.75, 1.25)),
                float(rng.normal(0, 14)),
                tuple(int(c) for c in rng.integers(0, 256, 3)) if plain else None,
            )
        )
        count -= length
    return shots


def shot_frames(store: Store, shot: Shot) -> Iterator[np.ndarray]:
    """Draw the frames of a shot."""
    share, x0, y0, x1, y1 = shot.window
    side = round(share * FRAME)
    room = FRAME - side
    table = np.clip((np.arange(256) - 128) * shot.gain + 128 + shot.shift, 0, 255)
    table = table.astype(np.uint8)
    for k, number in enumerate(shot.frames):
        if shot.colour is not None:
            yield np.full((FRAME, FRAME, 3), shot.colour, np.uint8)
            continue
        t = k / max(1, len(shot.frames) - 1)
        left, top = round((x0 + (x1 - x0) * t) * room), round((y0 + (y1 - y0) * t) * room)
        frame = store.frames[number, top : top + side, left : left + side]
        if shot.mirrored:
            frame = frame[:, ::-1]
        frame = np.take(table, frame)
        if room:
            image = Image.fromarray(frame).resize((FRAME, FRAME), Image.Resampling.BILINEAR)
            frame = np.asarray(image)
        yield frame


def write_video(path: Path, frames: Iterator[np.ndarray], step_s: float) -> None:
    """Encode frames, one every ``step_s`` seconds."""
    with _whole(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=1 / Fraction(step_s))
        stream.width = stream.height = FRAME
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {"preset": "ultrafast", "crf": "22", "g": "64"}
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ---- samples ------------------------------------------------------------------------------------


class Names:
    """Draws trained pictures: names evenly at first, so that fifty drawings of a cat do not make
    the word likelier.

    Args:
        store: The pictures.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.named = store, store.by_name()
        self.names, self.all = sorted(self.named), store.of_split("train")

    def picture(self, rng: Rng) -> int:
        """Draw a picture."""
        if rng.random() < 0.6:
            return int(rng.choice(self.all))
        return int(rng.choice(self.named[self.names[int(rng.integers(len(self.names)))]]))

    def absent(self, rng: Rng) -> str:
        """Draw a name."""
        return self.names[int(rng.integers(len(self.names)))]


def place(names: Names, num_frames: int, rng: Rng, *, share: float) -> list[Shown]:
    """Choose what appears when, in order of time, never two at once.

    Args:
        names: The pictures.
        num_frames: Frames of the video.
        rng: Chance.
        share: Pictures a frame, about.
    """
    wanted = max(1, int(rng.poisson(share * num_frames)))
    free = np.ones(num_frames, bool)
    shown: list[Shown] = []
    for _ in range(wanted):
        again = bool(shown) and rng.random() < 0.12
        picture = shown[int(rng.integers(len(shown)))].picture if again else names.picture(rng)
        name = names.store.name(picture)
        if not again and any(each.name == name for each in shown):
            continue
        length = int(rng.choice((1, 2, 3), p=(0.75, 0.15, 0.1)))
        start = int(rng.integers(max(1, num_frames - length + 1)))
        # Two stretches of one picture must not touch: they would be one.
        around = slice(max(0, start - again), start + length + again)
        if not free[around].all() or start + length > num_frames:
            continue
        free[start : start + length] = False
        shown.append(Shown(start, length, picture, name))
    return sorted(shown, key=lambda each: each.start)


def video_sample(store: Store, names: Names, kind: str, number: int, seed: int) -> dict[str, Any]:
    """Plan one video: its frames, what it shows and what is asked. No pixels.

    Args:
        store: The material.
        names: Draws pictures.
        kind: ``short``, ``long`` or ``longest``.
        number: Which of its set.
        seed: Seed of all data.
    """
    rng = np.random.default_rng([seed, number, *kind.encode()])
    if kind == "short":
        num_frames = int(rng.integers(8, 33))
        # A third are nearly all pictures: every time names one.
        share = float(rng.choice((0.15, 0.4, 1.5)))
        step_s = float(rng.choice((1, 1, 1, 2, 3, 5, 10, 20)))
        turns, at = 16, 0.65
    else:
        num_frames = round(2 ** float(rng.uniform(6, 11)))
        if kind == "longest":
            num_frames = int(rng.integers(3000, HAYSTACK + 1))
        share = float(rng.choice((0.04, 0.3, 0.8) if kind == "long" else (0.02, 0.12, 0.3)))
        steps = (1, 1, 1, 2) if num_frames > 1024 else (1, 1, 1, 2, 3, 5)
        step_s = 1.0 if kind == "longest" else float(rng.choice(steps))
        turns = (ROWS[kind] - FRAME_TOKENS * num_frames) // TURN_TOKENS - 20
        # Nearly all by their times: the answers' times are not learnt in so few steps, and their
        # loss would drown that of the names.
        at = 0.9
    shown = place(names, num_frames, rng, share=share)
    if not shown:
        picture = names.picture(rng)
        shown = [Shown(0, 1, picture, store.name(picture))]
    pairs = conversation(
        shown, num_frames, step_s, rng, turns=turns, absent=lambda: names.absent(rng), at=at
    )
    return {
        "num_frames": num_frames, "step_s": step_s, "shown": shown, "pairs": pairs,
        "shots": draw_shots(store.runs["train"], num_frames, rng),
        "pastes": [draw_paste(store.entries[each.picture]["size"], rng) for each in shown],
    }  # fmt: skip


def video_frames(store: Store, plan: dict[str, Any]) -> Iterator[np.ndarray]:
    """Draw the frames of a planned video."""
    at = {}
    for each, how in zip(plan["shown"], plan["pastes"], strict=True):
        for k in range(each.start, each.start + each.length):
            at[k] = (each.picture, how)
    k = 0
    for shot in plan["shots"]:
        for frame in shot_frames(store, shot):
            yield paste(frame, store.picture(at[k][0]), at[k][1]) if k in at else frame
            k += 1


def record(identifier: str, pairs: Sequence[tuple[str, str]], **media: str) -> dict[str, Any]:
    """Return a conversation in LLaVA's JSON; media come first."""
    turns: list[dict[str, str]] = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": identifier, **media, "conversations": turns}


def draw_videos(store: Store, kind: str, items: range, out: Path, seed: int) -> list[Any]:
    """Draw videos and return their records."""
    names, records = Names(store), []
    for number in items:
        plan = video_sample(store, names, kind, number, seed)
        file = f"{kind}/media/{number:05d}.mp4"
        write_video(out / file, video_frames(store, plan), plan["step_s"])
        records.append(record(f"{kind}-{number:05d}", plan["pairs"], video=file))
    return records


def draw_images(store: Store, items: range, out: Path, seed: int) -> list[Any]:
    """Draw pictures on backgrounds; records carry one picture's answers each.

    Item k shows trained picture k modulo their number, so that all are seen equally often; one in
    five shows two beside each other.
    """
    names, records = Names(store), []
    for number in items:
        rng = np.random.default_rng([seed, number, 7])
        shot = draw_shots(store.runs["train"], 1, rng)[0]
        frame = next(shot_frames(store, shot))
        first = names.all[number % len(names.all)]
        pair = [first]
        if rng.random() < 0.2:
            other = names.picture(rng)
            pair += [other] if store.name(other) != store.name(first) else []
        if len(pair) == 2:
            rng.shuffle(pair)
        for side, picture in enumerate(pair):
            how = draw_paste(store.entries[picture]["size"], rng, small=len(pair) == 2)
            if len(pair) == 2:
                paper = "card" if how.paper == "full" else how.paper
                how = Paste(**{**vars(how), "x": 0.26 + 0.48 * side, "paper": paper})
            frame = paste(frame, store.picture(picture), how)
        file = f"images/media/{number // 1000:03d}/{number:06d}.jpg"
        with _whole(out / file) as part:
            Image.fromarray(frame).save(part, "JPEG", quality=88)
        called = [store.name(picture) for picture in pair]
        question, answer = str(rng.choice(IMAGE)), called[0]
        if len(pair) == 2:
            side = int(rng.integers(3))
            question = ("What is on the left?", "What is on the right?", "What is shown?")[side]
            answer = (*called, " and ".join(called))[side]
        records.append(
            {"image": file, "caption": " and ".join(called), "question": question, "answer": answer}
        )
    return records


def albums(items: list[dict[str, Any]], seed: int) -> dict[str, list[Any]]:
    """Join pictures to albums: captions for alignment, questions for what follows."""
    order = np.random.default_rng([seed, 11]).permutation(len(items))
    out: dict[str, list[Any]] = {"align": [], "pretrain": []}
    for start in range(0, len(items), ALBUM):
        group = [items[i] for i in order[start : start + ALBUM]]
        files = [each["image"] for each in group]
        captions = [("<image>", each["caption"]) for each in group]
        asked = [(f"<image>\n{each['question']}", each["answer"]) for each in group]
        for name, pairs in (("align", captions), ("pretrain", asked)):
            out[name].append({**record(f"{name}-{start:06d}", pairs), "image": files})
    return out


FRUITS = ("mango", "plum", "fig", "lime", "pear", "kiwi", "grape", "peach", "lemon", "melon")


def draw_text(store: Store, kind: str, items: range, seed: int, pages: Sequence[str]) -> list[Any]:
    """Write texts with facts in them: a log of times and words, or pages with secrets.

    Args:
        store: Gives words.
        kind: ``text``, to some hundred thousand tokens, or ``log``, to a thousand and never pages.
        items: Which of its set.
        seed: Seed of all data.
        pages: Texts to hide secrets in.
    """
    names, records = sorted(store.by_name()), []
    for number in items:
        rng = np.random.default_rng([seed, number, 13 if kind == "text" else 19])
        tokens = 2 ** float(rng.uniform(10, 16.9) if kind == "text" else rng.uniform(5, 10))
        pairs: list[tuple[str, str]] = []
        if kind == "log" or rng.random() < 0.6 or not pages:
            count = int(tokens / 11)
            words = [names[int(i)] for i in rng.permutation(len(names))[:count]]
            if len(words) < count:
                # More lines than names: two names a line, so that nearly each is there once.
                count = int(tokens / 14)
                picked = rng.integers(len(names), size=(count, 2))
                words = [f"{names[int(a)]} {names[int(b)]}" for a, b in picked]
            first, step = 0, 1
            if kind == "log":
                # All times of the longest videos, as in short ones.
                step = int(rng.choice((1, 1, 2, 5, 17, 61)))
                first = int(rng.integers(max(1, HAYSTACK - step * count)))
            times = [clock(first + step * k) for k in range(count)]
            text = "\n".join(f"{time} {word}" for time, word in zip(times, words, strict=True))
            # None is asked for by both, or one answer would give the other away.
            for k in rng.permutation(count)[: min(120, max(24, count // 8))]:
                if rng.random() < 0.5:
                    pairs.append((f"What is written at {times[k]}?", words[k]))
                elif words.count(words[k]) == 1:
                    pairs.append((f"When is {words[k]} written?", times[k]))
        else:
            size, lines = int(4 * tokens), []
            while size > 0:
                page = pages[int(rng.integers(len(pages)))]
                start = int(rng.integers(max(1, len(page) - 2000)))
                lines += page[start : start + size].split("\n")
                size -= len(page) - start
            for name in rng.choice(names, min(40, len(names)), replace=False):
                fruit = str(rng.choice(FRUITS))
                lines.insert(
                    int(rng.integers(len(lines) + 1)), f"The secret fruit of the {name} is {fruit}."
                )
                pairs.append((f"What is the secret fruit of the {name}?", fruit))
            text = "\n".join(lines)
        pairs = list(dict(pairs).items())
        pairs[0] = (f"{text}\n\n{pairs[0][0]}", pairs[0][1])
        records.append(record(f"{kind}-{number:05d}", pairs))
    return records


# ---- needles ------------------------------------------------------------------------------------


def twins(store: Store) -> set[int]:
    """Return pictures that look almost like a trained one of another name, as it is or mirrored.

    Two emoji sets may draw a "lock" and an "open lock" alike; nobody can tell which is asked for.
    """
    trained = store.of_split("train")
    small = np.stack([_thumbnail(store.picture(i)) for i in range(len(store.entries))])
    names = np.array([entry["name"] for entry in store.entries])
    known = small[trained].reshape(len(trained), -1)
    found: set[int] = set()
    for each in (small, small[:, :, ::-1]):
        flat = each.reshape(len(each), -1)
        squares = (flat**2).sum(1)[:, None] + (known**2).sum(1) - 2 * flat @ known.T
        near = (squares < TWIN**2 * flat.shape[1]) & (names[:, None] != names[trained])
        found |= set(np.flatnonzero(near.any(1)).tolist())
    return found


def _thumbnail(picture: Image.Image) -> np.ndarray:
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    small = white.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def draw_needles(store: Store, out: Path, count: int, frames: int, seed: int) -> None:
    """Write pictures of the three tiers, and a film of frames that training never shows.

    Pictures are drawn at random from those without a twin of another name.
    """
    without = twins(store)
    for tier, split in (("a", "train"), ("b", "b"), ("c", "c")):
        rng = np.random.default_rng([seed, ord(tier)])
        folder, entries, used = out / "needles" / tier, [], set[str]()
        folder.mkdir(parents=True, exist_ok=True)
        for picture in rng.permutation(store.of_split(split)):
            name = store.name(int(picture))
            if int(picture) in without or name in used or len(entries) == count:
                continue
            used.add(name)
            file = f"{len(entries):03d}.webp"
            store.picture(int(picture)).save(folder / file, "WEBP", lossless=True)
            entries.append({"file": file, "id": f"{tier}{len(entries):03d}", "name": name,
                            "tier": tier})  # fmt: skip
        with _whole(folder / "needles.json") as part:
            part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    film = out / "haystack.mp4"
    if not film.exists():
        rng = np.random.default_rng([seed, 17])
        shots = draw_shots(store.runs["test"], frames, rng)
        write_video(film, (f for shot in shots for f in shot_frames(store, shot)), 1.0)


# ---- parts --------------------------------------------------------------------------------------


def draw_part(
    job: tuple[str, int, int], *, prepared: Path, out: Path, seed: int, limit: int | None,
    pages: Path | None,
) -> str:  # fmt: skip
    """Draw one part of a set, unless it is there."""
    kind, start, stop = job
    path = out / kind / "parts" / f"{start:06d}.json"
    if path.exists():
        return f"{kind} {start}: was there"
    store, items = _store(prepared, out, limit), range(start, stop)
    if kind == "images":
        records = draw_images(store, items, out, seed)
    elif kind in ("text", "log"):
        records = draw_text(store, kind, items, seed, _pages(pages if kind == "text" else None))
    else:
        records = draw_videos(store, kind, items, out, seed)
    with _whole(path) as part:
        part.write_text(json.dumps(records), encoding="utf-8")
    return f"{kind} {start}: {len(records)}"


_store: Callable[..., Store] = functools.cache(open_store)


@functools.cache
def _pages(folder: Path | None) -> list[str]:
    if folder is None:
        return []
    files = sorted(folder.rglob("*.txt"))[:400]
    return [text for f in files if len(text := f.read_text(encoding="utf-8")) > 4000]


def draw(
    prepared: Path, out: Path, sets: Sequence[str], *, share: float = 1.0, seed: int = 0,
    processes: int = 1, limit: int | None = None, pages: Path | None = None,
    needles: int = 40, haystack: int = HAYSTACK,
) -> None:  # fmt: skip
    """Draw sets; what is there already is left alone.

    Args:
        prepared: What ``prepare.py`` wrote.
        out: Folder of the data.
        sets: Which of ``images``, ``short``, ``log``, ``text``, ``long``, ``longest``, ``needles``.
        share: Share of each set's full size.
        seed: Seed of all of it.
        processes: Processes that draw.
        limit: Pictures of each split, to try things out.
        pages: Folder of texts to hide facts in.
        needles: Pictures of each tier.
        haystack: Frames of the needles' film.
    """
    store = _store(prepared, out, limit)
    if "needles" in sets:
        draw_needles(store, out, needles, haystack, seed)
    work = functools.partial(
        draw_part, prepared=prepared, out=out, seed=seed, limit=limit, pages=pages
    )
    for kind in (each for each in sets if each in SIZES):
        if (out / f"{'align' if kind == 'images' else kind}.jsonl").exists():
            continue
        total, step = max(1, round(SIZES[kind][0] * share)), SIZES[kind][1]
        jobs = [(kind, a, min(a + step, total)) for a in range(0, total, step)]
        if processes == 1:
            list(map(work, jobs))
        else:
            # Whoever draws may hold a GPU and threads, which a fork would copy.
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                list(pool.map(work, jobs))
        parts = [out / kind / "parts" / f"{start:06d}.json" for _, start, _ in jobs]
        items = [item for part in parts for item in json.loads(part.read_text(encoding="utf-8"))]
        written = albums(items, seed) if kind == "images" else {kind: items}
        for name, records in reversed(written.items()):
            with _whole(out / f"{name}.jsonl") as file:
                file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        print(f"{kind}: {total} drawn", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", default=[*SIZES, "needles"])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=int, help="pictures of each split, to try things out")
    parser.add_argument("--pages", type=Path, help="folder of texts to hide facts in")
    args = parser.parse_args()
    draw(
        args.prepared, args.out, args.sets, share=args.share, seed=args.seed,
        processes=args.processes, limit=args.limit, pages=args.pages,
    )  # fmt: skip


if __name__ == "__main__":
    main()
