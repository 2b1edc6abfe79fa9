"""Needles and haystacks: anybody's pictures, anybody's film.

Needles are read from

- a folder of pictures: a picture's name is its file's ("teddy-bear.png" and "Teddy bear (2).JPG"
  are two drawings of a teddy bear); other files and hidden ones are left alone, drawings without
  pixels (SVG) refused; of a GIF that moves the first picture is taken;
- a folder with ``needles.json``, or a ``.json``/``.jsonl`` file: entries with a picture (``file``,
  ``image`` or ``path``), an ``answer`` or ``name``, and, if wanted, ``question``, ``options`` and
  ``tier`` (or ``seen``);
- LongVA's formats: ``.json`` with ``path`` (in a folder ``images``), ``prompt``, ``answer``, or
  ``.parquet`` with ``image`` (bytes), ``question``, ``answer``, as a file, as a folder, or by the
  name of a data set on the Hugging Face Hub.

A haystack is a video, a folder of videos (one after the other by name, film2 before film10; what
has no ending of a video is left alone), a folder of pictures, or ``synthetic``: moving colours
drawn in code, for trying things out, which results name as such. Its frames are taken at a fixed
rate. One that is too short is an error, unless it may be repeated. For a frame that cannot be
decoded the nearest one of its block stands in, grey where there is none; which frames those are is
kept (`Haystack.undecoded`) and said by every result.

Cost: opening indexes a video once; frames are decoded when they are needed.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from longvila.errors import LongVILAError
from longvila.evaluation.needle_frames import FrameBook, Picture
from longvila.evaluation.task import plain
from longvila.inference.store import file_key
from longvila.log import log_once
from longvila.media.image import load_image, refuse_programs, turn_upright
from longvila.media.sampling import timestamp_indices
from longvila.media.sources import IMAGE_SUFFIXES, natural_key
from longvila.media.video import open_video

SYNTHETIC = "synthetic"
#: What a folder of needles may hold, and what looks like it but has to be converted first.
_PICTURES = IMAGE_SUFFIXES | {".gif", ".avif"}
_NO_PICTURES = {".svg", ".svgz", ".heic", ".heif", ".psd", ".pdf"}
_VIDEOS = {
    ".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".flv",
    ".wmv", ".ogv", ".3gp",
}  # fmt: skip
#: What file managers write behind the name of a second file of that name.
_COPY = re.compile(r"\s*\(\d+\)$")


class NeedleError(LongVILAError, ValueError):
    """A needle set or a haystack cannot be read as one."""


@dataclass(frozen=True)
class Needle:
    """A picture that is hidden in a film.

    Attributes:
        id: Unique in its set.
        answer: What it is called, or what its own question's answer is.
        open: Gives the picture, RGBA.
        question: Its own question; None for questions made from its name.
        options: Answers to choose from that came with it.
        tier: Which results it counts to; tiers are never averaged.
    """

    id: str
    answer: str
    open: Callable[[], Image.Image]
    question: str | None = None
    options: tuple[str, ...] = ()
    tier: str = ""

    def digest(self) -> str:
        """Return a digest of the picture's pixels."""
        picture = self.open()
        content = f"{picture.mode}{picture.size}".encode() + picture.tobytes()
        return hashlib.sha256(content).hexdigest()[:12]


