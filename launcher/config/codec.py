"""Frozen dataclasses to plain data and back: profiles (TOML), plans and ``--json``."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import BadRequest
from training.errors import ConfigError
from training.flags import typed

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
    try:
        return typed.from_data(cls, data, where)
    except ConfigError as error:
        raise BadRequest(str(error)) from None


def to_json(data: Any) -> str:
    """Return `data` as the text of a JSON file for people to read."""
    return json.dumps(data, indent=2) + "\n"
