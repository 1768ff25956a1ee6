"""The port on which the coordinator listens.

Until a connection has sent a `Hello` with the run's token, it can do nothing but be closed: it is limited in number, in time and in
bytes. Nothing is logged about it, so that a port scanner does not fill the log.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable
from functools import partial

from launcher.agent.network.addresses import file_limit, listener
from launcher.agent.network.lines import Lines
from launcher.agent.protocol import Hello
from launcher.config.timeouts import TIMEOUTS
from launcher.rank.messages import decode

HELLO_BYTES = 4096
"""Limit of the first line of a connection."""

MOST_PENDING = 64
"""So many connections may not have sent their `Hello` yet, and one more for each node of the run."""

OTHER_FILES = 64
"""Open files of this process that are not connections."""


class Admission:
    """Passes each connection that has sent the token to `on_hello`.

    Attributes:
        token: chosen at random, 32 hexadecimal digits.
    """

    def __init__(self, nodes: int, on_hello: Callable[[Lines, Hello], None]) -> None:
        self.token = secrets.token_hex(16)
        self._nodes, self._on_hello = nodes, on_hello
        self._pending: dict[Lines, float] = {}  # when each has connected, the oldest first
        self._server: asyncio.Server | None = None

    async def open(self, address: str) -> int:
        """Listen on a free port of `address` and return the port."""
        self._most = max(MOST_PENDING // 4, min(MOST_PENDING + self._nodes, file_limit() - self._nodes - OTHER_FILES))
        listening = listener(address)
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Lines(self._on_open), sock=listening, backlog=socket.SOMAXCONN
        )
        return int(listening.getsockname()[1])

    def _on_open(self, line: Lines) -> None:
        if len(self._pending) >= self._most:
            self._drop_oldest()
        self._pending[line] = time.monotonic()
        line.serve(HELLO_BYTES, partial(self._on_line, line), partial(self._pending.pop, line, None))

    def _on_line(self, line: Lines, data: bytes) -> None:
        self._pending.pop(line, None)
        try:
            hello: Hello = decode(Hello, data)
        except ValueError:
            line.abort()
            return
        if same(hello.token, self.token):
            self._on_hello(line, hello)
        else:
            line.abort()

    def _drop_oldest(self) -> None:
        oldest = next(iter(self._pending))
        del self._pending[oldest]
        oldest.abort()

    def drop_late(self, now: float) -> None:
        """Close the connections that have not sent their `Hello` within `Timeouts.hello`."""
        while self._pending and now - next(iter(self._pending.values())) > TIMEOUTS.hello:
            self._drop_oldest()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        while self._pending:
            self._drop_oldest()


def same(one: str, other: str) -> bool:
    """Compare two texts from outside in a time that does not depend on where they differ."""
    return secrets.compare_digest(*(text.encode(errors="surrogatepass") for text in (one, other)))
