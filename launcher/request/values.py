"""Values from Python for the parameters of a target: their types, and how they travel with the plan."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from launcher.config.codec import to_data
from launcher.errors import BadRequest
from launcher.request.spec import Values
from training.files import write_atomic
from training.flags.typed import Mismatch, brief, decode

MAX_JSON = 64 * 1024
"""Bytes of JSON up to which values lie in the plan; larger ones are pickled."""


def check_given(words: Sequence[Any], args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `args` and `kwargs` of a call of `launch` as a tuple and a dict.

    Raises:
        BadRequest: a word is not a string, or they are no sequence and no mapping of names.
    """
    for word in words:
        if not isinstance(word, str):
            raise BadRequest(
                f"launch(target, {brief(word, 80)}): words after the target are strings of a command line, such as"
                f" '--lr', '3e-4'. Values for the function's parameters are written args=({brief(word, 80)},) or kwargs={{...}}."
            )
    if isinstance(args, str | bytes | Mapping) or not isinstance(args, Sequence):
        raise BadRequest(
            f"args={brief(args, 80)}: a list or tuple of values is needed, such as args=({brief(args, 80)},)."
        )
    kwargs = {} if kwargs is None else kwargs
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise BadRequest(
            f"kwargs={brief(kwargs, 80)}: a dict of values by parameter is needed, such as kwargs={{'lr': 3e-4}}."
        )
    return tuple(args), dict(kwargs)


def fit(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as a value of type `hint` (None: any); plain data becomes what it stands for, as in a profile.

    Raises:
        BadRequest: it is of another type. For a type that cannot be checked, any value is returned.
    """
    if hint is None or _is_instance(value, hint):
        return value
    try:
        return decode(hint, to_data(value), where)
    except Mismatch as error:
        raise BadRequest(f"{error.where}: {brief(error.value)} is not {error.allowed}.") from None
    except ValueError as error:
        raise BadRequest(str(error)) from None
    except TypeError:
        return value


def _is_instance(value: Any, hint: Any) -> bool:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    for part in typing.get_args(hint) if union else (hint,):
        plain = isinstance(part, type) and part is not Any and typing.get_origin(part) is None
        # True is an int to Python, and a float has to be finite to be written as JSON only.
        if plain and isinstance(value, part) and not (isinstance(value, bool) and part is int):
            return True
    return False


def pack(hints: Mapping[str, Any], names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Values:
    """Return the values as they travel: as JSON if `fit` makes the same values of that, or else to be pickled.

    `names` are the parameters of `args`, as far as they are known.
    """
    if not args and not kwargs:
        return Values()
    try:
        by_position = [*names, *[""] * len(args)]
        listed = [_as_json(hints.get(name), value) for name, value in zip(by_position, args, strict=False)]
        named = {name: _as_json(hints.get(name), value) for name, value in kwargs.items()}
        if len(json.dumps([listed, named])) > MAX_JSON:
            raise ValueError
    except Exception:  # whatever the conversion of any object can raise
        return Values(pickled=True)
    return Values(tuple(listed), named)


def _as_json(hint: Any, value: Any) -> Any:
    """Return JSON data from which `fit` makes `value` again; raises an error of any type if there is none."""
    data = json.loads(json.dumps(to_data(value), allow_nan=False))
    if not _equal(fit(hint, decode(Any, [[[[data]]]], "")[0][0][0][0], ""), value):
        raise ValueError
    return data


def _equal(left: Any, right: Any) -> bool:
    """Whether two values and their parts are equal and of the same types."""
    if type(left) is not type(right):
        return False
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(_equal(left[key], right[key]) for key in left)
    if is_dataclass(left):
        return all(_equal(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    return bool(left == right)


def show(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the values as text of at most about 400 characters."""

    def spell(value: Any) -> str:
        try:
            return " ".join(brief(value, 80).split())
        except Exception:  # the object's own repr
            return f"<{type(value).__name__}>"

    text = ", ".join([*map(spell, args), *(f"{name}={spell(value)}" for name, value in kwargs.items())])
    return text if len(text) <= 400 else f"{text[:400]}..."


def write(path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Pickle values into `path`.

    Raises:
        BadRequest: one of them does not pickle.
    """
    import cloudpickle

    try:
        write_atomic(path, cloudpickle.dumps((tuple(args), dict(kwargs))))
    except Exception as error:
        raise BadRequest(
            f"the values of args and kwargs cannot be sent: {error}. One of them does not pickle (an open file, a lock, a"
            " live model on a GPU); create such things inside the function."
        ) from None


def load(values: Values, path: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the values as they were packed.

    Raises:
        BadRequest: they were pickled, and cannot be loaded in this environment.
    """
    if not values.pickled:
        return values.args, values.kwargs
    import cloudpickle

    try:
        args, kwargs = cloudpickle.loads(path.read_bytes())
    except Exception as error:
        raise BadRequest(
            f"the values of args and kwargs cannot be loaded: {type(error).__name__}: {error}. Their types must be"
            " importable here, or defined in the file that calls launch."
        ) from error
    return args, kwargs
