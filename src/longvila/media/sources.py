"""What a user may name as a video or a picture, turned into something a reader can open.

A source is a path, a ``file://``, ``http(s)://`` or ``data:`` address, a base64 string, bytes, an
open binary file, a folder of pictures, a list of pictures or paths, or an array. ``resolve``
looks at it once and returns a ``Source`` saying which of three kinds it is: one file on disk,
bytes in memory, or pictures in order.

Downloads go to a temporary file under a limit of bytes and of seconds, follow only http(s)
redirects, and are removed when the source is closed. Nothing is fetched unless an address was
given and ``allow_http`` is on; a server that takes addresses from strangers turns it off.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from longvila.errors import LongVILAError, VideoError

#: Suffixes taken for pictures in a folder of frames.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
_CHUNK_BYTES = 1 << 20
_DATA_URI = re.compile(r"data:(?P<type>[^,]*?)(?P<base64>;base64)?,", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """How far fetching goes.

    Attributes:
        allow_http: Whether http(s) addresses may be fetched at all.
        max_bytes: Most bytes of a download or of a base64 text once decoded.
        timeout_s: Most seconds a download may take.
    """

    allow_http: bool = True
    max_bytes: int = 8 << 30
    timeout_s: float = 300.0


@dataclass
class Source:
    """One resolved source; exactly one of ``path``, ``data`` and ``pictures`` is set.

    Attributes:
        name: What messages call it.
        path: A file on disk.
        data: A whole file in memory.
        pictures: Frames in order: paths, PIL images or arrays of shape (H, W, 3).
        temporary: Whether ``path`` was made here and goes away with ``close``.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None
    pictures: Sequence[Any] | None = None
    temporary: bool = False

    def close(self) -> None:
        """Remove the temporary file of a download; harmless otherwise and when repeated."""
        if self.temporary and self.path is not None:
            self.path.unlink(missing_ok=True)


