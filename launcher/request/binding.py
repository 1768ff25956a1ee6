"""From what was given, flags and values from Python, to the arguments of a target function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import BadRequest, nearest
from launcher.request.parameters import VARIADIC, Parameters
from launcher.request.spec import Target, Values
from launcher.request.values import fit, load, pack, show
from training.flags.fields import build, dataclass_of, read, usage


@dataclass(frozen=True)
class Call:
    """The arguments of a function by parameter; only the Context is missing."""

    parameters: Parameters
    arguments: Mapping[str, Any]

    @property
    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments without the Context, by position and by name."""
        bound = inspect.BoundArguments(self.parameters.without_context(), dict(self.arguments))
        return bound.args, bound.kwargs

    def configs(self) -> list[Any]:
        """The values of the parameters that are dataclasses."""
        bound = inspect.BoundArguments(self.parameters.without_context(), dict(self.arguments))
        bound.apply_defaults()
        hints = self.parameters.hints
        return [
            value for name, value in bound.arguments.items() if dataclass_of(hints.get(name))[0] and value is not None
        ]

    def run(self, function: Callable[..., Any], context: Callable[[], Any]) -> Any:
        """Call `function`; `context` makes the Context where one is taken."""
        arguments = dict(self.arguments)
        if self.parameters.context is not None:
            arguments[self.parameters.context] = context()
        bound = inspect.BoundArguments(self.parameters.signature, arguments)
        bound.apply_defaults()
        return function(*bound.args, **bound.kwargs)


def bind(parameters: Parameters, words: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Return the call with the flags in `words`, and the values `args` and `kwargs` from Python.

    Raises:
        BadRequest: the values do not fit the parameters, or one is missing that is no flag.
        ConfigError: a flag is unknown or missing, or its value is wrong.
    """
    parameters = _settle(parameters, args, kwargs)
    arguments = _fitted(parameters, args, kwargs)
    _check_no_flags(parameters, words, arguments)
    flags = parameters.flags
    if not flags:
        # A function that takes a Context reads the words from ctx.args; one that takes nothing can read nothing.
        if words and parameters.context is None:
            raise BadRequest(f"the target takes no arguments, but {' '.join(words)!r} followed it.")
        return Call(parameters, arguments)
    cls = parameters.as_dataclass(arguments)
    values = read(cls, words)
    for name in values:
        if name in arguments:
            raise BadRequest(
                f"{parameters.function}: {name!r} is given twice, as a flag and from Python; leave one of them out."
            )
    parsed = build(cls, values)
    for name in flags:
        value = getattr(parsed, name)
        if value is not parameters.signature.parameters[name].default:
            arguments[name] = value
    return Call(parameters, arguments)


def call_of(target: Target, function: Callable[..., Any], pickle: Path) -> Call:
    """Return the call of `function` that `target` asks for; `pickle` holds its values if they are pickled.

    Raises:
        BadRequest, ConfigError: as `bind`, unless that has checked them before.
    """
    parameters = Parameters.of(function)
    args, kwargs = load(target.values, pickle)
    context = target.values.context
    if context is None:
        return bind(parameters, target.args, args, kwargs)
    parameters = replace(parameters, context=context or None, guessed=False)
    if target.values.pickled:
        return Call(parameters, parameters.without_context().bind(*args, **kwargs).arguments)
    return Call(parameters, _fitted(parameters, args, kwargs))


def checked_values(
    function: Callable[..., Any],
    words: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    by_value: bool,
) -> Values:
    """Return all values of a call of `function`, flags included, as they travel.

    The annotations of a function that travels by value may name what does not travel: its values need none of them.

    Raises:
        BadRequest, ConfigError: as `bind`.
    """
    call = bind(Parameters.of(function), words, args, kwargs)
    signature = call.parameters.without_context().parameters.values()
    names = [p.name for p in signature if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    packed = pack({} if by_value else call.parameters.hints, names, *call.given)
    return replace(packed, shown=show(args, kwargs), context=call.parameters.context or "")


def _settle(parameters: Parameters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Parameters:
    """Give up the guess at the Context if the values from Python cover that parameter too."""
    if not parameters.guessed or not (args or kwargs):
        return parameters
    try:
        parameters.signature.bind(*args, **kwargs)
    except TypeError:
        return parameters
    return replace(parameters, context=None, guessed=False)


def _fitted(parameters: Parameters, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values from Python by parameter, each of its type."""
    named = parameters.function
    if parameters.context in kwargs:
        raise BadRequest(f"{named}: launch makes the Context {parameters.context!r}; leave it out of kwargs.")
    signature = parameters.without_context()
    try:
        found = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        unknown = [name for name in kwargs if name not in signature.parameters]
        near = nearest(unknown[0], signature.parameters) if unknown else ""
        takes = ", ".join(map(str, signature.parameters.values())) or "nothing"
        supplied = f" (and {parameters.context}, the Context, from launch)" if parameters.context else ""
        raise BadRequest(f"{named}: {error}{near}. It takes {takes}{supplied}.") from None
    for name, value in found.items():
        hint = parameters.hints.get(name)
        kind = signature.parameters[name].kind
        if kind not in VARIADIC:
            found[name] = fit(hint, value, f"{named}: {name}")
        elif isinstance(value, tuple):
            found[name] = tuple(fit(hint, each, f"{named}: {name}") for each in value)
        else:
            found[name] = {key: fit(hint, each, f"{named}: {key}") for key, each in value.items()}
    return dict(found)


def _check_no_flags(parameters: Parameters, words: Sequence[str], arguments: Mapping[str, Any]) -> None:
    """Refuse a call that lacks, or gives as flags, parameters that are no flags."""
    flags = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
    free = parameters.context is not None and not parameters.flags  # the words are for ctx.args
    wanted = dict.fromkeys([*_required(parameters), *(flags if not free else ())])
    if found := [name for name in wanted if name in parameters.problems and name not in arguments]:
        raise BadRequest(
            f"{parameters.function}: {'; '.join(_reason(parameters, name) for name in found)}. From Python, values can be"
            f" given as launch(..., kwargs={{{found[0]!r}: ...}}). A Context is annotated `Context` or named ctx."
        )


def _reason(parameters: Parameters, name: str) -> str:
    return f"the parameter {name!r} is no flag: {parameters.problems[name]}"


def _required(parameters: Parameters) -> list[str]:
    every = parameters.signature.parameters.values()
    return [p.name for p in every if p.default is p.empty and p.kind not in VARIADIC]


def describe_flags(name: str, parameters: Parameters) -> str:
    """Return the help of the function called `name`: its flags, and typed parameters that cannot be flags.

    Raises:
        BadRequest: a required parameter is no flag.
    """
    _check_no_flags(parameters, (), {})
    flags = usage(parameters.as_dataclass(comments=True))
    reasons = [f"  {_reason(parameters, each)}" for each in parameters.problems if each in parameters.hints]
    takes = "a Context and reads its arguments itself" if parameters.context else "no arguments"
    first = f"launch [OPTIONS] {name} [ARGS]...\n\n{flags}" if flags else f"{name} takes {takes}."
    return "\n".join([first, *([""] if reasons else []), *reasons])


def values_of(target: Target, function: Callable[..., Any] | None, given: Any) -> Any:
    """Return the values that `target` needs pickled: those that are `given`, or all of them if `function` is given."""
    if function is None:
        return given
    return bind(Parameters.of(function), target.args, *given).given
