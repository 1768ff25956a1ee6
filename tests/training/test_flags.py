from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from training.bert.config import TrainConfig
from training.errors import ConfigError
from training.flags import parse, usage


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
