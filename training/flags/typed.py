"""Decode plain data (JSON, TOML) or the text of a flag into values of annotated types.

Types: int, float, str, bool, Path, Enum, Literal, Any, `X | None`, unions, list, tuple, dict with keys of str or int,
and dataclasses of those. In data an enum is its value and None is null; in text an enum is the member's name, None the word
`none`, and the items of a list have commas between them; dicts and dataclasses have no text.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import types
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from training.errors import ConfigError, did_you_mean

T = TypeVar("T")

MAX_DEPTH = 32
"""Levels of tables and lists inside each other; more raise ConfigError."""

LARGEST = 2**53
"""Limit of `is_number` and `is_count`; above it a float is no exact whole number."""

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


class Mismatch(ValueError):
    """A value does not have the annotated type.

    Attributes:
        allowed: the values that do, such as ``a whole number`` or ``one of a, b``.
        where: the path of keys to the value; empty for text.
    """

    def __init__(self, allowed: str, where: str = "", value: Any = None) -> None:
        super().__init__(allowed)
        self.allowed, self.where, self.value = allowed, where, value


def from_data(cls: type[T], data: Any, where: str) -> T:
    """Return an instance of the dataclass `cls` from plain data; `where` names its source in errors.

    Raises:
        ConfigError: an unknown key (the known ones are listed), a missing key, or a value of the wrong type.
    """
    try:
        _check_depth(data, where)
        return cast(T, _table(cls, data, where))
    except Mismatch as error:
        shown = brief(error.value)
        allowed = error.allowed
        text = f"{shown} is not {allowed}" if allowed.startswith("one of") else f"expected {allowed}, got {shown}"
        raise ConfigError(f"{error.where}: {text}.") from None


def decode(hint: Any, data: Any, where: str) -> Any:
    """Return plain data as a value of the type `hint`; `where` names its source in errors.

    Raises:
        Mismatch: it has another type.
        ConfigError: an unknown or missing key of a dataclass, or data that is nested too deeply.
        TypeError: a type that cannot be checked.
    """
    _check_depth(data, where)
    return _value(hint, data, where)


def brief(value: Any, most: int = 200) -> str:
    """Return the repr of `value`, shortened in its middle to about `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # a number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


def _check_depth(data: Any, where: str) -> None:
    """Raise ConfigError for data that is nested too deeply; without recursion."""
    level, depth = [data], 0
    while level := [item for each in level for item in _items(each)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{where}: tables and lists are nested more than {MAX_DEPTH} levels deep.")


def _items(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []


def _table(cls: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise Mismatch("a table", where, data)
    hints, fields = _fields(cast(Hashable, cls))
    for key in data:
        if key not in fields:
            near = did_you_mean(str(key), fields, " (did you mean {!r}?)")
            raise ConfigError(f"{where}: unknown key {brief(key)}{near}. Known keys: {', '.join(fields)}.")
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in data.items()}
    if missing := [name for name, field in fields.items() if required(field) and name not in values]:
        raise ConfigError(f"{where}: the key {missing[0]!r} is missing.")
    return cls(**values)


@cache
def _fields(cls: Any) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    """Return the types and the fields of a dataclass, by name."""
    return get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls) if f.init}


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether the field of a dataclass has no default."""
    return is_missing(field.default) and is_missing(field.default_factory)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a finite number below 2^53, and no bool."""
    return (type(value) is float or type(value) is int) and -LARGEST < value < LARGEST


def is_count(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number from 0 to 2^53."""
    return type(value) is int and 0 <= value < LARGEST


def is_missing(value: Any) -> bool:
    """Whether `value` is dataclasses.MISSING, or the copy of it in a dataclass that was pickled by value."""
    return isinstance(value, type(dataclasses.MISSING))


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value`, from plain data, as a value of type `hint`. Raises Mismatch."""
    origin, arguments = get_origin(hint), get_args(hint)

    def refuse(allowed: str) -> NoReturn:
        raise Mismatch(allowed, where, value)

    if origin in (Union, types.UnionType):
        return _union(arguments, lambda part: _value(part, value, where), value)
    if hint is Any:
        return _any(value, where)
    if hint is type(None):
        return None if value is None else refuse("nothing")
    if origin is Literal:
        same = [choice for choice in arguments if choice == value and type(choice) is type(value)]
        return same[0] if same else refuse("one of " + ", ".join(map(str, arguments)))
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            refuse("a list")
        return origin(_value(h, v, where) for h, v in zip(_each(origin, arguments, value, refuse), value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            refuse("a table")
        return {_key(arguments[0], k, refuse): _value(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return _table(cast(type, hint), value, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        same = [each for each in hint if each.value == value and type(value) is not bool]
        return same[0] if same else refuse("one of " + ", ".join(str(each.value) for each in hint))
    if hint is Path:
        return Path(_value(str, value, where))
    if hint is float and type(value) is int:
        return _float(value, where)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        refuse(_NAMES.get(hint, str(hint)))
    if hint is float and not math.isfinite(value):
        refuse("a finite number")
    return value


def _key(hint: Any, key: Any, refuse: Any) -> Any:
    """Return the key of a table as a value of type `hint`; JSON writes every key as a string."""
    if hint is not int:
        return str(key)
    try:
        return int(key)
    except ValueError:
        refuse("a table with whole numbers as keys")


def _union(parts: tuple[Any, ...], read: Any, value: Any) -> Any:
    """Return the result of the first type in `parts` that fits; else raise the error of the first one except None."""
    first: Mismatch | None = None
    for part in parts:
        if part is type(None):
            if value is None:
                return None
            continue
        try:
            return read(part)
        except Mismatch as error:
            first = first or error
    assert first is not None
    raise first


def _any(value: Any, where: str) -> Any:
    """Return a value of any type. Raises Mismatch for a number that is not finite."""
    level = [value]
    while level:
        for each in level:
            if isinstance(each, float) and not math.isfinite(each):
                raise Mismatch("a finite number", where, each)
        level = [item for each in level for item in _items(each)]
    return value


def _float(value: int | str, where: str = "") -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Mismatch("a finite number", where, value)
    return number


def _each(origin: Any, arguments: tuple[Any, ...], items: Any, refuse: Any) -> list[Any]:
    """The type of each of `items` of a list or tuple."""
    if origin is list or arguments[-1] is ...:
        return [arguments[0]] * len(items)
    if len(items) != len(arguments):
        refuse(f"{len(arguments)} values")
    return list(arguments)


# ---- text -----------------------------------------------------------------------------------------------------------


def shape(hint: Any) -> str:
    """Describe how a value of type `hint` is written as text. Raises ConfigError for a type without such a form."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return "|".join(dict.fromkeys("none" if part is type(None) else shape(part) for part in arguments))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (list, tuple) and arguments:
        items = [shape(part) for part in arguments if part is not ...]
        return ",".join(items) + (",..." if origin is list or arguments[-1] is ... else "")
    if hint is bool:
        return "true|false"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "|".join(hint.__members__)
    if hint in (int, float, str, Path):
        return {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}[hint]
    raise ConfigError(
        f"no flag can have the type {hint!r}; use int, float, str, bool, Path, Literal, Enum, list or tuple,"
        " or a dataclass of those"
    )


