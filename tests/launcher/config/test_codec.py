"""Conversion of dataclasses to plain data and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.cluster import Cluster, Node, Ray, Slurm
from launcher.config.codec import from_data, to_data
from launcher.errors import BadRequest
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target

text = st.text(max_size=8)
paths = st.from_regex(r"/[a-z é'\"$]{1,8}(/[a-z]{1,4})?", fullmatch=True).map(Path)
placements = st.builds(
    Placement, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["cpu", "cuda", "tpu"]), why=text
)
specs = st.builds(
    RunSpec, text, st.lists(text).map(tuple), gpus=st.none() | st.integers(1, 9), time=st.none() | text,
    max_restarts=st.integers(0, 9),
)  # fmt: skip
targets = st.builds(
    Target, st.sampled_from(["function", "script", "module", "value"]), text, *[st.lists(text).map(tuple)] * 3
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
clusters = st.builds(
    Cluster, text, st.sampled_from(["local", "slurm", "ray"]), shared=st.lists(text).map(tuple), grace=numbers,
    node=st.builds(Node, st.none() | st.integers(0, 9), st.integers(0, 9), numbers, st.none() | text),
    slurm=st.builds(Slurm, text, exclusive=st.booleans(), sbatch=st.dictionaries(text, st.integers() | text)),
    ray=st.builds(Ray, address=st.none() | text),
)  # fmt: skip
plans = st.builds(
    Plan, text, paths, specs, st.sampled_from(["local", "slurm", "ray"]), clusters, placements, targets, paths,
    st.integers(1, 99), st.dictionaries(text, text),
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(plans)
def test_a_plan_survives_its_journey_through_json(plan: Plan) -> None:
    there = json.loads(json.dumps(to_data(plan)))
    assert from_data(Plan, there, "plan.json") == plan


@dataclass(frozen=True)
class Inner:
    number: float = 1.0


@dataclass(frozen=True)
class Outer:
    needed: int
    kind: Literal["a", "b"] = "a"
    state: State = State.LOST
    where: Path | None = None
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    table: dict[str, int] = field(default_factory=dict)
    flag: bool = False
    anything: Any = None


def test_every_kind_of_value_there_and_back() -> None:
    value = Outer(1, "b", State.QUEUED, Path("/x"), Inner(2.5), (Inner(), Inner(3.0)), {"k": 1}, True, [1, {"a": None}])
    data = to_data(value)
    assert data["many"] == [{"number": 1.0}, {"number": 3.0}]
    assert (data["state"], data["where"]) == ("queued", "/x")
    assert from_data(Outer, json.loads(json.dumps(data)), "here") == value


def test_a_whole_number_will_do_where_a_number_is_asked_for() -> None:
    number = from_data(Inner, {"number": 3}, "here").number
    assert (number, type(number)) == (3.0, float)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "here: the key 'needed' is missing."),
        ({"neded": 1}, "here: unknown key 'neded' (did you mean 'needed'?). Known keys: needed, kind, state,"),
        ({"zzz": 1}, "here: unknown key 'zzz'. Known keys: needed, kind"),
        ({"needed": "1"}, "here: needed: expected a whole number, got '1'."),
        ({"needed": True}, "here: needed: expected a whole number, got True."),
        ({"needed": 1.0}, "here: needed: expected a whole number, got 1.0."),
        ({"needed": None}, "here: needed: expected a whole number, got None."),
        ({"needed": 1, "flag": 1}, "here: flag: expected true or false, got 1."),
        ({"needed": 1, "kind": "c"}, "here: kind: 'c' is not one of a, b."),
        ({"needed": 1, "inner": 3}, "here: inner: expected a table, got 3."),
        ({"needed": 1, "inner": {"number": "x"}}, "here: inner: number: expected a number, got 'x'."),
        ({"needed": 1, "many": "ab"}, "here: many: expected a list, got 'ab'."),
        ({"needed": 1, "many": [3]}, "here: many: expected a table, got 3."),
        ({"needed": 1, "table": [1]}, "here: table: expected a table, got [1]."),
        ({"needed": 1, "table": {"k": "v"}}, "here: table.k: expected a whole number, got 'v'."),
        ({"needed": 1, "state": "gone"}, "here: state: 'gone' is not one of queued, running,"),
        ({"needed": 1, "where": 3}, "here: where: expected a string, got 3."),
    ],
)
def test_what_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as refused:
        from_data(Outer, data, "here")
    assert words in str(refused.value)
