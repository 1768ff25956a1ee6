"""Visits to a rank: a session of the agent asks it to open a debugger or to profile itself.

The session listens on a socket that is named after the rank's process and the kind of the visit, in the abstract namespace of the
machine. A rank connects to it at a signal (``debug``, ``profile``) or at a breakpoint (``breakpoint``), and reads what is asked, a
JSON object. Both ends check that the other one belongs to the same user. A rank without visits keeps nothing open.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
from contextlib import suppress
from typing import Any, Literal

VISIT_SIGNAL = signal.SIGRTMAX - 6
"""Asks a rank to connect to the session that listens for it."""

LONGEST = 1 << 20
"""Bytes of the longest message."""

PATIENCE = 5.0
"""Seconds for which a rank waits for the first message of a session."""

_CREDENTIALS = struct.Struct("3i")  # of ucred in unix(7): pid, uid, gid


Kind = Literal["debug", "breakpoint", "profile"]


def address_of(pid: int, kind: Kind) -> str:
    """Return the name of the socket on which a session listens for the rank that is the process `pid`."""
    return f"\0launch-{kind}-{pid}"


def is_own(connection: socket.socket) -> bool:
    """Return whether the other end of a connection is a process of this user."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.geteuid())


class Visit:
    """A connection to a session, over which lines of JSON go in both directions."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._file = connection, connection.makefile("rb")

    def send(self, message: dict[str, Any]) -> None:
        """Send `message`. Nothing happens if the session has gone."""
        with suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if the session has gone, or sends something else."""
        try:
            found = json.loads(self._file.readline(LONGEST))
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def close(self) -> None:
        """End the visit."""
        with suppress(OSError):
            self._file.close()
            self._connection.close()


def connect(kind: Kind) -> tuple[Visit, dict[str, Any]] | None:
    """Connect to the session that listens for this process; return the visit and what it asks for, or None without one."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(PATIENCE)
        connection.connect(address_of(os.getpid(), kind))
        if is_own(connection):
            visit = Visit(connection)
            asked = visit.receive()
            connection.settimeout(None)
            if asked is not None:
                return visit, asked
    except OSError:
        pass
    connection.close()
    return None
