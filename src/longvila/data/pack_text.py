"""Text to rows of exactly so many token ids, for training at long context.

    sources -> pieces of records -> tokenised by any number of processes -> one writer, in order
                                                                         -> shards, one by one

1. Sources are cut into pieces of equally many records; pieces are tokenised side by side.
2. The writer takes their documents in the order of the sources, each with an end token, and fills
   rows; what does not fit goes on at the start of the next row, as a document of its own.
3. A full shard is written beside its name, synced and renamed; then the manifest is, which says
   which document and token come next.

So the rows do not depend on how many processes tokenise or how often the run was killed: a killed
run loses at most the shard it was writing, and goes on by itself when started again. Memory is a
few pieces and one shard, however long a text is (`longvila.data.stretches`).

Rows know their documents (``document_lengths``), so that attention and positions can restart. The
original's format (``text``: ids, one JSON object a line, no boundaries) is read and written too.

It does not shuffle or remove duplicates; a mixture shuffles rows, and sources come as they are.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from longvila.data.records import Record, Records, check_unpacked, files_in, open_records
from longvila.data.stretches import AT_ONCE, encode
from longvila.errors import LongVILAError
from longvila.log import get_logger

_LOG = get_logger(__name__)
Format = Literal["parquet", "jsonl", "upstream"]
Documents = Literal["file", "line"]
Ids = np.ndarray[Any, Any]
_SUFFIX = {"parquet": ".parquet", "jsonl": ".jsonl", "upstream": ".json"}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_VERSION = 1
#: What a folder may hold beside .txt that is text, too.
_OTHER_KINDS = frozenset({".jsonl", ".ndjson", ".parquet"})


def parse_length(text: str | int) -> int:
    """Read a row length: a number, or one with k (1024) or M (1024 squared) behind it."""
    found = re.fullmatch(r"\s*(\d+)\s*([km]?)\s*", str(text), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise ValueError(f"a length is a number like 65536, 64k or 1M, got {text!r}")
    return int(found[1]) * _UNITS[found[2].lower()]


@dataclass(frozen=True)
class PackOptions:
    """What is packed, and how.

    Attributes:
        sources: Files or folders of ``.txt``, ``.jsonl``, ``.json``, ``.parquet``, or
            ``hf:NAME#SPLIT`` of Hugging Face ``datasets``; in this order.
        output: Folder of the shards.
        tokenizer: Folder or hub id of the tokenizer.
        length: Tokens of a row.
        text_field: Field with the text, or with ids of text that is tokenised already.
        documents: What a document is in a ``.txt`` file: the file, or each line.
        format: ``parquet`` or ``jsonl`` with document lengths, or ``upstream``.
        end_token: Token after each document; None for the tokenizer's end of text.
        min_tokens: Shorter documents are left out.
        keep_tail: Whether the last row is written although it is not full.
        rows_per_shard: Rows of a shard; None for about 64 million tokens.
        piece_records: Records tokenised at a time.
        processes: Processes that tokenise; 1 works in this one.
    """

    sources: tuple[str, ...]
    output: Path
    tokenizer: str
    length: int
    text_field: str = "text"
    documents: Documents = "file"
    format: Format = "parquet"
    end_token: str | None = None
    min_tokens: int = 1
    keep_tail: bool = False
    rows_per_shard: int | None = None
    piece_records: int = 64
    processes: int = 1

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("name at least one source")
        for name in ("length", "min_tokens", "piece_records", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rows_per_shard is not None and self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {self.rows_per_shard}")
        if self.format not in get_args(Format):
            raise ValueError(f"format must be one of {get_args(Format)}, got {self.format!r}")
        if self.documents not in get_args(Documents):
            raise ValueError(f"documents must be file or line, got {self.documents!r}")

    @property
    def shard_rows(self) -> int:
        """Rows of a shard."""
        return self.rows_per_shard or max((1 << 26) // self.length, 1)

    @property
    def fingerprint(self) -> str:
        """What a run must share with the shards it goes on from."""
        facts = {k: v for k, v in asdict(self).items() if k not in ("output", "processes")}
        facts["rows_per_shard"] = self.shard_rows
        facts["sizes"] = [_size(source) for source in self.sources]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _size(source: str) -> int:
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


# ---- reading ---------------------------------------------------------------------------------


class TextFiles:
    """Text files as records: each file a document, or each line that is not blank."""

    def __init__(self, paths: list[Path], documents: Documents) -> None:
        self.paths, self.documents = paths, documents
        self._spans: list[tuple[int, int, int]] = []
        for number, path in enumerate(paths):
            if not path.is_file():
                raise ValueError(f"{path}: not a regular file")
            if documents == "file":
                self._spans.append((number, 0, path.stat().st_size))
                continue
            place = 0
            with path.open("rb") as file:
                for line in file:
                    if line.strip():
                        self._spans.append((number, place, place + len(line)))
                    place += len(line)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._spans)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one document under ``text``."""
        number, start, end = self._spans[index]
        with self.paths[number].open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            raise ValueError(f"{self.paths[number]}: is no UTF-8: {fault}") from fault
        return {"text": text.rstrip("\r\n") if self.documents == "line" else text}