def resolve(
    source: Any, *, limits: Limits | None = None, error: type[LongVILAError] = VideoError
) -> Source:
    """Find out what a source is.

    Args:
        source: See the module's docstring.
        limits: How far fetching may go.
        error: Class of the exception that a source which cannot be used raises.

    Returns:
        The resolved source; the caller closes it.

    Raises:
        VideoError: Or ``error``: nothing is there, it is empty, refused, or too large.
        TypeError: If the type is none of those listed.
    """
    limits = limits or Limits()
    if isinstance(source, str):
        return _from_text(source, limits, error)
    if isinstance(source, os.PathLike):
        return _from_path(Path(source), error)
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise error("the bytes given as a video or picture are empty")
        return Source(f"<{len(source)} bytes>", data=bytes(source))
    if hasattr(source, "read"):
        return resolve(source.read(), limits=limits, error=error)
    if isinstance(source, list | tuple):
        if not source:
            raise error("the list of frames is empty")
        return Source(f"<{len(source)} frames>", pictures=source)
    array = _as_array(source)
    if array is not None:
        return Source(f"<array {tuple(array.shape)}>", pictures=_frames_of(array, error))
    raise TypeError(
        "expected a path, an address, bytes, a folder, a list of frames or an array; "
        f"got {type(source).__name__}"
    )


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``frame2`` before ``frame10``."""
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part.lower()) for part in parts]


def _from_text(text: str, limits: Limits, error: type[LongVILAError]) -> Source:
    scheme = text[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _download(text, limits, error)
    if scheme.startswith("file:"):
        return _from_path(_local_path(text, error), error)
    if scheme.startswith("data:"):
        head = _DATA_URI.match(text)
        if head is None:
            raise error(f"not a data: address (no comma): {_short(text)}")
        body = text[head.end() :]
        if head["base64"] is None:
            return resolve(urllib.parse.unquote_to_bytes(body), limits=limits, error=error)
        return _from_base64(body, f"<data: {head['type'] or 'no type'}>", limits, error)
    if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        raise error(f"{_short(text)}: only file://, http:// and https:// addresses are understood")
    # A path always wins. Only a text far too long for a name is tried as bare base64.
    if len(text) > 512 and re.fullmatch(r"[A-Za-z0-9+/\s]+={0,2}\s*", text):
        return _from_base64(text, "<base64 text>", limits, error)
    if not text:
        raise error("the path of the video or picture is empty")
    return _from_path(Path(os.path.expanduser(text)), error)


def _from_base64(body: str, name: str, limits: Limits, error: type[LongVILAError]) -> Source:
    if len(body) * 3 // 4 > limits.max_bytes:
        raise error(f"{name}: more than the {limits.max_bytes} bytes allowed")
    try:
        data = base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as fault:
        raise error(f"{name}: not valid base64 ({fault})") from fault
    if not data:
        raise error(f"{name}: empty")
    return Source(name, data=data)


def _from_path(path: Path, error: type[LongVILAError]) -> Source:
    try:
        if path.is_dir():
            return _from_folder(path, error)
        if "\0" in str(path):
            raise error(f"{str(path)!r}: not a path")
        if not path.exists():
            raise error(f"{path}: no such file")
        if not path.is_file():
            raise error(f"{path}: not a regular file")
        if path.stat().st_size == 0:
            raise error(f"{path}: the file is empty (0 bytes)")
    except (OSError, ValueError) as fault:
        if isinstance(fault, LongVILAError):
            raise
        raise error(f"{_short(str(path))}: {fault}") from fault
    if not os.access(path, os.R_OK):
        raise error(f"{path}: no permission to read it")
    return Source(str(path), path=path)


def _from_folder(folder: Path, error: type[LongVILAError]) -> Source:
    # Hidden ones are not frames: macOS leaves a "._NAME" beside each file it copies.
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and path.is_file()
    ]
    if not found:
        raise error(
            f"{folder}: a folder without pictures; expected files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return Source(str(folder), pictures=sorted(found, key=lambda p: natural_key(p.name)))


def _local_path(address: str, error: type[LongVILAError]) -> Path:
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError as fault:
        raise error(f"{_short(address)}: is no address: {fault}") from fault
    if parts.netloc not in ("", "localhost"):
        raise error(f"{address}: a file:// address must be on this machine, not {parts.netloc!r}")
    return Path(urllib.request.url2pathname(parts.path))


def _download(address: str, limits: Limits, error: type[LongVILAError]) -> Source:
    if not limits.allow_http:
        raise error(f"{_short(address)}: fetching addresses is switched off here (allow_http)")
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    deadline = time.monotonic() + limits.timeout_s
    try:
        suffix = Path(urllib.parse.urlsplit(address).path).suffix[:8]
    except ValueError as fault:  # brackets of an IPv6 address that are not closed, and such
        raise error(f"{_short(address)}: is no address: {fault}") from fault
    handle, name = tempfile.mkstemp(prefix="longvila-", suffix=suffix)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            # The socket's own timeout bounds each wait; the deadline bounds their sum.
            request = urllib.request.Request(address, headers={"User-Agent": "longvila"})
            with opener.open(request, timeout=min(limits.timeout_s, 30.0)) as answer:
                size = _copy(answer, out, address, deadline, limits, error)
        if size == 0:
            raise error(f"{_short(address)}: the server sent nothing")
    except (urllib.error.URLError, OSError, ValueError) as fault:
        path.unlink(missing_ok=True)
        if isinstance(fault, urllib.error.HTTPError):
            fault.close()
        if isinstance(fault, LongVILAError):
            raise
        if time.monotonic() > deadline:
            raise error(_too_late(address, limits)) from fault
        raise error(f"{_short(address)}: cannot be fetched: {fault}") from fault
    return Source(address, path=path, temporary=True)


def _too_late(address: str, limits: Limits) -> str:
    return f"{_short(address)}: not fetched within {limits.timeout_s:g} s"


def _copy(
    answer: Any,
    out: IO[bytes],
    address: str,
    deadline: float,
    limits: Limits,
    error: type[LongVILAError],
) -> int:
    size = 0
    # read1 returns what has come, so that a slow trickle meets the deadline.
    while chunk := answer.read1(_CHUNK_BYTES):
        size += len(chunk)
        if size > limits.max_bytes:
            raise error(f"{_short(address)}: more than the {limits.max_bytes} bytes allowed")
        if time.monotonic() > deadline:
            raise error(_too_late(address, limits))
        out.write(chunk)
    return size


def _as_array(source: Any) -> Any:
    """Return a NumPy view of an array or tensor, None of anything else."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, Tensor):
        return source.detach().cpu().numpy()
    return None


def _frames_of(array: Any, error: type[LongVILAError]) -> list[Any]:
    if array.ndim == 4 and array.shape[-1] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise error(
            "an array of frames has shape (F, H, W, 3) or (F, 3, H, W) with at least one frame; "
            f"got {tuple(array.shape)}"
        )
    if array.dtype != np.uint8:
        raise error(f"an array of frames is uint8, 0 to 255; got {array.dtype}")
    return list(array)


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
