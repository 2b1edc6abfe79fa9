"""Answers on disk: one JSON line a question, written once it is answered, read when a run goes on.

1. A question has a key: a digest of everything that decides its answer (model, task, document,
   prompt, video and frames, generation). Nothing else may bring an old answer back.
2. A line is appended with one write and flushed to the disk before the next question is asked. A
   line that a crash cut short is dropped when the file is opened again, and its question asked
   again.
3. Several groups of ranks write a file each into one folder; whoever opens the folder reads all,
   so a run may go on with another number of groups. A key that two files hold counts once.
4. Questions that failed (a video that cannot be read) are kept to be counted, and tried again.

Lines hold no times and no machine names: two runs with one seed leave equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longvila.errors import LongVILAError

Record = dict[str, Any]


class AnswersError(LongVILAError, ValueError):
    """A file of answers is damaged."""


def digest(value: Any) -> str:
    """Return the key of a JSON value: the same for equal values, in every process.

    Args:
        value: Anything JSON can hold; mappings in any order.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_lines(file: Path) -> list[Record]:
    """Read a file of lines, without a last one that was cut short.

    Args:
        file: The file; it need not exist.

    Raises:
        AnswersError: If a line that is not the last is no JSON object.
    """
    if not file.exists():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as fault:
            raise AnswersError(f"{file}, line {number} is no JSON: {fault}") from fault
        if not isinstance(record, dict):
            raise AnswersError(f"{file}, line {number} is no JSON object")
        records.append(record)
    del rest  # Behind the last newline there is nothing, or a line that was cut short.
    return records


def as_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False).encode() + b"\n"


def write_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by records, at once.

    Args:
        file: The file.
        records: Its lines.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_bytes(b"".join(as_line(record) for record in records))
    part.replace(file)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file at once, so that nobody ever reads half of one.

    Args:
        file: The file; its folder is made.
        value: What it holds.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


class Answers:
    """The answers of a run.

    Args:
        folder: Where the files are; None keeps answers in memory alone.
        writer: Name of the file to append to; None for a process that only reads.
    """

    def __init__(self, folder: Path | None, writer: str | None) -> None:
        self.folder = folder
        self.file = folder / f"{writer}.jsonl" if folder is not None and writer else None
        self._known: dict[str, Record] = {}
        if folder is not None:
            for file in sorted(folder.glob("*.jsonl")):
                for record in read_lines(file):
                    if self.find(record["key"]) is None:
                        self._known[record["key"]] = record
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            drop_cut_line(self.file)

    def find(self, key: str) -> Record | None:
        """Return the answer to a question that was answered before, or None.

        Args:
            key: The question's key.
        """
        record = self._known.get(key)
        return None if record is None or record.get("error") else record

    def add(self, record: Record) -> None:
        """Keep an answer, on disk before this returns.

        Args:
            record: The answer, with its ``key``.

        Raises:
            ValueError: If the question was answered already.
        """
        if self.find(record["key"]) is not None:
            raise ValueError(f"the question {record['key']} was answered already")
        self._known[record["key"]] = record
        if self.file is not None:
            with self.file.open("ab") as stream:
                stream.write(as_line(record))
                stream.flush()
                os.fsync(stream.fileno())

    def __len__(self) -> int:
        return len(self._known)

    def records(self) -> list[Record]:
        """Return all answers, each question once, ordered by task and document."""
        return sorted(
            self._known.values(),
            key=lambda r: (r["task"], r["split"], r["doc_id"], r["repeat"], r["key"]),
        )


def drop_cut_line(file: Path) -> None:
    """Cut a file behind its last newline, so that the next line begins at the start of one.

    Args:
        file: The file; it need not exist.
    """
    if not file.exists():
        return
    whole = file.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end != len(whole):
        with file.open("r+b") as stream:
            stream.truncate(end)
