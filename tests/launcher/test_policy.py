"""What the end of an attempt means: the whole table, and every name in it."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from launcher.policy import ADVICE, RETRIED, Action, Outcome, decide

Errors = list[dict[str, Any]]


def error(kind: str, rank: int = 0, message: str = "no") -> dict[str, Any]:
    return {
        "kind": kind,
        "rank": rank,
        "host": "node1",
        "type": "OSError",
        "message": message,
        "traceback": "Traceback",
    }


def test_every_kind_says_whether_it_is_retried_and_what_to_do() -> None:
    assert list(RETRIED) == list(ADVICE)
    assert all(text.endswith(".") for text in ADVICE.values())


@pytest.mark.parametrize(
    ("outcome", "action"),
    [
        (Outcome({0: 0, 1: 0}), Action.FINISH),
        (Outcome({0: 3, 1: 3}), Action.STOP),  # the target stopped by itself, or a stop file was found
        (Outcome({0: 0, 1: 3}), Action.STOP),
        (Outcome({0: 0, 1: 0}, stop="SIGTERM"), Action.FINISH),  # the stop came after the last step
        (Outcome({0: 3, 1: 3}, stop="SIGTERM"), Action.STOP),
        (Outcome({}, stop="SIGINT"), Action.STOP),  # before any rank could say anything
        (Outcome({0: -15, 1: 3}, stop="SIGTERM"), Action.STOP),  # a script dies of the signal
        (Outcome({0: -9, 1: -9}, stop="SIGINT"), Action.STOP),  # the second Ctrl-C
    ],
)
def test_ends_that_are_no_failures(outcome: Outcome, action: Action) -> None:
    assert decide(outcome, 3) == (action, None)


@pytest.mark.parametrize(
    ("exits", "errors", "more", "kind", "rank", "message"),
    [
        ({0: 1}, [error("user error")], {}, "user error", 0, "OSError: no"),
        ({0: 2}, [error("bad request", message="--lr: no")], {}, "bad request", 0, "--lr: no"),
        ({1: 1}, [error("out of memory", 1)], {}, "out of memory", 1, "OSError: no"),
        ({1: 1}, [error("disk full", 1)], {}, "disk full", 1, "OSError: no"),
        ({0: 1, 1: 1}, [error("communication", 0)], {}, "communication", 0, "OSError: no"),
        ({1: 1, 0: 1}, [error("user error", 1), error("communication")], {}, "user error", 1, "OSError: no"),
        ({1: -9}, [], {}, "killed", 1, "rank 1 was ended by SIGKILL"),
        ({1: -11}, [], {}, "killed", 1, "rank 1 was ended by SIGSEGV"),
        ({1: -40}, [], {}, "killed", 1, "rank 1 was ended by signal 40"),
        # The others lost the killed one; what they say is its echo.
        ({0: 1, 1: -9}, [error("communication", 0)], {}, "killed", 1, "rank 1 was ended by SIGKILL"),
        # A rank raised, and took a signal on its way out.
        ({0: -6}, [error("user error", 0)], {}, "user error", 0, "OSError: no"),
        ({2: 1}, [], {}, "user error", 2, "rank 2 ended with exit status 1 and left no error"),
        ({2: 77}, [], {}, "user error", 2, "rank 2 ended with exit status 77 and left no error"),
        ({2: 2}, [], {}, "bad request", 2, "rank 2 ended with exit status 2 and left no error"),
        ({}, [], {"lost": [3, 1]}, "node lost", None, "node 3 stopped answering"),
        ({0: 1}, [error("communication")], {"lost": [1]}, "node lost", None, "node 1 stopped answering"),
        ({0: 3}, [], {"lost": [1], "stop": "SIGTERM"}, "node lost", None, "node 1 stopped answering"),
        ({0: 1}, [error("user error")], {"stop": "SIGTERM"}, "user error", 0, "OSError: no"),
    ],
)
def test_failures_are_named(
    exits: dict[int, int], errors: Errors, more: dict[str, Any], kind: str, rank: int | None, message: str
) -> None:
    action, failure = decide(Outcome(exits, errors, **more), restarts_left=1)
    assert failure is not None
    assert (failure.kind, failure.rank, failure.message, failure.advice) == (kind, rank, message, ADVICE[kind])
    assert action is (Action.RESTART if RETRIED[kind] else Action.FAIL)
    assert decide(Outcome(exits, errors, **more), restarts_left=0) == (Action.FAIL, failure)


def test_the_table_of_failures_covers_every_kind() -> None:
    mark = next(m for m in test_failures_are_named.pytestmark if m.name == "parametrize")
    assert {row[3] for row in mark.args[1]} == set(RETRIED)


def test_no_signal_is_without_a_name() -> None:
    for number in signal.valid_signals():
        _, failure = decide(Outcome({0: -number}), 0)
        assert failure is not None
        assert failure.kind == "killed"
