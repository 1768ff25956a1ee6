"""What others may send to the coordinator's port, over real sockets: it goes on, says little, and acts on nothing."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.attempt import Attempt
from launcher.agent.coordinator import Coordinator
from launcher.agent.hangs.detection import RankStatus, StackLocation
from launcher.agent.job_attempt import JobAttempt
from launcher.agent.network import admission, peers
from launcher.agent.network.admission import MOST_PENDING
from launcher.agent.network.channel import FRAME_BYTES
from launcher.agent.protocol import (
    AgentInfo,
    Collectives,
    FromAgent,
    Heartbeats,
    Hello,
    Joined,
    Lost,
    OverTcp,
    RankExit,
    Received,
    Refused,
    Stacks,
    Welcome,
)
from launcher.config.timeouts import Timeouts
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import decode, encode
from tests.launcher.agent.network.proxy import Stage, play, until
from tests.launcher.plans import planned_run
from training.files import read_json

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(stage: Stage, first: bytes = b"") -> AsyncIterator[Connection]:
    """A connection that has sent `first`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
    try:
        writer.write(first)
        yield reader, writer
    finally:
        writer.transport.abort()


async def ends(reader: asyncio.StreamReader) -> bytes:
    """What is sent before the end of the connection."""
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def hello(stage: Stage, node: Any = 1, token: str | None = None, **more: Any) -> bytes:
    fields = {"node": node, "token": stage.token if token is None else token, "host": f"node{node}", **more}
    return json.dumps({"Hello": fields}).encode() + b"\n"


# ---- before the token ---------------------------------------------------------------------------------------------