def load_needles(source: str | Path, *, tier: str | None = None) -> list[Needle]:
    """Read a needle set.

    Args:
        source: A file, a folder, or the name of a data set on the Hub.
        tier: Keep this tier only.

    Returns:
        The needles, in the order of the set.

    Raises:
        NeedleError: If there is none, entries are incomplete or share an id, or a picture cannot be
            read as one.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        needles = list(_folder(path))
    elif path.is_file():
        needles = list(_file(path))
    elif str(source).count("/") == 1 and not str(source).startswith((".", "/")):
        needles = list(_folder(_hub(str(source))))
    else:
        raise NeedleError(f"no needles at {source}: neither a file, a folder nor a data set's name")
    if tier is not None:
        known = sorted({needle.tier for needle in needles})
        needles = [needle for needle in needles if needle.tier == tier]
        if not needles:
            raise NeedleError(f"{source} has no needle of tier {tier!r}; its tiers are {known}")
    if not needles:
        raise NeedleError(f"{source} holds no picture")
    ids = [needle.id for needle in needles]
    if len(set(ids)) < len(ids):
        twice = sorted({each for each in ids if ids.count(each) > 1})
        raise NeedleError(f"{source} has more than one needle called {', '.join(twice[:5])}")
    for needle in needles:
        # One that is no picture, or shows nothing, is told now, and not after hours.
        if needle.open().getextrema()[-1] == (0, 0):
            raise NeedleError(f"the picture of {needle.id!r} is transparent everywhere")
    return needles


def _folder(folder: Path) -> Iterator[Needle]:
    for name in ("needles.json", "dataset.json"):
        if (folder / name).is_file():
            yield from _file(folder / name)
            return
    tables = sorted(folder.rglob("*.parquet"))
    for table in tables:
        yield from _parquet(table)
    if tables:
        return
    known = _PICTURES | _NO_PICTURES
    pictures = sorted(each for each in _shown(folder) if each.suffix.lower() in known)
    stems = [path.stem for path in pictures]
    for path in pictures:
        name = unicodedata.normalize("NFC", _COPY.sub("", path.stem))
        name = name.replace("-", " ").replace("_", " ").strip().lower()
        if not plain(name):
            raise NeedleError(f"{path}: the file's name must be the name of what it shows")
        # Two files of one name are two pictures of one thing.
        yield Needle(path.stem if stems.count(path.stem) == 1 else path.name, name, _opener(path))


def _file(path: Path) -> Iterator[Needle]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
    except ValueError as fault:
        raise NeedleError(f"{path} is not JSON: {fault}") from fault
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise NeedleError(f"{path} must be a list of objects, one a needle")
    for number, entry in enumerate(entries):
        file = next((entry[key] for key in ("file", "image", "path") if key in entry), None)
        given = entry.get("answer", entry.get("name"))
        answer = str(given).strip() if isinstance(given, str | int | float) else ""
        if not isinstance(file, str) or not answer:
            raise NeedleError(
                f"{path}, entry {number} needs a picture (file, image or path) and one answer "
                f"or name; it has {entry}"
            )
        question = entry.get("question", entry.get("prompt"))
        options = entry.get("options") or ()
        if not isinstance(question, str | None) or not isinstance(options, list | tuple):
            raise NeedleError(f"{path}, entry {number}: a question is a text, options are a list")
        options = tuple(dict.fromkeys(map(str, options)))
        if options and answer not in options:
            raise NeedleError(f"{path}, entry {number}: {answer!r} is none of {list(options)}")
        tier = str(entry.get("tier", ""))
        if "seen" in entry:
            tier = "seen" if entry["seen"] else "unseen"
        yield Needle(
            str(entry.get("id", Path(file).stem)),
            answer,
            _opener(_beside(path, file)),
            question,
            options,
            tier,
        )


def _beside(path: Path, file: str) -> Path:
    """Where a picture is that a list names; LongVA's are in a folder of their own."""
    within = path.parent / "images" / file
    return within if within.is_file() else path.parent / file


def _parquet(path: Path) -> Iterator[Needle]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as fault:
        raise NeedleError(f"{path} needs pyarrow: pip install 'longvila[train]'") from fault
    table = parquet.read_table(path)
    missing = {"image", "question", "answer"} - set(table.column_names)
    if missing:
        raise NeedleError(
            f"{path} is no needle set in LongVA's format: {sorted(missing)} missing, it has "
            f"{table.column_names}"
        )
    for number, row in enumerate(table.to_pylist()):
        yield Needle(
            f"{path.stem}-{number}",
            str(row["answer"]),
            _decoder((row["image"] or {}).get("bytes"), f"{path}, row {number}"),
            str(row["question"]),
        )


def _decoder(content: bytes | None, name: str) -> Callable[[], Image.Image]:
    def open_picture() -> Image.Image:
        return _decoded(io.BytesIO(content or b""), name)

    return open_picture


def _decoded(source: Any, name: str) -> Image.Image:
    try:
        with Image.open(source) as picture:
            refuse_programs(picture, name)
            # Cameras say in a tag which side is up; sixteen bits are scaled to eight.
            upright = turn_upright(picture)
            return (load_image(upright) if upright.mode[0] in "IF" else upright).convert("RGBA")
    # Pillow says of a broken file whatever its reader of that format fell over.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        hint = ": save it as PNG" if Path(name).suffix.lower() in _NO_PICTURES else f": {fault}"
        raise NeedleError(f"{name} cannot be read as a picture{hint}") from fault


def _hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except (OSError, HfHubHTTPError) as fault:
        raise NeedleError(
            f"the data set {name} cannot be had from the Hugging Face Hub ({fault}); give a folder "
            "with its parquet files instead"
        ) from fault


