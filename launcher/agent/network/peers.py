"""The coordinator's connections to the other agents.

The protocol is lines of JSON over TCP (`launcher.agent.protocol`). Node 0 listens and writes its address, with a token, to
``rendezvous.json``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from launcher.agent.network.addresses import peer_of
from launcher.agent.network.admission import Admission, same
from launcher.agent.network.channel import FRAME_BYTES, Channel
from launcher.agent.network.lines import Lines
from launcher.agent.protocol import (
    AgentInfo,
    AgentMessage,
    Alive,
    End,
    FromTcp,
    Heartbeats,
    Hello,
    Joined,
    Lost,
    Refused,
    ToAgent,
    Welcome,
)
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import decode, encode
from training.files import write_atomic

ALIVE = encode(Alive())
ALIVE_TICKS = 4
"""An agent is sent `Alive` every so many heartbeats; a part of the agents each time."""

HEARTBEATS = encode(Heartbeats({}))[:13]
"""How a line with heartbeats begins. Only the newest of a node matters, and is decoded once a second or before another message."""


@dataclass
class Peer:
    """The agent of another node.

    Attributes:
        emit: receives its messages.
        on_breach: is called with what it did wrong.
        line: its connection; None while it has none.
        heartbeats: the newest, if they have not been passed on.
        lost: its node has been given up; this agent cannot return.
        giving_up: gives the node up if the agent does not connect again.
    """

    secret: str
    emit: Callable[[AgentMessage], None]
    on_breach: Callable[[str], None]
    channel: Channel = field(default_factory=Channel)
    line: Lines | None = None
    received_at: float = 0.0
    heartbeats: bytes = b""
    lost: bool = False
    giving_up: asyncio.TimerHandle | None = None

    @property
    def expected(self) -> bool:
        """Whether the agent is connected, or may connect again because it has not received everything."""
        return self.line is not None or not (self.lost or self.channel.settled)

    def on_line(self, data: bytes) -> None:
        """Receive a line."""
        self.received_at = time.monotonic()
        if data.startswith(HEARTBEATS):
            self.heartbeats = data
        else:
            self.pass_on(data)

    def pass_on(self, *lines: bytes) -> None:
        """Pass on the newest heartbeats and `lines`."""
        lines, self.heartbeats = (self.heartbeats, *lines), b""
        try:
            for line in filter(None, lines):
                message = decode(FromTcp, line)
                if self.channel.on_message(message):
                    self.emit(message)
        except ValueError as error:
            self.on_breach(f"sent what is no message: {str(error)[:200]}")

    def disconnect(self) -> None:
        """End the connection, if there is one, and the wait for another."""
        self.channel.detach()
        if self.giving_up is not None:
            self.giving_up.cancel()
        if self.line is not None:
            self.line.abort()
        self.line = self.giving_up = None


class Peers:
    """The agents of the other nodes. Their messages go to `emit`, with the number of their node."""

    def __init__(self, run_dir: RunDir, agent_info: AgentInfo, emit: Callable[[int, AgentMessage], None]) -> None:
        self.run_dir, self.agent_info, self.emit = run_dir, agent_info, emit
        self.hosts = {agent_info.node: agent_info.host}
        self.switches = {agent_info.node: agent_info.switches}
        self.addresses = {agent_info.node: agent_info.address}  # as this node reaches the others
        self._peers: dict[int, Peer] = {}
        self._joined = [agent_info.node]  # sorted
        self._admission = Admission(agent_info.nodes, self._on_hello)
        self._broken: list[str] = []  # hosts whose connections have ended and which have not been logged
        self._ending = False
        self._beating: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Listen, and write the address to the rendezvous file."""
        port = await self._admission.open(self.agent_info.address)
        # The token keeps other users of the node away; the run directory's own permissions guard the file.
        record = {
            "address": self.agent_info.address,
            "port": port,
            "token": self._admission.token,
            "session": self.agent_info.session,
        }
        write_atomic(self.run_dir.rendezvous_file, json.dumps(record))
        self._beating = asyncio.create_task(self._keep_in_touch())

    # ---- connections ------------------------------------------------------------------------------------------------

    def _on_hello(self, line: Lines, hello: Hello) -> None:
        if reason := self._objection(hello):
            _log(f"an agent for node {hello.node} at {_address(line)} was refused: {reason}")
            if hello.secret:
                line.write(encode(Refused(reason)))
            line.close()
        else:
            self._admit(line, hello)

    def _objection(self, hello: Hello) -> str:
        """Return why an agent with the right token is not accepted; empty if it is."""
        known = self._peers.get(hello.node)
        if not 0 <= hello.node < self.agent_info.nodes or hello.node == self.agent_info.node:
            return f"the run has nodes 0 to {self.agent_info.nodes - 1}, and this is node {self.agent_info.node}"
        if known is None:
            return "" if hello.received == 0 else "it was not connected before"
        returns = bool(hello.secret) and same(hello.secret, known.secret)
        if known.lost:
            return "its node was given up, since it was silent or disconnected for too long" if returns else ""
        return "" if returns else f"the agent on {self.hosts[hello.node]} is connected as this node"

    def _admit(self, line: Lines, hello: Hello) -> None:
        node, peer = hello.node, self._peers.get(hello.node)
        if peer is None or peer.lost:
            peer = self._peers[node] = Peer(hello.secret, partial(self.emit, node), partial(self.refuse, node))
        peer.disconnect()  # from a connection whose end has not been noticed
        peer.line, peer.received_at = line, time.monotonic()
        line.serve(FRAME_BYTES, peer.on_line, partial(self._on_end, node, peer, line))
        self.hosts[node], self.switches[node], self.addresses[node] = hello.host, hello.switches, _address(line)
        if peer.secret:
            line.write(encode(Welcome(peer.channel.received)))
        try:
            peer.channel.attach(line.write, hello.received)
        except ValueError as error:
            self.refuse(node, str(error))
            return
        if not self.is_connected(node):
            insort(self._joined, node)
            self.emit(node, Joined())

    def _on_end(self, node: int, peer: Peer, line: Lines) -> None:
        if peer.line is not line:
            return
        peer.disconnect()
        if not peer.secret or (self._ending and peer.channel.settled):
            self._give_up(node, peer)
            return
        self._broken.append(self.hosts[node])
        peer.giving_up = asyncio.get_running_loop().call_later(TIMEOUTS.reconnect, self._give_up, node, peer)

    def _give_up(self, node: int, peer: Peer) -> None:
        if self._remove(node, peer):
            self.emit(node, Lost())

    def _remove(self, node: int, peer: Peer) -> bool:
        """Disconnect a peer for good; return whether it was not lost before."""
        before, peer.lost, peer.heartbeats = peer.lost, True, b""
        peer.disconnect()
        if not before and self.is_connected(node):
            self._joined.remove(node)
        return not before

    async def _keep_in_touch(self) -> None:
        """Pass on heartbeats, report that this node is alive, and drop connections that have been silent for too long."""
        looked, tick = time.monotonic(), 0
        while True:
            now, tick = time.monotonic(), (tick + 1) % ALIVE_TICKS
            if now - looked > 3 * TIMEOUTS.heartbeat:  # this process itself was held up
                for peer in self._peers.values():
                    peer.received_at = now
            looked = now
            for node, peer in list(self._peers.items()):
                if peer.heartbeats:
                    peer.pass_on()
                if peer.line is not None and node % ALIVE_TICKS == tick:
                    peer.channel.send(Alive(), ALIVE)
                    peer.channel.report()
                if peer.line is not None and now - peer.received_at > TIMEOUTS.silence:
                    self._give_up(node, peer)
            self._admission.drop_late(now)
            self._log_broken()
            await asyncio.sleep(TIMEOUTS.heartbeat)

    def _log_broken(self) -> None:
        """Log the connections that have ended, in one line: a thousand may end at once."""
        if self._broken:
            names = ", ".join(self._broken[:4]) + ", ..." * (len(self._broken) > 4)
            _log(
                f"lost connections of agents, which have {TIMEOUTS.reconnect:g} s to return: {len(self._broken)} ({names})"
            )
            self._broken.clear()

    # ---- for the coordinator ----------------------------------------------------------------------------------------

    def refuse(self, node: int, reason: str) -> None:
        """End the connection of an agent that breaks the protocol; its node is lost."""
        _log(f"the agent on {self.hosts[node]} (node {node}) {reason}; its connection was closed")
        if (peer := self._peers.get(node)) is not None:
            self._give_up(node, peer)

    def drop(self, node: int) -> None:
        """Close the connection of `node`, whose agent then ends its ranks."""
        if (peer := self._peers.get(node)) is not None:
            self._remove(node, peer)

    def send(self, node: int, message: ToAgent) -> None:
        """Send `message` to `node` unless its agent is lost."""
        self.send_all((node,), message)

    def send_all(self, nodes: Iterable[int], message: ToAgent) -> None:
        """Send `message` to each of `nodes` whose agent is not lost."""
        line = encode(message)
        for node in nodes:
            peer = self._peers.get(node)
            if peer is not None and not peer.lost:
                peer.channel.send(message, line)

    def connected(self) -> list[int]:
        """The nodes that are connected, or may be again before they are given up; this one included."""
        return self._joined

    def is_connected(self, node: int) -> bool:
        """Whether `node` is in `connected`."""
        nodes = self.connected()
        place = bisect_left(nodes, node)
        return nodes[place : place + 1] == [node]

    async def close(self, exit_status: int) -> None:
        """Send the end of the run and wait for the other agents to disconnect, which they do when their ranks are gone."""
        self.send_all(list(self._peers), End(exit_status))
        if self._beating is not None:
            self._beating.cancel()
        self._ending = True
        deadline = time.monotonic() + TIMEOUTS.disconnect
        while any(peer.expected for peer in self._peers.values()) and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._admission.close()
        self._log_broken()
        for node, peer in self._peers.items():
            self._remove(node, peer)


def _address(line: Lines) -> str:
    return peer_of(line.transport.get_extra_info("peername"))


def _log(text: str) -> None:
    print(f"launch: {ascii(text)[1:-1]}", file=sys.stderr, flush=True)  # names come from outside
