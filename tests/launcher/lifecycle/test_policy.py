"""The policy for the end of an attempt: the whole table."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from launcher.lifecycle.history import FailedAttempt, History, read
from launcher.lifecycle.policy import (
    ADVICE,
    LONGEST_BACK_OFF,
    RULES,
    Action,
    Outcome,
    Retry,
    backoff_seconds,
    decide,
    no_progress,
    unfit,
)

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
    assert list(RULES) == list(ADVICE)
    assert all(rule.advice.endswith(".") for rule in RULES.values())


@pytest.mark.parametrize(
    ("outcome", "action"),
    [
        (Outcome({0: 0, 1: 0}), Action.FINISH),
        (Outcome({0: 3, 1: 3}), Action.STOP),  # the target stopped by itself, or a stop file was found
        (Outcome({0: 0, 1: 3}), Action.STOP),
        (Outcome({0: 0, 1: 0}, stop="SIGTERM"), Action.FINISH),  # the stop came after the last step
        (Outcome({0: 3, 1: 3}, stop="SIGTERM"), Action.STOP),
        (Outcome({}, stop="SIGINT"), Action.STOP),  # before a rank could report
        (Outcome({0: -15, 1: 3}, stop="SIGTERM"), Action.STOP),  # the signal kills a script
        (Outcome({0: -9, 1: -9}, stop="SIGINT"), Action.STOP),  # the second Ctrl-C
        (Outcome({0: 3}, lost=["node1"], stop="SIGTERM"), Action.STOP),  # scancel reaches one node first
        (Outcome({0: 0}, stop="SIGTERM", hosts={0: "a", 1: "a"}), Action.STOP),  # rank 1 had to be killed
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
        # The other ranks lost the killed one; their errors are consequences.
        ({0: 1, 1: -9}, [error("communication", 0)], {}, "killed", 1, "rank 1 was ended by SIGKILL"),
        # A rank raised, and was then killed by a signal.
        ({0: -6}, [error("user error", 0)], {}, "user error", 0, "OSError: no"),
        ({2: 1}, [], {}, "user error", 2, "rank 2 ended with exit status 1 and left no error"),
        ({2: 4}, [], {}, "disk full", 2, "rank 2 could not write its error into the run directory"),
        ({2: 5}, [], {}, "storage", 2, "rank 2 could not write its error into the run directory"),
        ({2: 77}, [], {}, "user error", 2, "rank 2 ended with exit status 77 and left no error"),
        ({2: 2}, [], {}, "bad request", 2, "rank 2 ended with exit status 2 and left no error"),
        ({}, [], {"lost": ["node3", "node1"]}, "node lost", None, "node3 stopped answering"),
        ({0: 1}, [error("communication")], {"lost": ["node1"]}, "node lost", None, "node1 stopped answering"),
        ({}, [], {"unfit": {"node3": "slow", "node1": "old"}}, "unfit node", None, "node3: slow; node1: old"),
        ({}, [], {"unfit": {"node3": "slow"}, "lost": ["node1"]}, "node lost", None, "node1 stopped answering"),
        ({0: 1}, [error("user error")], {"stop": "SIGTERM"}, "user error", 0, "OSError: no"),
        ({1: 1}, [error("device", 1)], {}, "device", 1, "OSError: no"),
        ({0: 1, 1: 1}, [error("diverged", 1)], {}, "diverged", 1, "OSError: no"),
        ({0: 1}, [error("communication")], {"hung": (1, "rank 1 is stopped")}, "hung", 1, "rank 1 is stopped"),
        ({}, [], {"hung": (None, "no rank makes progress")}, "hung", None, "no rank makes progress"),
    ],
)
def test_failures_are_named(
    exits: dict[int, int], errors: Errors, more: dict[str, Any], kind: str, rank: int | None, message: str
) -> None:
    action, failure = decide(Outcome(exits, errors, **more), restarts_left=1)
    assert failure is not None
    assert (failure.kind, failure.rank, failure.message, failure.advice) == (kind, rank, message, ADVICE[kind])
    again = RULES[kind].retry is not Retry.NEVER and not {"lost", "unfit"} & more.keys()
    assert action is (Action.RESTART if again else Action.FAIL)
    assert decide(Outcome(exits, errors, **more), restarts_left=0) == (Action.FAIL, failure)


@pytest.mark.parametrize("code", [0, 1, 130, 143, -15, -9, 3])
@pytest.mark.parametrize("movable", [False, True])
def test_a_stop_is_an_end_of_its_own_only_for_a_program_without_a_context(code: int, movable: bool) -> None:
    """All combinations: ranks joined or not, stop requested or not; `movable`: a requeue is possible."""
    errors = [error("user error")] if code == 1 else []

    def action(joined: bool, stop: str, finished: bool = False) -> Action:
        outcome = Outcome({0: code, 1: 0}, errors, stop, joined=joined, finished=finished)
        return decide(outcome, 1, movable=movable)[0]

    killed = code in (-15, -9)
    failed = Action.RESTART if killed else Action.FAIL
    assert action(joined=False, stop="SIGTERM") is Action.STOP
    assert action(joined=False, stop="SIGTERM", finished=True) is Action.FINISH
    assert action(joined=False, stop="") is (Action.FINISH if code == 0 else failed)
    assert action(joined=True, stop="") is {0: Action.FINISH, 3: Action.STOP}.get(code, failed)
    with_context = {0: Action.FINISH, 3: Action.STOP, -15: Action.STOP, -9: Action.STOP}
    assert action(joined=True, stop="SIGTERM") is with_context.get(code, Action.FAIL)


def test_only_a_program_without_handler_and_steps_loses_everything() -> None:
    for exits, lost in (({0: -15, 1: -15}, True), ({}, True), ({0: 0, 1: -15}, False), ({0: 143}, False)):
        outcome = Outcome(exits, stop="SIGTERM", joined=False)
        assert outcome.lost_everything is lost
        assert not replace(outcome, step=4).lost_everything
        assert not replace(outcome, joined=True).lost_everything
    stopped = Outcome({0: 0, 1: -15}, stop="SIGTERM", joined=False, ended_before_stop=frozenset({0}))
    assert stopped.lost_everything, "that rank 0 had ended by itself before saves nothing"
    silent = Outcome({}, stop="SIGTERM", hosts={0: "a", 1: "a"})
    assert silent.lost_everything, "a function that neither logs nor stops is killed"
    assert not replace(silent, exits={0: 3}).lost_everything
    assert not replace(silent, hosts={}).lost_everything, "no rank had started"
    assert no_progress(History(losses=2), None, 2) is None
    failure = no_progress(History(losses=3), None, 2)
    assert failure is not None
    assert (failure.kind, failure.advice) == ("no progress", ADVICE["no progress"])


def test_a_program_that_begins_again_after_each_preemption_ends() -> None:
    def requeued(first: int | None) -> dict[str, Any]:
        return {"event": "requeued", "reason": "preempted", "step": 50, "first": first}

    def verdict(firsts: Sequence[int | None], allowed: int = 2) -> str | None:
        """Of the preemption of an attempt that began with the last of `firsts`; its step is further than any before."""
        failure = no_progress(read([requeued(first) for first in firsts[:-1]]), 90, allowed, firsts[-1])
        return failure.message if failure else None

    assert verdict([1, 1]) is None
    assert (
        verdict([1, 1, 1])
        == "the program began at step 1 after each of the last 2 preemptions: it resumes from nothing"
    )
    assert verdict([1, 1, 1], allowed=3) is None
    assert verdict([1, 1, 1, 1], allowed=3) is not None
    assert verdict([1, 1], allowed=0) is not None
    for firsts in ([1, 51, 51], [1, 51, 101], [1, None, 1], [None, None, None], [1, 1, 40]):
        assert verdict(firsts) is None


def test_the_table_of_failures_covers_every_kind() -> None:
    mark = next(m for m in test_failures_are_named.pytestmark if m.name == "parametrize")
    # "no progress" is detected between jobs and "not started" before there are ranks, so not at the end of an attempt.
    assert {row[3] for row in mark.args[1]} == set(RULES) - {"no progress", "not started"}


def test_what_needs_another_node_waits_for_one_where_a_scheduler_has_them() -> None:
    lost, struck, sick, killed = (
        Outcome({}, lost=["node2"]),
        Outcome({}, hosts={0: "node1", 1: "node2"}, unfit={"node2": "its clock is off"}),
        Outcome({0: 1}, [error("device")]),
        Outcome({0: -9}, hosts={0: "node1"}, step=5),
    )
    for outcome, here in ((lost, Action.FAIL), (struck, Action.FAIL), (sick, Action.RESTART)):
        there = Action.MOVE
        assert decide(outcome, 1)[0] is here
        assert decide(outcome, 1, movable=True)[0] is there
        assert decide(outcome, 0, movable=True)[0] is Action.FAIL
    for outcome in (lost, struck):
        assert decide(outcome, 1, movable=True, spare=True)[0] is Action.RESTART, "the spare node is there already"
    assert decide(killed, 1, movable=True)[0] is Action.RESTART


def test_a_device_that_is_not_there_is_looked_for_elsewhere_and_not_here() -> None:
    """A retry may help with a faulty GPU, but not with one that is missing or unusable for this torch."""
    for name, message, here in (
        ("DeviceError", "GPU 1 is not there", Action.FAIL),
        ("AssertionError", "Torch not compiled with CUDA enabled", Action.FAIL),
        ("RuntimeError", "Found no NVIDIA driver on your system.", Action.FAIL),
        ("RuntimeError", "CUDA error: uncorrectable ECC error encountered", Action.RESTART),
    ):
        outcome = Outcome({0: 1}, [{**error("device", message=message), "type": name}])
        assert decide(outcome, 3)[0] is here
        assert decide(outcome, 3, spare=True)[0] is here
        assert decide(outcome, 3, movable=True)[0] is Action.MOVE
        assert decide(outcome, 0, movable=True)[0] is Action.FAIL


def test_an_unfit_node_is_struck_off_at_once_but_not_where_all_are_unfit() -> None:
    alone = Outcome({}, hosts={0: "node1"}, unfit={"node1": "its clock is off"})
    action, failure = decide(alone, 1, movable=True)
    assert failure is not None
    assert (action, failure.host) == (Action.MOVE, "node1")
    assert unfit(failure, History(), None) == ("node1",)
    both = Outcome({}, hosts={0: "node1", 1: "node2"}, unfit={"node1": "no room", "node2": "no room"})
    assert decide(both, 3, movable=True, spare=True)[0] is Action.FAIL
    assert decide(Outcome({}, stop="SIGTERM", unfit={"node1": "no room"}), 1, movable=True) == (Action.STOP, None)


def test_a_node_that_fails_again_and_again_in_vain_is_struck_off() -> None:
    def past(*hosts: str) -> History:
        return History(tuple(FailedAttempt("killed", n, host, 5) for n, host in enumerate(hosts)))

    killed = Outcome({2: -9}, hosts={2: "node1"}, step=5)
    for history, moves in ((past("node1"), False), (past("node1", "node1"), True), (past("node2", "node1"), False)):
        action, failure = decide(killed, 1, history, movable=True)
        assert failure is not None
        assert action is (Action.MOVE if moves else Action.RESTART)
        assert unfit(failure, history, 5) == (("node1",) if moves else ())
    got_on = Outcome({2: -9}, hosts={2: "node1"}, step=6)
    assert decide(got_on, 1, past("node1", "node1"), movable=True)[0] is Action.RESTART
    _, sick = decide(Outcome({0: 1}, [error("device")]), 1)
    assert sick is not None
    assert unfit(sick, History(), 5) == ("node1",), "a sick GPU does not get a second chance"


def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time() -> None:
    killed = Outcome({1: -11}, step=5)
    action, failure = decide(killed, 3, History((FailedAttempt("killed", 1, None, 5),)))
    assert failure is not None
    assert (action, failure.message) == (Action.FAIL, "rank 1 was ended by SIGSEGV, again at step 5")
    for other in (
        FailedAttempt("killed", 0, None, 5),
        FailedAttempt("killed", 1, None, 4),
        FailedAttempt("hung", 1, None, 5),
    ):
        assert decide(killed, 3, History((other,)))[0] is Action.RESTART


def test_restarts_come_at_once_while_the_run_gets_on_and_ever_later_while_it_does_not() -> None:
    def waits(*steps: int | None) -> list[float]:
        """The wait after each of several failures at the given newest steps."""
        past = [FailedAttempt("killed", 0, None, step) for step in steps]
        return [backoff_seconds(History(tuple(past[:n])), step) for n, step in enumerate(steps)]

    assert waits(3, 5, 9) == [0, 0, 0]
    assert waits(3, 3, 3, 3, 4) == [0, 1, 2, 4, 0]
    assert waits(None, None, None) == [0, 1, 2]
    assert waits(*[3] * 9)[-1] == LONGEST_BACK_OFF


def test_no_signal_is_without_a_name() -> None:
    for number in signal.valid_signals():
        _, failure = decide(Outcome({0: -number}), 0)
        assert failure is not None
        assert failure.kind == "killed"
