"""Parse command-line flags into a dataclass: fields are flags, types are checks, comments are the help.

    @dataclass(frozen=True)
    class Optimizer:
        lr: float = 1e-3     # --optimizer.lr 3e-4
        fused: bool = False  # --optimizer.fused or --no-optimizer.fused

    @dataclass(frozen=True)
    class Config:
        batch_size: int = 8  # samples of a rank in one batch
        amp: bool = True     # --amp or --no-amp
        optimizer: Optimizer = Optimizer()

    config = parse(Config, ["--batch-size", "16", "--no-amp", "--optimizer.lr", "3e-4"])

Types: int, float, str, bool, Path, Literal, Enum (by member name), `X | None` (the word `none`), unions, list or tuple of
those, written with commas, and dataclasses. The fields of a nested dataclass are dotted flags; those that are not given keep
the value that the outer field's default has. A field of type `Dataclass | None` becomes a dataclass if one of its flags is
given, and None by `--optimizer none`. Dashes and underscores are equivalent; names cannot be abbreviated.

A field's ``metadata`` may hold ``help``, the text for a field without a comment, and ``top``: true for a nested dataclass
whose flags have no prefix.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import textwrap
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from training.errors import ConfigError, did_you_mean
from training.flags import comments
from training.flags.typed import Mismatch, brief, from_text, is_missing, shape

T = TypeVar("T")


def parse(cls: type[T], args: Sequence[str], *, prog: str = "") -> T:
    """Return an instance of the dataclass `cls` from the flags in `args`.

    Raises ConfigError for an unknown flag, a value of the wrong type, a flag without a value or given twice, a missing
    required flag, a word that is not a flag, and if `cls` itself raises it, a ValueError or an AssertionError.
    """
    result: T = build(cls, read(cls, args, prog=prog), prog=prog)
    return result


def read(cls: type[Any], args: Sequence[str], *, prog: str = "") -> dict[str, Any]:
    """Return the values of the flags in `args` by the dotted names of the fields of `cls`. Raises ConfigError."""
    hints = {flag.name: flag.hint for flag in _group(cls).all_flags()}
    where = f"{prog}: " if prog else ""
    values: dict[str, Any] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{where}unexpected {word!r}; every argument is written --name value")
        flag, equals, value = word[2:].partition("=")
        name, negated = flag.replace("-", "_"), False
        if name not in hints and name.startswith("no_") and hints.get(name[3:]) is bool:
            name, negated = name[3:], True
        if name not in hints:
            known = [_dashed(field) for field in hints]
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
                    f"{where}{_dashed(name)} needs a value: {_dashed(name)} {_shape(hints[name])}"
                    + (f" (a value that starts with dashes is written {_dashed(name)}={rest[0]})" if rest else "")
                )
            value = rest.pop(0)
        try:
            values[name] = from_text(hints[name], value)
        except Mismatch as error:
            raise ConfigError(f"{where}{_dashed(name)}: {brief(value)} is not {error.allowed}") from None
    return values


def build(cls: type[Any], values: Mapping[str, Any], *, prog: str = "") -> Any:
    """Return an instance of `cls` from values by dotted names, as `read` returns them. Raises ConfigError."""
    where = f"{prog}: " if prog else ""
    group = _group(cls)
    if missing := [_dashed(name) for name in group.missing(values)]:
        raise ConfigError(f"{where}{' and '.join(missing)} must be given")
    return group.build(values, where)


def usage(cls: type[Any]) -> str:
    """Return the help of the dataclass `cls`: name, type, comment and default of each flag, nested ones in groups."""
    group = _group(cls, help_of=comments.of_fields)
    rows = [[each.row() for each in part.flags.values()] for part in group.walk()]
    width = min(34, max((len(flag) for part in rows for flag, _ in part), default=0))
    parts = []
    for part, own in zip(group.walk(), rows, strict=True):
        lines = [part.heading()] if part.name else []
        for flag, text in own:
            body = textwrap.wrap(text, 100 - width) or [""]
            if len(flag) > width:
                lines.append(f"  {flag}")
            else:
                lines.append(f"  {flag:<{width}}  {body.pop(0)}".rstrip())
            lines += [f"  {'':<{width}}  {line}" for line in body]
        if own:
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def check_type(name: str, hint: Any) -> None:
    """Raise ConfigError unless a field or parameter `name` of type `hint` can be given by flags."""
    cls, _ = dataclass_of(hint)
    if cls is not None:
        _group(cls)
        return
    try:
        shape(hint)
    except ConfigError as error:
        raise ConfigError(f"{_dashed(name)}: {error}") from None


def dataclass_of(hint: Any) -> tuple[type[Any] | None, bool]:
    """The dataclass of a hint ``D`` or ``D | None``, or None; and whether the hint allows None."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found = [part for part in parts if part is not type(None)]
    if len(found) == 1 and isinstance(found[0], type) and dataclasses.is_dataclass(found[0]):
        return found[0], len(parts) > 1
    return None, False


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One flag: its dotted name, and type, default and help of the field that it sets.

    The default is MISSING for one that is required, and a `_Factory` for one that each instance makes.
    """

    name: str
    hint: Any
    default: Any
    help: str

    def row(self) -> tuple[str, str]:
        """The flag with its type, and its help with its default."""
        name = _dashed(self.name)
        flag = f"--[no-]{name[2:]}" if self.hint is bool else f"{name} {_shape(self.hint)}"
        text = self.help
        if self.default is dataclasses.MISSING:
            text += " (required)"
        elif (default := _made(self.default)) is not None and default != "":
            text += f" (default: {_spell(default)})"
        return flag, text.strip()


@dataclasses.dataclass(frozen=True)
class _Group:
    """A dataclass as flags and as groups of nested ones, both by field.

    Attributes:
        name: the dotted name of the field; empty at the top.
        base: the instance whose values are the defaults, None for one that may be left out, or MISSING.
        off: the name of the flag that makes it None; empty without one.
    """

    cls: type[Any]
    name: str
    base: Any
    off: str
    help: str
    flags: dict[str, _Flag]
    groups: dict[str, _Group]

    def walk(self) -> Iterator[_Group]:
        """This group and those below it."""
        yield self
        for each in self.groups.values():
            yield from each.walk()

    def all_flags(self) -> Iterator[_Flag]:
        """The flags of this group and of those below it."""
        names: set[str] = set()
        for each in (flag for group in self.walk() for flag in group.flags.values()):
            if each.name in names:
                raise ConfigError(f"{_dashed(each.name)} is the flag of two fields or parameters; rename one of them")
            names.add(each.name)
            yield each

    def heading(self) -> str:
        """The line over its flags in the help."""
        optional = " or none" if self.off else ""
        return f"{self.name.replace('_', '-')} ({self.cls.__name__}{optional})" + (
            f": {self.help}" if self.help else ""
        )

    def given(self, values: Collection[str]) -> bool:
        """Whether one of its fields is in `values`."""
        return any(flag.name in values and flag.name != self.off for flag in self.all_flags())

    def missing(self, values: Collection[str]) -> Iterator[str]:
        """The names of required flags that are not in `values`."""
        given = self.given(values)
        if self.off and self.off in values:
            if given:
                raise ConfigError(f"{_dashed(self.off)} none and other flags of it are given; leave one of them out")
            return
        made = self.base is dataclasses.MISSING or (self.base is None and given)
        if made:
            yield from (
                f.name for f in self.flags.values() if f.default is dataclasses.MISSING and f.name not in values
            )
        for each in self.groups.values():
            if made or each.given(values) or each.off in values:
                yield from each.missing(values)

    def build(self, values: Mapping[str, Any], where: str) -> Any:
        """The instance, or None, that `values` describe."""
        if self.off and self.off in values:
            return None
        if not self.given(values) and self.base is not dataclasses.MISSING:
            return self.base
        fields = {field: values[flag.name] for field, flag in self.flags.items() if field and flag.name in values}
        for field, each in self.groups.items():
            # One that is not given and has a default stays what the outer dataclass makes it.
            if each.given(values) or each.off in values or each.base is dataclasses.MISSING:
                fields[field] = each.build(values, where)
        try:
            if self.base is None or self.base is dataclasses.MISSING:
                return self.cls(**fields)
            return dataclasses.replace(self.base, **fields)
        except ConfigError:
            raise
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"{where}{self.cls.__name__}: {error or type(error).__name__}") from error


def _group(
    cls: Any,
    name: str = "",
    base: Any = dataclasses.MISSING,
    inside: tuple[type, ...] = (),
    help_of: Callable[[type], Mapping[str, str]] = lambda _: {},
) -> _Group:
    """Return the flags of the dataclass `cls`, which is the field `name`; `help_of` reads the comments, for the help alone.

    Raises ConfigError for what cannot have flags.
    """
    if not dataclasses.is_dataclass(cls) or not isinstance(cls, type):
        raise ConfigError(f"{cls!r} is no dataclass, so it has no flags; decorate it with @dataclass")
    if cls in inside:
        raise ConfigError(f"{_dashed(name)}: {cls.__name__} contains itself, so it has no flags")
    try:
        hints = get_type_hints(cls)
    except Exception as error:  # the annotations are the user's expressions
        raise ConfigError(
            f"the annotations of {cls.__name__} cannot be read: {error}; define and import the types that they name at the"
            " top of the module, not below `if TYPE_CHECKING`"
        ) from None
    texts = help_of(cls)
    group = _Group(cls, name, base, "", "", {}, {})
    for field in (field for field in dataclasses.fields(cls) if field.init):
        hint, default = hints[field.name], _default(field, base)
        text = field.metadata.get("help") or texts.get(field.name, "")
        flag = f"{name}.{field.name}" if name else field.name
        nested, optional = dataclass_of(hint)
        if nested is None:
            check_type(flag, hint)
            group.flags[field.name] = _Flag(flag, hint, default, text)
            continue
        default = _made(default)
        top = bool(field.metadata.get("top"))
        below = _group(nested, "" if top else flag, default, (*inside, cls), help_of)
        if optional and not top:
            below = dataclasses.replace(below, off=flag, flags={"": _off(flag, default)} | below.flags)
        group.groups[field.name] = dataclasses.replace(below, help=text)
    return group


def _off(name: str, default: Any) -> _Flag:
    """The flag that makes an optional dataclass None."""
    return _Flag(name, type(None), None, "leave it out" + (" (default)" if default is None else ""))


@dataclasses.dataclass(frozen=True)
class _Factory:
    """The factory of a default, which is called only if its value is needed."""

    make: Callable[[], Any]


def _made(default: Any) -> Any:
    return default.make() if isinstance(default, _Factory) else default


def _default(field: dataclasses.Field[Any], base: Any) -> Any:
    """The default of a field: the value that `base` has, its own or its factory, or MISSING."""
    if base is not None and base is not dataclasses.MISSING:
        return getattr(base, field.name)
    if not is_missing(field.default_factory):
        return _Factory(cast(Any, field.default_factory))
    return dataclasses.MISSING if is_missing(field.default) else field.default


def _shape(hint: Any) -> str:
    return "none" if hint is type(None) else shape(hint)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _spell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_spell, value))
    return value.name if isinstance(value, enum.Enum) else str(value)


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
