"""Frozen dataclasses to YAML and back, and overrides that know their types.

1. `to_plain` turns a tree of dataclasses into dicts of plain values, `from_plain` reads it back.
2. A file may say less than everything: what it says is laid over a tree that is complete.
3. An override, ``optimizer.weight_decay=0.1``, names a setting by its path, or by its last name
   where only one has that name, and is read as YAML.

Every value is checked against the type of its field; an unknown key is an error that names the
nearest known ones. Numbers that YAML takes for text (``1e-5``) are read as numbers where a number
is wanted, and nothing else is converted.

It knows no setting by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from longvila.data.yaml_text import load_yaml
from longvila.errors import LongVILAError

Settings = TypeVar("Settings")


class SettingsError(LongVILAError, ValueError):
    """A setting is unknown or of the wrong type; the message names it and what was expected."""


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def to_plain(settings: Any) -> Any:
    """Return a tree of dataclasses as dicts, lists and scalars."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {name: to_plain(getattr(settings, name)) for name in _fields(type(settings))}
    if isinstance(settings, tuple | list):
        return [to_plain(each) for each in settings]
    return settings


def to_yaml(settings: Any) -> str:
    """Return a tree of dataclasses as YAML, in the order of their fields."""
    return yaml.safe_dump(to_plain(settings), sort_keys=False, allow_unicode=True)


def overlay(settings: Settings, values: Mapping[str, Any], *, where: str = "") -> Settings:
    """Return settings with some values replaced.

    Args:
        settings: A complete tree.
        values: Nested values; keys that are left out stay as they are.
        where: Where the values come from, for messages.

    Returns:
        A new tree of the same type.

    Raises:
        SettingsError: If a key is unknown or a value has the wrong type.
    """
    return typing.cast(Settings, _overlay(settings, values, where, ""))


