"""The coordinator's connections to the other agents, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from launcher.agent.network import peers
from launcher.agent.network.peers import Peers
from launcher.agent.protocol import (
    AgentInfo,
    AgentMessage,
    Alive,
    Heartbeats,
    Hello,
    Joined,
    Lost,
    RankExit,
    Signal,
    ToAgent,
)
from launcher.config.timeouts import Timeouts
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import decode, encode
from training.files import read_json

Received = list[tuple[int, AgentMessage]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(run_dir: RunDir, node: int, token: str | None = None) -> Connection:
    """Connect as the agent of `node`."""
    found = read_json(run_dir.rendezvous_file)
    assert found is not None
    reader, writer = await asyncio.open_connection(found["address"], found["port"])
    writer.write(encode(Hello(node, found["token"] if token is None else token, f"node{node}")))
    return reader, writer


def converse(folder: Path, scenario: Callable[[Peers, RunDir, Received], Awaitable[None]]) -> Received:
    received: Received = []

    async def inside() -> None:
        connections = Peers(RunDir(folder), AgentInfo(nodes=3, host="node0"), lambda *message: received.append(message))
        await connections.listen()
        try:
            async with asyncio.timeout(20):
                await scenario(connections, RunDir(folder), received)
        finally:
            await connections.close(0)

    asyncio.run(inside())
    return received


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_agents_join_send_receive_and_leave(tmp_path: Path) -> None:
    async def scenario(connections: Peers, run_dir: RunDir, received: Received) -> None:
        reader, writer = await connect(run_dir, 2)
        await until(lambda: connections.connected() == [0, 2])
        assert connections.hosts == {0: "node0", 2: "node2"}
        writer.write(encode(RankExit(5, 0, 1)))
        connections.send(2, Signal(15))
        connections.send(1, Signal(15))  # never joined: dropped
        messages = [decode(ToAgent, await reader.readline()) for _ in range(2)]
        assert [m for m in messages if m != Alive()] == [Signal(15)]
        writer.close()
        await until(lambda: connections.connected() == [0])

    assert converse(tmp_path, scenario) == [(2, Joined()), (2, RankExit(5, 0, 1)), (2, Lost())]


def test_a_connection_without_the_token_is_closed(tmp_path: Path) -> None:
    async def scenario(connections: Peers, run_dir: RunDir, received: Received) -> None:
        for reader, writer in [await connect(run_dir, 1, token="guessed"), await connect(run_dir, 1, token="")]:
            assert await reader.read() == b""
            writer.close()
        assert connections.connected() == [0]

    assert converse(tmp_path, scenario) == []


def test_an_agent_that_is_silent_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUTS", Timeouts(silence=0.5, heartbeat=0.05))

    async def scenario(connections: Peers, run_dir: RunDir, received: Received) -> None:
        silent, talker = await connect(run_dir, 1), await connect(run_dir, 2)
        for _ in range(20):
            talker[1].write(encode(Heartbeats({})))
            await asyncio.sleep(0.05)
        assert connections.connected() == [0, 2]
        for _, writer in (silent, talker):
            writer.close()

    received = converse(tmp_path, scenario)
    assert [node for node, message in received if message == Lost()][:1] == [1]
