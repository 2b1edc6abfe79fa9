"""Answers on disk: one JSON line a question, written once it is answered, read when a run goes on.

1. A question has a key: a digest of everything that decides its answer (model, task, document,
   prompt, video and frames, generation). Nothing else may bring an old answer back.
2. A line is appended with one write and flushed to the disk before the next question is asked. A
   line that a crash cut short is dropped when the file is opened again, and its question asked
   again.
3. Several groups of ranks write a file each into one folder; whoever opens the folder reads all,
   so a run may go on with another number of groups. A key that two files hold counts once.
4. A file has one writer: a second run into the folder is refused while the first one lives.
5. Questions that failed (a video that cannot be read) are kept to be counted, and tried again.

Lines hold no times and no machine names: two runs with one seed leave equal bytes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from longvila.errors import LongVILAError
from longvila.log import get_logger

Record = dict[str, Any]
_LOG = get_logger(__name__)


class AnswersError(LongVILAError, ValueError):
    """A file of answers is damaged, or another run is writing it."""


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
    # Behind the last newline there is nothing, or a line that was cut short.
    *lines, _ = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as fault:
            raise AnswersError(f"{file}, line {number} is no JSON: {fault}") from fault
        if not isinstance(record, dict):
            raise AnswersError(f"{file}, line {number} is no JSON object")
        records.append(record)
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

    Raises:
        AnswersError: If a file is damaged, or another run is writing it.
    """

    def __init__(self, folder: Path | None, writer: str | None) -> None:
        self.folder = folder
        self._stream: BinaryIO | None = None
        if folder is not None and writer:
            self._stream = open_to_append(folder / f"{writer}.jsonl")
            self._done = weakref.finalize(self, self._stream.close)
        self._known: dict[str, Record] = {}
        if folder is not None:
            for file in sorted(folder.glob("*.jsonl")):
                for record in read_lines(file):
                    if "key" not in record:
                        raise AnswersError(f"{file} holds no answers: give a folder of its own")
                    if self.find(record["key"]) is None:
                        self._known[record["key"]] = record

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
        if self._stream is not None:
            append(self._stream, as_line(record))

    def close(self) -> None:
        """Let another writer in; what is here can still be read."""
        if self._stream is not None:
            self._done()

    def __len__(self) -> int:
        return len(self._known)

    def records(self) -> list[Record]:
        """Return all answers, each question once, ordered by task and document."""
        return sorted(
            self._known.values(),
            key=lambda r: (r["task"], r["split"], r["doc_id"], r["repeat"], r["key"]),
        )


def open_to_append(file: Path) -> BinaryIO:
    """Open a file of lines as its only writer, without a last line that was cut short.

    Args:
        file: The file; it and its folder are made.

    Returns:
        It, at its end. Closing it, or the end of the process, lets the next writer in.

    Raises:
        AnswersError: If another run is writing it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    stream = file.open("a+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        if fault.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            stream.close()
            raise AnswersError(
                f"another run is writing {file}: wait for it, or give another folder"
            ) from fault
        _LOG.warning("%s: no locks here (%s): start no second run into this folder", file, fault)
    stream.seek(0)
    # What stands behind the last newline is half a line.
    stream.truncate(stream.read().rfind(b"\n") + 1)
    stream.seek(0, os.SEEK_END)
    return stream


def append(stream: BinaryIO, line: bytes) -> None:
    """Write a line; it is on the disk when this returns."""
    stream.write(line)
    stream.flush()
    os.fsync(stream.fileno())
