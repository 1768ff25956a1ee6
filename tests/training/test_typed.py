"""Conversion of plain data and text to annotated types, for JSON, TOML and flags."""

from __future__ import annotations

import enum
import json
import tomllib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.errors import ConfigError
from training.flags.fields import parse
from training.flags.typed import MAX_DEPTH, brief, from_data


class Colour(enum.Enum):
    red = 1
    dark_blue = 2


@dataclass(frozen=True)
class Leaf:
    size: int
    rate: float = 0.5


@dataclass(frozen=True)
class Tree:
    leaf: Leaf
    pair: tuple[int, str] = (1, "x")
    leaves: tuple[Leaf, ...] = ()
    names: dict[str, tuple[float, ...]] = field(default_factory=dict)
    colour: Colour = Colour.red
    kind: Literal["a", 1] = "a"
    where: Path | None = None
    either: int | str | None = None
    switch: bool = False
    items: list[int] = field(default_factory=list)
    anything: Any = None
    maybe: Leaf | None = None
    derived: int = field(default=0, init=False)


def test_every_type_from_json_and_toml() -> None:
    text = (
        'pair = [2, "y"]\ncolour = 2\nkind = 1\nwhere = "/x"\neither = "z"\nswitch = true\nitems = [1]\nanything = 1.5\n'
        "leaves = [{size = 1}, {size = 2, rate = 3}]\n[leaf]\nsize = 3\n[names]\na = [1, 2.5]\n[maybe]\nsize = 4\n"
    )
    expected = Tree(
        Leaf(3), (2, "y"), (Leaf(1), Leaf(2, 3.0)), {"a": (1.0, 2.5)}, Colour.dark_blue, 1, Path("/x"), "z", True, [1],
        1.5, Leaf(4),
    )  # fmt: skip
    data = tomllib.loads(text)
    assert from_data(Tree, data, "here") == expected
    assert from_data(Tree, json.loads(json.dumps(data)), "here") == expected
    assert from_data(Tree, {"leaf": {"size": 1}, "where": None, "maybe": None}, "here") == Tree(Leaf(1))


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "here: expected a table, got []."),
        ("x", "here: expected a table, got 'x'."),
        ({"lef": 1}, "here: unknown key 'lef' (did you mean 'leaf'?). Known keys: leaf, pair,"),
        ({1: 1}, "here: unknown key 1"),
        ({"derived": 1}, "here: unknown key 'derived'"),
        ({"leaf": {"sise": 1}}, "here: leaf: unknown key 'sise' (did you mean 'size'?)"),
        ({"leaf": {}}, "here: leaf: the key 'size' is missing."),
        ({"leaf": {"size": True}}, "here: leaf: size: expected a whole number, got True."),
        ({"leaf": {"size": 1, "rate": float("nan")}}, "here: leaf: rate: expected a finite number, got nan."),
        ({"leaf": {"size": 1, "rate": float("inf")}}, "here: leaf: rate: expected a finite number, got inf."),
        ({"leaf": {"size": 1, "rate": 10**400}}, "here: leaf: rate: expected a finite number, got 1000"),
        (
            {"leaf": {"size": 1, "rate": 10**5000}},
            "here: leaf: rate: expected a finite number, got a number of thousands",
        ),
        ({"leaf": {"size": 1, "rate": True}}, "here: leaf: rate: expected a number, got True."),
        ({"pair": [1]}, "here: pair: expected 2 values, got [1]."),
        ({"pair": {"a": 1}}, "here: pair: expected a list"),
        ({"pair": ["x", "y"]}, "here: pair: expected a whole number, got 'x'."),
        ({"names": {"a": ["b"]}}, "here: names.a: expected a number, got 'b'."),
        ({"names": {"a": [float("nan")]}}, "here: names.a: expected a finite number, got nan."),
        ({"leaves": [{"size": 1}, 2]}, "here: leaves: expected a table, got 2."),
        ({"colour": True}, "here: colour: True is not one of 1, 2."),
        ({"colour": "red"}, "here: colour: 'red' is not one of 1, 2."),
        ({"colour": []}, "here: colour: [] is not one of 1, 2."),
        ({"kind": True}, "here: kind: True is not one of a, 1."),
        ({"kind": {}}, "here: kind: {} is not one of a, 1."),
        ({"where": 1}, "here: where: expected a string, got 1."),
        ({"either": 1.5}, "here: either: expected a whole number, got 1.5."),
        ({"switch": "true"}, "here: switch: expected true or false, got 'true'."),
        ({"items": "12"}, "here: items: expected a list, got '12'."),
        ({"maybe": 3}, "here: maybe: expected a table, got 3."),
        ({"anything": {"x": [float("-inf")]}}, "here: anything: expected a finite number, got -inf."),
        ({"anything": nested(MAX_DEPTH)}, "here: tables and lists are nested more than 32 levels deep."),
        ({"leaf": nested(100_000)}, "here: tables and lists are nested more than 32 levels deep."),
        ({"switch": "x" * 5000}, "here: switch: expected true or false, got 'xxx"),
        ({"x" * 5000: 1}, "here: unknown key 'xxx"),
    ],
    ids=lambda value: brief(value, 40) if isinstance(value, str) else "data",
)
def test_wrong_data_is_refused_with_its_path(data: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_data(Tree, data, "here")
    assert str(refused.value).startswith(words)
    assert len(str(refused.value)) < 500


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["size", "rate", "a"]), inner),
    max_leaves=6,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.dictionaries(st.sampled_from([*Tree.__dataclass_fields__, "other"]), values))
def test_any_data_becomes_a_value_or_one_kind_of_error(data: dict[str, Any]) -> None:
    with suppress(ConfigError):
        assert isinstance(from_data(Tree, data, "here"), Tree)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--size=٣", "is not a whole number"),
        ("--rate=١.٥", "is not a number"),
        ("--rate=1e999", "is not a finite number"),
        ("--rate=-inf", "is not a finite number"),
        ("--size=" + "9" * 5000, "is not a whole number"),
        ("--size=", "is not a whole number"),
        ("--size=" + "x" * 5000, "is not a whole number"),
    ],
    ids=range(7),
)
def test_wrong_text_is_refused(argument: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse(Leaf, ["--size=1", argument] if "rate" in argument else [argument])
    assert len(str(refused.value)) < 300
