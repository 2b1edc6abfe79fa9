"""Whether a save still holds what was written, by the checksums that are in it anyway.

`torch.save` puts every tensor into a zip archive with a CRC-32, and `torch.load` does not look at
it: a bit that flips on a disk or in a copy becomes a weight. Here each archive of a save is read
and compared with its own checksums; saves of all versions have them.

Cost: nothing when a save is written. When it is read, one more pass over its files at the speed of
the disk or of zlib, some 2 GB a second, each rank a share of equal size. Not covered: the list of
tensors (``.metadata``) and ``run.json``, whose damage shows in names, shapes and places.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp


class _Part(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file = path.open("rb")
        self._start, self._size, self._place = start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"place {base + offset} of {self._size} bytes")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._size - self._place, 0)]
        self._file.seek(self._start + self._place)
        number = self._file.readinto(view)  # type: ignore[attr-defined]
        self._place += number
        return int(number)

    def close(self) -> None:
        self._file.close()
        super().close()


def find_damage(folder: Path, *, rank: int = 0, ranks: int = 1) -> str | None:
    """Compare a rank's share of a save with its checksums.

    Args:
        folder: Folder that `torch.distributed.checkpoint` wrote, perhaps with ``rank-*.pt`` files.
        rank: Whose share.
        ranks: How many there are.

    Returns:
        What is wrong first, None if nothing is.
    """
    entries = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    parts = sorted({(each.relative_path, each.offset, each.length) for each in entries})
    parts += sorted((each.name, 0, each.stat().st_size) for each in folder.glob("rank-*.pt"))
    total = sum(size for *_, size in parts)
    before = 0
    for name, start, size in parts:
        # By bytes, so that a large embedding does not make one rank's share larger.
        if before * ranks // max(total, 1) == rank:
            fault = _wrong(folder / name, start, size)
            if fault is not None:
                return f"{name}: {fault}"
        before += size
    return None


def _wrong(path: Path, start: int, size: int) -> str | None:
    try:
        with _Part(path, start, size) as file, zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError,
        RuntimeError, ValueError,
    ) as fault:  # fmt: skip
        return f"{str(fault) or type(fault).__name__}, in the {size:,} bytes from {start:,}"
    if broken is not None:
        return f"a checksum is wrong in the {size:,} bytes from {start:,}"
    return None
