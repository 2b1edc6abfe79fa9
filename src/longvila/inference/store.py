"""A prompt that was read, on disk: one safetensors file a rank, and what they belong to.

    index.json                            sizes, who holds which tokens, the key
    cache-00000-of-00002.safetensors      keys.0 values.0 sums.0 ...   (tokens, K, D) of rank 0
    cache-00001-of-00002.safetensors      of rank 1

Keys carry their positions, so which rank holds a token does not matter: a cache saved by any number
of ranks is read by any other. Each rank reads an equal stretch of the sequence, slice by slice,
straight to its device.

**The key** says what the numbers depend on: the model (its configuration and a digest of some
thousand of its weights), the precision, the tokens, and for media of which the caller says so their
files and frames. `load_cache` compares it with what the caller has now and names every difference.
A file is told by its size and a digest of its beginning, middle and end, so that a copy is the same
file and a re-encoded one is not; a folder by those of its files, and their names.

**Sums.** Beside the keys and values of each token lies the sum of their bits, eight bytes at a
time, and the index has digests of the rest: a bit that flips on a disk or in a copy is found when
it is read, and told to all ranks. It costs eight bytes a token and layer, and one more pass
over what was read where it is then, on a CPU core some 10 GB a second.

Files are written one tensor after the other, never a shard at a time in memory; ``index.json``
comes last, so that a folder without it is known to be unfinished.

It stores caches of one row. It does not compress.

Letters: S tokens, K kv heads, D head dim.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from longvila.errors import LongVILAError
from longvila.inference.cache import ShardedCache
from longvila.inference.paging import Pager
from longvila.inference.positions import TextRuns
from longvila.inference.together import Result, together
from longvila.sp.layout import SequenceLayout, split_evenly
from longvila.sp.mesh import SPMesh

INDEX = "index.json"
_FORMAT = 1
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64",
}  # fmt: skip
_SAMPLED_WEIGHTS = 8
_DIGEST_BYTES = 1 << 20
_PICTURE_BYTES = 1 << 14
_WRITE_TOKENS = 65536
#: What an index holds beside its format.
_ENTRIES = ("tokens", "layers", "bytes", "intervals", "text_runs", "key", "extra")
#: Entries of a configuration that change nothing about what a model computes.
_VOLATILE = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"}


class StoreError(LongVILAError, ValueError):
    """A stored prompt is not there, not whole, or of something else; the message says what."""


# ---- keys ------------------------------------------------------------------------------------


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _stable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(k): _stable(v)
            for k, v in value.items()
            if k not in _VOLATILE and not str(k).startswith("_attn")
        }
    if isinstance(value, list | tuple):
        return [_stable(each) for each in value]
    return value if isinstance(value, int | float | str | bool | None) else str(value)


@torch.no_grad()
def model_key(model: PreTrainedModel) -> dict[str, Any]:
    """Return what tells a model from another, without reading all of it.

    Args:
        model: The model.

    Returns:
        Its type, precision, a digest of its configuration, and one of a few weights of every
        parameter: another training of the same shape differs in all of them.
    """
    config = json.dumps(_stable(model.config.to_dict()), sort_keys=True)
    samples = []
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        step = max(1, flat.numel() // _SAMPLED_WEIGHTS)
        samples.append(flat[::step][:_SAMPLED_WEIGHTS].to(torch.float64))
    weights = torch.cat(samples).cpu().numpy().tobytes() if samples else b""
    return {
        "type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "configuration": _digest(config.encode()),
        "weights": _digest(weights),
    }


def file_key(source: Any) -> dict[str, Any] | None:
    """Return what tells a file (or a folder of pictures) from another.

    Args:
        source: As `longvila.media.video.open_video` takes it.

    Returns:
        Size and digest; None for what is no file of this machine, which cannot be compared.
    """
    try:
        path = Path(os.path.expanduser(str(source).removeprefix("file://")))
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.is_file())
            names = [(p.name, p.stat().st_size) for p in files]
            # Pictures that are not compressed have one size, whatever they show.
            parts = b"".join(
                _samples(p, n, _PICTURE_BYTES) for p, (_, n) in zip(files, names, strict=True)
            )
            return {
                "bytes": sum(n for _, n in names),
                "digest": _digest(repr(names).encode()),
                "content": _digest(parts),
            }
        if not path.is_file():
            return None
    except OSError:  # a data: address is longer than a path may be
        return None
    size = path.stat().st_size
    return {"bytes": size, "digest": _digest(_samples(path, size, _DIGEST_BYTES))}


def _samples(path: Path, size: int, each: int) -> bytes:
    """Read so many bytes from the beginning, the middle and the end of a file."""
    with path.open("rb") as file:
        parts = []
        for start in (0, size // 2, max(0, size - each)):
            file.seek(start)
            parts.append(file.read(each))
    return b"".join(parts)


def differences(stored: Any, now: Any, where: str = "") -> Iterator[str]:
    """Name the entries in which two keys differ; entries that one lacks are not compared."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        for name in sorted(set(stored) & set(now)):
            yield from differences(stored[name], now[name], f"{where}.{name}" if where else name)
    elif isinstance(stored, list) and isinstance(now, list) and len(stored) == len(now):
        for number, pair in enumerate(zip(stored, now, strict=True)):
            yield from differences(*pair, f"{where}[{number}]")
    elif stored != now and stored is not None and now is not None:
        yield f"{where}: {_short(stored)} there, {_short(now)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- files -----------------------------------------------------------------------------------


