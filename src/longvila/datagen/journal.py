"""What a long job has done, one JSON line each, so that it can be killed and go on.

    captions.jsonl   {"key": "film#3", ...}     a result; appended, flushed, never rewritten
    failures.jsonl   {"step", "key", "cause", "message", "attempt"}       a log, not a verdict

1. A result is one line, written with one call at the end of the file and synchronised, so a process
   that is killed leaves whole lines and at most one torn one.
2. A journal that is opened cuts a torn last line off. A line that is torn elsewhere is no accident
   of a kill and is refused.
3. What has a result is not done again. What failed has none, so the next run tries it again;
   failures are logged each time, and those that still stand are found by asking which keys have no
   result.

Not done: two processes on one journal (`Lock` refuses the second).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longvila.errors import LongVILAError

Record = dict[str, Any]


class JournalError(LongVILAError):
    """A journal is damaged, in use, or belongs to other settings."""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with _writing(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say of a disk that is full what it means."""
    try:
        yield
    except OSError as fault:
        raise JournalError(
            f"{path} cannot be written ({fault.strerror}); what is there is whole: make room, and "
            "the same command goes on"
        ) from fault


def as_lines(records: Iterator[Any] | list[Any]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)


class Lock:
    """Keeps a second process out of a folder, until the first ends however it does.

    Raises:
        JournalError: If another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ".lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            self._file.close()
            raise JournalError(
                f"{folder} is in use by another process; two would do the same work twice"
            ) from fault

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *fault: object) -> None:
        self._file.close()


class Journal:
    """Results by key, kept in a file; threads may add to it.

    Raises:
        JournalError: If a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Record] = {}
        self._lock = threading.Lock()
        if path.exists():
            self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _read(self) -> None:
        data, whole = self.path.read_bytes(), 0
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                record = json.loads(line)
                self.done[record["key"]] = record
            except (ValueError, KeyError, TypeError) as fault:
                if whole + len(line) < len(data):
                    raise JournalError(
                        f"{self.path}, line {number} is damaged: {fault}; mend or delete the line"
                    ) from fault
                break
            if not line.endswith(b"\n"):
                del self.done[record["key"]]
                break
            whole += len(line)
        if whole < len(data):
            os.truncate(self.path, whole)

    def __contains__(self, key: str) -> bool:
        return key in self.done

    def __getitem__(self, key: str) -> Record:
        return self.done[key]

    def __len__(self) -> int:
        return len(self.done)

    def add(self, key: str, **values: Any) -> Record:
        """Keep a result.

        Returns:
            The record.
        """
        record = {"key": key, **values}
        self._append(record)
        self.done[key] = record
        return record

    def _append(self, record: Record) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock, _writing(self.path):
            end = os.fstat(self._file).st_size
            if os.write(self._file, line) != len(line):
                # The next line must not stand behind half of this one.
                os.ftruncate(self._file, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Failures:
    """A log of what went wrong."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)
        self.attempts: dict[tuple[str, str], int] = {}
        self.last: dict[tuple[str, str], Record] = {}
        for record in self._journal.done.values():
            self._count(record)

    def _count(self, record: Record) -> None:
        place = (record["step"], record["item"])
        self.attempts[place] = self.attempts.get(place, 0) + 1
        self.last[place] = record

    def add(self, step: str, item: str, fault: Exception) -> None:
        """Log a failure."""
        attempt = self.attempts.get((step, item), 0) + 1
        record = self._journal.add(
            f"{step}/{item}/{attempt}",
            step=step, item=item, cause=type(fault).__name__, message=str(fault), attempt=attempt,
        )  # fmt: skip
        self._count(record)

    def close(self) -> None:
        """Close the file."""
        self._journal.close()