@functools.lru_cache(maxsize=8)
def open_text(source: str, documents: Documents) -> Records:
    """Open a source of text; the same object for equal arguments in a process.

    Returns:
        The records.

    Raises:
        ImportError: If ``hf:`` is asked for and ``datasets`` is not installed.
    """
    if source.startswith("hf:"):
        return open_records(source)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        check_unpacked(path)
        found = files_in(path)
        files = sorted(f for f in found if f.suffix.lower() == ".txt")
        others = {f.suffix for f in found if f.suffix in _OTHER_KINDS}
        if files and others:
            raise ValueError(
                f"{path}: a folder of .txt and {', '.join(sorted(others))}, of which only one kind "
                "would be read; name the files, or put each kind into a folder of its own"
            )
        if files:
            return TextFiles(files, documents)
    elif path.suffix.lower() in (".txt", ".md"):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        return TextFiles([path], documents)
    return open_records(path)


@dataclass(frozen=True)
class _Piece:
    source: str
    start: int
    stop: int


@functools.lru_cache(maxsize=1)
def _load_tokenizer(name: str, end_token: str | None) -> tuple[str, int]:
    """The tokenizer as text, and the id of the end token."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(name)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name} has no fast tokenizer (tokenizer.json); convert it first")
    if end_token is None and tokenizer.eos_token_id is None:
        raise ValueError(f"{name} has no end-of-text token; give end_token")
    end = tokenizer.eos_token_id if end_token is None else tokenizer.get_vocab().get(end_token)
    if end is None:
        raise ValueError(f"{name} has no token {end_token!r}")
    return tokenizer.backend_tokenizer.to_str(), int(end)


@functools.lru_cache(maxsize=1)
def _backend(text: str) -> Any:
    """The tokenizer itself, which needs neither transformers nor torch in a worker."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _tokenise(options: PackOptions, piece: _Piece, tokenizer: str, end: int) -> Iterator[Ids]:
    """Yield the ids of a piece's documents, in order, end tokens included."""
    records = open_text(piece.source, options.documents)
    backend = _backend(tokenizer)
    texts: list[str] = []
    size = 0
    for index in range(piece.start, piece.stop):
        record = records[index]
        if options.text_field not in record:
            raise ValueError(
                f"{piece.source}, record {index}: no field {options.text_field!r}, only "
                f"{sorted(record)}"
            )
        value = record[options.text_field]
        if isinstance(value, str):
            texts.append(value)
            size += len(value)
            if index + 1 < piece.stop and size < AT_ONCE:
                continue
        try:
            for ids in encode(backend, texts):
                yield np.append(ids, np.int32(end))
        except ValueError as fault:
            raise ValueError(f"{piece.source}, up to record {index}: {fault}") from fault
        texts, size = [], 0
        if not isinstance(value, str):
            yield from _token_row(record, value, f"{piece.source}, record {index}", options)