def _check(index: Mapping[str, Any]) -> str:
    """A digest of an index without it, as JSON gives it back."""
    plain = {**json.loads(json.dumps(index)), "check": None}
    return _digest(json.dumps(plain, sort_keys=True).encode())


def _sums(keys: Tensor, values: Tensor) -> Tensor:
    """One integer of each token, ``(S,)`` int64, which any flipped bit of the token's changes.

    Args:
        keys: ``(S, K, D)``.
        values: The same.
    """
    found = [torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device) for _ in range(2)]
    for whole, out in zip((keys, values), found, strict=True):
        # In stretches, as they may have to be copied.
        for rows, sums in zip(whole.split(_WRITE_TOKENS), out.split(_WRITE_TOKENS), strict=True):
            flat = rows.reshape(rows.shape[0], -1).contiguous().view(torch.uint8)
            wide = flat if flat.shape[1] % 8 else flat.view(torch.int64)
            torch.sum(wide, 1, dtype=torch.int64, out=sums)
    return found[0] + 3 * found[1]


def _digests(cache: ShardedCache) -> dict[str, str]:
    """Digests of what a cache holds beside keys and values."""
    found = {"input_ids": cache.input_ids, "logits": cache.logits}
    return {
        name: _digest(x[0].contiguous().cpu().view(torch.uint8).numpy().tobytes())
        for name, x in found.items()
        if x is not None
    }


def _shard_name(rank: int, ranks: int) -> str:
    return f"cache-{rank:05d}-of-{ranks:05d}.safetensors"


def _write_tensors(path: Path, tensors: list[tuple[str, list[Tensor]]]) -> int:
    """Write a safetensors file; each tensor is given in parts along its first dimension."""
    header: dict[str, Any] = {}
    offset = 0
    for name, parts in tensors:
        rows = sum(part.shape[0] for part in parts)
        size = sum(part.numel() for part in parts) * parts[0].element_size()
        header[name] = {
            "dtype": _DTYPES[parts[0].dtype],
            "shape": [rows, *parts[0].shape[1:]],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    unfinished = path.with_suffix(".part")
    try:
        with unfinished.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)))
            file.write(encoded)
            for _, parts in tensors:
                for part in parts:
                    _write_rows(file, part)
        os.replace(unfinished, path)
    except OSError as fault:
        unfinished.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise StoreError(
            f"{path.parent} cannot be written ({fault.strerror}): {offset / 2**20:,.1f} MiB are "
            f"needed, that disk has {free / 2**20:,.1f} MiB left; make room, or choose another"
        ) from fault
    return 8 + len(encoded) + offset


def _write_rows(file: BinaryIO, x: Tensor) -> None:
    for rows in x.split(_WRITE_TOKENS):
        if rows.numel():
            file.write(rows.contiguous().cpu().view(torch.uint8).numpy().data)


