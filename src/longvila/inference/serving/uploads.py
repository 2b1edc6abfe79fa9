"""Files that clients send ahead of their questions.

A file is written under a random name that only its sender learns. When all files together exceed
their bound, those go that were used longest ago and are not being read. What is still coming has a
bound of the same size. The folder goes with the server.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from longvila.inference.serving.errors import RequestError


class Budget:
    """Bytes that many requests share.

    Args:
        limit: Most bytes.
        why: What a client is told when there are no more.
    """

    def __init__(self, limit: int, why: str) -> None:
        self.limit, self.why, self.taken = limit, why, 0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Take some; `give` them back.

        Raises:
            RequestError: If there are not so many.
        """
        with self._lock:
            if self.taken + count > self.limit:
                raise RequestError(
                    f"{self.why}; come back later", status=503, code="busy", retry_after_s=10
                )
            self.taken += count

    def give(self, count: int) -> None:
        """Give some back."""
        with self._lock:
            self.taken -= count


class Uploads:
    """Uploaded files under a bound.

    Args:
        budget: Most bytes of all files.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.folder = Path(tempfile.mkdtemp(prefix="longvila-uploads-"))
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._held: dict[str, int] = {}
        self.incoming = Budget(budget, "the server cannot take more uploads at once")

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(self._files.values())

    def new_path(self) -> Path:
        """Return a path to write a file to; `add` or remove it afterwards."""
        return self.folder / f"part-{secrets.token_urlsafe(24)}"

    def add(self, path: Path) -> str:
        """Take a file that was written; return its id.

        Raises:
            RequestError: If there is no room for it.
        """
        size, key = path.stat().st_size, secrets.token_urlsafe(24)
        with self._lock:
            idle = [key for key in self._files if not self._held.get(key)]
            while sum(self._files.values()) + size > self.budget:
                if not idle:
                    path.unlink()
                    raise RequestError(
                        f"the server keeps {self.budget} bytes of uploads, and they are in use",
                        status=507, code="no_room", retry_after_s=30,
                    )  # fmt: skip
                oldest = idle.pop(0)
                del self._files[oldest]
                (self.folder / oldest).unlink(missing_ok=True)
            path.rename(self.folder / key)
            self._files[key] = size
        return key

    @contextlib.contextmanager
    def hold(self, key: str) -> Iterator[Path]:
        """Lend a file while it is read.

        Raises:
            RequestError: If there is none.
        """
        with self._lock:
            # The system may have tidied its temporary folder.
            if key not in self._files or not (self.folder / key).exists():
                raise RequestError(
                    "there is no such upload any more; send the file again",
                    status=404, code="upload_not_found",
                )  # fmt: skip
            self._files.move_to_end(key)
            self._held[key] = self._held.get(key, 0) + 1
        try:
            yield self.folder / key
        finally:
            with self._lock:
                self._held[key] -= 1
                if not self._held[key]:
                    del self._held[key]

    def close(self) -> None:
        """Remove all files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with self._lock:
            self._files.clear()
