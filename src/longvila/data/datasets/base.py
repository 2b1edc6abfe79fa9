"""What an adapter is: a published schema, and the way from a record to a sample.

An adapter names the fields it needs and those it knows of, says where the schema was read, and
refuses a record that lacks a field it needs. Where the schema could not be read at its source
(``verified`` is False), it also refuses fields it does not know, since then nobody can say what
they mean; where it could, unknown fields are later additions and are ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Number
from pathlib import Path
from typing import Any, get_args

from longvila.data.records import Record, Records
from longvila.data.sample import Kind, Media, Sample, Style, Turn
from longvila.errors import LongVILAError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


class SchemaError(LongVILAError, ValueError):
    """A record is not of the shape its adapter knows; the message names fields and record."""


@dataclass(frozen=True)
class Context:
    """What an adapter may need beside the record.

    Attributes:
        dataset: Name of the dataset, for messages.
        index: Number of the record.
        media_dir: Folder that media paths are relative to; None takes paths as they are.
        options: Options of the adapter.
    """

    dataset: str
    index: int
    media_dir: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def media(self, kind: Kind, source: Any, **times: Any) -> Media:
        """Return a medium, its path completed."""
        if isinstance(source, Mapping) and ("bytes" in source or "path" in source):
            source = source.get("bytes") or source.get("path")
        # Before it is completed: an empty name would be the folder of all media.
        if source is None or (isinstance(source, str) and not source.strip()):
            raise self.error(f"names no {kind}")
        if isinstance(source, Number | Mapping):
            raise self.error(
                f"names {kind} {source!r}; expected a path, an address or bytes, and no field, or "
                "null, where there is none"
            )
        if isinstance(source, str | os.PathLike) and self.media_dir is not None:
            text = os.fspath(source)
            if not _ADDRESS.match(text) and not os.path.isabs(text):
                source = str(self.media_dir / text)
        return Media(kind, source, **times)

    def error(self, what: str) -> SchemaError:
        """Return an error that names the record."""
        return SchemaError(f"{self.dataset}, record {self.index}: {what}")


Convert = Callable[[Record, Context], Sample]


@dataclass(frozen=True)
class Adapter:
    """One kind of record.

    Attributes:
        name: What users choose it by.
        about: What the set is, in a line.
        required: Fields a record must have.
        optional: Fields it may have.
        convert: Makes the sample.
        verified: Whether the schema was read where its authors publish it.
        source: Where and how the schema was read.
        under: For a JSON mapping, the key below which records are.
        options: Names of the options it takes.
        style: How its samples are always read; None for what the stage says.
    """

    name: str
    about: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Convert
    verified: bool
    source: str
    under: str | None = None
    options: tuple[str, ...] = ()
    style: Style | None = None

    def __call__(self, record: Record, context: Context) -> Sample:
        """Make a sample of a record.

        Raises:
            SchemaError: If the record is not of the adapter's shape.
        """
        missing = [name for name in self.required if name not in record]
        if missing:
            raise context.error(
                f"lacks {missing}; the adapter {self.name!r} needs {list(self.required)}, the "
                f"record has {sorted(record)}"
            )
        if not self.verified:
            known = {*self.required, *self.optional, "__key__"}
            unknown = sorted(set(record) - known)
            if unknown:
                raise context.error(
                    f"has fields {unknown} that the adapter {self.name!r} does not know; its "
                    "schema could not be checked at its source, so they are not guessed at. Drop "
                    "them, or write an adapter"
                )
        try:
            return self.convert(record, context)
        except SchemaError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as fault:
            raise context.error(
                f"is not what the adapter {self.name!r} reads: {type(fault).__name__}: {fault}"
            ) from fault


class Dataset:
    """Records seen through an adapter.

    Args:
        name: Name for mixtures and reports.
        records: The records.
        adapter: The adapter.
        media_dir: Folder that media paths are relative to.
        options: Options of the adapter.
        style: How its samples are read, ``chat`` or ``plain``; None for the adapter's style, or
            else the stage's.

    Raises:
        ValueError: If the adapter has no such option, or there is no such style.
    """

    def __init__(
        self,
        name: str,
        records: Records,
        adapter: Adapter,
        *,
        media_dir: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        style: Style | None = None,
    ) -> None:
        self.name, self.records, self.adapter = name, records, adapter
        self.media_dir = None if media_dir is None else Path(media_dir)
        self.options = dict(options or {})
        if style not in (None, *get_args(Style)):
            raise ValueError(f"dataset {name!r}: style must be chat or plain, got {style!r}")
        self.style = style or adapter.style
        unknown = sorted(set(self.options) - set(adapter.options))
        if unknown:
            raise ValueError(
                f"the adapter {adapter.name!r} has no options {unknown}; it takes "
                f"{sorted(adapter.options)}"
            )

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Return one sample."""
        context = Context(self.name, index, self.media_dir, self.options)
        sample = self.adapter(self.records[index], context)
        return sample if self.style is None else replace(sample, style=self.style)


def conversation(
    record_id: Any, context: Context, *turns: tuple[str, Any], system: str | None = None
) -> Sample:
    """Make a sample of turns given as (role, parts or text)."""
    made = [Turn("system", (system,))] if system else []
    for role, parts in turns:
        made.append(Turn(role, (parts,) if isinstance(parts, str) else tuple(parts)))  # type: ignore[arg-type]
    try:
        return Sample(str(record_id), context.dataset, tuple(made))
    except ValueError as fault:
        raise context.error(str(fault)) from fault


def caption(record_id: Any, context: Context, media: Media, text: Any) -> Sample:
    """Make a sample of one medium and its caption.

    The question is the option ``question``, or a plain request; the ``plain`` style leaves it out.
    """
    if not isinstance(text, str) or not text.strip():
        raise context.error(f"has no caption, got {text!r}")
    default = f"Describe the {media.kind}."
    question = context.options.get("question") or default
    return conversation(record_id, context, ("user", (media, question)), ("assistant", text))


def lettered(choices: Any) -> str:
    """Write choices one a line behind letters."""
    return "\n".join(f"{letter(i)}. {choice}" for i, choice in enumerate(choices))


def letter(index: int) -> str:
    """Return A for 0, B for 1, ..."""
    return chr(ord("A") + index)
