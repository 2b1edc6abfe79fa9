"""Ask every question of every scene once, and never lose or repeat an answer.

1. `Records` is a file of lines: first the settings of the run, then one JSON object an answer,
   appended in one write and flushed to the disk. A process that dies leaves at most one torn last
   line, which is cut off when the run goes on.
2. A run goes on only with the settings it began with; a difference is an error that names it. An
   answer that is there is not asked again, and a second answer to one question is an error.
3. `run` takes scenes in the order it is given, reads a scene if any of its questions is open, and
   asks those. Over several data-parallel groups scenes are dealt in turn, and each group's first
   rank writes a file of its own; what is open is what the first rank of all read, on every rank.

Records hold nothing that differs between two runs with one seed: no clock, no host. Speed is for
the progress function to report.

Cost: a flush an answer, a few milliseconds against the reading of a video.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch.distributed as dist

from longvila.errors import LongVILAError
from longvila.evaluation.answerer import Answerer, Watched
from longvila.evaluation.answers import append, open_to_append
from longvila.evaluation.task import Question, Scene, grade

Record = dict[str, Any]


class RecordsError(LongVILAError, RuntimeError):
    """A file of records is damaged, or belongs to a run with other settings."""


class Records:
    """Answers of one run, on disk.

    Args:
        folder: Holds ``records.jsonl``; made if absent.
        settings: What the answers depend on.
        part: Which group of ranks writes; each has its own file.
        writes: Whether this process writes; the others only read.

    Raises:
        RecordsError: If the folder holds answers of other settings, or a damaged file.
        AnswersError: If another run is writing there.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, part: int = 0, writes: bool = True
    ) -> None:
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))
        self.path = folder / ("records.jsonl" if part == 0 else f"records-{part}.jsonl")
        self.rows: dict[str, Record] = {}
        self._file: BinaryIO | None = open_to_append(self.path) if writes else None
        try:
            for path in sorted(folder.glob("records*.jsonl")):
                for row in read_records(path, self.settings):
                    self._take(row)
        except BaseException:
            self.close()
            raise
        if self._file is not None and self._file.tell() == 0:
            self._write({"settings": self.settings, "key": settings_key(self.settings)})

    def add(self, row: Record) -> None:
        """Keep an answer; returns when it is on the disk.

        Args:
            row: A record with an ``id``.

        Raises:
            RecordsError: If there is an answer of that id.
        """
        self._take(json.loads(json.dumps(row)))
        if self._file is not None:
            self._write(row)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, row: Record) -> None:
        if row["id"] in self.rows:
            raise RecordsError(f"{self.folder} has two answers to {row['id']}")
        self.rows[row["id"]] = row

    def _write(self, row: Record) -> None:
        assert self._file is not None
        append(self._file, (json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n").encode())


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return a digest of settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(path: Path, settings: Mapping[str, Any] | None = None) -> list[Record]:
    """Read one file of records.

    Args:
        path: The file; a torn last line is left out.
        settings: What the first line must say; None for anything.

    Returns:
        The answers.

    Raises:
        RecordsError: If the settings differ, or a line before the last is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    rows: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as fault:
            raise RecordsError(f"{path}, line {number} is damaged: {fault}") from fault
    if not rows:
        return []
    head = rows.pop(0)
    if "settings" not in head:
        raise RecordsError(f"{path} does not begin with the settings of a run")
    if settings is not None and head["settings"] != json.loads(json.dumps(settings)):
        theirs, ours = head["settings"], json.loads(json.dumps(settings))
        names = [n for n in sorted({*theirs, *ours}) if theirs.get(n) != ours.get(n)]
        told = "; ".join(f"{n} was {theirs.get(n)!r}, is {ours.get(n)!r}" for n in names)
        raise RecordsError(
            f"{path} holds answers of other settings ({told}): go on with those, or write to "
            "another folder"
        )
    return rows


# ---- asking -----------------------------------------------------------------------------------


def ask(answerer: Answerer, watched: Watched, question: Question) -> Record:
    """Put one question and grade the answer.

    Args:
        answerer: Who is asked.
        watched: The scene, read.
        question: The question.

    Returns:
        The record: question, truth, answer, what was read out of it, grade, shape.
    """
    scores: list[float] | None = None
    if question.ask == "choice":
        scores = answerer.choose(watched, question.text, question.options)
        said = question.options[max(range(len(scores)), key=scores.__getitem__)]
    elif question.ask == "forced":
        said = answerer.predict(watched, question.text, question.answer)
    else:
        said = answerer.answer(watched, question.text, max_new_tokens=question.max_new_tokens)
    result = grade(question, said)
    record: Record = {
        "id": question.id,
        "task": question.task,
        "ask": question.ask,
        "question": question.text,
        "answer": question.answer,
        "said": said,
        "read": result.read,
        "score": result.score,
        "correct": result.correct,
        "chance": question.chance,
        "tokens": watched.tokens,
        "shape": dict(question.shape),
    }
    if scores is not None:
        record["options"] = list(question.options)
        record["scores"] = [round(score, 4) for score in scores]
    return record


def run(
    answerer: Answerer,
    scenes: Sequence[Scene],
    watch: Callable[[Scene], Watched],
    records: Records,
    *,
    part: int = 0,
    parts: int = 1,
    progress: Callable[[int, int, Scene], None] | None = None,
) -> None:
    """Ask what is open.

    Args:
        answerer: Who is asked.
        scenes: In the order they are read.
        watch: Reads a scene; called for those with an open question, in order.
        records: Where answers are and go.
        part: Which data-parallel group this rank is of.
        parts: Data-parallel groups.
        progress: Called with (scenes done, scenes open, scene) after each.

    Raises:
        ValueError: If two questions have one id.

    Comm: Over several ranks one broadcast of the ids that are answered.
    """
    ids = [question.id for scene in scenes for question in scene.questions]
    if len(set(ids)) != len(ids):
        raise ValueError(f"{len(ids) - len(set(ids))} questions share their id with another")
    done = answered(records.rows)
    open_scenes = [scene for scene in scenes if any(q.id not in done for q in scene.questions)]
    mine = open_scenes[part::parts]
    for number, scene in enumerate(mine, start=1):
        watched = watch(scene)
        for question in scene.questions:
            if question.id not in done:
                records.add({**ask(answerer, watched, question), "scene": scene.id})
        if progress is not None:
            progress(number, len(mine), scene)


def answered(ids: Iterable[str]) -> set[str]:
    """Return the ids that the first rank of all has, on every rank; without ranks, the given ones.

    Args:
        ids: What this rank has.

    Comm: Over several ranks one broadcast.
    """
    box: list[Any] = [sorted(ids)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return set(box[0])
