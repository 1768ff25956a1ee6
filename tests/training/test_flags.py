from __future__ import annotations

import enum
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cloudpickle
import pytest

from training.bert.config import TrainConfig
from training.errors import ConfigError
from training.flags.fields import parse, usage


class Colour(enum.Enum):
    red = 1
    dark_blue = 2


@dataclass(frozen=True)
class Config:
    count: int  # how many
    rate: float = 0.5  # how fast
    # and this goes with nothing
    name: str = "x"
    quick: bool = False  # whether to hurry
    where: Path | None = None
    kind: Literal["a", "b", 3] = "a"
    colour: Colour = Colour.red
    sizes: list[int] = field(default_factory=list, metadata={"help": "some sizes"})
    pair: tuple[int, str] = (1, "x")
    many: tuple[float, ...] = ()
    either: int | str = 0


def test_every_type() -> None:
    words = (
        "--count 3 --rate=1e-3 --name=--odd --quick --where /tmp/a --kind 3 --colour dark_blue --sizes 1,2,3 "
        "--pair 4,y --many 1,2.5 --either x1"
    )
    assert parse(Config, words.split()) == Config(
        3, 1e-3, "--odd", True, Path("/tmp/a"), 3, Colour.dark_blue, [1, 2, 3], (4, "y"), (1.0, 2.5), "x1"
    )
    assert parse(Config, ["--count", "-3", "--where", "none", "--sizes=", "--no-quick", "--either", "7"]) == Config(
        -3, either=7
    )
    assert parse(Config, ["--count=1", "--quick=false"]).quick is False


def test_dashes_and_underscores_are_the_same() -> None:
    assert parse(TrainConfig, ["--batch_size", "4", "--max-length=9"]) == TrainConfig(batch_size=4, max_length=9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--count must be given"),
        (["--count"], "--count needs a value: --count INT"),
        (["--count", "--quick"], "needs a value.*written --count=--quick"),
        (["--count", "many"], "--count: 'many' is not a whole number"),
        (["--count", "1.5"], "not a whole number"),
        (["--rate", "nan"], "not a finite number"),
        (["--rate", "fast"], "not a number"),
        (["--count", "1", "--count", "2"], "--count is given twice"),
        (["--quick", "--no-quick"], "--quick is given twice"),
        (["--cuont", "1"], "unknown option --cuont; did you mean --count?"),
        (["--cou", "1"], "unknown option --cou"),
        (["--kind", "c"], "'c' is not one of a, b, 3"),
        (["--colour", "green"], "not one of red, dark_blue"),
        (["--pair", "1"], "2 values with commas"),
        (["--sizes", "1,x"], "not a whole number"),
        (["--quick=maybe"], "not true or false"),
        (["--no-quick=true"], "takes no value"),
        (["--no-count"], "unknown option"),
        (["--where="], "PATH|none"),
        (["word"], "unexpected 'word'"),
        (["--"], "unexpected '--'"),
    ],
)
def test_what_is_wrong_is_named(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Config, args, prog="job")


def test_a_class_that_cannot_have_flags() -> None:
    @dataclass
    class Odd:
        thing: dict[str, int] = field(default_factory=dict)

    for cls in (Odd, int):
        with pytest.raises(ConfigError, match=r"no flag can have the type|is no dataclass"):
            parse(cls, [])


def test_the_error_of_the_class_itself_comes_through() -> None:
    @dataclass
    class Picky:
        size: int = 1

        def __post_init__(self) -> None:
            if self.size > 3:
                raise ConfigError("too big")

    with pytest.raises(ConfigError, match="too big"):
        parse(Picky, ["--size", "4"])


def test_usage_takes_its_help_from_the_comments() -> None:
    text = usage(Config)
    assert "--count INT" in text
    assert "how many (required)" in text
    assert "how fast (default: 0.5)" in text
    assert "--[no-]quick" in text
    assert "whether to hurry (default: False)" in text
    assert "some sizes" in text
    assert "a|b|3" in text
    assert "goes with nothing" not in text
    assert all(len(line) <= 110 for line in usage(TrainConfig).splitlines())


def test_every_option_of_the_reference_job_has_help() -> None:
    for line in usage(TrainConfig).split("\n  --"):
        assert len(line.split()) > 4, line


def test_a_class_without_source_has_usage_too() -> None:
    space: dict[str, Any] = {"dataclass": dataclass}
    exec("@dataclass\nclass Made:\n    size: int = 1", space)
    assert "--size INT" in usage(space["Made"])


# ---- nested dataclasses ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3  # learning rate
    fused: bool = True  # one kernel for all parameters
    kind: Literal["sgd", "adam"] = "adam"


@dataclass(frozen=True)
class Schedule:
    warmup: int  # steps
    optimizer: Optimizer | None = None


