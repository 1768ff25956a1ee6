"""The cost of a message in a large job, counted in executed lines: it does not grow with the nodes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import launcher
from launcher.agent.attempt import Attempt
from launcher.agent.hangs.detection import RankStatus, StackLocation
from launcher.agent.health import preflight
from launcher.agent.network.lines import Lines
from launcher.agent.network.peers import Peer, Peers
from launcher.agent.protocol import (
    AgentInfo,
    AgentMessage,
    Collectives,
    DumpStacks,
    Heartbeats,
    Lost,
    NodeChecked,
    RankExit,
    Signal,
    Stacks,
    ToAgent,
)
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import encode

SMALL, LARGE, RANKS = 16, 256, 8
FOLDER = str(Path(launcher.__file__).parent)


class Executed:
    """Counts the lines of our packages that are executed."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        self.count += event == "line"
        return self


@contextmanager
def counted() -> Iterator[Executed]:
    lines, before = Executed(), sys.gettrace()
    sys.settrace(lines)
    try:
        yield lines
    finally:
        sys.settrace(before)


class Whole(set[int]):
    """All ranks that run; operations that look at each of them are counted."""

    walks = 0

    def _walk(self, *_: object) -> Any:
        self.walks += 1
        return NotImplemented

    __le__ = __lt__ = __ge__ = __gt__ = __and__ = __or__ = __sub__ = __xor__ = _walk

    def __iter__(self) -> Iterator[int]:
        self.walks += 1
        return super().__iter__()


def ranks_of(node: int) -> range:
    return range(node * RANKS, (node + 1) * RANKS)


def beats(node: int, age: float = 0.0) -> Heartbeats:
    return Heartbeats({rank: RankStatus(5, "training", age, "S") for rank in ranks_of(node)})


Round = Callable[[int], Iterable[AgentMessage]]
"""The messages of a node."""

STEADY: tuple[Round, ...] = (lambda node: [beats(node)],)
HUNG: tuple[Round, ...] = (*STEADY, lambda node: [beats(node, 400.0)])
LOCATIONS: Round = lambda node: [Stacks(dict.fromkeys(ranks_of(node), StackLocation("a", True)))]  # noqa: E731
RECORDS: Round = lambda node: map(Collectives, ranks_of(node))  # noqa: E731
CASES: dict[str, tuple[tuple[Round, ...], Round]] = {
    "heartbeats": (STEADY, lambda node: [beats(node)]),
    "heartbeats that find a hang": (STEADY, lambda node: [beats(node, 400.0)]),
    "heartbeats in a hang": (HUNG, lambda node: [beats(node, 401.0)]),
    "stacks": (HUNG, LOCATIONS),
    "collectives": ((*HUNG, LOCATIONS), RECORDS),
    "exits": (STEADY, lambda node: (RankExit(rank, 0, 5) for rank in ranks_of(node))),
    "exits by a signal": (STEADY, lambda node: (RankExit(rank, -9, 5) for rank in ranks_of(node))),
    "lost nodes": (STEADY, lambda node: [Lost()]),
}


def cost(nodes: int, before: tuple[Round, ...], measured: Round) -> tuple[float, int, list[ToAgent]]:
    """The lines of a message, how many messages looked at all ranks, and what was sent."""
    sent: list[ToAgent] = []

    async def inside() -> tuple[float, int]:
        attempt = Attempt(1, {node: node for node in range(nodes)}, RANKS, 300.0, sent.append)
        for each in before:
            for node in range(nodes):
                for message in each(node):
                    attempt.on_message(node, message)
        attempt.alive = whole = Whole(attempt.alive)
        messages = [(node, message) for node in range(nodes) for message in measured(node)]
        with counted() as lines:
            for node, message in messages:
                assert attempt.owns(node, message)
                attempt.on_message(node, message)
        return lines.count / len(messages), whole.walks

    per_message, walks = asyncio.run(inside())
    return per_message, walks, sent


@pytest.mark.parametrize("case", CASES)
def test_a_message_costs_the_same_in_a_job_of_any_size(case: str) -> None:
    small, _, _ = cost(SMALL, *CASES[case])
    large, walks, sent = cost(LARGE, *CASES[case])
    assert large <= 1.1 * small
    assert walks <= 1, "all ranks are looked at once in a round, or never"
    hung = case in ("heartbeats that find a hang", "heartbeats in a hang", "stacks", "collectives")
    assert [each for each in sent if not isinstance(each, Signal)] == [DumpStacks(1)] * hung


@pytest.mark.parametrize("nodes", [SMALL, LARGE])
def test_a_line_with_heartbeats_is_kept_until_it_is_due(nodes: int, tmp_path: Path) -> None:
    """The newest heartbeats of a node are decoded once, however many there are."""
    received: list[tuple[int, AgentMessage]] = []
    peers = Peers(RunDir(tmp_path), AgentInfo(nodes=nodes), lambda *each: received.append(each))
    connections = {node: Lines(lambda _: None) for node in range(1, nodes)}
    for node, connection in connections.items():
        peer = peers._peers[node] = Peer("s", partial(peers.emit, node), pytest.fail)
        connection.serve(1 << 20, peer.on_line, lambda: None)
    data = {node: encode(beats(node)) for node in connections}
    with counted() as lines:
        for _ in range(10):
            for node, connection in connections.items():
                connection.data_received(data[node])
    assert lines.count / len(data) / 10 < 15
    assert received == []
    connections[1].data_received(encode(RankExit(8, 0, 1)))
    assert received == [(1, beats(1)), (1, RankExit(8, 0, 1))], "in order"


def test_an_answer_to_the_preflight_costs_the_same_in_a_job_of_any_size() -> None:
    def lines_of(nodes: int) -> float:
        async def inside() -> float:
            inbox: asyncio.Queue[tuple[int, AgentMessage]] = asyncio.Queue()
            for node in range(nodes):
                inbox.put_nowait((node, NodeChecked(1, {})))
            agents = range(nodes)
            with counted() as lines:
                found = await preflight.ask(
                    1, agents, lambda _: None, inbox, agents.__contains__, lambda *_: pytest.fail("another message")
                )
            assert [*found] == [*agents]
            return lines.count / nodes

        return asyncio.run(inside())

    assert lines_of(LARGE) <= 1.1 * lines_of(SMALL)


def test_most_agreed_compares_each_value_once() -> None:
    compared: list[tuple[int, int]] = []

    def agree(one: int, other: int) -> bool:
        compared.append((one, other))
        return abs(one - other) <= 1

    values = {f"node{number}": 7 if number == 3 else number % 2 for number in range(1000)}
    assert preflight._most_agreed(values, agree) == "node0"
    assert len(compared) == 9
