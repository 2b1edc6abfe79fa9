"""What a run is about and what it leaves: videos by name, and the dataset with what was reviewed.

Samples are in LLaVA's format, which the adapter ``longvila-sft`` reads: a caption sample and a
question sample of each video that went through every step, in the order of the videos. How a
caption is asked for follows from the video's name. What a reviewer rejected is left out.

The dataset follows from journals and decisions alone, so it can be written anew at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvila.datagen.journal import Journal, Lock, as_lines, write_whole
from longvila.datagen.prompts import Prompts
from longvila.datagen.qa import Question
from longvila.errors import LongVILAError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv"}
)
#: Steps of a run, in order; each has a journal.
STEPS = ("segments", "captions", "summaries", "questions", "kept")


@dataclass(frozen=True)
class Video:
    """A video to make data of.

    Attributes:
        id: Its name; unique.
        path: Where it is.
        listed: What the dataset calls it: its path below the folder it was found in, or in full.
    """

    id: str
    path: str
    listed: str


def find_videos(sources: Sequence[str | Path]) -> list[Video]:
    """Find the videos that are named.

    Args:
        sources: Videos, folders of them (searched below, too), ``.txt`` files with a path a line,
            or ``.jsonl`` files of objects with ``video`` and perhaps ``id``. Paths in a list are
            relative to its folder.

    Returns:
        The videos, in the order of the sources and of names inside a folder.

    Raises:
        LongVILAError: If a source is absent, holds no video, or two videos have one name.
    """
    found: list[Video] = []
    for source in sources:
        path = Path(source)
        if not path.exists():
            raise LongVILAError(f"{path}: no such file or folder")
        if path.is_dir():
            files = sorted(f for f in path.rglob("*") if f.suffix.lower() in VIDEO_SUFFIXES)
            if not files:
                raise LongVILAError(f"{path}: no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
            for file in files:
                below = file.relative_to(path)
                found.append(Video(str(below.with_suffix("")), str(file), str(below)))
        elif path.suffix in (".txt", ".jsonl"):
            found += _listed(path)
        else:
            found.append(Video(path.stem, str(path), str(path.resolve())))
    twice = [name for name, number in Counter(v.id for v in found).items() if number > 1]
    if twice:
        raise LongVILAError(
            f"several videos are called {twice[:3]}; give folders, or a .jsonl list with an id each"
        )
    return found


def _listed(path: Path) -> Iterator[Video]:
    # Not by splitlines, which ends a line at signs that texts and names may hold.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line) if path.suffix == ".jsonl" else {"video": line.strip()}
            place = path.parent / entry["video"]
            name = str(entry.get("id") or place.stem)
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise LongVILAError(
                f"{path}, line {number}: expected an object with 'video'"
            ) from fault
        yield Video(name, str(place), str(place.resolve()))


def part_of(video: Video, number: int) -> str:
    """Name a segment, whose number is from 0."""
    return f"{video.id}#{number + 1}"


def captions_of(video: Video, journals: Mapping[str, Journal]) -> list[str] | None:
    """Return the captions of all segments of a video, None while one is missing."""
    if video.id not in journals["segments"]:
        return None
    number = len(journals["segments"][video.id]["bounds_s"]) - 1
    keys = [part_of(video, n) for n in range(number)]
    if any(key not in journals["captions"] for key in keys):
        return None
    return [journals["captions"][key]["caption"] for key in keys]


def read_decisions(output: Path) -> dict[str, str]:
    """Return what a reviewer decided: ``accept`` or ``reject`` by item; empty without a review.

    Raises:
        LongVILAError: If the file is not what the page writes.
    """
    path = output / "decisions.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise LongVILAError(f"{path}: {fault}") from fault
    return check_decisions(found, str(path))


def check_decisions(found: Any, where: str) -> dict[str, str]:
    """Return decisions if they are that.

    Raises:
        LongVILAError: If they are anything else.
    """
    if not isinstance(found, dict) or any(
        not isinstance(key, str) or value not in ("accept", "reject")
        for key, value in found.items()
    ):
        raise LongVILAError(f"{where}: expected an object of accept and reject by item")
    return found


def item_of(video_id: str, question: Question | None) -> str:
    """Name what is decided on: a question of a video, or its long caption."""
    return f"{video_id}/{'summary' if question is None else question.key}"


def write_dataset(
    output: Path,
    videos: Sequence[Video],
    journals: Mapping[str, Journal],
    conversation: str,
    asks: Sequence[str],
) -> Counter[str]:
    """Write the samples of all videos that are whole, in their order.

    Args:
        output: The run's folder.
        videos: The videos.
        journals: Results.
        conversation: ``one`` or ``each``, as in `LongSFTOptions`.
        asks: What a caption is asked for with; a video's name decides which.

    Returns:
        How many samples of which kind, and how many items a reviewer rejected.
    """
    decisions = read_decisions(output)
    counts: Counter[str] = Counter(captions=0, questions=0, samples=0, rejected=0)
    records: list[dict[str, Any]] = []
    for video in videos:
        if video.id not in journals["kept"]:
            continue
        if decisions.get(item_of(video.id, None)) == "reject":
            counts["rejected"] += 1
        else:
            number = int(hashlib.sha256(video.id.encode()).hexdigest(), 16)
            said = [(asks[number % len(asks)], journals["summaries"][video.id]["summary"])]
            records.append(_sample(video, "caption", said))
            counts["captions"] += 1
        said = []
        for values in journals["kept"][video.id]["kept"]:
            question = Question.of(values)
            if decisions.get(item_of(video.id, question)) == "reject":
                counts["rejected"] += 1
            else:
                said.append((question.question, question.answer))
        counts["questions"] += len(said)
        if conversation == "one" and said:
            records.append(_sample(video, "questions", said))
        elif conversation == "each":
            records += [_sample(video, f"question-{n}", [each]) for n, each in enumerate(said, 1)]
    counts["samples"] = len(records)
    write_whole(output / "dataset.jsonl", as_lines(records))
    return counts


def _sample(video: Video, kind: str, said: Sequence[tuple[str, str]]) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(said):
        human = question if number else f"{question}\n<video>"
        turns += [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": f"{video.id}-{kind}", "video": video.listed, "conversations": turns}


@contextmanager
def opened(output: Path) -> Iterator[tuple[list[Video], dict[str, Journal], dict[str, Any]]]:
    """Open a folder to look at it: its videos, its journals, and how `write_dataset` made it.

    Raises:
        LongVILAError: If it is none.
        JournalError: If it is in use.
    """
    path = output / "settings.json"
    if not path.is_file():
        raise LongVILAError(
            f"{output} is no folder of `longvila data long-sft`: it has no {path.name}"
        )
    with Lock(output):
        listed = json.loads(path.read_text(encoding="utf-8"))
        journals = {name: Journal(output / f"{name}.jsonl") for name in STEPS}
        try:
            videos = [Video(**video) for video in listed["videos"]]
            # Folders of older releases do not say how captions are asked for.
            asks = listed.get("asks") or Prompts().lines("ask_caption")
            yield videos, journals, {"conversation": listed["conversation"], "asks": asks}
        finally:
            for journal in journals.values():
                journal.close()
