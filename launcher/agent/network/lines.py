"""Connections that carry lines, bounded in length."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast


class Lines(asyncio.Protocol):
    """A connection that somebody has opened to this process; `on_open` calls `serve`."""

    def __init__(self, on_open: Callable[[Lines], None]) -> None:
        self._on_open = on_open
        self._rest = bytearray()
        self._closed = False

    def serve(self, limit: int, on_line: Callable[[bytes], None], on_end: Callable[[], object]) -> None:
        """Pass on each line, and the end of the connection; a line of more than `limit` bytes ends it."""
        self._limit, self._on_line, self._on_end = limit, on_line, on_end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection."""
        self.transport = cast(asyncio.Transport, transport)
        self._on_open(self)

    def data_received(self, data: bytes) -> None:
        """Pass on each whole line, until the connection is closed."""
        if not self._rest and data.endswith(b"\n") and data.count(b"\n") == 1 and len(data) <= self._limit:
            self._on_line(data)  # as almost always
            return
        *lines, rest = (self._rest + data).split(b"\n")
        for line in (*lines, rest):
            if len(line) > self._limit:
                self.abort()
            if self._closed:
                return
            if line is not rest:
                self._on_line(bytes(line))
        self._rest = rest

    def write(self, line: bytes) -> None:
        """Send a line."""
        self.transport.write(line)

    def close(self) -> None:
        """Close the connection after what was written; nothing that it has sent is read any more."""
        self._closed = True
        self.transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._closed = True
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end of the connection."""
        self._closed = True
        self._on_end()
