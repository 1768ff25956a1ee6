"""The other agents of a run, as the coordinator sees them: who has joined, who is silent, and how to tell them things.

The protocol is JSON lines over TCP. Node 0 listens and leaves its address, with a token, in ``rendezvous.json``.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from launcher.agent.protocol import AgentInfo, Message
from launcher.lifecycle.run_dir import RunDir
from training.files import write_atomic

CONNECT_SECONDS = 300.0
"""How long the agents of a run wait for each other at the start; nodes of one allocation can boot minutes apart."""

PULSE_SECONDS = 1.0
"""How often agents tell each other that they are alive, and how their ranks get on."""

SILENCE_SECONDS = 20.0
"""How long a connected agent may be silent before its node counts as lost: a machine that lost its power says nothing."""

CLOSE_GRACE_SECONDS = 10.0
"""How long the coordinator waits, after the end, for the other agents to leave."""


class Peers:
    """The connections of the other agents. What they say goes to `emit`, with the number of their node."""

    def __init__(self, run_dir: RunDir, agent_info: AgentInfo, emit: Callable[[int, Message], None]) -> None:
        self.run_dir, self.agent_info, self.emit = run_dir, agent_info, emit
        self.hosts = {agent_info.node: agent_info.host}
        self.addresses = {agent_info.node: agent_info.address}  # as this node reaches the others
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._heard: dict[int, float] = {}
        self._server: asyncio.Server | None = None
        self._pulse: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Open the door and say where it is."""
        self._server = await asyncio.start_server(self._welcome, "", 0, family=socket.AF_INET)
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
        self._pulse = asyncio.create_task(self._keep_in_touch())

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello: Message = {}
        with suppress(ValueError, OSError):  # clusters have port scanners, which say all kinds of things
            hello = json.loads(await reader.readline())
        if not secrets.compare_digest(str(hello.get("token")), self._token):
            writer.close()
            return
        node = int(hello["hello"])
        self._writers[node] = writer
        self._heard[node] = time.monotonic()
        self.hosts[node] = hello["host"]
        self.addresses[node] = writer.get_extra_info("peername")[0]
        self.emit(node, {"joined": node})
        with suppress(ConnectionError):
            while line := await reader.readline():
                self._heard[node] = time.monotonic()
                self.emit(node, json.loads(line))
        writer.close()
        if self._writers.pop(node, None) is not None:
            self.emit(node, {"lost": node})

    async def _keep_in_touch(self) -> None:
        """Tell the others that this node is alive, and drop those who have not said so for too long."""
        looked = time.monotonic()
        while True:
            now = time.monotonic()
            if now - looked > 3 * PULSE_SECONDS:  # this process was held up, so silence says nothing about the others
                self._heard = dict.fromkeys(self._heard, now)
            looked = now
            for node in list(self._writers):
                self.send(node, {"beat": 0})
                if now - self._heard[node] > SILENCE_SECONDS:
                    self.drop(node)
                    self.emit(node, {"lost": node})
            await asyncio.sleep(PULSE_SECONDS)

    def drop(self, node: int) -> None:
        """Have no more to do with `node`, whose agent sees the connection end."""
        writer = self._writers.pop(node, None)
        if writer is not None:
            writer.transport.abort()

    def send(self, node: int, message: Message) -> None:
        """Send `message` to `node`, if it is still there; what is sent to a node that has just gone is lost with it."""
        writer = self._writers.get(node)
        if writer is not None:
            with suppress(ConnectionError):
                writer.write(json.dumps(message).encode() + b"\n")

    def connected(self) -> list[int]:
        """The nodes that are connected, this one included."""
        return sorted({self.agent_info.node, *self._writers})

    async def close(self, exit_status: int) -> None:
        """Say that the run has ended and give the others time to hear it; each leaves when its ranks are gone."""
        for node in list(self._writers):
            self.send(node, {"end": exit_status})
        if self._pulse is not None:
            self._pulse.cancel()
        if self._server is not None:
            self._server.close()
        deadline = time.monotonic() + CLOSE_GRACE_SECONDS
        while self._writers and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for writer in self._writers.values():
            writer.transport.abort()