def _overlay(settings: Any, values: Any, where: str, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise _error(where, f"{path.rstrip('.') or 'the file'} must be a mapping, got {values!r}")
    fields = _fields(type(settings))
    changed: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise _error(where, f"there is no setting {path}{key}" + _nearest(str(key), fields))
        current, hint = getattr(settings, key), fields[key]
        nested = _dataclass_of(hint)
        if nested is not None and isinstance(value, Mapping):
            base = current if current is not None else _blank(nested, value, where, path + key)
            changed[key] = _overlay(base, value, where, f"{path}{key}.")
        else:
            changed[key] = _convert(value, hint, where, path + key)
    try:
        return dataclasses.replace(settings, **changed)
    except ValueError as fault:
        raise _error(where, str(fault)) from fault


def _blank(cls: type, values: Mapping[str, Any], where: str, path: str) -> Any:
    """A dataclass that stands where None stood; fields without a default must be given."""
    fields = _fields(cls)
    inside = f"{path}." if path else ""
    unknown = [key for key in values if key not in fields]
    if unknown:
        nearest = _nearest(str(unknown[0]), fields)
        raise _error(where, f"there is no setting {inside}{unknown[0]}{nearest}")
    given = {k: _convert(v, fields[k], where, f"{inside}{k}") for k, v in values.items()}
    try:
        return cls(**given)
    except TypeError as fault:  # fields without a default that are not given
        raise _error(where, f"{path or cls.__name__}: {fault}") from fault
    except ValueError as fault:
        raise _error(where, str(fault)) from fault


def from_plain(cls: type[Settings], values: Mapping[str, Any], *, where: str = "") -> Settings:
    """Read a complete tree.

    Args:
        cls: The dataclass.
        values: What `to_plain` gave.
        where: Where the values come from, for messages.

    Raises:
        SettingsError: If a key is unknown or missing, or a value has the wrong type.
    """
    made: Any = _convert(values, cls, where, "")
    return typing.cast(Settings, made)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        SettingsError: If it is no YAML, or no mapping.
    """
    try:
        values = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise SettingsError(f"{path} is no YAML: {fault}") from fault
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    return values


def paths(cls: type, prefix: str = "") -> dict[str, Any]:
    """Map the path of every setting, groups of settings included, to its type."""
    found: dict[str, Any] = {}
    for name, hint in _fields(cls).items():
        nested = _dataclass_of(hint)
        if nested is not None:
            found |= paths(nested, f"{prefix}{name}.")
        found[prefix + name] = hint
    return found


def leaves(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Map the path of every setting, groups of settings left out, to its plain value."""
    found: dict[str, Any] = {}
    for name, value in to_plain(settings).items():
        nested = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def override(settings: Settings, assignments: Sequence[str]) -> Settings:
    """Return settings with assignments ``path=value`` applied in order.

    One that contradicts the settings so far may be completed by those after it.

    Args:
        settings: A complete tree.
        assignments: Each a path, or the last name of one where that is unique, an equals sign and a
            value in YAML.

    Returns:
        A new tree of the same type.

    Raises:
        SettingsError: If an assignment cannot be read, its name is unknown or stands for several
            leaves, or its value has the wrong type.
    """
    known = paths(type(settings))
    waiting: dict[str, Any] = {}
    first: SettingsError | None = None
    for text in assignments:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise SettingsError(f"--set takes key=value, got {text!r}")
        if name not in known:
            same = [path for path in known if path.rsplit(".", 1)[-1] == name]
            if len(same) > 1:
                raise SettingsError(f"{name} stands for several settings: {', '.join(same)}")
            if not same:
                raise SettingsError(f"there is no setting {name}" + _nearest(name, known))
            name = same[0]
        try:
            nested: Any = load_yaml(value)
        except yaml.YAMLError as fault:
            raise SettingsError(f"--set {text}: the value is no YAML: {fault}") from fault
        for key in reversed(name.split(".")):
            nested = {key: nested}
        waiting = _joined(waiting, nested)
        try:
            settings = overlay(settings, waiting, where=f"--set {text}")
            waiting, first = {}, None
        except SettingsError as fault:
            first = first or fault
    if first is not None:
        raise first
    return settings


def _joined(one: Any, other: Any) -> Any:
    """Nested values with others laid over them."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    return one | {key: _joined(one.get(key), value) for key, value in other.items()}


# ---- types -----------------------------------------------------------------------------------


def _dataclass_of(hint: Any) -> type | None:
    options = get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _convert(value: Any, hint: Any, where: str, path: str) -> Any:
    if _is_union(hint):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        faults = []
        for option in rest:
            try:
                return _convert(value, option, where, path)
            except SettingsError as fault:
                faults.append(fault)
        if len(rest) == 1:
            raise faults[0]
        raise _error(where, f"{path} must be {_say(hint)}, got {value!r}")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _error(where, f"{path} must be a mapping, got {value!r}")
        return _blank(hint, value, where, path)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise _error(where, f"{path} must be a list, got {value!r}")
        item = get_args(hint)[0]
        return tuple(_convert(each, item, where, f"{path}[{i}]") for i, each in enumerate(value))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            near = _nearest(str(value), [str(c) for c in choices])
            raise _error(where, f"{path} must be one of {list(choices)}, got {value!r}{near}")
        return value
    if hint is float and not isinstance(value, bool):
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError as fault:
                raise _error(where, f"{path} must be a number, got {value!r}") from fault
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not hint:
        raise _error(where, f"{path} must be {_say(hint)}, got {value!r}")
    return value


def _say(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(_say(each) for each in get_args(hint))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return "null" if hint is type(None) else names.get(hint, str(hint))


def _nearest(name: str, known: Any) -> str:
    by_last = {path.rsplit(".", 1)[-1]: path for path in known}
    near = difflib.get_close_matches(name, list(known), n=3)
    near += [by_last[n] for n in difflib.get_close_matches(name, list(by_last), n=3)]
    unique = list(dict.fromkeys(near))
    if unique:
        return f"; did you mean {' or '.join(unique)}?"
    return f"; there are {', '.join(known)}"


def _error(where: str, what: str) -> SettingsError:
    return SettingsError(f"{where}: {what}" if where else what)
