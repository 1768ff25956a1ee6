"""Values of a request: numbers, names, durations, states."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.durations import parse_minutes, parse_moment, parse_seconds, seconds
from launcher.errors import BadRequest
from launcher.request.placement.place import Devices
from launcher.request.spec import RunSpec, State, check_name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 0}, "--gpus 0: at least 1 is needed."),
        ({"tpus": -1}, "--tpus -1: at least 1 is needed."),
        ({"cpus": 0}, "--cpus 0: at least 1 is needed."),
        ({"cpus": 1, "nodes": 0}, "--nodes 0: at least 1 is needed."),
        ({"max_restarts": -1}, "--max-restarts -1: 0 or more is needed."),
        ({"gpus": "2"}, "--gpus 2: a whole number is needed, not '2'."),
        ({"gpus": 2.0}, "--gpus 2.0: a whole number is needed, not 2.0."),
        ({"gpus": True}, "--gpus True: a whole number is needed"),
        ({"max_restarts": 1.5}, "--max-restarts 1.5: a whole number is needed"),
        ({"gpus": 1, "cpus": 1}, "--gpus and --cpus together: a run uses one kind of device. Give one of them."),
        ({"gpus": 1, "tpus": 1, "cpus": 1}, "--gpus and --tpus and --cpus together"),
        ({"name": "../x"}, "--name '../x': a run name is up to 100 letters"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest) as refused:
        RunSpec(**options)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ({}, None),
        ({"nodes": 2, "topology": "2x2"}, None),
        ({"gpus": 4}, Devices("gpu", 4)),
        ({"cpus": 2, "nodes": 1}, Devices("cpu", 2, 1)),
        ({"gpus": 8, "accelerator": "h100"}, Devices("gpu", 8, None, "h100")),
        ({"tpus": 16, "accelerator": "v5e", "topology": "4x4"}, Devices("tpu", 16, None, "v5e", "4x4")),
    ],
)
def test_the_devices_of_a_request(options: dict[str, Any], devices: Devices | None) -> None:
    assert RunSpec(**options).devices() == devices


@pytest.mark.parametrize("name", ["a", "0", "mrpc-lr3e-5", "A.b_c-9", "x" * 100, "a..b"])
def test_a_name_that_is_a_plain_file_name(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "_x", "a/b", "../a", "a b", "a\n", "\na", "a\0b", "a'b", 'a"b', "$(id)", "`id`",
     "a;b", "a|b", "a&b", "%j", "~", "ä", "a\u2028b", "x" * 101],
)  # fmt: skip
def test_a_name_that_is_refused(name: str) -> None:
    with pytest.raises(BadRequest, match="a run name is up to 100 letters"):
        check_name(name)


@settings(deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=12))
def test_no_name_that_passes_leaves_the_runs_folder(name: str) -> None:
    try:
        check_name(name)
    except BadRequest:
        return
    assert name.isascii()
    assert not set(name) & set("/\\ \n\0'\"$`")
    assert name not in (".", "..")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90m", 90),
        ("2h", 120),
        ("1d", 1440),
        ("1d12h", 2160),
        ("1d2h3m4s", 1564),
        ("1h30m", 90),
        ("45s", 1),
        ("60s", 1),
        ("61s", 2),
        ("02:30:00", 150),
        ("0:00:01", 1),
        ("100:00:00", 6000),
        ("90", 90),
        ("30:00", 30),
        ("30:01", 31),
        ("1:2:3", 63),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("1-00:00:00", 1440),
        ("2-12:30:30", 3631),
    ],
)
def test_a_duration_in_minutes_rounded_up(text: str, minutes: int) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize(
    "text", ["", "0", "0m", "00:00:00", "00:00", "2 h", "2H", "h", "1h2d", "-1h", "1.5h", "30:60", "1:60:3", "2h\n", "soon",
     "24:61:61", "24:00:60", "1-24:60:00", "٣h", "٠٢:٣٠:٠٠", "9" * 5000, "9" * 5000 + "h", "1" * 10 + "h", "+1h", "1_0h",
     "1h1h", "nan", "1e3s", "1--00:00:00", "1-"]
)  # fmt: skip
def test_no_duration(text: str) -> None:
    with pytest.raises(BadRequest, match="write a duration such as 90m, 2h, 1d12h or 02:30:00") as refused:
        parse_minutes(text)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("text", ["3651d", "999999999d", "999999999-00:00:00", "87601h", "3650d1s", "999999999h"])
def test_a_duration_that_is_too_long(text: str) -> None:
    with pytest.raises(BadRequest, match=r"at most 3650d \(10 years\) is allowed"):
        parse_minutes(text)
    assert parse_minutes("3650d") == 3650 * 24 * 60


@given(st.text(st.characters(), max_size=12) | st.from_regex(r"[0-9]{0,3}[dhms:-]([0-9]{0,2}[dhms:-]?){0,3}"))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_any_text_is_a_duration_or_none(text: str) -> None:
    assert seconds(text) is None or text.isascii()


def test_states_and_their_exit_statuses() -> None:
    table = {state: (state.done, state.exit_status) for state in State}
    assert table == {
        State.QUEUED: (False, 1),
        State.RUNNING: (False, 1),
        State.SUCCEEDED: (True, 0),
        State.FAILED: (True, 1),
        State.STOPPED: (True, 3),
        State.LOST: (True, 1),
        State.UNKNOWN: (False, 1),
    }


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("2h", 7200), ("1d12h", 129600), ("0s", 0)])
def test_durations_with_a_unit(text: str, expected: int) -> None:
    assert parse_seconds("--timeout", text) == expected
    before = time.time()
    assert before - expected <= parse_moment("--since", text) <= time.time() - expected


@pytest.mark.parametrize(
    "text", ["", "60", "1.5h", "soon", "-1h", "3651d", "9" * 100, "2026-11", "02:30:00", "\u0663s"]
)
def test_no_duration_with_a_unit(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^--timeout .*: write a duration with its unit, such as "):
        parse_seconds("--timeout", text)


def test_moments() -> None:
    day = datetime(2026, 11, 20).timestamp()
    assert parse_moment("--since", "2026-11-20") == day
    for text in ("2026-11-20T18:30", "2026-11-20 18:30:00"):
        assert parse_moment("--since", text) == day + 18.5 * 3600
    for text in ("2026-13-01", "2026-02-30", "2026-11-20T24:01"):
        with pytest.raises(BadRequest, match="there is no such date"):
            parse_moment("--since", text)
    for text in ("", "60", "2026-11", "20261120", "yesterday", "2026-11-20T18"):
        with pytest.raises(BadRequest, match=r"write a duration .*, or a date such as 2026-11-20\.$"):
            parse_moment("--older", text)
