"""Agents whose connections break, over real sockets: nothing is lost, nothing arrives twice, and who cannot return is lost."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest

from launcher.agent.network import link as links
from launcher.agent.network import peers
from launcher.agent.network.channel import Channel
from launcher.agent.network.lines import Lines
from launcher.agent.network.link import CoordinatorGone, Link, Rendezvous
from launcher.agent.protocol import Alive, End, Heartbeats, Hello, Joined, Lost, RankExit, Received, Signal, ToAgent
from launcher.config.timeouts import Timeouts
from launcher.rank.messages import decode
from tests.launcher.agent.network.proxy import Stage, play, until


def with_timeouts(monkeypatch: pytest.MonkeyPatch, silence: float = 20.0, reconnect: float = 3.0) -> None:
    for module in (peers, links):
        monkeypatch.setattr(module, "TIMEOUTS", Timeouts(heartbeat=0.05, silence=silence, reconnect=reconnect))


class Agent:
    """An agent that keeps the messages that it receives."""

    def __init__(self, link: Link) -> None:
        self.link, self.messages = link, list[ToAgent]()
        self.task = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        while True:
            message = await self.link.receive()
            if message != Alive():
                self.messages.append(message)
            if isinstance(message, End):
                self.link.close()
                return


@pytest.mark.parametrize("fault", ["reset", "freeze"])
def test_each_message_arrives_once_whatever_becomes_of_the_connections(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_timeouts(monkeypatch, silence=0.8)

    async def scenario(stage: Stage) -> None:
        agent = Agent(await stage.join(1))
        for number in range(40):
            agent.link.send(RankExit(number, 0, 0))
            agent.link.send(Heartbeats({}))
            stage.peers.send(1, Signal(10, [number]))
            if number % 10 == 5:  # some have arrived, some are under way
                connections = stage.proxy.count
                getattr(stage.proxy, fault)()
            if number % 10 == 9:
                await until(partial(lambda before: stage.proxy.count > before, connections))
                agent.link.report()
        exits = [RankExit(number, 0, 0) for number in range(40)]
        await until(lambda: [each for each in stage.of(1) if isinstance(each, RankExit)] == exits)
        await until(lambda: len(agent.messages) >= 40)
        assert agent.messages == [Signal(10, [number]) for number in range(40)]
        assert [stage.of(1).count(each) for each in (Joined(), Lost())] == [1, 0]
        assert stage.peers.connected() == [0, 1]
        await asyncio.gather(stage.peers.close(0), agent.task)
        assert agent.messages[-1] == End(0)

    play(tmp_path, scenario)


def test_messages_before_the_first_connection_are_kept(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        link = Link(Hello(1, "", "node1"))
        link.send(RankExit(1, 0, 0))
        await link.open(Rendezvous("127.0.0.1", stage.port, stage.token))
        await until(lambda: stage.of(1) == [Joined(), RankExit(1, 0, 0)])
        link.close()
        stage.peers.drop(1)

    play(tmp_path, scenario)


def test_an_agent_that_does_not_return_is_lost_and_refused_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_timeouts(monkeypatch, reconnect=0.2)

    async def scenario(stage: Stage) -> None:
        link = await stage.join(1)
        stage.proxy.reset()
        await until(lambda: stage.of(1) == [Joined(), Lost()])
        assert stage.peers.connected() == [0]
        with pytest.raises(CoordinatorGone, match="its node was given up"):
            await link.receive()
        other = await stage.join(1)  # another agent of the node may
        await until(lambda: stage.peers.connected() == [0, 1])
        other.close()

    play(tmp_path, scenario)
    assert "launch: lost connections of agents, which have 0.2 s to return: 1 (node1)\n" in capsys.readouterr().err


def test_a_thousand_connections_that_end_at_once_are_one_line_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(stage: Stage) -> None:
        links = [await stage.join(node) for node in range(1, 101)]
        stage.proxy.reset()
        await asyncio.sleep(0.1)
        await asyncio.gather(*(stage.peers.close(0), *map(end_of, links)))

    play(tmp_path, scenario, nodes=101)
    said = capsys.readouterr().err.splitlines()
    assert len(said) <= 2
    assert said[0].startswith("launch: lost connections of agents, which have 3 s to return: ")


async def end_of(link: Link) -> None:
    while not isinstance(await link.receive(), End):
        pass
    link.close()


def test_an_agent_that_was_dropped_does_not_return(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        link = await stage.join(1)
        stage.peers.drop(1)
        with pytest.raises(CoordinatorGone, match="its node was given up"):
            await link.receive()

    assert play(tmp_path, scenario).of(1) == [Joined()], "who drops it knows"


def test_a_coordinator_that_has_exited_is_gone_at_once(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        link = await stage.join(1)
        stage.peers._admission.close()
        stage.proxy.server.close()
        stage.proxy.reset()
        with pytest.raises(CoordinatorGone, match="is gone"):
            async with asyncio.timeout(2):
                await link.receive()
        stage.peers.drop(1)

    play(tmp_path, scenario)


def test_a_silent_coordinator_is_gone_after_the_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_timeouts(monkeypatch, silence=0.4)

    async def scenario(stage: Stage) -> None:
        link = await stage.join(1)
        stage.proxy.freeze()

        # It accepts connections, as the kernel does for a stopped process.
        monkeypatch.setattr(stage.peers._admission, "_on_hello", lambda *_: None)
        with pytest.raises(CoordinatorGone, match="is gone"):
            await link.receive()
        stage.peers.drop(1)

    play(tmp_path, scenario)


def test_a_coordinator_that_is_busy_answers_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_timeouts(monkeypatch, silence=0.8)

    async def scenario(stage: Stage) -> None:
        agent, unanswered = Agent(await stage.join(1)), list[Hello]()
        admit = stage.peers._admission._on_hello

        def on_hello(line: Lines, hello: Hello) -> None:
            unanswered.append(hello)
            if len(unanswered) > 2:
                admit(line, hello)

        monkeypatch.setattr(stage.peers._admission, "_on_hello", on_hello)
        stage.proxy.reset()
        stage.peers.send(1, Signal(10))
        await until(lambda: agent.messages == [Signal(10)])
        assert len(unanswered) == 3
        stage.peers.drop(1)
        with pytest.raises(CoordinatorGone):
            await agent.task

    play(tmp_path, scenario)


def test_an_agent_that_has_lost_its_connection_receives_the_end(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        agent = Agent(await stage.join(1))
        stage.proxy.reset()
        await asyncio.gather(stage.peers.close(3), agent.task)
        assert agent.messages == [End(3)]

    play(tmp_path, scenario)


def test_a_channel_keeps_what_has_not_arrived() -> None:
    written: list[bytes] = []
    channel = Channel()
    for number in range(3):
        channel.send(RankExit(number, 0, 0))
    channel.send(Heartbeats({}))  # only the newest matters
    channel.attach(written.append, 1)
    assert [decode(RankExit, line).rank for line in written] == [1, 2]
    assert not channel.on_message(Received(3))
    assert channel.settled
    for impossible in (2, 4, -1):
        with pytest.raises(ValueError, match="cannot have arrived"):
            channel.on_message(Received(impossible))