def _opener(path: Path) -> Callable[[], Image.Image]:
    def open_picture() -> Image.Image:
        return _decoded(path, str(path))

    if not path.is_file():
        raise NeedleError(f"there is no picture {path}")
    return open_picture


# ---- drawing ----------------------------------------------------------------------------------


def whole_frame(needle: Needle, square: Callable[[Image.Image], Image.Image]) -> Picture:
    """Draw a needle as a frame of its own.

    Args:
        needle: The picture; what is transparent becomes white.
        square: Brings a picture to the size of a frame, as the processor does.
    """
    picture = needle.open()
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return np.array(square(white.convert("RGB")))


def pasted(frame: Picture, needle: Needle, where: tuple[float, float], *, share: float) -> Picture:
    """Paste a needle on a card into a frame.

    Args:
        frame: uint8 ``(h, w, 3)``; not changed.
        needle: The picture.
        where: Place of the card as fractions of the free room (right, down).
        share: Longer side of the card as a share of the frame's shorter side.

    Returns:
        A new frame.
    """
    out = Image.fromarray(frame)
    picture = needle.open()
    side = max(4, round(share * min(out.size)))
    margin = max(1, side // 20)
    scale = (side - 2 * margin) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    card = Image.new("RGB", (size[0] + 2 * margin, size[1] + 2 * margin), "white")
    card.paste(picture, (margin, margin), picture)
    left = round(where[0] * (out.width - card.width))
    top = round(where[1] * (out.height - card.height))
    out.paste(card, (left, top))
    return np.array(out)


# ---- haystacks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Haystack:
    """A film as numbered frames.

    Attributes:
        book: The frames.
        label: What results call it.
        step_s: Seconds from a frame to the next.
        repeats: How often the film is shown to fill the frames.
        key: What tells it from another film, or another part or rate of this one.
        reels: The videos it is made of.
    """

    book: FrameBook
    label: str
    step_s: float
    repeats: int
    key: Any = None
    reels: tuple[_Reel, ...] = ()

    @property
    def duration_s(self) -> float:
        """Seconds of film that frames are taken from."""
        return sum(reel.duration_s for reel in self.reels)

    def undecoded(self) -> list[str]:
        """Return which frames could not be decoded so far, by video and number."""
        return [f"{r.path.name}, frame {number}" for r in self.reels for number in sorted(r.bad)]


def check_haystack(
    source: str | Path, *, fps: float = 1.0, part: tuple[float, float] = (0.0, 1.0)
) -> None:
    """Refuse a haystack that is not there, or a part that is none, before anything is loaded.

    Args:
        source: As for `open_haystack`.
        fps: Frames taken each second.
        part: Where each film begins and ends, as shares of its length.

    Raises:
        NeedleError: If there is nothing, or a number is wrong.
    """
    if not 0 <= part[0] < part[1] <= 1:
        raise NeedleError(
            f"a part of a film is two shares of it in order, as 0.5 1; got {part[0]:g} {part[1]:g}"
        )
    if not 0 < fps < math.inf:
        raise NeedleError(f"frames a second must be a number above zero, got {fps:g}")
    if str(source) != SYNTHETIC:
        _videos(source)


def open_haystack(
    source: str | Path,
    *,
    num_frames: int,
    fps: float,
    processor: Any,
    repeat: bool = False,
    part: tuple[float, float] = (0.0, 1.0),
    block: int = 32,
) -> Haystack:
    """Open a haystack.

    Args:
        source: A video, a folder of videos or of pictures, or ``"synthetic"``.
        num_frames: Frames that are needed.
        fps: Frames taken each second.
        processor: A processor of videos, which knows the size of a frame and how to reach it.
        repeat: Whether a film that is too short is shown again.
        part: Where each film begins and ends, as shares of its length.
        block: Frames decoded at once.

    Raises:
        NeedleError: If the film is too short, or the part is none.
        VideoError: If it cannot be read.
    """
    check_haystack(source, fps=fps, part=part)
    size: tuple[int, int] = processor.height_width
    if str(source) == SYNTHETIC:
        book = FrameBook(num_frames, lambda a, b: _drawn(a, b, size), size=size, block=block)
        return Haystack(book, "synthetic (drawn in code)", 1 / fps, 1)
    reels = [_Reel(path, fps, processor, part) for path in _videos(source)]
    total = sum(reel.num_frames for reel in reels)
    if total < num_frames and not repeat:
        # A folder of pictures has no clock: a higher rate shows no more of them.
        timed = [reel.duration_s for reel in reels if not reel.path.is_dir()]
        rate = math.ceil(num_frames / sum(timed) * 10) / 10 if sum(timed) > 0 else 0
        raise NeedleError(
            f"{source} gives {total} frames at {fps:g} a second and {num_frames} are needed: "
            + (f"take more frames a second (--fps {rate:g}), " if rate else "")
            + "show it again (--repeat), bring a longer film, or measure fewer frames"
        )

    def read(start: int, stop: int) -> Picture:
        # One call a reel, so that frames decoded together can stand in for each other.
        parts = []
        while start < stop:
            first = start % total
            for reel in reels:
                if first < reel.num_frames:
                    break
                first -= reel.num_frames
            last = min(first + stop - start, reel.num_frames)
            parts.append(reel.frames(first, last))
            start += last - first
        return np.concatenate(parts)

    return Haystack(
        FrameBook(num_frames, read, size=size, block=block),
        Path(source).name,
        1 / fps,
        -(-num_frames // total),
        {"file": file_key(source), "part": list(part), "fps": fps, "frames": num_frames},
        tuple(reels),
    )


def _shown(folder: Path) -> list[Path]:
    """The files of a folder that its owner sees."""
    return [each for each in folder.iterdir() if each.is_file() and each.name[0] != "."]


def _videos(source: str | Path) -> list[Path]:
    path = Path(os.path.expanduser(source))
    if not path.is_dir():
        if not path.exists():
            raise NeedleError(f"there is no haystack {source}: neither a file nor a folder")
        return [path]
    files = sorted(_shown(path), key=lambda each: (natural_key(each.name), each.name))
    films = [each for each in files if each.suffix.lower() in _VIDEOS]
    if films or any(each.suffix.lower() in IMAGE_SUFFIXES for each in files):
        return films or [path]
    if not files:
        raise NeedleError(f"the folder {path} is empty")
    return files


class _Reel:
    """One video of a haystack; opened when its frames are asked for, and kept open."""

    def __init__(self, path: Path, fps: float, processor: Any, part: tuple[float, float]) -> None:
        self.path, self.processor = path, processor
        with open_video(str(path), frame_rate=fps) as reader:
            metadata = reader.metadata
        self.fps = fps
        start_s, stop_s = (share * metadata.duration_s for share in part)
        self.duration_s = stop_s - start_s
        times = start_s + np.arange(max(1, math.ceil((stop_s - start_s) * fps - 1e-6))) / fps
        self.indices = timestamp_indices(metadata.timestamps_s, times)
        self.num_frames = len(self.indices)
        self.bad: set[int] = set()
        self._reader: Any = None

    def frames(self, start: int, stop: int) -> Picture:
        if self._reader is None:
            self._reader = open_video(str(self.path), frame_rate=self.fps)
        wanted = self.indices[start:stop].tolist()
        # Padding needs a frame's own shape.
        pad = self.processor.image_aspect_ratio == "pad"
        size = None if pad else self.processor.height_width
        found = {
            frame.index: np.asarray(self.processor.square(Image.fromarray(frame.image)))
            if pad
            else frame.image
            for frame in self._reader.frames(sorted(set(wanted)), size=size)
        }
        missing = set(wanted) - set(found)
        if missing - self.bad:
            log_once(
                __name__, logging.WARNING, f"{self.path}: some frames cannot be decoded; their "
                "neighbours stand in, and the results name them",
            )  # fmt: skip
            self.bad |= missing
        grey = np.full((*self.processor.height_width, 3), 128, np.uint8)
        for index in missing:
            near = min(set(found) - missing, key=lambda other: abs(other - index), default=None)
            found[index] = grey if near is None else found[near]
        return np.stack([found[index] for index in wanted])


def _drawn(start: int, stop: int, size: tuple[int, int]) -> Picture:
    """Draw slowly moving, muted colours; no frame is like another."""
    height, width = size
    down, right = np.mgrid[0:height, 0:width] / max(height, width)
    frames = []
    for number in range(start, stop):
        waves = [
            np.sin(2 * np.pi * (right * a + down * b) + number * c)
            for a, b, c in ((1.0, 0.5, 0.31), (0.3, 1.2, 0.17), (1.5, 1.1, 0.071))
        ]
        frames.append(np.stack([128 + 60 * wave for wave in waves], axis=-1))
    return np.stack(frames).astype(np.uint8)