@dataclass(frozen=True)
class Nested:
    steps: int = 3  # optimizer steps
    optimizer: Optimizer = Optimizer(lr=5.0)  # of the model
    schedule: Schedule | None = None
    second: Optimizer | None = field(default_factory=lambda: Optimizer(kind="sgd"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Nested()),
        ("--steps 4 --optimizer.kind sgd", Nested(4, Optimizer(5.0, kind="sgd"))),
        ("--no-optimizer.fused --optimizer.lr=3e-4", Nested(optimizer=Optimizer(3e-4, fused=False))),
        ("--schedule.warmup 9", Nested(schedule=Schedule(9))),
        ("--schedule.warmup 9 --schedule.optimizer.lr 2", Nested(schedule=Schedule(9, Optimizer(2.0)))),
        ("--schedule.warmup 9 --schedule.optimizer none", Nested(schedule=Schedule(9))),
        ("--second.lr 7", Nested(second=Optimizer(7.0, kind="sgd"))),
        ("--second none", Nested(second=None)),
    ],
)
def test_fields_of_a_nested_dataclass_are_dotted_flags(words: str, expected: Nested) -> None:
    assert parse(Nested, words.split()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer.rl 3", "unknown option --optimizer.rl; did you mean --optimizer.lr?"),
        ("--optimizer.kind x", "--optimizer.kind: 'x' is not one of sgd, adam"),
        ("--optimizer none", "unknown option --optimizer;"),
        ("--schedule.optimizer.lr 2", "--schedule.warmup must be given"),
        ("--schedule none --schedule.warmup 2", "--schedule none and other flags of it are given"),
        ("--second yes", "--second: 'yes' is not none"),
    ],
)
def test_what_is_wrong_with_a_nested_flag_is_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Nested, words.split())


def test_a_required_nested_dataclass_asks_for_its_required_fields() -> None:
    @dataclass
    class Outer:
        size: int
        schedule: Schedule

    Outer.__annotations__ = {"size": int, "schedule": Schedule}
    with pytest.raises(ConfigError, match=r"--size and --schedule\.warmup must be given"):
        parse(Outer, [])
    assert parse(Outer, ["--size", "1", "--schedule.warmup", "2"]) == Outer(1, Schedule(2))


def test_usage_groups_the_flags_of_nested_dataclasses() -> None:
    top, optimizer, schedule, below, second = usage(Nested).split("\n\n")
    assert top.split() == ["--steps", "INT", "optimizer", "steps", "(default:", "3)"]
    assert optimizer.splitlines()[0] == "optimizer (Optimizer): of the model"
    assert "learning rate (default: 5.0)" in optimizer
    assert "--[no-]optimizer.fused" in optimizer
    assert schedule.splitlines()[0] == "schedule (Schedule or none)"
    assert "leave it out (default)" in schedule
    assert "steps (required)" in schedule
    assert "--schedule.optimizer.lr NUMBER" in below
    assert "(default: sgd)" in second


@dataclass
class Endless:
    inner: Endless | None = None


@dataclass
class Unknown:
    thing: NoSuchType = None  # type: ignore[name-defined] # noqa: F821


@dataclass
class TwoOfThem:
    either: Optimizer | Schedule = Optimizer()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Endless, "--inner: Endless contains itself"),
        (Unknown, "the annotations of Unknown cannot be read: name 'NoSuchType' is not defined"),
        (TwoOfThem, "--either: no flag can have the type"),
    ],
)
def test_a_dataclass_that_cannot_have_flags_is_an_error_of_ours(cls: type, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(cls, [])
    with pytest.raises(ConfigError, match=message):
        usage(cls)


def test_a_value_error_of_the_class_is_wrong_input() -> None:
    @dataclass
    class Picky:
        size: int = 1

        def __post_init__(self) -> None:
            if self.size > 3:
                raise ValueError("size is at most 3")

    with pytest.raises(ConfigError, match="Picky: size is at most 3"):
        parse(Picky, ["--size", "4"])


def test_the_factory_of_a_default_is_called_once_for_an_instance() -> None:
    calls = []

    @dataclass
    class Counted:
        sizes: list[int] = field(default_factory=lambda: calls.append(1) or [1])  # type: ignore[func-returns-value]

    Counted.__annotations__ = {"sizes": list[int]}
    assert parse(Counted, []) == Counted([1])
    assert len(calls) == 1
    assert "(default: 1)" in usage(Counted)


def test_a_dataclass_that_was_pickled_by_value_has_flags() -> None:
    space: dict[str, Any] = {"__name__": "__main__", "dataclass": dataclass, "field": field}
    exec("@dataclass\nclass Made:\n    size: int\n    more: list[int] = field(default_factory=list)", space)
    made = _in_another_process(space["Made"])
    assert made == ["--size must be given", "1 []"]


def _in_another_process(cls: type) -> list[str]:
    """What `parse` says there, where the class is made anew from its pickle."""
    program = """
import sys, cloudpickle
from training.errors import ConfigError
from training.flags.fields import parse
made = cloudpickle.loads(sys.stdin.buffer.read())
try:
    parse(made, [])
except ConfigError as error:
    print(error)
found = parse(made, ["--size", "1"])
print(found.size, found.more)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], input=cloudpickle.dumps(cls), capture_output=True, check=True
    )
    lines: list[str] = done.stdout.decode().splitlines()
    return lines
