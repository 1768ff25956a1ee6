"""The state of an attempt after messages of its agents, without agents."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.attempt import Attempt
from launcher.agent.hangs.detection import HangDetector, RankStatus, StackLocation
from launcher.agent.job_attempt import debug_variables
from launcher.agent.protocol import DumpStacks, Heartbeats, Lost, RankExit, Signal, Stacks, Start, ToAgent
from launcher.config.cluster import Cluster
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.history import FailedAttempt, History
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target

KILL = Signal(signal.SIGKILL)


def make(hang_after: float = 0.0, nodes: dict[int, int] | None = None) -> tuple[Attempt, list[ToAgent]]:
    """An attempt of two nodes with two ranks each; agents 0 and 2 are its nodes, agent 1 is a spare."""
    sent: list[ToAgent] = []
    return Attempt(7, nodes or {0: 0, 2: 1}, 2, hang_after, sent.append), sent


def run(scenario: Any) -> None:
    async def inside() -> None:
        scenario()

    asyncio.run(inside())


def beats(age: float, *, step: int = 3, state: str = "S") -> dict[int, RankStatus]:
    return {rank: RankStatus(step, "training", age, state) for rank in range(4)}


def test_an_attempt_is_over_when_every_rank_has_ended() -> None:
    def scenario() -> None:
        attempt, sent = make()
        for rank in (1, 0, 3, 2):
            assert not attempt.over
            attempt.on_message(2 * (rank // 2), RankExit(rank, 0, 10 + rank))
        assert attempt.over
        assert (attempt.exits, attempt.step, attempt.kill_at, sent) == ({1: 0, 0: 0, 3: 0, 2: 0}, 13, None, [])

    run(scenario)


@pytest.mark.parametrize(("code", "patience"), [(-9, 0.0), (1, TIMEOUTS.error_grace), (2, TIMEOUTS.error_grace)])
def test_after_a_bad_end_the_others_are_killed_and_what_they_say_then_does_not_count(
    code: int, patience: float
) -> None:
    def scenario() -> None:
        attempt, sent = make()
        now = asyncio.get_running_loop().time()
        attempt.on_message(0, RankExit(1, code, 4))
        assert attempt.kill_at is not None
        assert attempt.kill_at - now == pytest.approx(patience, abs=0.2)
        attempt.on_deadline()
        assert sent == [KILL]
        for rank in (0, 2, 3):
            attempt.on_message(0, RankExit(rank, -9, 4))
        assert (attempt.over, attempt.exits) == (True, {1: code})

    run(scenario)


def test_a_rank_that_cannot_even_be_killed_costs_its_node_and_not_the_run() -> None:
    def scenario() -> None:
        attempt, sent = make()
        attempt.on_message(0, RankExit(1, -9, 4))
        attempt.on_deadline()
        attempt.on_message(0, RankExit(0, -9, 4))
        attempt.on_message(2, RankExit(3, -9, 4))
        assert attempt.kill_at is not None
        assert not attempt.over, "rank 2 is in the D state"
        attempt.on_deadline()
        assert (attempt.over, attempt.lost, sent) == (True, [2], [KILL])

    run(scenario)


def test_a_lost_agent_takes_its_ranks_along_and_a_lost_spare_nothing() -> None:
    def scenario() -> None:
        attempt, _ = make()
        attempt.on_message(1, Lost())
        assert (attempt.lost, attempt.kill_at) == ([], None)
        attempt.on_message(2, Lost())
        assert (attempt.lost, attempt.alive) == ([2], {0, 1})
        assert attempt.kill_at is not None

    run(scenario)


def test_a_hang_is_named_once_the_ranks_have_said_where_they_stand() -> None:
    def scenario() -> None:
        attempt, sent = make(hang_after=5.0)
        attempt.on_message(0, Heartbeats(beats(0.0)))
        assert sent == []
        attempt.on_message(0, Heartbeats(beats(6.0) | {3: RankStatus(3, "training", 6.0, "T")}))
        assert sent == [DumpStacks(7)]
        attempt.on_message(0, Heartbeats(beats(7.0)))
        assert sent == [DumpStacks(7)], "they are asked once"
        attempt.on_message(0, Stacks(dict.fromkeys((0, 1), StackLocation("train.py:9 in step", True))))
        attempt.on_deadline()
        assert attempt.hung == (3, "rank 3 is stopped (SIGSTOP or a terminal) at step 3")
        assert sent[-1] == KILL

    run(scenario)


def test_all_ranks_are_looked_at_once_for_as_many_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(HangDetector, "see", lambda self, beats, now: looks.append(len(beats)))

    def scenario() -> None:
        attempt, _ = make(nodes={node: node for node in range(100)})
        for second in range(3):
            for node in range(100):
                beats = {rank: RankStatus(second, "training", 0.0) for rank in (2 * node, 2 * node + 1)}
                attempt.on_message(node, Heartbeats(beats))
        assert looks == [200, 200, 200]
        assert attempt.step == 2

    run(scenario)


def test_nobody_hangs_while_a_rank_has_not_been_heard() -> None:
    def scenario() -> None:
        attempt, sent = make(hang_after=5.0)
        attempt.on_message(0, Heartbeats({rank: beat for rank, beat in beats(60.0).items() if rank != 3}))
        assert sent == []

    run(scenario)


@pytest.mark.parametrize(
    ("device", "kind", "step", "environment", "variables"),
    [
        ("cuda", "hung", None, {}, {"NCCL_DEBUG": "INFO"}),
        ("cuda", "communication", 0, {}, {"NCCL_DEBUG": "INFO"}),
        ("cuda", "hung", 7, {}, {}),
        ("cuda", "user error", None, {}, {}),
        ("cuda", "hung", None, {"NCCL_DEBUG": "WARN"}, {}),
        ("cpu", "hung", None, {}, {}),
    ],
)
def test_nccl_explains_itself_in_the_attempt_after_one_that_never_connected(
    device: Any, kind: str, step: int | None, environment: dict[str, str], variables: dict[str, str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    target = Target("script", "x.py")
    plan = replace(
        Plan(
            "x",
            tmp_path,
            RunSpec("x.py"),
            "local",
            Cluster("c", "local"),
            Placement(1, 2, device),
            target,
            tmp_path,
            60,
        ),
        environment=environment,
    )
    past = History(failed_attempts=(FailedAttempt(kind, None, None, step),))
    assert debug_variables(plan, past) == variables
    start = Start.of(plan, 2, 0, ["10.0.0.1"], 1, variables)
    assert all(start.environments.get(rank, {}) == variables for rank in (0, 1))


@pytest.mark.parametrize(
    ("grace", "also_sent", "after"), [(60.0, False, 0.0), (60.0, True, TIMEOUTS.same_stop), (2.0, True, 1.0)]
)
def test_a_request_waits_for_the_scheduler_that_sends_sigterm_too(grace: float, also_sent: bool, after: float) -> None:
    def scenario() -> None:
        attempt, sent = make()
        attempt.on_message(0, RankExit(1, 0, -1))
        fields = attempt.ask_to_stop(grace, also_sent)
        assert sent == [Signal(signal.SIGTERM, after=after)]
        assert fields == {"ranks": 3, "context": False, "grace": grace}
        attempt.on_message(0, RankExit(0, -15, -1))
        assert attempt.ended_before_stop == {1}

    run(scenario)


def test_ranks_that_end_before_their_stop_is_known_are_told_from_those_that_ended_long_before() -> None:
    async def scenario() -> None:
        attempt, _ = make()
        attempt.on_message(0, RankExit(0, 0, -1))
        await asyncio.sleep(TIMEOUTS.late_signal_scheduler + 0.1)
        for rank in (1, 2, 3):
            attempt.on_message(2 * (rank // 2), RankExit(rank, -15, -1))
        attempt.stopped_before()
        assert attempt.ended_before_stop == {0}

    asyncio.run(scenario())
