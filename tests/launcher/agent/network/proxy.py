"""Run a scenario with the coordinator's connections, and a proxy that breaks the connections through it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

from launcher.agent.network.link import Link, Rendezvous
from launcher.agent.network.peers import Peers
from launcher.agent.protocol import AgentInfo, AgentMessage, Hello
from launcher.lifecycle.run_dir import RunDir
from training.files import read_json

Received = list[tuple[int, AgentMessage]]


class Proxy:
    """Passes bytes between agents and a port."""

    def __init__(self, port: int) -> None:
        self.to = port
        self.writers: list[asyncio.StreamWriter] = []
        self.opened: list[asyncio.StreamWriter] = []
        self.count = 0
        self.frozen: set[asyncio.StreamWriter] = set()

    async def listen(self) -> int:
        """Return the port on which it listens."""
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.count += 1
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.close()
            return
        self.writers += [writer, forth]
        self.opened += [writer, forth]
        await asyncio.gather(self._pass_on(reader, forth), self._pass_on(back, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                if writer not in self.frozen:
                    writer.write(data)
        except OSError:
            pass
        if writer not in self.frozen:
            writer.close()

    def reset(self) -> None:
        """Break all connections, both ends get RST; what is under way is lost."""
        for writer in self.writers:
            if not writer.is_closing():
                end: socket.socket = writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
        self.writers.clear()

    async def close(self) -> None:
        """End what is left of all connections."""
        self.server.close()
        for writer in self.opened:
            writer.transport.abort()
        await asyncio.sleep(0.01)

    def freeze(self) -> None:
        """Let nothing through the present connections any more, and leave them open."""
        self.frozen |= {*self.writers}
        self.writers.clear()


class Stage:
    """The coordinator's connections, a proxy before them, and what has been received."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.run_dir, self.received = RunDir(folder), Received()
        self.links: list[Link] = []
        self.peers = Peers(self.run_dir, AgentInfo(nodes=nodes, host="node0"), lambda *each: self.received.append(each))

    async def open(self) -> None:
        """Listen."""
        await self.peers.listen()
        found = read_json(self.run_dir.rendezvous_file)
        assert found is not None
        self.port, self.token = int(found["port"]), str(found["token"])
        self.proxy = Proxy(self.port)
        self.proxy_port = await self.proxy.listen()

    async def join(self, node: int) -> Link:
        """Connect as the agent of `node`, through the proxy."""
        link = Link(Hello(node, "", f"node{node}"))
        self.links.append(link)
        await link.open(Rendezvous("127.0.0.1", self.proxy_port, self.token))
        return link

    def of(self, node: int) -> list[AgentMessage]:
        """What `node` has sent."""
        return [message for sender, message in self.received if sender == node]


def play(folder: Path, scenario: Callable[[Stage], Awaitable[None]], nodes: int = 3) -> Stage:
    """Run a scenario, 20 s at most."""
    stage = Stage(folder, nodes)

    async def inside() -> None:
        await stage.open()
        try:
            async with asyncio.timeout(20):
                await scenario(stage)
        finally:
            await stage.proxy.close()
            for link in stage.links:
                link._disconnect()
            await stage.peers.close(0)

    asyncio.run(inside())
    return stage


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