def from_text(hint: Any, text: str) -> Any:
    """Return `text` as a value of type `hint`. Raises Mismatch, whose message names the allowed values."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # str and Path accept any text, so they are tried last.
        for part in sorted(arguments, key=lambda part: part in (str, Path)):
            try:
                return from_text(part, text)
            except Mismatch:
                continue
        raise Mismatch(shape(hint))
    if hint is type(None):
        return None if text.lower() == "none" else _refuse("none")
    if origin is Literal:
        choices = {str(choice): choice for choice in reversed(arguments)}
        return choices[text] if text in choices else _refuse("one of " + ", ".join(map(str, arguments)))
    if origin in (list, tuple):
        items = text.split(",") if text else []
        parts = _each(origin, arguments, items, lambda allowed: _refuse(f"{allowed} with commas between them"))
        return origin(from_text(part, item) for part, item in zip(parts, items, strict=True))
    if hint is bool:
        return _WORDS[text.lower()] if text.lower() in _WORDS else _refuse("true or false")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint[text] if text in hint.__members__ else _refuse("one of " + ", ".join(hint.__members__))
    if hint is Path and not text:
        _refuse("a path")
    if hint in (int, float) and not text.isascii():  # int() and float() accept the digits of every script
        _refuse(_NAMES[hint])
    try:
        return _float(text) if hint is float else hint(text)
    except Mismatch:
        raise
    except ValueError:
        raise Mismatch(_NAMES[hint]) from None


def _refuse(allowed: str) -> NoReturn:
    raise Mismatch(allowed)
