"""The ledger of a run's time, from logs with simple numbers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from launcher.client.follow import account_line
from launcher.config.codec import to_data
from launcher.lifecycle.accounting import Account, Ledger, keep

PARTS = ("startup", "useful", "replayed", "evaluation", "checkpoint", "other")


def event(time: float, event: str, /, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": event, **fields}


def started(time: float, attempt: int = 1, ranks: int = 4) -> dict[str, Any]:
    return event(time, "started", attempt=attempt, world_size=ranks, hosts=["n1"])


def steps(attempt: int, *at: tuple[float, int]) -> list[dict[str, Any]]:
    return [{"time": time, "attempt": attempt, "step": step, "loss": 1.0} for time, step in at]


def evaluated(attempt: int, time: float, step: int, **fields: Any) -> dict[str, Any]:
    return {"time": time, "attempt": attempt, "step": step, "eval": {"accuracy": 0.5}, **fields}


def parts(account: Account) -> dict[str, Any]:
    """The values that are not 0."""
    found = {name: getattr(account, name) for name in ("queue", *PARTS, "steps", "steps_replayed", "steps_lost")}
    return {name: value for name, value in found.items() if value != 0}


def test_an_undisturbed_run() -> None:
    ledger = keep(
        [
            event(0, "submitted"),
            started(100),
            event(131, "saved", attempt=1, rank=0, step=30, blocked=1.0),
            event(170, "finished", attempt=1, state="succeeded"),
        ],
        # A step takes 1 s and every tenth is logged. The evaluation at step 40 takes 4 s, and the checkpoint of
        # step 30 delays training by 1 s.
        [*steps(1, (130, 10), (140, 20), (150, 30), (161, 40)), evaluated(1, 165, 40)],
    )
    expected = {"queue": 100, "startup": 20, "useful": 40, "checkpoint": 1, "evaluation": 4, "other": 5, "steps": 40}
    assert parts(ledger.total) == expected
    (attempt,) = ledger.attempts
    assert ledger.total == dataclasses.replace(attempt, attempt=0)
    assert attempt.held == 70
    assert attempt.goodput == pytest.approx(40 / 70)
    assert attempt.device_hours == pytest.approx(70 * 4 / 3600)
    assert account_line(ledger.total) == (
        "goodput 57 % of 1m10s, 1m40s in the queue, 20s starting, 4s evaluating, 1s waiting for checkpoints;"
        " 0.0778 device-hours"
    )
    assert json.loads(json.dumps(to_data(ledger)))["total"]["steps"] == 40


def test_steps_done_twice_after_a_restart_in_place() -> None:
    first, second = keep(
        [
            event(0, "submitted"),
            started(10),
            event(15, "saved", attempt=1, rank=0, step=4, blocked=0.0),
            event(22, "failed", attempt=1, kind="killed"),
            event(22, "restarted", attempt=1, kind="killed", restarts_left=2),
            started(23, attempt=2),
            event(24, "resumed", attempt=2, rank=0, step=4),
            event(32, "finished", attempt=2, state="succeeded"),
        ],
        [*steps(1, *((11 + n, n) for n in range(1, 10))), *steps(2, *((20 + n, n) for n in range(5, 13)))],
    ).attempts
    # Nine steps, of which five are not in the checkpoint of step 4, and 2 s until the loss is detected.
    assert parts(first) == {"queue": 10, "startup": 1, "useful": 9, "other": 2, "steps": 9, "steps_lost": 5}
    # In the same allocation: from the failure at 22 s the time is start-up, not queue.
    assert parts(second) == {"startup": 2, "replayed": 5, "useful": 3, "steps": 3, "steps_replayed": 5}
    assert (first.held, second.held) == (12, 10)


def test_a_requeued_run_waits_again_and_may_shrink() -> None:
    ledger = keep(
        [
            event(0, "submitted"),
            started(5, ranks=8),
            event(13, "preempted", signal="SIGUSR2"),
            event(14, "saved", attempt=1, rank=0, step=6, blocked=0.5),
            event(14, "requeued", attempt=1),
            started(114, attempt=2, ranks=4),
            event(116, "resumed", attempt=2, rank=0, step=6),
            event(118, "finished", attempt=2, state="succeeded"),
        ],
        [*steps(1, *((7 + n, n) for n in range(1, 7))), *steps(2, (117, 7), (118, 8))],
    )
    first, second = ledger.attempts
    assert parts(first) == {"queue": 5, "startup": 2, "useful": 6, "checkpoint": 0.5, "other": 0.5, "steps": 6}
    assert parts(second) == {"queue": 100, "startup": 2, "useful": 2, "steps": 2}
    assert ledger.total.device_hours == pytest.approx((9 * 8 + 4 * 4) / 3600)
    assert ledger.total.held == 13
    assert (ledger.total.queue, ledger.total.ranks) == (105, 4)


def test_a_restart_on_other_nodes_waits_in_the_queue() -> None:
    lost = {"attempt": 1, "step": 2, "kind": "node lost"}
    events = [
        event(0, "submitted"),
        started(1),
        event(6, "failed", **lost),
        event(6, "restarted", **lost, restarts_left=2),
        event(7, "requeued", attempt=1, reason="node lost", step=2, exclude=["n1"]),
        started(17, attempt=2),
    ]
    first, second = keep(events, [*steps(1, (3, 1), (4, 2)), *steps(2, (19, 1), (20, 2))], now=20).attempts
    assert parts(first) == {"queue": 1, "startup": 1, "useful": 2, "other": 3, "steps": 2, "steps_lost": 2}
    assert parts(second) == {"queue": 10, "startup": 1, "replayed": 2, "steps_replayed": 2}


def test_an_attempt_that_never_started_and_moves_waits_in_the_queue() -> None:
    """As if a node does not pass the preflight: a waiting job holds no devices."""
    ledger = keep(
        [
            event(0, "submitted"),
            started(10),
            event(20, "restarted", attempt=1),
            event(22, "restarted", attempt=2),
            event(23, "requeued", attempt=2),
            started(123, 3),
            event(133, "finished", attempt=3),
        ],
        [*steps(1, (15, 1)), *steps(3, (128, 2))],
    )
    assert [(account.attempt, account.queue, account.held) for account in ledger.attempts] == [
        (1, 10, 10),
        (3, 100, 10),
    ]


def test_an_attempt_that_went_without_a_word() -> None:
    """A node loses power: no event ends the attempt, and the scheduler requeues the job."""
    ledger = keep(
        [event(0, "submitted"), started(0), started(60, attempt=2), event(65, "finished", attempt=2, state="failed")],
        [*steps(1, (2, 1), (3, 2), (4, 3)), *steps(2, (62, 1), (63, 2))],
    )
    assert parts(ledger.attempts[0]) == {"startup": 1, "useful": 3, "steps": 3, "steps_lost": 3}
    assert parts(ledger.attempts[1]) == {"queue": 56, "startup": 1, "replayed": 2, "other": 2, "steps_replayed": 2}


def test_resumed_by_hand_after_the_supervisor_was_killed() -> None:
    ledger = keep(
        [event(0, "submitted"), started(0), event(90, "submitted"), started(91, attempt=2)],
        [*steps(1, (2, 1), (3, 2)), *steps(2, (93, 3), (94, 4))],
        now=96,
    )
    assert parts(ledger.attempts[1]) == {"queue": 1, "startup": 1, "useful": 2, "other": 2, "steps": 2}
    assert ledger.total.held == 3 + 5
    assert ledger.total.goodput == pytest.approx(4 / 8)


def test_a_clock_that_jumps_back_costs_only_the_moment_in_which_it_does() -> None:
    events = [event(1000, "submitted"), started(1000), event(-2590, "finished", attempt=1, state="succeeded")]
    log = steps(1, *((1001 + n, n) for n in range(1, 6)), *((-2600 + n, n) for n in range(6, 11)))
    total = keep(events, log).total
    # The step during which the clock jumped took no time.
    assert parts(total) == {"startup": 1, "useful": 9, "steps": 10}
    assert total.held == 10


def test_clocks_of_two_nodes_differ() -> None:
    """The coordinator's clock is 30 s ahead of rank 0's: no value is negative, and the time of steps is correct."""
    events = [event(130, "submitted"), started(130), event(145, "finished", attempt=1, state="succeeded")]
    total = keep(events, steps(1, (105, 1), (106, 2), (107, 3))).total
    assert parts(total) == {"useful": 2, "other": 38, "steps": 3}


def test_an_evaluation_between_two_records_is_told_by_the_pace_of_the_steps() -> None:
    events = [started(0), event(33, "finished", attempt=1, state="succeeded")]
    log = [*steps(1, (10, 10), (20, 20)), evaluated(1, 31, 28), *steps(1, (33, 30))]
    assert parts(keep(events, log).total) == {"useful": 30, "evaluation": 3, "steps": 30}
    log[2]["seconds"] = 3.5  # a recorded time is used
    assert parts(keep(events, log).total) == {"useful": 29.5, "evaluation": 3.5, "steps": 30}
    # An evaluation as the only record has no duration, unless it is recorded.
    assert parts(keep(events, [evaluated(1, 31, 28)]).total) == {"startup": 31, "other": 2, "steps": 28}
    short = keep(events, [evaluated(1, 31, 28, seconds=5.0)]).total
    assert parts(short) == {"startup": 26, "evaluation": 5, "other": 2, "steps": 28}


def test_a_checkpoint_whose_cost_nobody_recorded_is_not_called_free() -> None:
    saved = event(2, "saved", attempt=1, rank=0, step=1)
    total = keep(
        [started(0), saved, event(5, "finished", attempt=1, state="succeeded")], steps(1, (1, 1), (4, 2))
    ).total
    assert total.checkpoint is None
    assert total.useful + total.startup + total.other == total.held == 5


def test_a_run_that_never_came_to_a_step() -> None:
    ledger = keep([event(0, "submitted"), started(2), event(9, "failed", attempt=1)], [])
    assert parts(ledger.total) == {"queue": 2, "startup": 7}
    assert ledger.total.goodput == 0
    assert account_line(ledger.total) == ""


def test_a_run_that_still_waits() -> None:
    assert keep([event(0, "submitted")], []) == Ledger(Account(0, 0), ())
    assert keep([], []) == Ledger(Account(0, 0), ())


def test_strange_lines_are_left_out() -> None:
    """A user's function may log arbitrary values."""
    events = [{"event": "started"}, started(0), event(4, "brewed", attempt=7), event(6, "finished", state="succeeded")]
    log: list[dict[str, Any]] = [
        {"step": "first", "time": 1.0},
        {"note": "hello"},
        *steps(1, (2, 1), (2, 1), (3, 2), (5, 1)),
    ]
    assert parts(keep(events, log).total) == {"startup": 1, "useful": 2, "other": 3, "steps": 2}


def test_the_parts_of_every_attempt_add_up() -> None:
    events = [
        event(0, "submitted"),
        started(3),
        event(40, "restarted", attempt=1),
        started(41, attempt=2),
        event(44, "resumed", attempt=2, step=10),
        event(47, "saved", attempt=2, step=20, blocked=0.25),
        event(99, "finished", attempt=2, state="succeeded"),
    ]
    log = [
        *steps(1, (9, 10), (15, 20), (22, 30)),
        *steps(2, (50, 20), (58, 30)),
        evaluated(2, 66, 34),
        *steps(2, (80, 40)),
    ]
    ledger = keep(events, log)
    for account in (*ledger.attempts, ledger.total):
        assert sum(getattr(account, name) for name in PARTS) == pytest.approx(account.held)
        assert 0 < account.goodput < 1
    assert [account.held for account in ledger.attempts] == [37, 59]
    assert (ledger.total.steps, ledger.total.steps_replayed, ledger.total.steps_lost) == (40, 20, 20)
