"""The outcome of an attempt from messages of its agents, without agents."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from launcher.agent.attempt import ERROR_GRACE_SECONDS, Attempt
from launcher.agent.protocol import Message

KILL = {"signal": int(signal.SIGKILL)}


class Told(list[Message]):
    """The messages that were sent to the agents."""


def make(hang_after: float = 0.0, nodes: dict[int, int] | None = None) -> tuple[Attempt, Told]:
    """An attempt of two nodes with two ranks each; agents 0 and 2 are its nodes, agent 1 is a spare."""
    fields = Told()
    return Attempt(7, nodes or {0: 0, 2: 1}, 2, hang_after, fields.append), fields


def run(scenario: Any) -> None:
    async def inside() -> None:
        scenario()

    asyncio.run(inside())


def beats(age: float, *, step: int = 3, state: str = "S") -> dict[str, tuple[Any, ...]]:
    """As decoded from JSON: the ranks are text."""
    return {str(rank): (step, "training", age, state) for rank in range(4)}


def test_an_attempt_is_over_when_every_rank_has_ended() -> None:
    def scenario() -> None:
        attempt, fields = make()
        for rank in (1, 0, 3, 2):
            assert not attempt.over
            attempt.on_message(2 * (rank // 2), {"exit": rank, "code": 0, "step": 10 + rank})
        assert attempt.over
        assert (attempt.exits, attempt.step, attempt.kill_at, fields) == ({1: 0, 0: 0, 3: 0, 2: 0}, 13, None, [])

    run(scenario)


@pytest.mark.parametrize(("code", "patience"), [(-9, 0.0), (1, ERROR_GRACE_SECONDS), (2, ERROR_GRACE_SECONDS)])
def test_after_a_bad_end_the_others_are_killed_and_what_they_say_then_does_not_count(
    code: int, patience: float
) -> None:
    def scenario() -> None:
        attempt, fields = make()
        now = asyncio.get_running_loop().time()
        attempt.on_message(0, {"exit": 1, "code": code, "step": 4})
        assert attempt.kill_at is not None
        assert attempt.kill_at - now == pytest.approx(patience, abs=0.2)
        attempt.on_deadline()
        assert fields == [KILL]
        for rank in (0, 2, 3):
            attempt.on_message(0, {"exit": rank, "code": -9, "step": 4})
        assert (attempt.over, attempt.exits) == (True, {1: code})

    run(scenario)


def test_a_rank_that_cannot_even_be_killed_costs_its_node_and_not_the_run() -> None:
    def scenario() -> None:
        attempt, fields = make()
        attempt.on_message(0, {"exit": 1, "code": -9, "step": 4})
        attempt.on_deadline()
        attempt.on_message(0, {"exit": 0, "code": -9, "step": 4})
        attempt.on_message(2, {"exit": 3, "code": -9, "step": 4})
        assert attempt.kill_at is not None
        assert not attempt.over, "rank 2 is in the D state"
        attempt.on_deadline()
        assert (attempt.over, attempt.lost, fields) == (True, [2], [KILL])

    run(scenario)


def test_a_lost_agent_takes_its_ranks_along_and_a_lost_spare_nothing() -> None:
    def scenario() -> None:
        attempt, _ = make()
        attempt.on_message(1, {"lost": 1})
        assert (attempt.lost, attempt.kill_at) == ([], None)
        attempt.on_message(2, {"lost": 2})
        assert (attempt.lost, attempt.alive) == ([2], {0, 1})
        assert attempt.kill_at is not None

    run(scenario)


def test_a_hang_is_named_once_the_ranks_have_said_where_they_stand() -> None:
    def scenario() -> None:
        attempt, fields = make(hang_after=5.0)
        attempt.on_message(0, {"beats": beats(0.0)})
        assert fields == []
        attempt.on_message(0, {"beats": beats(6.0) | {"3": (3, "training", 6.0, "T")}})
        assert fields == [{"stacks": 7}]
        attempt.on_message(0, {"beats": beats(7.0)})
        assert fields == [{"stacks": 7}], "they are asked once"
        attempt.on_message(0, {"stacks": {"0": ("train.py:9 in step", True), "1": ("train.py:9 in step", True)}})
        attempt.on_deadline()
        assert attempt.hung == (3, "rank 3 is stopped (SIGSTOP or a terminal) at step 3")
        assert fields[-1] == KILL

    run(scenario)


def test_nobody_hangs_while_a_rank_has_not_been_heard() -> None:
    def scenario() -> None:
        attempt, fields = make(hang_after=5.0)
        attempt.on_message(0, {"beats": {rank: beat for rank, beat in beats(60.0).items() if rank != "3"}})
        assert fields == []

    run(scenario)
