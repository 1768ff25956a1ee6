"""What a function takes: its Context, its flags, and the parameters that are neither."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest

from launcher.errors import BadRequest
from launcher.request.binding import Call, bind, describe_flags
from launcher.request.parameters import Parameters
from training.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from training.context import Context


class Kind(enum.Enum):
    small = 1
    large = 2


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3  # learning rate
    fused: bool = True


@dataclass(frozen=True)
class Config:
    steps: int = 3  # optimizer steps
    optimizer: Optimizer = Optimizer()  # of the model


def nothing() -> str:
    return "nothing"


def context(ctx: Context) -> Any:
    return ctx


def both(ctx: Context, config: Config) -> Any:
    return ctx, config


def both_as_text(ctx: NoSuchName, config: Config) -> None: ...  # type: ignore[name-defined] # noqa: F821
def config_alone(config: Config) -> Any:
    return config


def typed(
    c: Context,
    lr: float,  # how fast
    epochs: int = 3,
    *,
    debug: bool = False,  # print more
    where: Path | None = None,
    kind: Kind = Kind.small,
    mode: Literal["a", "b"] = "a",
    sizes: list[int] = [1],  # noqa: B006
) -> Any:
    return c, lr, epochs, debug, where, kind, mode, sizes


def no_context(lr: float = 1e-3, *, debug: bool = False) -> Any:
    return lr, debug


def bare_first(c, lr: float) -> Any:  # type: ignore[no-untyped-def]
    return c, lr


def bare_two(lr, epochs) -> Any:  # type: ignore[no-untyped-def]
    return lr, epochs


def two_configs(one: Optimizer, two: Optimizer | None = None) -> Any:
    return one, two


def mixed(config: Config, debug: bool = False) -> Any:
    return config, debug


def late_context(lr: float, *, context=None) -> Any:  # type: ignore[no-untyped-def]
    return lr, context


def positional(lr: float, /, *more: int, **rest: float) -> Any:
    return lr, more, rest


def table(ctx: Context, table: dict[str, int]) -> Any:
    return table


def optional_table(lr: float = 1.0, table: dict[str, int] | None = None) -> Any:
    return lr, table


def unknown(ctx: Context, config: nowhere.Config) -> None: ...  # type: ignore[name-defined] # noqa: F821
def same_flag(config: Config, steps: int = 1) -> None: ...
async def coroutine() -> None: ...
def generator() -> Any:
    yield 1


class Callable_:
    def __call__(self, ctx: Context, lr: float = 1.0) -> Any:
        return ctx, lr

    def method(self, ctx: Context) -> Any:
        return ctx


def run(call: Call, function: Callable[..., Any]) -> Any:
    return call.run(function, lambda: cast("Context", "CTX"))


@pytest.mark.parametrize(
    ("function", "words", "expected"),
    [
        (nothing, "", "nothing"),
        (context, "--what it=reads itself", "CTX"),
        (lambda whatever: whatever, "", "CTX"),
        (both, "--steps 5", ("CTX", Config(5))),
        (both, "--optimizer.lr 2 --no-optimizer.fused", ("CTX", Config(3, Optimizer(2.0, fused=False)))),
        (both_as_text, "--steps 5", None),
        (config_alone, "--steps=5", Config(5)),
        (typed, "--lr 1", ("CTX", 1.0, 3, False, None, Kind.small, "a", [1])),
        (no_context, "--no-debug --lr 3e-4", (3e-4, False)),
        (bare_first, "--lr 2", ("CTX", 2.0)),
        (two_configs, "--one.lr 2", (Optimizer(2.0), None)),
        (two_configs, "--two.lr 2", (Optimizer(), Optimizer(2.0))),
        (mixed, "--steps 2 --debug", (Config(2), True)),
        (late_context, "--lr 2", (2.0, "CTX")),
        (positional, "--lr 2", (2.0, (), {})),
        (optional_table, "--lr 2", (2.0, None)),
        (Callable_(), "--lr 2", ("CTX", 2.0)),
        (Callable_().method, "", "CTX"),
        (functools.partial(typed, epochs=9), "--lr 1", ("CTX", 1.0, 9, False, None, Kind.small, "a", [1])),
    ],
)
def test_what_a_function_gets_from_flags(function: Callable[..., Any], words: str, expected: Any) -> None:
    assert run(bind(Parameters.of(function), words.split(), (), {}), function) == expected


def test_types_of_flags_of_parameters() -> None:
    words = "--lr 1e-3 --epochs 4 --debug --where /tmp --kind large --mode b --sizes 1,2"
    _, *rest = run(bind(Parameters.of(typed), words.split(), (), {}), typed)
    from pathlib import Path

    assert rest == [1e-3, 4, True, Path("/tmp"), Kind.large, "b", [1, 2]]


@pytest.mark.parametrize(
    ("function", "words", "message"),
    [
        (typed, "", "--lr must be given"),
        (typed, "--lr x", "--lr: 'x' is not a number"),
        (typed, "--lr 1 --epoch 2", r"unknown option --epoch; did you mean --epochs\?"),
        (typed, "--lr 1 --kind 1", "--kind: '1' is not one of small, large"),
        (nothing, "--x y", "the target takes no arguments, but '--x y' followed it"),
        (both, "--stepz y", "--steps"),
        (bare_two, "--lr 1", r"'lr' is no flag: it has no annotation; write `lr: float`.*'epochs' is no flag"),
        (table, "", r"'table' is no flag: --table: no flag can have the type dict\[str, int\]; use int"),
        (optional_table, "--table 3", "the parameter 'table' is no flag"),
        (unknown, "", r"the parameter 'config' is no flag: its annotation 'nowhere.Config' cannot be read"),
        (same_flag, "--steps 2", "--steps is the flag of two fields or parameters"),
    ],
)
def test_flags_that_a_function_does_not_take(function: Callable[..., Any], words: str, message: str) -> None:
    with pytest.raises((BadRequest, ConfigError), match=message):
        bind(Parameters.of(function), words.split(), (), {})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (coroutine, "coroutine only begins when it is awaited or iterated; a target is a plain function."),
        (generator, "generator only begins when it is awaited"),
        (dict, "its parameters cannot be read"),
    ],
)
def test_functions_that_are_no_target(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Parameters.of(function)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        (typed, (1, 2), {"debug": True}, ("CTX", 1.0, 2, True, None, Kind.small, "a", [1])),
        (typed, (1,), {"where": "/tmp", "kind": Kind.large}, None),
        (bare_two, (3, 4), {}, (3, 4)),
        (lambda x: x, (3,), {}, 3),
        (bare_first, (), {"lr": 2}, ("CTX", 2.0)),
        (both, (Config(7),), {}, ("CTX", Config(7))),
        (both, ({"steps": 7, "optimizer": {"lr": 2}},), {}, ("CTX", Config(7, Optimizer(2.0)))),
        (positional, (1, 2, 3), {"x": 4}, (1.0, (2, 3), {"x": 4.0})),
        (table, ({"a": 1},), {}, {"a": 1}),
    ],
)
def test_what_a_function_gets_from_python(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> None:
    found = run(bind(Parameters.of(function), (), args, kwargs), function)
    assert expected is None or found == expected


def test_flags_complete_values_from_python() -> None:
    assert run(bind(Parameters.of(no_context), ["--debug"], (2.0,), {}), no_context) == (2.0, True)
    found = run(bind(Parameters.of(both), ["--steps", "9"], (), {"config": Config(1, Optimizer(5.0))}), both)
    assert found == ("CTX", Config(9, Optimizer(5.0)))


@pytest.mark.parametrize(
    ("function", "words", "args", "kwargs", "message"),
    [
        (typed, "", (1, 2, 3), {}, r"typed: too many positional arguments. It takes lr: 'float'.*\(and c, the Context"),
        (typed, "", (1,), {"epoch": 2}, r"got an unexpected keyword argument 'epoch' \(did you mean 'epochs'\?\)"),
        (typed, "", (1,), {"lr": 2}, "multiple values for argument 'lr'"),
        (typed, "", ("x",), {}, "typed: lr: 'x' is not a number"),
        (typed, "", (True,), {}, "typed: lr: True is not a number"),
        (typed, "", (1,), {"kind": "huge"}, "typed: kind: 'huge' is not one of 1, 2"),
        (typed, "", (1,), {"mode": "c"}, "typed: mode: 'c' is not one of a, b"),
        (typed, "", (1,), {"sizes": [1, "x"]}, "typed: sizes: 'x' is not a whole number"),
        (typed, "", (), {"epochs": 1}, "--lr must be given"),
        (typed, "", (1,), {"c": 2}, "launch makes the Context 'c'; leave it out of kwargs"),
        (both, "", (3,), {}, "both: config: 3 is not a table"),
        (both, "", ({"stepz": 1},), {}, r"unknown key 'stepz' \(did you mean 'steps'\?\)"),
        (nothing, "", (3,), {}, "too many positional arguments. It takes nothing."),
        (bare_two, "", (3,), {}, "the parameter 'epochs' is no flag"),
        (no_context, "--lr 1", (2.0,), {}, "'lr' is given twice, as a flag and from Python"),
    ],
)
def test_values_that_do_not_fit(
    function: Callable[..., Any], words: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises((BadRequest, ConfigError), match=message):
        bind(Parameters.of(function), words.split(), args, kwargs)


def test_the_help_has_types_defaults_comments_and_groups() -> None:
    text = describe_flags("m:typed", Parameters.of(typed))
    assert "--lr NUMBER         how fast (required)" in text
    assert "--[no-]debug        print more (default: False)" in text
    assert "--kind small|large  (default: small)" in text
    assert "noqa" not in text
    nested = describe_flags("m:both", Parameters.of(both))
    assert "optimizer steps (default: 3)\n\noptimizer (Optimizer): of the model\n  --optimizer.lr NUMBER" in nested
    assert describe_flags("m:nothing", Parameters.of(nothing)) == "m:nothing takes no arguments."
    assert "a Context and reads its arguments itself" in describe_flags("m:context", Parameters.of(context))
    assert "the parameter 'table' is no flag" in describe_flags("m:o", Parameters.of(optional_table))
    with pytest.raises(BadRequest, match=r"'lr' is no flag.*'epochs' is no flag"):
        describe_flags("m:bare_two", Parameters.of(bare_two))
