"""Raw records from files, by number: nothing is read before it is asked for.

    .jsonl            byte offsets of the lines            one pass over the file, no parsing
    .json  [...]      byte offsets of the elements         one pass over brackets and strings
    .json  {...}      a mapping, read whole                 records get their key as ``__key__``
    .parquet          row groups                            the last ones stay decoded
    .tar, a folder    offsets of the members               WebDataset: files that share a stem
    hf:NAME@CONFIG#SPLIT                                    Hugging Face ``datasets``, by name
    a folder that ``save_to_disk`` wrote                    the same
    anything indexed  a ``datasets.Dataset``, lists         as they are

Hidden files and folders of a folder are passed over. A ``.json`` file of one object a line is read
as lines, as ``load_dataset("json")`` does. Offsets cost 16 bytes a record. Pictures and videos in
columns of ``datasets`` stay encoded: bytes and path.
Readers may be shared between threads and sent to other processes, which open the files again.

Tars are read with the standard library. Upstream's pickles (``.pkl``) are refused: reading one runs
whatever code is in it; convert them to JSON lines or WebDataset where they were made.

It does not know what a record means: that is an adapter's part (`longvila.data.datasets`).
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from longvila.errors import LongVILAError

#: Half of a character in JSON; two that belong together are one character.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class RecordError(LongVILAError, ValueError):
    """One record cannot be read, whatever the others are; the message names file and record."""


Record = Mapping[str, Any]
_BOM = b"\xef\xbb\xbf"
# Strings are passed over by whole runs: one step a byte would take memory for each.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,]+")
_KEPT_GROUPS = 2
_COMPRESSED = re.compile(r"\.(txt|md|json|jsonl|ndjson|parquet)\.(gz|bz2|zst|xz|zip|lz4)$")


class Records(Protocol):
    """Records by number."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __getitem__(self, index: int) -> Record:
        """Return one."""
        ...


def open_records(source: Any, *, under: str | None = None) -> Records:
    """Open whatever holds records.

    Args:
        source: A file or a folder (see the module's text), several files, ``hf:NAME``, or anything
            that has a length and gives mappings by number.
        under: For a JSON mapping, the key below which the records are.

    Returns:
        The records.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the kind of file is unknown or its content is not what its name says.
        TypeError: If the source is none of these.
    """
    if isinstance(source, str) and source.startswith("hf:"):
        return _open_hub(source)
    if isinstance(source, str | os.PathLike):
        return _open_path(Path(os.path.expanduser(source)), under)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        if isinstance(source, list | tuple) and source and isinstance(source[0], str | os.PathLike):
            return Joined([open_records(part, under=under) for part in source])
        if isinstance(source, Mapping):
            raise TypeError(
                f"expected one split or file, got a mapping of {sorted(source)}; choose one of them"
            )
        return _encoded(source) if hasattr(source, "cast_column") else source  # type: ignore[return-value]
    raise TypeError(
        "expected a path, paths, or records with a length and an index (a list, a datasets.Dataset)"
        f"; got {type(source).__name__}. Streams have no index: write them to parquet or JSON lines"
    )


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as fault:
        raise ImportError(f"{source}: pip install datasets to read it") from fault
    return datasets


def _open_hub(source: str) -> Records:
    """A set that ``datasets.load_dataset`` finds, on the hub or in a folder."""
    name, _, split = source.removeprefix("hf:").partition("#")
    name, _, config = name.partition("@")
    loaded = _datasets(source).load_dataset(name, config or None, split=split or "train")
    return _encoded(loaded)


def _encoded(dataset: Any) -> Records:
    """Leave pictures, videos and sounds as bytes: they are decoded where they are needed."""
    for column, feature in dataset.features.items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(column, dataclasses.replace(feature, decode=False))
    found: Records = dataset
    return found


def _by_number(name: str) -> tuple[Any, ...]:
    # Imported late: packing text in workers needs no torch, which the media room brings.
    from longvila.media.sources import natural_key

    return tuple(natural_key(name))


