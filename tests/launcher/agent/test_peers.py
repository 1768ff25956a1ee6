"""The coordinator's connections to the other agents, over real sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from launcher.agent import peers
from launcher.agent.peers import Peers
from launcher.agent.protocol import AgentInfo, Message
from launcher.lifecycle.run_dir import RunDir
from training.files import read_json

Heard = list[tuple[int, Message]]
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def dial(run_dir: RunDir, node: int, **changed: str) -> Line:
    """Connect as the agent of `node` and send its first message."""
    found = read_json(run_dir.rendezvous_file)
    assert found is not None
    reader, writer = await asyncio.open_connection(found["address"], found["port"])
    writer.write(
        json.dumps({"hello": node, "token": found["token"], "host": f"node{node}", **changed}).encode() + b"\n"
    )
    return reader, writer


def converse(folder: Path, scenario: Callable[[Peers, RunDir, Heard], Awaitable[None]]) -> Heard:
    heard: Heard = []

    async def inside() -> None:
        room = Peers(RunDir(folder), AgentInfo(nodes=3, host="node0"), lambda node, said: heard.append((node, said)))
        await room.listen()
        try:
            async with asyncio.timeout(20):
                await scenario(room, RunDir(folder), heard)
        finally:
            await room.close(0)

    asyncio.run(inside())
    return heard


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_agents_join_speak_hear_and_leave(tmp_path: Path) -> None:
    async def scenario(room: Peers, run_dir: RunDir, heard: Heard) -> None:
        reader, writer = await dial(run_dir, 2)
        await until(lambda: room.connected() == [0, 2])
        assert room.hosts == {0: "node0", 2: "node2"}
        writer.write(b'{"exit": 5, "code": 0, "step": 1}\n')
        room.send(2, {"signal": 15})
        room.send(1, {"signal": 15})  # not joined: nobody receives it
        said = [json.loads(await reader.readline()) for _ in range(2)]
        assert [m for m in said if "beat" not in m] == [{"signal": 15}]
        writer.close()
        await until(lambda: room.connected() == [0])

    joined, said, lost = converse(tmp_path, scenario)
    assert (joined, said, lost) == ((2, {"joined": 2}), (2, {"exit": 5, "code": 0, "step": 1}), (2, {"lost": 2}))


def test_a_stranger_is_shown_the_door(tmp_path: Path) -> None:
    async def scenario(room: Peers, run_dir: RunDir, heard: Heard) -> None:
        for reader, writer in [await dial(run_dir, 1, token="guessed"), await dial(run_dir, 1, token="")]:
            assert await reader.read() == b""
            writer.close()
        assert room.connected() == [0]

    assert converse(tmp_path, scenario) == []


def test_an_agent_that_falls_silent_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(peers, "PULSE_SECONDS", 0.05)

    async def scenario(room: Peers, run_dir: RunDir, heard: Heard) -> None:
        silent, talker = await dial(run_dir, 1), await dial(run_dir, 2)
        for _ in range(20):
            talker[1].write(b'{"beats": {}}\n')
            await asyncio.sleep(0.05)
        assert room.connected() == [0, 2]
        for _, writer in (silent, talker):
            writer.close()

    heard = converse(tmp_path, scenario)
    assert [node for node, said in heard if "lost" in said][:1] == [1]
