"""Values from Python: in the plan as JSON where that makes the same ones again, or else pickled."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from launcher.config.codec import to_data
from launcher.errors import BadRequest
from launcher.request.binding import call_of, checked_values, values_of
from launcher.request.spec import Target, Values
from launcher.request.values import check_given, load, show, write
from training.flags.typed import from_data


class Kind(enum.Enum):
    small = 1


@dataclass
class Config:
    lr: float = 1.0
    where: Path | None = None
    kind: Kind = Kind.small
    more: Any = None
    sizes: tuple[int, ...] = ()


def takes(ctx, config: Config, n: int = 2) -> Any:  # type: ignore[no-untyped-def]
    return config, n


def anything(x, y) -> Any:  # type: ignore[no-untyped-def]
    return x, y


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize(
    ("function", "args", "kwargs", "pickled"),
    [
        (takes, (Config(2.0, Path("/a"), sizes=(1, 2)),), {"n": 3}, False),
        (takes, (Config(more={1: 2}),), {}, True),
        (takes, (Config(more=(1, 2)),), {}, True),
        (takes, (Config(more=math.inf),), {}, True),
        (anything, (1, [None, "x", 2.5, {"a": True}]), {}, False),
        (anything, (1,), {"y": (1, 2)}, True),
        (anything, (1, Path("/a")), {}, True),
        (anything, (1, [(1, 2)]), {}, True),
        (anything, (1, {1: 2}), {}, True),
        (anything, (1, math.nan), {}, True),
        (anything, (1, "x" * 100_000), {}, True),
        (anything, (1, json.loads("[" * 40 + "]" * 40)), {}, True),
    ],
)
def test_they_are_the_same_after_the_journey(
    tmp_path: Path, by_value: bool, function: Callable[..., Any], args: Any, kwargs: Any, pickled: bool
) -> None:
    values = checked_values(function, (), args, kwargs, by_value=by_value)
    typed = function is takes  # without its function's annotations, only plain data is JSON
    assert values.pickled == (pickled or (by_value and typed))
    target = Target("value" if by_value else "function", "m:f", values=values)
    there = from_data(Target, json.loads(json.dumps(to_data(target))), "target")
    file = tmp_path / "arguments.pkl"
    if values.pickled:
        write(file, *values_of(target, function, (args, kwargs)))
    found = call_of(there, function, file).run(function, lambda: "CTX")
    expected = function(*(("CTX", *args) if typed else args), **kwargs)
    assert repr(found) == repr(expected)


def test_a_dataclass_of_a_script_travels_by_value(tmp_path: Path) -> None:
    space: dict[str, Any] = {"__name__": "__main__", "field": field, "dataclass": dataclass}
    exec("@dataclass\nclass C:\n    a: int\n    b: list = field(default_factory=list)\n", space)
    exec("def f(ctx, c: C, d: C = C(1)): return c.a, c.b, d.a", space)
    function = cloudpickle.loads(cloudpickle.dumps(space["f"]))
    values = checked_values(function, (), (space["C"](4),), {}, by_value=True)
    write(tmp_path / "a", *values_of(Target("value", "f", values=values), function, ((space["C"](4),), {})))
    assert call_of(Target("value", "f", values=values), function, tmp_path / "a").run(function, list) == (4, [], 1)


def test_values_that_do_not_pickle_or_load(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as file, pytest.raises(BadRequest, match="does not pickle"):
        write(tmp_path / "a", (file,), {})
    (tmp_path / "a").write_bytes(b"nonsense")
    with pytest.raises(BadRequest, match="the values of args and kwargs cannot be loaded"):
        load(Values(pickled=True), tmp_path / "a")


def test_how_they_are_displayed() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    assert show((1, "a\nb"), {"lr": 3e-4, "odd": Odd()}) == "1, 'a\\nb', lr=0.0003, odd=<Odd>"
    assert len(show((list(range(10_000)),) * 100, {})) < 500


@pytest.mark.parametrize(
    ("words", "args", "kwargs", "message"),
    [
        ((3,), (), None, r"launch\(target, 3\): words .* are written args=\(3,\) or kwargs"),
        ((), 3, None, r"args=3: a list or tuple of values is needed, such as args=\(3,\)"),
        ((), "abc", None, "a list or tuple"),
        ((), {"a": 1}, None, "a list or tuple"),
        ((), (), [("a", 1)], "a dict of values by parameter"),
        ((), (), {1: 2}, "a dict of values by parameter"),
    ],
)
def test_what_launch_does_not_take(words: Any, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        check_given(words, args, kwargs)
    assert check_given(("--x",), [1], None) == ((1,), {})
