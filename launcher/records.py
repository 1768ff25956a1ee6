"""Frozen dataclasses to plain data and back: the one codec behind profiles (TOML), plans and ``--json``."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import BadRequest, nearest

T = TypeVar("T")


def to_data(value: Any) -> Any:
    """Return `value` as JSON-able data: dataclasses become dicts, tuples lists, paths and enums strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_data(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def from_data(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `cls` from `data`; `where` names its source in errors.

    Raises:
        BadRequest: an unknown key (the known ones are listed), a missing key or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    if not isinstance(data, Mapping):
        raise BadRequest(f"{where}: expected a table, got {str(data)[:80]!r}.")
    for key in data:
        if key not in hints:
            raise BadRequest(f"{where}: unknown key {key!r}{nearest(key, hints)}. Known keys: {', '.join(hints)}.")
    values = {key: _convert(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    missing = [
        f.name
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise BadRequest(f"{where}: the key {missing[0]!r} is missing.")
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if value not in arguments:
            raise BadRequest(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise BadRequest(f"{where}: expected a list, got {value!r}.")
        return tuple(_convert(arguments[0], v, where) for v in value)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise BadRequest(f"{where}: expected a table, got {value!r}.")
        return {k: _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise BadRequest(f"{where}: expected a table, got {value!r}.")
        return from_data(typing.cast(type, hint), value, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in (choices := [each.value for each in hint]):
            raise BadRequest(f"{where}: {value!r} is not one of {', '.join(map(str, choices))}.")
        return hint(value)
    if hint is Path:
        return Path(_convert(str, value, where))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise BadRequest(f"{where}: expected {_NAMES.get(hint, hint)}, got {value!r}.")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