def files_in(folder: Path) -> list[Path]:
    """Return the files of a folder and the folders in it, without hidden files and folders."""
    return [
        path
        for path in folder.rglob("*")
        if not path.is_dir()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def check_unpacked(folder: Path) -> None:
    """Refuse a folder in which compressed records would be passed over.

    Raises:
        ValueError: If it has some.
    """
    packed = sorted(str(f) for f in files_in(folder) if _COMPRESSED.search(f.name))
    if packed:
        raise ValueError(
            f"{folder} holds compressed files, which have no offsets ({packed[0]}, {len(packed)} "
            "in all); unpack them first, or move them away"
        )


def _open_path(path: Path, under: str | None) -> Records:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not (path.is_dir() or path.is_file()):
        raise ValueError(f"{path}: not a regular file")
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = sorted(json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"])
            raise ValueError(f"{path} holds the splits {splits}; name one of these folders")
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            return _encoded(_datasets(str(path)).load_from_disk(str(path)))
        if any(path.glob("[!.]*.tar")):
            return TarRecords(path)
        check_unpacked(path)
        found = files_in(path)
        files = [f for f in found if f.suffix in (".parquet", ".jsonl", ".ndjson")]
        # Beside those, .json is what somebody notes about them, as pack_text does beside its own.
        files = files or [f for f in found if f.suffix == ".json" and f.name != "manifest.json"]
        if not files:
            raise ValueError(f"{path}: a folder without .tar, .parquet, .jsonl or .json files")
        files.sort(key=lambda f: _by_number(str(f.relative_to(path))))
        return Joined([_open_path(file, under) for file in files])
    if path.suffix in (".jsonl", ".ndjson"):
        return JsonLines(path)
    if path.suffix == ".json":
        return _open_json(path, under)
    if path.suffix == ".parquet":
        return ParquetRecords(path)
    if path.suffix == ".tar":
        return TarRecords(path)
    hint = ""
    if path.suffix in (".pkl", ".pickle"):
        hint = "; pickles run code when read: convert them to JSON lines or WebDataset"
    elif path.suffix in (".gz", ".zip", ".zst", ".xz"):
        hint = "; unpack it first, compressed files have no offsets"
    raise ValueError(
        f"{path}: records are read from .jsonl, .json, .parquet, .tar and folders of these{hint}"
    )


def _open_json(path: Path, under: str | None) -> Records:
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head[:1] == b"[":
        return JsonArray(path)
    if head[:1] != b"{":
        raise ValueError(f"{path}: JSON that is neither a list nor an object")
    with path.open("rb") as file:
        # Of a mapping or of lines, either may come after empty ones.
        first = next((line for line in file if line.removeprefix(_BOM).strip()), b"")
        further = file.tell() < path.stat().st_size
    try:
        json.loads(first)
        # A whole object on the first line: either lines, or a mapping written without breaks.
        if under is None and further:
            return JsonLines(path)
    except json.JSONDecodeError:
        first = b""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as fault:
        raise ValueError(f"{path}: is no JSON, nor one object a line: {fault}") from fault
    if under is not None:
        if under not in content:
            raise ValueError(f"{path}: no key {under!r}; the keys are {sorted(content)[:10]}")
        content = content[under]
    if isinstance(content, list):
        return content
    if content and all(isinstance(value, dict) for value in content.values()):
        return [{"__key__": key, **value} for key, value in content.items()]
    if first:
        return JsonLines(path)
    raise ValueError(f"{path}: an object whose values are not records")


class _Offsets:
    """Records that lie between byte offsets of one file."""

    def __init__(self, path: Path, starts: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]):
        self.path, self._starts, self._ends = path, starts, ends
        self._lock = threading.Lock()
        self._file: int | None = None

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        """Return one record, parsed.

        Raises:
            RecordError: If it is no JSON object.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no number {index}")
        with self._lock:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDONLY)
        start, end = int(self._starts[index]), int(self._ends[index])
        # pread has no position of its own, so threads share the descriptor.
        text = os.pread(self._file, end - start, start)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as fault:
            raise RecordError(f"{self.path}, record {index} at byte {start}: {fault}") from fault
        if not isinstance(record, dict):
            raise RecordError(
                f"{self.path}, record {index}: expected an object, got {type(record).__name__}"
            )
        if _SURROGATE.search(text):
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as fault:
                raise RecordError(
                    f"{self.path}, record {index} at byte {start}: a text holds half a character "
                    f"(\\ud800 to \\udfff without its other half): {fault}"
                ) from fault
        return record

    def __getstate__(self) -> dict[str, Any]:
        """Leave the descriptor and the lock out; another process has its own."""
        return {**self.__dict__, "_file": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without a descriptor."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        """Close the file."""
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]


class JsonLines(_Offsets):
    """One JSON object a line; empty lines are skipped."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        starts: list[int] = []
        ends: list[int] = []
        place = 0
        with path.open("rb") as file:
            for line in file:
                if line.removeprefix(_BOM).strip():
                    starts.append(place)
                    ends.append(place + len(line))
                place += len(line)
        super().__init__(path, np.array(starts, np.int64), np.array(ends, np.int64))


class JsonArray(_Offsets):
    """The objects of one JSON list."""

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            spans, closed = _elements(text)
        if not closed:
            raise ValueError(
                f"{path}: the list is not closed, or something comes after it; is the file cut "
                "off, or several lists behind one another?"
            )
        pairs = np.array(spans, np.int64).reshape(-1, 2)
        super().__init__(path, pairs[:, 0], pairs[:, 1])


def _elements(text: mmap.mmap) -> tuple[list[tuple[int, int]], bool]:
    """Byte ranges of the elements of the outermost list, and whether it is all there is.

    What is no object has a range, too, so that it is found when it is read. Matches refer to the
    map; a function of its own lets go of them before the map is closed.
    """
    spans: list[tuple[int, int]] = []
    depth, start, last = 0, -1, -1
    for token in _TOKEN.finditer(text):
        sign = token.group()
        if depth == 1:
            for found in _SCALAR.finditer(text, last, token.start()):
                spans.append(found.span())
            last = token.end()
            if sign[:1] == b'"':
                spans.append(token.span())
        if sign in (b"[", b"{"):
            depth += 1
            if depth == 1:
                last = token.end()
            elif depth == 2:
                start = token.start()
        elif sign in (b"]", b"}"):
            depth -= 1
            if depth == 1:
                spans.append((start, token.end()))
                last = token.end()
            elif depth == 0:
                return spans, re.compile(rb"\S").search(text, token.end()) is None
    return spans, False


class ParquetRecords:
    """Rows of a parquet file; pyarrow reads it.

    Raises:
        ImportError: If pyarrow is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        metadata = self._open().metadata
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._ends = np.cumsum([0, *counts])
        self._lock = threading.Lock()
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def _open(self) -> Any:
        try:
            import pyarrow.parquet as parquet
        except ImportError as fault:
            raise ImportError(
                f"{self.path}: reading parquet needs pyarrow; pip install 'longvila[train]'"
            ) from fault
        try:
            return parquet.ParquetFile(self.path)
        except ValueError as fault:
            raise ValueError(f"{self.path}: {fault}") from fault

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        """Return one row."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows, there is no number {index}")
        number = int(np.searchsorted(self._ends, index, side="right")) - 1
        with self._lock:
            group = self._groups.get(number)
            if group is None:
                with self._open() as file:
                    try:
                        group = self._groups[number] = file.read_row_group(number)
                    except (OSError, ValueError) as fault:
                        raise ValueError(
                            f"{self.path}, rows from {int(self._ends[number])}: {fault}; is the "
                            "file damaged?"
                        ) from fault
                while len(self._groups) > _KEPT_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
        row = group.slice(index - int(self._ends[number]), 1)
        return {name: row.column(name)[0].as_py() for name in row.column_names}

    def __getstate__(self) -> dict[str, Any]:
        """Leave decoded groups and the lock out."""
        return {**self.__dict__, "_groups": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without decoded groups."""
        self.__dict__.update(state)
        self._groups, self._lock = OrderedDict(), threading.Lock()


class TarRecords:
    """WebDataset shards: files of a tar that share a stem are one record.

    A record has ``__key__``, ``__shard__``, and the bytes of each file under its suffix with the
    dot (``.jpg``); ``.json`` is parsed and ``.txt`` decoded. Hidden files, and those without a
    suffix, are left out. With a wids index beside the shards (``wids-meta.json``), its list of
    shards is taken and its counts are checked: they are of records or, as the original counts, of
    names without their last suffix, folders included.

    Args:
        path: A tar, or a folder of tars.

    Raises:
        ValueError: If a shard has other records than its index says, or a name twice.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        promised: dict[Path, int] = {}
        if path.is_dir():
            index = path / "wids-meta.json"
            if index.exists():
                for shard in json.loads(index.read_text("utf-8"))["shardlist"]:
                    promised[path / shard["url"]] = int(shard["nsamples"])
                shards = list(promised)
            else:
                shards = sorted(path.glob("[!.]*.tar"), key=lambda f: _by_number(f.name))
        else:
            shards = [path]
        self.shards = shards
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()
        self._records: list[tuple[int, str, dict[str, tuple[int, int]]]] = []
        for number, shard in enumerate(shards):
            before = len(self._records)
            names = self._scan(number, shard)
            found = len(self._records) - before
            if shard in promised and promised[shard] not in (found, names):
                raise ValueError(
                    f"{shard}: {found} records, but wids-meta.json promises {promised[shard]}; the "
                    "download is not complete"
                )

    def _scan(self, number: int, shard: Path) -> int:
        found: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            # Only headers are read: bodies are skipped by seeking.
            with tarfile.open(shard, "r:") as tar:
                members = tar.getmembers()
        except tarfile.TarError as fault:
            raise ValueError(f"{shard}: {fault}; is it a tar, and all of it?") from fault
        if shard.stat().st_size % tarfile.BLOCKSIZE:
            raise ValueError(f"{shard}: is no whole number of blocks; is the file cut off?")
        for member in members:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not dot or not stem:  # "._a.jpg" is what macOS leaves beside a.jpg
                continue
            key = f"{folder}/{stem}" if folder else stem
            files = found.setdefault(key, {})
            if dot + suffix in files:
                raise ValueError(f"{shard}: {member.name} is there twice")
            files[dot + suffix] = (member.offset_data, member.size)
        self._records += [(number, key, files) for key, files in found.items()]
        return len({os.path.splitext(member.name)[0] for member in members})

    def __len__(self) -> int:
        """Return the number of records in all shards."""
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        """Return one record, its files read.

        Raises:
            RecordError: If a text or JSON of it is none.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} records, none with number {index}")
        number, key, files = self._records[index]
        with self._lock:
            if number not in self._files:
                self._files[number] = os.open(self.shards[number], os.O_RDONLY)
            descriptor = self._files[number]
        record: dict[str, Any] = {"__key__": key, "__shard__": self.shards[number].name}
        for suffix, (start, size) in files.items():
            content = os.pread(descriptor, size, start)
            if len(content) != size:
                raise RecordError(f"{self.shards[number]}: cut off inside {key}{suffix}")
            try:
                if suffix == ".json":
                    record[suffix] = json.loads(content)
                else:
                    record[suffix] = content.decode() if suffix == ".txt" else content
            except ValueError as fault:
                raise RecordError(f"{self.shards[number]}: {key}{suffix}: {fault}") from fault
        return record

    def __getstate__(self) -> dict[str, Any]:
        """Leave descriptors and the lock out."""
        return {**self.__dict__, "_files": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without descriptors."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        """Close the shards."""
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


class Joined:
    """Several sets of records behind one another."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([0, *(len(part) for part in self.parts)])

    def __len__(self) -> int:
        """Return how many there are in all."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        """Return one."""
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} records, none with number {index}")
        part = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self.parts[part][index - int(self._ends[part])]
