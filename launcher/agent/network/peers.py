"""The coordinator's connections to the other agents.

The protocol is lines of JSON over TCP (`launcher.agent.protocol`). Node 0 listens and writes its address, with a token, to
``rendezvous.json``. Until a connection has sent a `Hello` with this token, it can do nothing but be closed: it is limited in
number, in time and in bytes.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from launcher.agent.network.addresses import file_limit, listener, peer_of
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

HELLO_BYTES = 4096
"""Limit of the first line of a connection."""

STRANGERS = 64
"""Connections that have not sent their `Hello` may be so many, and one for each node of the run."""

OTHER_FILES = 64
"""Open files of this process that are not connections."""

HEARTBEATS = encode(Heartbeats({}))[:13]
"""How a line with heartbeats begins. Only the newest of a node matters, and is decoded once a second or before another message."""


@dataclass
class Peer:
    """The agent of another node.

    Attributes:
        line: its connection; None while it has none.
        heartbeats: the newest, if they have not been passed on.
        lost: its node has been given up; this agent cannot return.
        giving_up: gives the node up if the agent does not connect again.
    """

    secret: str
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


class Peers:
    """The agents of the other nodes. Their messages go to `emit`, with the number of their node."""

    def __init__(self, run_dir: RunDir, agent_info: AgentInfo, emit: Callable[[int, AgentMessage], None]) -> None:
        self.run_dir, self.agent_info, self.emit = run_dir, agent_info, emit
        self.hosts = {agent_info.node: agent_info.host}
        self.switches = {agent_info.node: agent_info.switches}
        self.addresses = {agent_info.node: agent_info.address}  # as this node reaches the others
        self._peers: dict[int, Peer] = {}
        self._joined = [agent_info.node]  # sorted
        self._strangers: dict[Lines, float] = {}  # when each has connected, the oldest first
        self._nodes: dict[Lines, int] = {}
        self._server: asyncio.Server | None = None
        self._ending = False
        self._beating: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Listen, and write the address to the rendezvous file."""
        nodes = self.agent_info.nodes
        self._most_strangers = max(STRANGERS // 4, min(STRANGERS + nodes, file_limit() - nodes - OTHER_FILES))
        listening = listener(self.agent_info.address)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Lines(HELLO_BYTES, self._on_open, self._on_line, self._on_end),
            sock=listening,
            backlog=socket.SOMAXCONN,
        )
        self._token = secrets.token_hex(16)
        # The token keeps other users of the node away; the run directory's own permissions guard the file.
        record = {
            "address": self.agent_info.address,
            "port": listening.getsockname()[1],
            "token": self._token,
            "session": self.agent_info.session,
        }
        write_atomic(self.run_dir.rendezvous_file, json.dumps(record))
        self._beating = asyncio.create_task(self._keep_in_touch())

    # ---- connections ------------------------------------------------------------------------------------------------

    def _on_open(self, line: Lines) -> None:
        if len(self._strangers) >= self._most_strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.abort()
        self._strangers[line] = time.monotonic()

    def _on_line(self, line: Lines, data: bytes) -> None:
        node = self._nodes.get(line)
        if node is None:
            self._on_hello(line, data)
            return
        peer = self._peers[node]
        peer.received_at = time.monotonic()
        if data.startswith(HEARTBEATS):
            peer.heartbeats = data
            return
        self._take_in(node, peer, peer.heartbeats, data)

    def _take_in(self, node: int, peer: Peer, *lines: bytes) -> None:
        """Pass on the messages of a peer."""
        peer.heartbeats = b""
        try:
            for line in filter(None, lines):
                message = decode(FromTcp, line)
                if peer.channel.on_message(message):
                    self.emit(node, message)
        except ValueError as error:
            self.refuse(node, f"sent what is no message: {str(error)[:200]}")

    def _on_hello(self, line: Lines, data: bytes) -> None:
        self._strangers.pop(line, None)
        try:
            hello = decode(Hello, data)
        except ValueError:  # port scanners send anything
            line.abort()
            return
        if not _same(hello.token, self._token):
            line.abort()
        elif reason := self._objection(hello):
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
        same = bool(hello.secret) and _same(hello.secret, known.secret)
        if known.lost:
            return "its node was given up, since it was silent or disconnected for too long" if same else ""
        return "" if same else f"the agent on {self.hosts[hello.node]} is connected as this node"

    def _admit(self, line: Lines, hello: Hello) -> None:
        node, peer = hello.node, self._peers.get(hello.node)
        if peer is None or peer.lost:
            peer = self._peers[node] = Peer(hello.secret)
        if peer.giving_up is not None:
            peer.giving_up.cancel()
        if peer.line is not None:  # this end has not noticed its end yet
            self._nodes.pop(peer.line, None)
            peer.line.abort()
        line.limit, peer.line, peer.received_at = FRAME_BYTES, line, time.monotonic()
        self._nodes[line] = node
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

    def _on_end(self, line: Lines) -> None:
        self._strangers.pop(line, None)
        node = self._nodes.pop(line, None)
        if node is None:
            return
        peer = self._peers[node]
        peer.line = None
        peer.channel.detach()
        if not peer.secret or (self._ending and peer.channel.settled):
            self._give_up(node, peer)
            return
        _log(f"the connection to the agent on {self.hosts[node]} has ended; it has {TIMEOUTS.reconnect:g} s to return")
        peer.giving_up = asyncio.get_running_loop().call_later(TIMEOUTS.reconnect, self._give_up, node, peer)

    def _give_up(self, node: int, peer: Peer) -> None:
        if not peer.lost:
            self._remove(node, peer)
            self.emit(node, Lost())

    def _remove(self, node: int, peer: Peer) -> None:
        if self.is_connected(node):
            self._joined.remove(node)
        peer.lost, peer.heartbeats = True, b""
        if peer.giving_up is not None:
            peer.giving_up.cancel()
        if peer.line is not None:
            self._nodes.pop(peer.line, None)
            peer.line.abort()
            peer.line = None
        peer.channel.detach()

    async def _keep_in_touch(self) -> None:
        """Pass on heartbeats, report that this node is alive, and drop connections that have been silent for too long."""
        looked, alive, odd = time.monotonic(), encode(Alive()), 0
        while True:
            now = time.monotonic()
            if now - looked > 3 * TIMEOUTS.heartbeat:  # this process itself was held up
                for peer in self._peers.values():
                    peer.received_at = now
            looked, odd = now, 1 - odd
            for node, peer in list(self._peers.items()):
                if peer.heartbeats:
                    self._take_in(node, peer, peer.heartbeats)
                if peer.line is not None:
                    if node % 2 == odd:
                        peer.channel.send(Alive(), alive)
                        peer.channel.report()
                    if now - peer.received_at > TIMEOUTS.silence:
                        self._give_up(node, peer)
            while self._strangers and now - next(iter(self._strangers.values())) > TIMEOUTS.hello:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.abort()
            await asyncio.sleep(TIMEOUTS.heartbeat)

    # ---- for the coordinator ----------------------------------------------------------------------------------------

    def refuse(self, node: int, reason: str) -> None:
        """End the connection of an agent that breaks the protocol; its node is lost."""
        _log(f"the agent on {self.hosts[node]} (node {node}) {reason}; its connection was closed")
        if (peer := self._peers.get(node)) is not None:
            self._give_up(node, peer)

    def drop(self, node: int) -> None:
        """Close the connection of `node`, whose agent then ends its ranks."""
        if (peer := self._peers.get(node)) is not None and not peer.lost:
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
        if self._server is not None:
            self._server.close()
        for node, peer in self._peers.items():
            self._remove(node, peer)
        for line in list(self._strangers):
            line.abort()


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(*(text.encode(errors="surrogatepass") for text in (one, other)))


def _address(line: Lines) -> str:
    return peer_of(line.transport.get_extra_info("peername"))


def _log(text: str) -> None:
    print(f"launch: {ascii(text)[1:-1]}", file=sys.stderr, flush=True)  # names come from outside