def save_cache(
    cache: ShardedCache,
    path: str | Path,
    key: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a cache of one row; every rank of its group must call it.

    Args:
        cache: What was read.
        path: Folder to write to; made if missing.
        key: What it depends on; anything JSON takes, compared when it is loaded.
        extra: What else to keep beside it; not compared.
        overwrite: Whether a stored prompt that is there may be replaced.

    Returns:
        The folder.

    Raises:
        StoreError: If the folder holds something already, or cannot be written to; on all ranks,
            whichever of them finds it full.
        ValueError: If the cache has several rows, or was filled without ids.

    Comm: Four all-gathers of error messages, one of sizes.

    Memory: ``2 * 65536 * K * D`` elements on the host.
    """
    folder = Path(path)
    group = cache.group if cache.num_ranks > 1 else None
    if cache.pager is not None:
        cache.pager.settle()
    layers = [layer.everything() for layer in cache.shards]
    first = cache.rank == 0

    def look() -> None:
        if cache.input_ids is None or any(x[0].shape[0] > 1 for parts in layers for x in parts):
            raise ValueError("only a cache of one row, filled by an engine, can be stored")
        if (folder / INDEX).exists() and not overwrite:
            raise StoreError(f"{folder} holds a stored prompt already; delete it or choose another")
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file; a stored prompt is a folder")

    def clear() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if first:
            (folder / INDEX).unlink(missing_ok=True)
            for old in folder.glob("cache-*.safetensors"):
                old.unlink()

    def write() -> int:
        tensors: list[tuple[str, list[Tensor]]] = []
        if first:
            assert cache.input_ids is not None
            tensors.append(("input_ids", [cache.input_ids[0]]))
            if cache.logits is not None:
                tensors.append(("logits", [cache.logits[0]]))
        if cache.held[cache.rank]:
            for number, parts in enumerate(layers):
                tensors.append((f"keys.{number}", [keys[0] for keys, _ in parts]))
                tensors.append((f"values.{number}", [values[0] for _, values in parts]))
                tensors.append((f"sums.{number}", [_sums(k[0], v[0]) for k, v in parts]))
        if not tensors:
            return 0
        return _write_tensors(folder / _shard_name(cache.rank, cache.num_ranks), tensors)

    _together(look, group)  # nobody writes before everybody looked
    _together(clear, group)
    sizes = [_together(write, group)]
    if group is not None:
        found: list[Any] = [None] * cache.num_ranks
        dist.all_gather_object(found, sizes[0], group=group)
        sizes = found

    def finish() -> None:
        if not first:
            return
        index = {
            "format": _FORMAT,
            "tokens": cache.get_seq_length(),
            "layers": len(layers),
            "bytes": sizes,
            "intervals": [cache.intervals(rank) for rank in range(cache.num_ranks)],
            "text_runs": None if cache.text_runs is None else cache.text_runs.runs,
            "key": key,
            "extra": extra or {},
            "digests": _digests(cache),
        }
        index["check"] = _check(index)
        part = folder / f"{INDEX}.part"
        part.write_text(json.dumps(index, indent=1), encoding="utf-8")
        os.replace(part, folder / INDEX)

    _together(finish, group)
    return folder


def _together(work: Callable[[], Result], group: dist.ProcessGroup | None) -> Result:
    """Do something on all ranks that share a prompt; None is one process alone."""
    return work() if group is None else together(work, group, raises=StoreError)


def is_stored(path: str | Path) -> bool:
    """Whether a path is the folder of a stored prompt."""
    try:
        return (Path(path) / INDEX).is_file()
    except OSError:  # a data: address is longer than a path may be
        return False


def begins_stored(path: str | Path) -> bool:
    """Whether a path is a folder whose stored prompt was not written to the end."""
    try:
        return Path(path).is_dir() and not is_stored(path) and any(Path(path).glob("cache-*-of-*"))
    except OSError:
        return False


def read_index(path: str | Path) -> dict[str, Any]:
    """Return what a stored prompt says of itself: ``tokens``, ``key``, ``extra`` and more.

    Args:
        path: Its folder.

    Raises:
        StoreError: If there is none, it is unfinished, of another format, or files are missing.
    """
    folder = Path(path)
    if not is_stored(folder):
        why = "was not written to the end" if begins_stored(folder) else f"has no {INDEX}"
        raise StoreError(f"{folder} is no stored prompt: it {why}")
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index.get("format")
    except (ValueError, AttributeError) as fault:
        raise StoreError(f"{folder} is no stored prompt: its {INDEX} is another's") from fault
    if index.get("format") != _FORMAT:
        raise StoreError(
            f"{folder} has format {index.get('format')!r}, this version reads {_FORMAT}; make it "
            "again"
        )
    # Those of older versions have none.
    if index.get("check", ...) not in (..., _check(index)) or any(
        name not in index for name in _ENTRIES
    ):
        raise StoreError(f"{folder / INDEX} is damaged or was changed; make it again")
    ranks = len(index["bytes"])
    for rank, size in enumerate(index["bytes"]):
        file = folder / _shard_name(rank, ranks)
        there = file.stat().st_size if file.exists() else 0
        if there != size:
            raise StoreError(f"{file} has {there} bytes instead of {size}; make it again")
    return index


def load_cache(
    path: str | Path,
    key: Mapping[str, Any],
    *,
    mesh: SPMesh | None = None,
    device: torch.device | str = "cpu",
    pager: Pager | None = None,
) -> ShardedCache:
    """Read a stored prompt; on a mesh, every rank its part.

    Args:
        path: Its folder.
        key: What the caller has, as for `save_cache`; entries that it lacks are not compared.
        mesh: The ranks that share it; any number.
        device: Where it goes.
        pager: Takes what exceeds its budget to the host.

    Returns:
        The cache.

    Raises:
        StoreError: If it is not there, not whole, damaged, or of something else; every difference
            is named. On all ranks, whichever of them finds it.

    Comm: One all-gather of error messages.

    Memory: The rank's share, on the device.
    """
    folder = Path(path)

    def read() -> ShardedCache:
        index = read_index(folder)
        now = json.loads(json.dumps(key))  # tuples and names that are numbers, as they were stored
        if unlike := list(differences(index["key"], now)):
            raise StoreError(f"{folder} was made of something else: " + "; ".join(unlike))
        try:
            return _read_cache(folder, index, mesh, device, pager)
        except (SafetensorError, KeyError, TypeError, IndexError) as fault:
            raise StoreError(f"{folder} is damaged ({fault}); make it again") from fault

    return _together(read, mesh.sp_group if mesh is not None and mesh.sp_size > 1 else None)


def _read_cache(
    folder: Path,
    index: dict[str, Any],
    mesh: SPMesh | None,
    device: torch.device | str,
    pager: Pager | None,
) -> ShardedCache:
    cache = ShardedCache(index["layers"], mesh=mesh, pager=pager)
    tokens, ranks = index["tokens"], len(index["bytes"])
    low, high = split_evenly(tokens, cache.num_ranks, cache.rank)
    files = [
        safe_open(folder / _shard_name(rank, ranks), framework="pt") if size else None
        for rank, size in enumerate(index["bytes"])
    ]
    pieces: list[tuple[Any, int, int, int]] = []  # file, its first row, its last, our first row
    for file, intervals in zip(files, index["intervals"], strict=True):
        edges = [0, *accumulate(stop - start for start, stop in intervals)]
        for (start, stop), row in zip(intervals, edges, strict=False):
            a, b = max(start, low), min(stop, high)
            if a < b:
                pieces.append((file, row + a - start, row + b - start, a - low))
    layout = SequenceLayout((tokens,), cache.num_ranks, 1, "contiguous")
    flipped = torch.zeros(high - low, dtype=torch.bool, device=device)
    with cache.receiving(layout, tokens):
        for layer in range(index["layers"]):
            both = [
                _read_rows(pieces, f"{name}.{layer}", high - low, device)[None].transpose(1, 2)
                for name in ("keys", "values")
            ]
            if high > low:
                # Stored prompts of older versions have no sums.
                if all(f"sums.{layer}" in file.keys() for file, *_ in pieces):  # noqa: SIM118
                    there = _read_rows(pieces, f"sums.{layer}", high - low, device)
                    flipped |= there != _sums(*(x[0].transpose(0, 1) for x in both))
                cache.update(both[0], both[1], layer)
    if damaged := int(flipped.sum()):
        raise StoreError(
            f"{folder} is damaged: {damaged} of its {tokens} tokens are not what was written; copy "
            "it again, or make it again"
        )
    assert files[0] is not None
    cache.input_ids = files[0].get_tensor("input_ids")[None].to(device)
    if "logits" in files[0].keys():  # noqa: SIM118  # a file, not a mapping
        cache.logits = files[0].get_tensor("logits")[None].to(device)
    if "digests" in index and _digests(cache) != index["digests"]:
        raise StoreError(
            f"{folder} is damaged: its ids or logits are not what was written; copy it again, or "
            "make it again"
        )
    if index["text_runs"] is not None:
        cache.text_runs = TextRuns(tuple(tuple(run) for run in index["text_runs"]))
    return cache


def _read_rows(
    pieces: list[tuple[Any, int, int, int]], name: str, rows: int, device: torch.device | str
) -> Tensor:
    """``(rows, ...)`` of one tensor, from the slices that hold its rows."""
    out: Tensor | None = None
    for file, first, last, row in pieces:
        part = file.get_slice(name)[first:last]
        if out is None:
            out = torch.empty((rows, *part.shape[1:]), dtype=part.dtype, device=device)
        out[row : row + last - first] = part.to(device)
    if out is None:
        return torch.empty(0, 0, 0, device=device)
    return out
