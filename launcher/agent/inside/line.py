"""The connection between a client and a session: both ends prove that they have the request's key.

The session connects, and both ends send a number that is used once::

    session -> client   session's number (32 bytes)
    client -> session   client's number, HMAC(key, "client" + both numbers)
    session -> client   HMAC(key, "session" + both numbers)

Then messages follow in both directions. Each carries an HMAC over its count, kind and data, with a key of its direction, so
that nothing can be inserted, repeated or left out. The data is not encrypted. (HMAC-SHA-256 of RFC 2104 and FIPS 180-4.)
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import struct
from typing import Any

from launcher.config.timeouts import TIMEOUTS
from training.files import parse_json

NUMBER_BYTES = PROOF_BYTES = 32
TAG_BYTES = 16
MAX_MESSAGE = 16 << 20
"""Limit of the data of one message in bytes."""

CHUNK = 1 << 16
"""Bytes of output in one message at most."""

FIELDS, OUTPUT, ERROR, TYPED, SIZE = b"j", b"o", b"e", b"i", b"w"
"""Kinds of messages: a JSON object; standard output; standard error; typed bytes; the size of the window."""

NO_STATUS = 255
"""The exit status if a session ends before the command or the shell, as that of ssh."""

KEEPALIVE = {socket.TCP_KEEPIDLE: 5, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class NotTrusted(ConnectionError):
    """The other end does not have the key, or a message was changed."""


class Line:
    """A connection whose other end has the key."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sending: bytes, receiving: bytes
    ) -> None:
        self._reader, self._writer = reader, writer
        self._sending, self._receiving = sending, receiving
        self._sent = self._received = 0
        endpoint: socket.socket = writer.get_extra_info("socket")
        # A machine without power closes no connection.
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * TIMEOUTS.silence))
        for option, value in KEEPALIVE.items():
            endpoint.setsockopt(socket.IPPROTO_TCP, option, value)

    def write(self, kind: bytes, data: bytes = b"") -> None:
        """Send a message; see `drain`. Nothing happens after the end of the connection."""
        body = kind + data
        self._writer.write(struct.pack("!I", len(body)) + body + _tag(self._sending, self._sent, body))
        self._sent += 1

    async def drain(self) -> None:
        """Wait until the other end has taken most of what was sent. Raises ConnectionError."""
        await self._writer.drain()

    async def send(self, **fields: Any) -> None:
        """Send a JSON object and wait as `drain` does."""
        self.write(FIELDS, json.dumps(fields).encode())
        await self.drain()

    async def receive(self) -> tuple[bytes, bytes]:
        """Return the kind and the data of the next message; empty ones after the end of the connection.

        Raises:
            NotTrusted: it is not from the other end, or exceeds `MAX_MESSAGE`.
        """
        try:
            (size,) = struct.unpack("!I", await self._reader.readexactly(4))
            if not 0 < size <= MAX_MESSAGE + 1:
                raise NotTrusted("a message of a wrong length")
            body = await self._reader.readexactly(size)
            tag = await self._reader.readexactly(TAG_BYTES)
        except NotTrusted:
            raise
        except (asyncio.IncompleteReadError, OSError):
            return b"", b""
        if not hmac.compare_digest(tag, _tag(self._receiving, self._received, body)):
            raise NotTrusted("a message without the right authentication code")
        self._received += 1
        return body[:1], body[1:]

    async def receive_fields(self) -> dict[str, Any] | None:
        """Return the next message, a JSON object; None after the end of the connection.

        Raises:
            NotTrusted: as `receive`, or it is something else.
        """
        kind, data = await self.receive()
        if kind == FIELDS:
            return fields_of(data)
        if kind:
            raise NotTrusted(f"a message of the kind {kind!r} instead of an object")
        return None

    async def close(self) -> None:
        """Send what is left, and close the connection."""
        self._writer.close()
        try:
            async with asyncio.timeout(TIMEOUTS.hello):
                await self._writer.wait_closed()
        except (OSError, TimeoutError):
            self.abort()

    def abort(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()


def fields_of(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises NotTrusted for something else."""
    try:
        found = parse_json(data)
    except ValueError as error:
        raise NotTrusted(f"a message that is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise NotTrusted("a message that is not an object")
    return found


async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> Line:
    """Return the connection of a session, at the client's end.

    Raises:
        NotTrusted: it does not have the key.
        OSError, asyncio.IncompleteReadError: the connection has ended.
    """
    own = secrets.token_bytes(NUMBER_BYTES)
    numbers = await reader.readexactly(NUMBER_BYTES) + own
    writer.write(own + _prove(key, b"client", numbers))
    _check(await reader.readexactly(PROOF_BYTES), _prove(key, b"session", numbers))
    return Line(reader, writer, _prove(key, b"to session", numbers), _prove(key, b"to client", numbers))


async def introduce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> Line:
    """Return the connection to a client, at the session's end. Raises as `admit` does."""
    own = secrets.token_bytes(NUMBER_BYTES)
    writer.write(own)
    numbers = own + await reader.readexactly(NUMBER_BYTES)
    _check(await reader.readexactly(PROOF_BYTES), _prove(key, b"client", numbers))
    writer.write(_prove(key, b"session", numbers))
    return Line(reader, writer, _prove(key, b"to client", numbers), _prove(key, b"to session", numbers))


def _prove(key: bytes, role: bytes, numbers: bytes) -> bytes:
    return hmac.digest(key, role + b"\0" + numbers, "sha256")


def _check(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise NotTrusted("the other end does not have the key of the request")


def _tag(key: bytes, count: int, body: bytes) -> bytes:
    return hmac.digest(key, count.to_bytes(8, "big") + body, "sha256")[:TAG_BYTES]
