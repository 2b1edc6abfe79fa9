"""Datasets by name: adapters, and files that list datasets and mixtures.

    datasets:
      clips: {adapter: llava, path: clips.jsonl, media_dir: videos}
      text:  {adapter: openorca, path: [part-0.parquet, part-1.parquet]}
    mixtures:
      sft: clips*2 + text

Paths in such a file are relative to it; ``hf:`` names are as they are. Unknown keys are errors.

``style: plain`` (or ``chat``) says how a set is read whatever the stage says. Pictures with text
and interleaved documents (``coyo``, ``mmc4``) are plain by themselves, as in the original, so that
pre-training mixes them with conversations.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longvila.data.datasets import captions, llava, questions
from longvila.data.datasets.base import Adapter, Dataset, SchemaError
from longvila.data.records import open_records
from longvila.data.yaml_text import load_yaml

#: Every adapter by name.
ADAPTERS: Mapping[str, Adapter] = {
    adapter.name: adapter for adapter in (*llava.ADAPTERS, *captions.ADAPTERS, *questions.ADAPTERS)
}
_KEYS = {"adapter", "path", "media_dir", "under", "options", "style"}

__all__ = ["ADAPTERS", "Adapter", "DataFile", "Dataset", "SchemaError", "open_dataset", "read_file"]


def open_dataset(
    adapter: str | Adapter,
    source: Any,
    *,
    name: str | None = None,
    media_dir: str | Path | None = None,
    under: str | None = None,
    options: Mapping[str, Any] | None = None,
    style: Any = None,
) -> Dataset:
    """Open a dataset.

    Args:
        adapter: An adapter, or the name of one.
        source: What `longvila.data.records.open_records` takes.
        name: Name for mixtures and reports; None for the adapter's.
        media_dir: Folder that media paths are relative to.
        under: For a JSON mapping, the key below which records are; None for the adapter's.
        options: Options of the adapter.
        style: ``chat`` or ``plain``; None for the adapter's own, or else the stage's.

    Returns:
        The dataset.

    Raises:
        ValueError: If there is no such adapter or option.
    """
    if not isinstance(adapter, Adapter):
        if adapter not in ADAPTERS:
            near = difflib.get_close_matches(str(adapter), ADAPTERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"no adapter {adapter!r}{hint}; there are {', '.join(sorted(ADAPTERS))}"
            )
        adapter = ADAPTERS[adapter]
    if adapter.under is not None and under is None and isinstance(source, str | Path):
        under = adapter.under
    records = open_records(source, under=under)
    return Dataset(
        name or adapter.name, records, adapter, media_dir=media_dir, options=options, style=style
    )


@dataclass(frozen=True)
class DataFile:
    """What a file lists: datasets and named mixtures."""

    datasets: dict[str, Dataset]
    mixtures: dict[str, str]


def read_file(path: str | Path) -> DataFile:
    """Read a YAML file of datasets and mixtures.

    Returns:
        The datasets, opened, and the mixtures.

    Raises:
        ValueError: If it is no YAML, a key is unknown or one that is needed is missing.
    """
    path = Path(path)
    try:
        content = load_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise ValueError(f"{path}: is not a YAML file: {fault}") from fault
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected the keys datasets and (optional) mixtures, got a "
            f"{type(content).__name__}"
        )
    listed, mixtures = content.get("datasets"), content.get("mixtures") or {}
    if set(content) - {"datasets", "mixtures"} or not listed:
        raise ValueError(
            f"{path}: expected the keys datasets and (optional) mixtures, got "
            f"{sorted(map(str, content))}"
        )
    if not isinstance(listed, dict) or not isinstance(mixtures, dict):
        raise ValueError(f"{path}: datasets and mixtures are mappings, each entry under its name")
    for name, text in mixtures.items():
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, mixture {name!r}: expected a text like a*2 + b, got {text!r}"
            )
    datasets = {}
    for name, entry in listed.items():
        where = f"{path}, dataset {name!r}"
        if re.search(r"[\s*+]", str(name)):
            raise ValueError(f"{where}: mixtures cannot name it; no spaces, * and + in names")
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected {{adapter: ..., path: ...}}, got {entry!r}")
        if set(entry) - _KEYS or not {"adapter", "path"} <= set(entry):
            raise ValueError(
                f"{where}: keys are {sorted(_KEYS)}, adapter and path are needed; got "
                f"{sorted(map(str, entry))}"
            )
        try:
            datasets[str(name)] = _open(str(name), entry, path.parent)
        except (TypeError, ValueError) as fault:
            raise ValueError(f"{where}: {fault}") from fault
    return DataFile(datasets, mixtures)


def _open(name: str, entry: Mapping[str, Any], folder: Path) -> Dataset:
    """Open what a file lists."""
    paths, media_dir = entry["path"], entry.get("media_dir")
    paths = paths if isinstance(paths, list) else [paths]
    if not paths or not all(isinstance(each, str) and each for each in (*paths, media_dir or ".")):
        raise ValueError(
            f"path is a text or a list of them, media_dir a text; got {paths} and {media_dir!r}"
        )
    if not isinstance(entry.get("options") or {}, dict):
        raise ValueError(f"options are a mapping, got {entry['options']!r}")
    found = [
        each if each.startswith("hf:") else folder / Path(os.path.expanduser(each))
        for each in paths
    ]
    return open_dataset(
        entry["adapter"],
        found[0] if len(found) == 1 else found,
        name=name,
        media_dir=None if media_dir is None else folder / Path(os.path.expanduser(media_dir)),
        under=entry.get("under"),
        options=entry.get("options"),
        style=entry.get("style"),
    )
