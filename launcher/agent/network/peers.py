"""The coordinator's connections to the other agents of a run.

The protocol is lines of JSON over TCP (`launcher.agent.protocol`). Node 0 listens and writes its address, with a token, to
``rendezvous.json``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress

from launcher.agent.network.addresses import listener, peer_of
from launcher.agent.protocol import AgentInfo, AgentMessage, Alive, End, FromAgent, Hello, Joined, Lost, ToAgent
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.messages import decode, encode
from training.files import write_atomic


class Peers:
    """The connections of the other agents. Their messages go to `emit`, with the number of their node."""

    def __init__(self, run_dir: RunDir, agent_info: AgentInfo, emit: Callable[[int, AgentMessage], None]) -> None:
        self.run_dir, self.agent_info, self.emit = run_dir, agent_info, emit
        self.hosts = {agent_info.node: agent_info.host}
        self.switches = {agent_info.node: agent_info.switches}
        self.addresses = {agent_info.node: agent_info.address}  # as this node reaches the others
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._received_at: dict[int, float] = {}
        self._server: asyncio.Server | None = None
        self._beating: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Listen, and write the address to the rendezvous file."""
        self._server = await asyncio.start_server(self._serve, sock=listener())
        port = self._server.sockets[0].getsockname()[1]
        self._token = secrets.token_hex(16)
        # The token keeps other users of the node away; the run directory's own permissions guard the file.
        record = {
            "address": self.agent_info.address,
            "port": port,
            "token": self._token,
            "session": self.agent_info.session,
        }
        write_atomic(self.run_dir.rendezvous_file, json.dumps(record))
        self._beating = asyncio.create_task(self._keep_in_touch())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello: Hello | None = None
        with suppress(ValueError, OSError):  # port scanners send anything
            hello = decode(Hello, await reader.readline())
        if hello is None or not secrets.compare_digest(hello.token.encode(), self._token.encode()):
            writer.close()
            return
        node = hello.node
        self._writers[node] = writer
        self._received_at[node] = time.monotonic()
        self.hosts[node] = hello.host
        self.switches[node] = hello.switches
        self.addresses[node] = peer_of(writer.get_extra_info("peername"))
        self.emit(node, Joined())
        with suppress(ConnectionError):
            while line := await reader.readline():
                self._received_at[node] = time.monotonic()
                self.emit(node, decode(FromAgent, line))
        writer.close()
        if self._writers.pop(node, None) is not None:
            self.emit(node, Lost())

    async def _keep_in_touch(self) -> None:
        """Report once a second that this node is alive, and drop the agents that have been silent for too long."""
        looked = time.monotonic()
        while True:
            now = time.monotonic()
            if now - looked > 3 * TIMEOUTS.heartbeat:  # this process itself was held up
                self._received_at = dict.fromkeys(self._received_at, now)
            looked = now
            for node in list(self._writers):
                self.send(node, Alive())
                if now - self._received_at[node] > TIMEOUTS.silence:
                    self.drop(node)
                    self.emit(node, Lost())
            await asyncio.sleep(TIMEOUTS.heartbeat)

    def drop(self, node: int) -> None:
        """Close the connection of `node`, whose agent then ends its ranks."""
        writer = self._writers.pop(node, None)
        if writer is not None:
            writer.transport.abort()

    def send(self, node: int, message: ToAgent) -> None:
        """Send `message` to `node` if it is connected; else the message is dropped."""
        writer = self._writers.get(node)
        if writer is not None:
            with suppress(ConnectionError):
                writer.write(encode(message))

    def connected(self) -> list[int]:
        """The nodes that are connected, this one included."""
        return sorted({self.agent_info.node, *self._writers})

    async def close(self, exit_status: int) -> None:
        """Send the end of the run and wait for the other agents to disconnect, which they do when their ranks are gone."""
        for node in list(self._writers):
            self.send(node, End(exit_status))
        if self._beating is not None:
            self._beating.cancel()
        if self._server is not None:
            self._server.close()
        deadline = time.monotonic() + TIMEOUTS.disconnect
        while self._writers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for writer in self._writers.values():
            writer.transport.abort()
