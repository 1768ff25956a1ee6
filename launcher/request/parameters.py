"""The parameters of a target function: which of them takes the Context, and which are flags."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import BadRequest
from training.errors import ConfigError
from training.flags.comments import of_parameters
from training.flags.fields import check_type, dataclass_of

Parameter = inspect.Parameter

VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

_CONTEXT_NAMES = ("ctx", "context")

_KNOWN_NAMES: dict[str, Any] = {
    **{name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union", "List", "Tuple")},
    "typing": typing,
    "Path": pathlib.Path,
    "pathlib": pathlib,
}
"""Names that an annotation may use although the module imports them for type checkers only."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of a function.

    Attributes:
        hints: the types of those that are annotated, by name.
        problems: why a parameter is no flag, and what to write instead.
        context: the parameter that takes the Context; None without one.
        guessed: that one is neither annotated `Context` nor called so; it is the first and has no annotation.
        target: the function itself, for the comments beside them.
    """

    function: str
    signature: inspect.Signature
    hints: Mapping[str, Any]
    problems: Mapping[str, str]
    context: str | None
    guessed: bool
    target: Callable[..., Any]

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Parameters:
        """Inspect `function`.

        Raises:
            BadRequest: it is a coroutine or a generator, or its parameters cannot be read.
        """
        named = getattr(function, "__qualname__", repr(function))
        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(kind(function) for kind in kinds):
            raise BadRequest(f"{named} only begins when it is awaited or iterated; a target is a plain function.")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError) as error:
            raise BadRequest(f"{named}: its parameters cannot be read: {error}. Call it in a function.") from None
        hints: dict[str, Any] = {}
        problems: dict[str, str] = {}
        context = None
        for name, parameter in signature.parameters.items():
            hint, problem = _evaluate(function, parameter.annotation)
            free = parameter.kind not in VARIADIC
            if free and context is None and _is_context(parameter.annotation, hint):
                context = name
                continue
            if hint is not None:
                hints[name] = hint
            if free and (text := problem or _why_no_flag(name, hint)):
                problems[name] = text
        if context is None:
            context = next((name for name in _CONTEXT_NAMES if name in problems), None)
        guess = None if context else _guess(signature, hints, problems)
        return cls(
            function=named,
            signature=signature,
            hints=hints,
            problems={name: text for name, text in problems.items() if name not in (context, guess)},
            context=context or guess,
            guessed=guess is not None,
            target=function,
        )

    @property
    def flags(self) -> list[str]:
        """The parameters that are flags, or whose fields are."""
        parameters = self.signature.parameters
        fit = [name for name in self.hints if name not in self.problems and name != self.context]
        return [name for name in fit if parameters[name].kind not in VARIADIC]

    def as_dataclass(self, given: Mapping[str, Any] | None = None, *, comments: bool = False) -> type:
        """Return a dataclass whose fields are the flags; values that are `given` are defaults in it.

        With `comments` it has the comments beside the parameters, which takes reading the source.

        The fields of a dataclass that is the only one among the parameters have no prefix.
        """
        flags, texts = self.flags, of_parameters(self.target) if comments else {}
        nested = [name for name in flags if dataclass_of(self.hints[name])[0] is not None]
        made: list[tuple[str, Any, Any]] = []
        for name in flags:
            default = (given or {}).get(name, self.signature.parameters[name].default)
            options: dict[str, Any] = {"kw_only": True}
            options["metadata"] = {"help": texts.get(name, ""), "top": [name] == nested}
            if default is not Parameter.empty:
                options["default_factory"] = functools.partial(_same, default)
            made.append((name, self.hints[name], dataclasses.field(**options)))
        return dataclasses.make_dataclass("FlagsOfTarget", made)

    def without_context(self) -> inspect.Signature:
        """The signature as a caller of `launch` has to fill it."""
        rest = [p for p in self.signature.parameters.values() if p.name != self.context]
        return self.signature.replace(parameters=rest)


def _same(value: Any) -> Any:
    return value


def _evaluate(function: Callable[..., Any], annotation: Any) -> tuple[Any, str]:
    """Return the type that an annotation stands for, or None and the reason; the reason is empty where there is none."""
    if annotation is Parameter.empty:
        return None, ""
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        found = typing.get_type_hints(holder, _KNOWN_NAMES | _globals(function))["it"]
    except Exception as error:  # annotations are the user's expressions
        return None, (
            f"its annotation {annotation!r} cannot be read ({error}); define and import the types that it names at the top"
            " of the module, not below `if TYPE_CHECKING`"
        )
    return (None, "") if found in (Any, object) else (found, "")


def _globals(function: Any) -> dict[str, Any]:
    """The names that annotations of `function`, or of its class, can use."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    if hasattr(function, "__globals__"):
        return dict(function.__globals__)
    owner = function if isinstance(function, type) else type(function)
    return dict(vars(sys.modules[owner.__module__]) if owner.__module__ in sys.modules else {})


def _is_context(annotation: Any, hint: Any) -> bool:
    if hint is None:  # a name that is imported for type checkers alone
        return isinstance(annotation, str) and re.search(r"\bContext\b", annotation) is not None
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = [(base.__module__, base.__name__) for part in options if isinstance(part, type) for base in part.__mro__]
    return ("training.context", "Context") in names


def _why_no_flag(name: str, hint: Any) -> str:
    if hint is None:
        return f"it has no annotation; write `{name}: float` or another type"
    try:
        check_type(name, hint)
    except ConfigError as error:
        return str(error)
    return ""


def _guess(signature: inspect.Signature, hints: Mapping[str, Any], problems: Mapping[str, str]) -> str | None:
    """The first parameter if it, and no other, is required and has no annotation."""
    required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.kind not in VARIADIC]
    bare = [name for name in required if name in problems and name not in hints]
    first = next(iter(signature.parameters.values()), None)
    if first is None or bare != [first.name] or first.kind is Parameter.KEYWORD_ONLY:
        return None
    return first.name
