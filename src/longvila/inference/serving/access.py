"""From what a request names to a file that may be read: the only way in for media.

- ``data:`` addresses carry their bytes.
- ``upload:ID`` is a file that was uploaded; the id is a secret of whoever uploaded it.
- ``file:///folder/clip.mp4``, ``/folder/clip.mp4`` and ``clip.mp4`` are files below one of the
  roots. The path is walked from the root, one name at a time, relative to the folder that is open:
  a symbolic link on the way, even one that stays inside, ends the walk, and so do ``..`` and what
  is no regular file. A path outside is refused in the same words whether anything is there or not.
- http(s) addresses are fetched if that is switched on (`longvila.inference.serving.fetch`).

Decoders take a path, not an open file, so the path is checked once more after decoding: a file that
was exchanged in between is not answered about.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import re
import stat
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from longvila.inference.serving.errors import RequestError
from longvila.inference.serving.fetch import Fetcher
from longvila.inference.serving.settings import Access, Limits

_DATA = re.compile(r"data:(?P<type>[^,;]*)(?:;[^,;]*)*?(?P<base64>;base64)?,", re.IGNORECASE)
_LONGEST_NAME = 80


class Store(Protocol):
    """Where uploaded files are."""

    @contextlib.contextmanager
    def hold(self, key: str) -> Iterator[Path]:
        """Lend a file."""
        ...


@dataclass(frozen=True)
class Opened:
    """A medium that may be read.

    Attributes:
        name: What messages call it.
        source: A path or bytes.
        identity: Device, number, size and times of a file that stays; None for what does not.
    """

    name: str
    source: Path | bytes
    identity: tuple[int, ...] | None = None

    def check(self) -> None:
        """Make sure that the file is the one that was checked.

        Raises:
            RequestError: If it was exchanged.
        """
        if self.identity is None or isinstance(self.source, bytes):
            return
        try:
            now = _identity(os.lstat(self.source))
        except OSError:
            now = None
        if now != self.identity:
            raise RequestError(f"{self.name}: the file changed while it was read; ask again")


class Gate:
    """Opens what a request names, or refuses.

    Args:
        access: What may be reached.
        limits: Bounds on sizes and times.
        uploads: Uploaded files.
        fetcher: Fetches addresses.
    """

    def __init__(
        self, access: Access, limits: Limits, uploads: Store, fetcher: Fetcher | None = None
    ) -> None:
        self.access, self.limits, self.uploads = access, limits, uploads
        self.fetcher = fetcher or Fetcher(access)
        #: Where each root is, by both its names: links that lead to it are the operator's.
        self.roots = {
            Path(name): Path(os.path.realpath(root))
            for root in access.roots
            for name in (os.path.abspath(root), os.path.realpath(root))
        }
        for given, root in self.roots.items():
            if not root.is_dir():
                raise ValueError(f"{given}: a root of files that may be read must be a folder")

    def admit(self, url: str) -> None:
        """Refuse at once what `open` would refuse for its name alone.

        A request is then answered before it has waited for its turn.

        Args:
            url: What the request names.

        Raises:
            RequestError: If it may not be read.
        """
        scheme = url[:8].lower()
        if scheme.startswith(("http:", "https:")):
            self.fetcher.admit(url)
        elif scheme.startswith("upload:"):
            with self.uploads.hold(url.partition(":")[2]):
                return
        elif not scheme.startswith("data:"):
            self._file(url)

    @contextlib.contextmanager
    def open(
        self, url: str, *, timeout_s: float, check: Callable[[], None] = lambda: None
    ) -> Iterator[Opened]:
        """Open a medium for as long as it is read.

        Args:
            url: What the request names.
            timeout_s: Most seconds of a download.
            check: Called now and then; raises to stop.

        Yields:
            What may be read.

        Raises:
            RequestError: If it may not or cannot be.
        """
        scheme = url[:8].lower()
        if scheme.startswith("data:"):
            yield self._data(url)
        elif scheme.startswith(("http:", "https:")):
            path = self.fetcher.fetch(
                url, max_bytes=self.limits.media_bytes, timeout_s=timeout_s, check=check
            )
            try:
                yield Opened(shorten(url), path)
            finally:
                path.unlink(missing_ok=True)
        elif scheme.startswith("upload:"):
            with self.uploads.hold(url.partition(":")[2]) as path:
                yield Opened("the uploaded file", path)
        else:
            yield self._file(url)

    # ---- data: addresses

    def _data(self, url: str) -> Opened:
        head = _DATA.match(url[:256])
        if head is None or head["base64"] is None:
            raise RequestError("a data: URI must read data:TYPE;base64,DATA", code="invalid_media")
        size = (len(url) - head.end()) * 3 // 4
        if size > self.limits.media_bytes:
            raise _too_large("the data: URI", size, self.limits)
        try:
            data = base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError) as fault:
            raise RequestError(
                f"the data: URI is not valid base64 ({fault})", code="invalid_media"
            ) from fault
        if not data:
            raise RequestError("the data: URI is empty", code="invalid_media")
        return Opened(f"the {head['type'] or 'untyped'} data", data)

    # ---- files

    def _file(self, url: str) -> Opened:
        text = url
        if url[:5].lower() == "file:":
            try:
                parts = urllib.parse.urlsplit(url)
                text = urllib.parse.unquote(parts.path, errors="strict")
            except ValueError as fault:
                raise _outside(url) from fault
            if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
                raise _outside(url)
        elif re.match(r"[a-z][a-z0-9+.-]*:", url, re.IGNORECASE):
            raise RequestError(
                f"{shorten(url)}: media are named by data:, file:, http:, https: or upload: "
                "addresses",
                code="invalid_media",
            )
        if not self.roots:
            raise RequestError(
                "this server reads no files; send the medium as a data: URI, or start the server "
                "with --root FOLDER",
                status=403,
                code="files_disabled",
            )
        if not text or "\0" in text or "\\" in text:
            raise _outside(url)
        for name, root in self.roots.items():
            path = PurePosixPath(text)
            if path.is_absolute():
                if not path.is_relative_to(name):
                    continue
                path = path.relative_to(name)
            found = self._walk(root, path.parts, url)
            if found is not None:
                return found
        raise _outside(url)

    def _walk(self, root: Path, names: tuple[str, ...], url: str) -> Opened | None:
        """Follow names below a root without following links; None if they lead nowhere."""
        if not names or ".." in names:
            return None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with contextlib.ExitStack() as stack:
            try:
                here = os.open(root, flags | os.O_DIRECTORY)
                stack.callback(os.close, here)
                for name in names[:-1]:
                    here = os.open(name, flags | os.O_DIRECTORY, dir_fd=here)
                    stack.callback(os.close, here)
                # Looked at before it is opened: opening a device or a pipe may do something.
                if not stat.S_ISREG(os.lstat(names[-1], dir_fd=here).st_mode):
                    return None
                last = os.open(names[-1], flags, dir_fd=here)
                stack.callback(os.close, last)
                status = os.fstat(last)
            except (OSError, ValueError):
                return None
            if not stat.S_ISREG(status.st_mode):
                return None
        name = names[-1]
        if status.st_size > self.limits.media_bytes:
            raise _too_large(name, status.st_size, self.limits)
        if status.st_size == 0:
            raise RequestError(f"{shorten(url)}: the file is empty", code="invalid_media")
        return Opened(name, root.joinpath(*names), _identity(status))


def shorten(text: str) -> str:
    """Return a name fit for a message."""
    text = "".join(c if c.isprintable() else "?" for c in text[: _LONGEST_NAME + 1])
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 3] + "..."


def _identity(status: os.stat_result) -> tuple[int, ...]:
    # Whoever copies a file over another may set its time of change, but not the time of doing so.
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times


def _outside(url: str) -> RequestError:
    return RequestError(
        f"{shorten(url)}: not a file in the folders that this server may read",
        status=403,
        code="file_refused",
    )


def _too_large(name: str, size: int, limits: Limits) -> RequestError:
    return RequestError(
        f"{name}: {size} bytes, at most {limits.media_bytes} are taken; send a smaller file",
        status=413,
        code="media_too_large",
    )
