"""Parse command-line flags into a dataclass: fields are flags, types are checks, comments are the help.

    @dataclass(frozen=True)
    class Config:
        batch_size: int = 8  # samples of a rank in one batch
        amp: bool = True     # --amp or --no-amp

    config = parse(Config, ["--batch-size", "16", "--no-amp"])

Types: int, float, str, bool, Path, Literal, Enum (by member name), `X | None` (the word `none`), unions, and list or
tuple of those, written with commas. Dashes and underscores are equivalent; names cannot be abbreviated.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Sequence
from typing import Any, TypeVar, get_type_hints

from training.errors import ConfigError, did_you_mean
from training.typed import Mismatch, brief, from_text, required, shape

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], *, prog: str = "") -> T:
    """Return an instance of the dataclass `cls` from the flags in `args`.

    Raises ConfigError for an unknown flag, a value of the wrong type, a flag without a value or given twice, a missing
    required flag, a word that is not a flag, and if `cls` itself raises it.
    """
    hints, fields = _fields(cls)
    where = f"{prog}: " if prog else ""
    values: dict[str, Any] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{where}unexpected {word!r}; every argument is written --name value")
        flag, equals, value = word[2:].partition("=")
        name, negated = flag.replace("-", "_"), False
        if name not in fields and name.startswith("no_") and hints.get(name[3:]) is bool:
            name, negated = name[3:], True
        if name not in fields:
            known = [_dashed(field) for field in fields]
            raise ConfigError(
                f"{where}unknown option --{flag}{did_you_mean('--' + flag.replace('_', '-'), known)} "
                f"(known: {' '.join(known) or 'none, it takes no options'})"
            )
        if name in values:
            raise ConfigError(f"{where}{_dashed(name)} is given twice; leave one of them out")
        if hints[name] is bool and not equals:
            values[name] = not negated
            continue
        if negated:
            raise ConfigError(f"{where}--{flag} takes no value; write --{flag} or {_dashed(name)}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(
                    f"{where}{_dashed(name)} needs a value: {_dashed(name)} {shape(hints[name])}"
                    + (f" (a value that starts with dashes is written {_dashed(name)}={rest[0]})" if rest else "")
                )
            value = rest.pop(0)
        try:
            values[name] = from_text(hints[name], value)
        except Mismatch as error:
            raise ConfigError(f"{where}{_dashed(name)}: {brief(value)} is not {error.allowed}") from None
    missing = [_dashed(name) for name, field in fields.items() if required(field) and name not in values]
    if missing:
        raise ConfigError(f"{where}{' and '.join(missing)} must be given")
    return cls(**values)


def usage(cls: type[Any]) -> str:
    """Return the help of the dataclass `cls`: name, type, comment and default of each flag."""
    hints, fields = _fields(cls)
    comments = _comments(cls)
    rows = []
    for name, field in fields.items():
        flag = f"--[no-]{name.replace('_', '-')}" if hints[name] is bool else f"{_dashed(name)} {shape(hints[name])}"
        text = field.metadata.get("help") or comments.get(name, "")
        if required(field):
            text += " (required)"
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            if default is not None and default != "":
                text += f" (default: {_spell(default)})"
        rows.append((flag, text.strip()))
    width = min(34, max((len(flag) for flag, _ in rows), default=0))
    lines = []
    for flag, text in rows:
        body = textwrap.wrap(text, 100 - width) or [""]
        if len(flag) > width:
            lines.append(f"  {flag}")
        else:
            lines.append(f"  {flag:<{width}}  {body.pop(0)}".rstrip())
        lines += [f"  {'':<{width}}  {line}" for line in body]
    return "\n".join(lines)


def _fields(cls: type[Any]) -> tuple[dict[str, Any], dict[str, dataclasses.Field[Any]]]:
    if not dataclasses.is_dataclass(cls):
        raise ConfigError(f"{cls!r} is no dataclass, so it has no flags; decorate it with @dataclass")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = get_type_hints(cls)
    for name in fields:
        shape(hints[name])  # raises ConfigError for a type that a flag cannot have
    return hints, fields


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _spell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_spell, value))
    return value.name if isinstance(value, enum.Enum) else str(value)


def _comments(cls: type[Any]) -> dict[str, str]:
    """Return the comment on the line of each field; empty if there is no source, as for a class made in a shell."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        previous = ""
        names = inspect.get_annotations(base)
        lines: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME and token.string in names and token.line.lstrip().startswith(token.string):
                lines.setdefault(token.start[0], token.string)
            elif token.type == tokenize.COMMENT:
                text = token.string.lstrip("# ").strip()
                if token.start[0] in lines:
                    found[lines[token.start[0]]] = text
                    previous = lines[token.start[0]]
                elif previous and token.line.strip().startswith("#") and token.start[1] > 4:
                    found[previous] += " " + text  # a comment that continues on the next line
    return found


def check_function(flag: str, name: str) -> None:
    """Raise ConfigError unless `name` has the form package.module:function. Imports nothing."""
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        raise ConfigError(f"{flag} {name}: a function is written package.module:function")


def find_function(flag: str, name: str) -> Any:
    """Import and return the function `name`. Raises ConfigError if it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{flag} {name} cannot be loaded: {error}") from error
