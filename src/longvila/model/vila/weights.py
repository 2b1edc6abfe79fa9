"""Tensors by name from weight files, and a safetensors writer that holds one tensor at a time.

Reading: an index (``*.index.json``) or a single file, safetensors before .bin. Names, shapes and
types come from the headers; data is mapped from the file and read when asked for.

Writing: `plan_shards` deals names to files by size alone; `write_shards` then writes each file's
header and appends one tensor after the other. Memory is that of the largest tensor, whatever the
size of the model; bits are copied, not converted.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longvila.errors import CheckpointError
from longvila.model.vila.layout import read_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_STEMS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Args:
        name: Its name there.
        shape: Its shape.
        dtype: Its type.
        file: The file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """The weights of one folder.

    Args:
        folder: Holds ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.

    Raises:
        CheckpointError: If there are none, or an index names a file or a tensor that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[Path, Any] = {}
        files, promised = _weight_files(folder)
        for file in files:
            self.tensors.update(self._list(file))
        lost = sorted(set(promised) - set(self.tensors))
        if lost:
            raise CheckpointError(f"{folder}: the index names tensors no shard has: {lost[:5]}")

    def _list(self, file: Path) -> dict[str, StoredTensor]:
        handle = self._handle(file)
        found = {}
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            if isinstance(handle, dict):
                shape, dtype = tuple(handle[name].shape), handle[name].dtype
            else:
                entry = handle.get_slice(name)
                code = entry.get_dtype()
                if code not in _DTYPES:
                    raise CheckpointError(f"{file}: tensor {name} has the type {code}, not handled")
                shape, dtype = tuple(entry.get_shape()), _DTYPES[code]
            found[name] = StoredTensor(name, shape, dtype, file)
        return found

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            if file.suffix == ".safetensors":
                try:
                    self._open[file] = safe_open(file, framework="pt", device="cpu")
                except SafetensorError as fault:
                    raise CheckpointError(
                        f"{file}: damaged or cut off ({fault}); fetch or copy it again"
                    ) from fault
            else:
                self._open[file] = load_bin(file)
        return self._open[file]

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        handle = self._handle(self.tensors[name].file)
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def lazy(self, name: str) -> Any:
        """Return what transformers' loader takes for a tensor it reads later."""
        handle = self._handle(self.tensors[name].file)
        return handle[name] if isinstance(handle, dict) else handle.get_slice(name)


def load_bin(file: Path) -> dict[str, Tensor]:
    """Read a file of torch tensors, mapped where its format allows; nothing in it is executed.

    Args:
        file: A .bin file.

    Returns:
        Tensors by name.

    Raises:
        CheckpointError: If it is damaged or holds anything but tensors.
    """
    with file.open("rb") as stream:
        mapped = stream.read(2) == b"PK"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as fault:
        reason = str(fault).partition("\n")[0]
        raise CheckpointError(f"{file}: cannot be read as named tensors ({reason})") from fault
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} holds something other than named tensors")
    return state


def _weight_files(folder: Path) -> tuple[list[Path], Iterable[str]]:
    for stem in _STEMS:
        index = folder / f"{stem}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map", {})
            files = [folder / name for name in sorted(set(weight_map.values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise CheckpointError(f"{folder} lacks the shards {missing} named by {index.name}")
            return files, weight_map
        if (folder / stem).is_file():
            return [folder / stem], ()
    raise CheckpointError(f"{folder} has none of {', '.join(_STEMS)} (whole or with an index)")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Args:
        name: Its name in the new file.
        shape: Its shape.
        dtype: Its type.
        read: Returns its data.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(entries: Iterable[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Deal tensors to files in order, each file as full as its limit allows.

    Args:
        entries: What is to be written.
        max_shard_bytes: Limit of a file; a single larger tensor gets a file of its own.

    Returns:
        The tensors of each file.
    """
    shards: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not shards or size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def write_shards(folder: Path, entries: Iterable[Entry], max_shard_bytes: int) -> list[Path]:
    """Write tensors as ``model.safetensors``, or as shards with their index.

    Args:
        folder: Where to; must exist.
        entries: What is to be written.
        max_shard_bytes: Limit of a file.

    Returns:
        The files with weights.

    Memory:
        The largest tensor.
    """
    shards = plan_shards(entries, max_shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return [folder / "model.safetensors"]
    files, weight_map = [], {}
    for i, shard in enumerate(shards):
        files.append(folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors")
        write_safetensors(files[-1], shard)
        weight_map.update({entry.name: files[-1].name for entry in shard})
    total = sum(entry.num_bytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def write_safetensors(path: Path, entries: Iterable[Entry]) -> None:
    """Write one safetensors file, a tensor at a time.

    Args:
        path: The file.
        entries: Its tensors, in order of their data.

    Raises:
        CheckpointError: If a tensor is not what its entry says.
    """
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for entry in entries:
            tensor = entry.read()
            if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
                raise CheckpointError(
                    f"{entry.name} was announced as {entry.dtype} {entry.shape} but is "
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                )
            flat = tensor.detach().contiguous().reshape(-1)
            if flat.numel():
                stream.write(flat.view(torch.uint8).numpy().data)


def read_entries(files: WeightFiles, names: Mapping[str, str]) -> list[Entry]:
    """Make entries that copy tensors of a folder under new names.

    Args:
        files: Where they are.
        names: New name of each tensor.

    Returns:
        Entries in the order of the names.
    """

    def entry(old: str, new: str) -> Entry:
        stored = files.tensors[old]
        return Entry(new, stored.shape, stored.dtype, lambda: files.read(old))

    return [entry(old, new) for old, new in names.items()]
