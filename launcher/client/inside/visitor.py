"""Ask a running run for sessions on its nodes, and accept their connections.

The run directory is the only thing that this process and the nodes share: the request is a file in it. This process listens while
the sessions connect, on 127.0.0.1 for a run on this machine.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from launcher.agent.inside.line import Line, NotTrusted, admit
from launcher.agent.network.addresses import listener, own_addresses
from launcher.client.inside.target import Target
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.records import visits
from launcher.lifecycle.records.visits import Kind, VisitRequest

Result = TypeVar("Result")

MOST_PENDING = 64
"""So many connections may not have proved yet that they have the key, and one more for each node."""


def run_visit(visit: Coroutine[Any, Any, Result]) -> Result:
    """Run `visit` to its end and return what it returns, also in a notebook, whose thread has an event loop that runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(visit)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, visit).result()


@dataclass(frozen=True)
class Session:
    """A session on a node, which has proved that it has the key.

    Attributes:
        ranks: those of the node that were asked for; all of it, if nodes were.
    """

    line: Line
    node: int
    host: str
    ranks: tuple[int, ...]


class Visitor:
    """A request for sessions, as a context manager; the connections are closed at its end.

    ::

        async with Visitor(target, "stacks") as visitor:
            async for session in visitor.sessions():
                await session.line.send(...)

    Attributes:
        missing: why the session of a node did not connect, by its host, after `sessions`.
    """

    def __init__(self, target: Target, kind: Kind) -> None:
        self.target, self.kind = target, kind
        self.missing: dict[str, str] = {}
        self._folder = target.run.dir.visits
        self._key = secrets.token_bytes(32)
        self._id = ""
        self._arrived: asyncio.Queue[Session] = asyncio.Queue()
        self._admitting: set[asyncio.Task[None]] = set()
        self._lines: dict[int, Line] = {}

    async def __aenter__(self) -> Self:
        alone = self.target.alone
        listening = listener("127.0.0.1" if alone else "")
        listening.setblocking(False)
        self._server = await asyncio.start_server(self._on_connection, sock=listening)
        request = VisitRequest(
            kind=self.kind,
            addresses=["127.0.0.1"] if alone else own_addresses()[:64],
            port=listening.getsockname()[1],
            key=self._key.hex(),
            ranks=list(self.target.ranks),
            nodes=list(self.target.nodes),
        )
        try:
            self._id = await asyncio.to_thread(visits.leave, self._folder, request)
        except BaseException:
            self._server.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.withdraw()
        for line in self._lines.values():
            line.abort()

    def withdraw(self) -> None:
        """Remove the request and stop listening; the sessions that have connected stay."""
        self._server.close()
        for task in self._admitting:
            task.cancel()
        if self._id:
            visits.remove(self._folder, self._id)

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._admitting) >= MOST_PENDING + self.target.expected:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._admitting.add(task)
        try:
            async with asyncio.timeout(TIMEOUTS.hello):
                line = await admit(reader, writer, self._key)
                session = self._session(line, await line.receive_fields())
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()  # a stranger, or a session whose client has gone on
            return
        finally:
            self._admitting.discard(task)
        if session.node in self._lines:
            line.abort()
            return
        self._lines[session.node] = line
        self._arrived.put_nowait(session)

    def _session(self, line: Line, fields: dict[str, Any] | None) -> Session:
        match fields:
            case {"node": int(node), "ranks": [*ranks]} if 0 <= node < len(self.target.hosts):
                return Session(line, node, self.target.hosts[node], tuple(map(int, ranks)))
        raise NotTrusted("not the first message of a session")

    async def sessions(self) -> AsyncIterator[Session]:
        """Yield each session when it has connected, until all have, or for `Timeouts.visit` seconds.

        The request is withdrawn afterwards.

        Raises:
            BadRequest: no session has connected; the text says why, and how else to get to the node.
        """
        deadline = time.monotonic() + TIMEOUTS.visit
        failed: dict[int, str] = {}
        while len(self._lines) + len(failed) < self.target.expected or not self._arrived.empty():
            session = None
            with suppress(TimeoutError):
                session = await asyncio.wait_for(self._arrived.get(), 0.2)
            if session is not None:
                yield session
                continue
            failed = await asyncio.to_thread(visits.failures, self._folder, self._id)
            failed = {node: why for node, why in failed.items() if node not in self._lines}
            if time.monotonic() > deadline or self.target.run.dir.result_file.exists():
                break
        self._note_missing(failed)
        self.withdraw()
        if not self._lines:
            raise BadRequest(self._explanation(failed))

    def _note_missing(self, failed: dict[int, str]) -> None:
        """Set `missing`."""
        hosts = self.target.hosts
        silent = f"its agent did not answer within {TIMEOUTS.visit:g} s"
        if not self.target.ranks:
            asked = self.target.nodes or range(len(hosts))
            self.missing = {hosts[node]: failed.get(node, silent) for node in asked if node not in self._lines}

    def _explanation(self, failed: dict[int, str]) -> str:
        name, directory = self.target.name, self.target.run.dir
        if directory.result_file.exists():
            return f"run {name!r} has ended meanwhile. `launch status {name}` shows how."
        if failed:
            node, why = min(failed.items())
            host = self.target.hosts[node] if node < len(self.target.hosts) else f"node {node}"
            text = f"{host} cannot reach this machine ({socket.gethostname()}): {why}. A firewall may keep it from doing so."
        else:
            text = (
                f"no agent of run {name!r} answered within {TIMEOUTS.visit:g} s: it is between two attempts or ends, or an older"
                f" version of launch started it. `launch status {name}` shows its state."
            )
        other = self.target.other_way()
        return f"{text} Another way in: `{other}`." if other else text