def test_idle_connections_are_bounded_and_agents_still_join(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        open_before = len(os.listdir("/proc/self/fd"))
        idle = [await asyncio.open_connection("127.0.0.1", stage.port) for _ in range(1100)]
        try:
            link = await stage.join(1)
            await until(lambda: stage.peers.connected() == [0, 1])
            assert [await ends(reader) for reader, _ in idle[:1000]] == [b""] * 1000, "the oldest are closed"
            held = len(os.listdir("/proc/self/fd")) - open_before - len(idle)
            assert held <= MOST_PENDING + 3 + 4  # one for each node; the agent's own, and those of the proxy
            assert not idle[-1][0].at_eof()
            link.close()
        finally:
            for _, writer in idle:
                writer.transport.abort()
        stage.peers.drop(1)

    play(tmp_path, scenario)


@pytest.mark.parametrize("drip", [b"", b"{"])
def test_a_connection_that_sends_no_hello_in_time_is_closed(
    drip: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (peers, admission):
        monkeypatch.setattr(module, "TIMEOUTS", Timeouts(hello=0.2, heartbeat=0.05))

    async def scenario(stage: Stage) -> None:
        async with connected(stage) as (reader, writer):
            async with asyncio.timeout(5):
                while not (reader.at_eof() or writer.is_closing()):
                    writer.write(drip)
                    await asyncio.sleep(0.02)

    play(tmp_path, scenario)


GARBAGE = {
    "nothing": b"\n",
    "zeros": bytes(200_000),
    "no end": b"x" * 5_000,
    "http": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "tls": bytes.fromhex("16030100a5010000a10303") + os.urandom(64) + b"\n",
    "brackets": b"[" * 100_000 + b"\n",
    "brackets in the limit": b"[" * 4_000 + b"\n",
    "deep tables": b'{"Hello":' * 400 + b"1" + b"}" * 400 + b"\n",
    "many digits": b'{"Hello": {"node": ' + b"9" * 4_000 + b', "token": "", "host": ""}}\n',
    "not utf-8": b'{"Hello": {"node": 1, "token": "\xff\xfe", "host": ""}}\n',
    "a list": b'{"Hello": []}\n',
    "another message": encode(RankExit(0, 0, 1)),
    "two messages": b'{"Hello": {"node": 1, "token": "", "host": ""}, "End": {}}\n',
    "a number": b"1e999\n",
}
TOKENS = ["", "guess", "\u00e9" * 32, "\ud800", "\0", "x" * 3000]


@pytest.mark.parametrize("sent", [*GARBAGE, *TOKENS])
def test_without_the_token_nothing_is_answered_or_logged(
    sent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(stage: Stage) -> None:
        first = GARBAGE[sent] if sent in GARBAGE else hello(stage, token=sent, secret="s")
        for _ in range(3):
            async with connected(stage, first + encode(RankExit(0, 0, 1))) as (reader, _):
                assert await ends(reader) == b""
        assert stage.peers.connected() == [0]
        link = await stage.join(1)
        stage.peers.drop(1)
        link.close()

    assert play(tmp_path, scenario).received == [(1, Joined())]
    assert capsys.readouterr().err == ""


def test_it_listens_on_the_address_that_the_agents_use(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.2", stage.port)

    play(tmp_path, scenario)


# ---- with the token -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", [0, 3, -1, 10**30])
def test_an_agent_of_no_node_is_refused(node: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(stage: Stage) -> None:
        async with connected(stage, hello(stage, node, secret="s")) as (reader, _):
            assert isinstance(decode(OverTcp, await ends(reader)), Refused)

    assert play(tmp_path, scenario).received == []
    assert (
        f"launch: an agent for node {node} at 127.0.0.1 was refused: the run has nodes 0 to 2"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("secret", ["", "guess", "\u00e9", "\ud800"])
def test_a_second_agent_of_a_node_displaces_nobody(
    secret: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(stage: Stage) -> None:
        link = await stage.join(1)
        async with connected(stage, hello(stage, secret=secret) + encode(RankExit(1, 0, 9))) as (reader, _):
            answer = await ends(reader)
            assert answer == b"" if not secret else isinstance(decode(OverTcp, answer), Refused)
        link.send(RankExit(1, 1, 2))
        await until(lambda: stage.of(1) == [Joined(), RankExit(1, 1, 2)])
        stage.peers.drop(1)
        link.close()

    play(tmp_path, scenario)
    assert "node 1 at 127.0.0.1 was refused: the agent on node1 is connected as this node" in capsys.readouterr().err


BREACHES = {
    "no JSON": b"hello\n",
    "brackets": b"[" * 100_000 + b"\n",
    "another message": encode(Joined()),
    "a message of the coordinator": b'{"End": {"exit_status": 0}}\n',
    "no signal": b'{"StopRequest": {"number": 999}}\n',
    "no exit status": b'{"RankExit": {"rank": 1, "code": 4711, "step": 1}}\n',
    "a step of 80 bits": b'{"RankExit": {"rank": 1, "code": 0, "step": 1208925819614629174706176}}\n',
    "more than was sent": encode(Received(5)),
    "less than nothing": encode(Received(-1)),
}
GROUP: dict[str, Any] = {"name": "g", "title": "g", "last": 1, "pending": []}
BREACHES |= {
    f"members {number}": json.dumps({"Collectives": {"rank": 1, "groups": [GROUP | {"members": members}]}}).encode()
    + b"\n"
    for number, members in enumerate(([[0, 1 << 60, 1]], [[0, 1]], [[-1, 5, 1]], [[0, 1, 1]] * 1000))
}
COLUMNS: dict[str, list[Any]] = {"ranks": [1], "steps": [1], "phases": ["training"], "ages": [0.5], "states": ["S"]}
HEARTBEATS = {
    "statuses": {"ranks": {"1": {}}},
    "of two lengths": COLUMNS | {"steps": [1, 2]},
    "no number": COLUMNS | {"ages": [float("nan")]},
    "endless": COLUMNS | {"ages": [float("inf")]},
    "true": COLUMNS | {"ranks": [True]},
    "a wide step": COLUMNS | {"steps": [1 << 80]},
    "a list": COLUMNS | {"states": [[]]},
    "a text": COLUMNS | {"states": "S"},
    "more": COLUMNS | {"more": [1]},
}
BREACHES |= {name: json.dumps({"Heartbeats": fields}).encode() + b"\n" for name, fields in HEARTBEATS.items()}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_the_protocol_ends_the_connection_and_names_the_node(
    breach: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "TIMEOUTS", Timeouts(heartbeat=0.05))

    async def scenario(stage: Stage) -> None:
        link = await stage.join(2)
        async with connected(stage, hello(stage) + BREACHES[breach] + encode(RankExit(1, 0, 9))) as (reader, _):
            await ends(reader)
        await until(lambda: Lost() in stage.of(1))
        assert stage.of(1) == [Joined(), Lost()]
        assert stage.peers.connected() == [0, 2]
        stage.peers.drop(2)
        link.close()

    play(tmp_path, scenario)
    said = [line for line in capsys.readouterr().err.splitlines() if "node1 (node 1)" in line]
    assert len(said) == 1
    assert said[0].endswith("its connection was closed")


def test_a_line_has_a_limit_after_the_token_too(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        async with connected(stage, hello(stage)) as (reader, writer):
            await until(lambda: stage.peers.connected() == [0, 1])
            writer.write(bytes(FRAME_BYTES + (1 << 20)))
            await ends(reader)
        await until(lambda: stage.of(1) == [Joined(), Lost()])

    play(tmp_path, scenario)


def test_a_name_cannot_act_on_the_terminal_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(stage: Stage) -> None:
        async with connected(stage, hello(stage, host="\x1b[2J\nlaunch: succeeded") + b"x\n") as (reader, _):
            await ends(reader)

    play(tmp_path, scenario)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(r"launch: the agent on \x1b[2J\nlaunch: succeeded (node 1) sent what is no message")


@pytest.mark.parametrize(
    "foreign",
    [
        RankExit(0, 0, 5),
        RankExit(2, 0, 5),
        RankExit(-1, 0, 5),
        Heartbeats({1: RankStatus(), 0: RankStatus(5)}),
        Stacks({0: StackLocation("a")}),
        Collectives(0),
    ],
)
def test_an_agent_reports_on_the_ranks_of_its_own_node_alone(
    foreign: FromAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = planned_run(tmp_path / "r", "local")

    async def inside() -> None:
        found = Coordinator(run, run.plan(), AgentInfo(nodes=3, host="node0"))
        await found.peers.listen()
        attempt = Attempt(1, {0: 0, 1: 1, 2: 2}, 1, 0.0, found.agents.send_all)
        job = JobAttempt(1, run, run.plan(), found.agents, found.stops, found.inbox)
        record = read_json(RunDir(run.path).rendezvous_file)
        assert record is not None
        reader, writer = await asyncio.open_connection(record["address"], record["port"])
        writer.write(encode(Hello(1, record["token"], "node1", secret="s")) + encode(foreign))
        try:
            async with asyncio.timeout(20):
                assert decode(OverTcp, await reader.readline()) == Welcome()
                while 1 not in attempt.lost:
                    await job._receive(attempt)
                await ends(reader)
        finally:
            writer.transport.abort()
            await found.peers.close(0)
        assert (attempt.exits, attempt.step, attempt.alive) == ({}, -1, {0, 2})

    asyncio.run(inside())
    kind = type(foreign).__name__
    assert f"node1 (node 1) sent {kind} of ranks of other nodes; its connection was closed" in capsys.readouterr().err