def _token_row(record: Record, value: Any, where: str, options: PackOptions) -> list[Ids]:
    """Documents of a row that is tokenised already."""
    ids = np.asarray(value)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(
            f"{where}: {options.text_field!r} must be a text or a list of token ids, got "
            f"{str(value)[:80]!r}"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < 1 << 31:
        raise ValueError(f"{where}: ids from {ids.min()} to {ids.max()} are no token ids")
    found = record.get("document_lengths")
    lengths = [len(ids)] if found is None or len(found) == 0 else [int(n) for n in found]
    if sum(lengths) != len(ids) or min(lengths, default=0) < 0:
        raise ValueError(f"{where}: {len(ids)} ids, but document_lengths add up to {sum(lengths)}")
    return np.split(ids.astype(np.int32), np.cumsum(lengths)[:-1])


def _tokenise_all(options: PackOptions, piece: _Piece, tokenizer: str, end: int) -> list[Ids]:
    """What a worker sends back."""
    return list(_tokenise(options, piece, tokenizer, end))


def _pieces(options: PackOptions) -> list[_Piece]:
    pieces = []
    for source in options.sources:
        total = len(open_text(source, options.documents))
        for start in range(0, total, options.piece_records):
            pieces.append(_Piece(source, start, min(start + options.piece_records, total)))
    return pieces


def _tokenised(options: PackOptions, pieces: list[_Piece]) -> Iterator[Iterable[Ids]]:
    """Documents of each piece in order, a few pieces ahead of whoever asks."""
    tokenizer, end = _load_tokenizer(options.tokenizer, options.end_token)
    if options.processes == 1:
        yield from (_tokenise(options, piece, tokenizer, end) for piece in pieces)
        return
    # Spawned, not forked: tokenizers have threads of their own.
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        waiting = iter(pieces)

        def submit(number: int) -> list[Future[list[Ids]]]:
            return [
                pool.submit(_tokenise_all, options, piece, tokenizer, end)
                for piece in islice(waiting, number)
            ]

        ahead = submit(2 * options.processes)
        while ahead:
            try:
                documents = ahead.pop(0).result()
                ahead += submit(1)
            except BrokenExecutor as fault:
                raise LongVILAError(
                    "a process that tokenises was ended from outside, perhaps for want of memory; "
                    "begin again with fewer processes: the same command goes on"
                ) from fault
            yield documents


# ---- writing ---------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a run is; what the manifest holds.

    Attributes:
        piece: The piece that comes next.
        document: Documents of it that are done.
        token: Tokens of the next document that are done.
        rows: Rows written.
        shards: Names of the shards and their rows.
        counts: Documents, tokens, cut and short documents, and tokens of the tail.
        histogram: Documents and tokens by the power of two at or below a document's length.
        done: Whether everything is written.
    """

    piece: int = 0
    document: int = 0
    token: int = 0
    rows: int = 0
    shards: list[list[Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    histogram: dict[str, list[int]] = field(default_factory=dict)
    done: bool = False

    def seen(self, tokens: int) -> None:
        """Count a document that begins."""
        self.counts.update(documents=1, tokens=tokens)
        self.counts["longest"] = max(self.counts["longest"], tokens)
        entry = self.histogram.setdefault(str(1 << (tokens.bit_length() - 1)), [0, 0])
        entry[0] += 1
        entry[1] += tokens

    def state(self) -> dict[str, Any]:
        """Return everything as plain values."""
        # asdict would rebuild the Counter from pairs, and count those.
        return {**vars(self), "counts": dict(self.counts)}

    def copy(self) -> Progress:
        """Return a copy that later counting leaves alone."""
        return Progress(**json.loads(json.dumps(self.state())))

    def __post_init__(self) -> None:
        self.counts = Counter(self.counts)


def _save(path: Path, write: Callable[[Path], None]) -> None:
    part = path.with_name(f".{path.name}.part")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _write_manifest(options: PackOptions, progress: Progress) -> dict[str, Any]:
    manifest = {
        "version": _VERSION,
        "fingerprint": options.fingerprint,
        "length": options.length,
        "format": options.format,
        "tokenizer": options.tokenizer,
        "progress": progress.state(),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    _save(options.output / "manifest.json", lambda part: _write_text(part, text))
    return manifest


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_shard(options: PackOptions, path: Path, rows: list[tuple[Ids, list[int]]]) -> None:
    if options.format == "parquet":
        _save(path, lambda part: _write_parquet(part, rows))
        return
    lines = []
    for ids, lengths in rows:
        row: dict[str, Any] = {"text": ids.tolist()}
        if options.format == "jsonl":
            row = {"input_ids": ids.tolist(), "document_lengths": lengths}
        lines.append(json.dumps(row, separators=(",", ":")) + "\n")
    _save(path, lambda part: _write_text(part, "".join(lines)))


def _write_parquet(path: Path, rows: list[tuple[Ids, list[int]]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    kind = pa.list_(pa.int32())
    table = pa.table(
        {
            "input_ids": pa.array([ids for ids, _ in rows], kind),
            "document_lengths": pa.array([lengths for _, lengths in rows], kind),
        }
    )
    # A row group of one row: a row of a million ids is read without its neighbours.
    parquet.write_table(table, path, row_group_size=1, compression="zstd")


def _resume(options: PackOptions) -> Progress:
    file = options.output / "manifest.json"
    leftovers = [p.name for p in options.output.glob("rows-*")]
    if not file.exists():
        if leftovers:
            raise ValueError(f"{options.output} holds {leftovers[:3]} but no manifest; clear it")
        return Progress()
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        mine = (manifest["fingerprint"], manifest["version"]) == (options.fingerprint, _VERSION)
        progress = Progress(**manifest["progress"])
    except (ValueError, KeyError, TypeError) as fault:
        raise ValueError(
            f"{file} is damaged ({fault}); clear the folder and begin again"
        ) from fault
    if not mine and not leftovers and not progress.done:
        file.unlink()  # a run that came to nothing
        return Progress()
    if not mine:
        raise ValueError(
            f"{options.output} holds rows of other sources or settings (length "
            f"{manifest['length']}, {manifest['format']}, {manifest['tokenizer']}); choose another "
            "folder or clear it"
        )
    for name, _ in progress.shards:
        if not (options.output / name).exists():
            raise ValueError(
                f"{options.output}: {name} was written and is gone; put it back, or clear the "
                "folder and begin again"
            )
    return progress


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second run out of a folder, until this one ends however it does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise LongVILAError(
                f"another run is at work in {folder}; wait for it, or choose another folder"
            ) from fault
        except OSError as fault:
            _LOG.warning("%s: no locks here (%s); nothing keeps a second run out", folder, fault)
        yield
    finally:
        os.close(handle)


def pack_text(
    options: PackOptions, *, report: Callable[[Progress], None] | None = None
) -> Progress:
    """Pack text into rows; goes on where an earlier run of equal options ended.

    Returns:
        Counts and shards of the whole.

    Raises:
        ImportError: If parquet is to be written and pyarrow is not installed.
        ValueError: If the folder holds rows of other options, a field is missing, or the tokenizer
            has no end token.
        LongVILAError: If the folder cannot be written, or another run is at work in it.
    """
    # Now, not when the first shard is full.
    if options.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(
            "writing parquet needs pyarrow: pip install 'longvila[train]', or take the format jsonl"
        )
    output = options.output.resolve()
    for source in options.sources:
        if Path(os.path.expanduser(source)).resolve() in (output, *output.parents):
            raise ValueError(
                f"{options.output} lies in {source}: what is written there would be read as text; "
                "choose a folder beside it"
            )
    options.output.mkdir(parents=True, exist_ok=True)
    with _alone(options.output):
        return _pack(options, report)


def _pack(options: PackOptions, report: Callable[[Progress], None] | None) -> Progress:
    progress = _resume(options)
    if progress.done:
        return progress
    open_text.cache_clear()  # files may have changed since an earlier run of this process
    pieces = _pieces(options)
    rows: list[tuple[Ids, list[int]]] = []
    parts: list[Ids] = []
    filled = 0

    def flush(last: bool) -> None:
        try:
            if rows:
                name = f"rows-{len(progress.shards):05d}{_SUFFIX[options.format]}"
                _write_shard(options, options.output / name, rows)
                progress.shards.append([name, len(rows)])
                rows.clear()
            progress.done = last
            _write_manifest(options, progress)
        except OSError as fault:
            raise LongVILAError(
                f"{options.output} cannot be written ({fault}); what is there is whole: make "
                "room, and the same command goes on"
            ) from fault
        if report is not None and (progress.rows or last):
            report(progress.copy())

    if not (options.output / "manifest.json").exists():
        flush(False)  # or a run that is killed after its first shard would not know it for its own
    skip, begun = progress.document, progress.token
    for documents in _tokenised(options, pieces[progress.piece :]):
        for ids in islice(documents, skip, None):
            if len(ids) < options.min_tokens:
                progress.counts["short"] += 1
                progress.document += 1
                continue
            if begun == 0:
                progress.seen(len(ids))
            start = begun
            while start < len(ids):
                part = ids[start : start + options.length - filled]
                parts.append(part)
                filled += len(part)
                start += len(part)
                if filled == options.length:
                    rows.append((np.concatenate(parts), [len(each) for each in parts]))
                    progress.rows += 1
                    parts, filled = [], 0
                    if start < len(ids):
                        progress.counts["cuts"] += 1
                    if len(rows) == options.shard_rows:
                        # The state says what comes after this row, inside a document or between.
                        progress.token = start
                        if start == len(ids):
                            progress.document, progress.token = progress.document + 1, 0
                        flush(False)
                        if start == len(ids):
                            progress.document -= 1
            begun = progress.token = 0
            progress.document += 1
        skip = 0
        progress.piece, progress.document = progress.piece + 1, 0
    if filled:
        progress.counts["tail"] = filled
        if options.keep_tail:
            rows.append((np.concatenate(parts), [len(each) for each in parts]))
            progress.rows += 1
    flush(True)
    return progress
