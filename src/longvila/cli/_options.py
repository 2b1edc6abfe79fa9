"""How every verb reads its command line: tyro over a frozen dataclass, shown alike.

An option that may be left out is shown as what it takes (``--frames INT``); tyro alone shows
``{None}|INT`` and would take the word None for a value.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

T = TypeVar("T")
_PLAIN: dict[type, str] = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}
_REGISTRY = ConstructorRegistry()


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: str | None = None
    """Folder or hub id of the checkpoint; the small model of this package if absent."""
    gpus: int = 1
    """GPUs (with --device cpu: processes) that share the work; torchrun's count instead."""
    device: str = "auto"
    """Where the model runs, as torch names it; auto is the first GPU, or the CPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision; auto is bfloat16 on a GPU and float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(ModelOptions):
    """How videos are read."""

    frames: int | None = None
    """Frames sampled from each video; with --fps, at most so many."""
    fps: float | None = None
    """Frames a second sampled from each video."""
    kv_offload: float | None = None
    """GiB of keys and values that stay on each GPU; the rest is paged to the host."""


@_REGISTRY.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read ``INT | None`` and the like as their one type; None is for options not given."""
    if typing.get_origin(info.type) not in (typing.Union, types.UnionType):
        return None
    kinds = [each for each in typing.get_args(info.type) if each is not types.NoneType]
    if len(kinds) != 1 or len(typing.get_args(info.type)) != 2:
        return None
    words = typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is typing.Literal else ()
    kind: Any = str if words else kinds[0]
    if kind not in _PLAIN:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(words) + "}" if words else _PLAIN[kind],
        instance_from_str=lambda given: kind(given[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
        choices=words or None,
    )


def parse(
    options: type[T], argv: list[str], verb: str, text: str | None, *, flag_pairs: bool = True
) -> T:
    """Read a command line.

    Args:
        options: A dataclass whose fields are the options.
        argv: Arguments after the verb.
        verb: Its name, with that of its command if it has several.
        text: What ``--help`` says above the options; the dataclass' docstring if None.
        flag_pairs: Whether a switch has a ``--no-`` form.

    Returns:
        The options. A line that cannot be read, and ``--help``, end the process instead.
    """
    config = () if flag_pairs else (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(
        options,
        args=argv,
        prog=f"longvila {verb}",
        description=text,
        config=config,
        registry=_REGISTRY,
    )
