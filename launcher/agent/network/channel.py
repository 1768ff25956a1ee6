"""The messages between the coordinator and one agent, whatever becomes of the connections that carry them.

Both ends count the messages that they receive. A message is kept until the other end has reported that it has arrived; after a
reconnection those that have not are sent again, in order. So none is lost, and none arrives twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from launcher.agent.protocol import Alive, Heartbeats, Received
from launcher.rank.messages import encode

UNCOUNTED = (Alive, Heartbeats, Received)
"""Only the newest of these matters: they are neither counted nor sent again."""

FRAME_BYTES = 4 << 20
"""Limit of a line; a `Start` of 1,000 ranks has 400 KiB, and `Collectives` has 64 KiB at most."""


class Channel:
    """One end of a channel.

    Attributes:
        received: the number of messages from the other end.
    """

    def __init__(self) -> None:
        self.received = 0
        self._reported = 0  # the number that the other end has last been sent
        self._arrived = 0  # messages of this end at the other end
        self._kept: deque[bytes] = deque()
        self._write: Callable[[bytes], None] | None = None

    @property
    def settled(self) -> bool:
        """Whether every message of this end has arrived at the other end."""
        return not self._kept

    def send(self, message: Any, line: bytes = b"") -> None:
        """Send `message` now, or after the next reconnection; `line` is the encoded message if it is known."""
        line = line or encode(message)
        if not isinstance(message, UNCOUNTED):
            self._kept.append(line)
        self._write_line(line)

    def attach(self, write: Callable[[bytes], None], arrived: int) -> None:
        """Use a new connection, whose other end has received `arrived` messages.

        Raises:
            ValueError: this end has not sent so many, or no longer has those after it.
        """
        self.on_report(arrived)
        self._write = write
        for line in self._kept:
            self._write_line(line)

    def detach(self) -> None:
        """Keep the messages that follow for the next connection."""
        self._write = None

    def on_report(self, arrived: int) -> None:
        """Forget the first `arrived` messages. Raises ValueError as `attach` does."""
        if not self._arrived <= arrived <= self._arrived + len(self._kept):
            raise ValueError(f"{arrived} messages cannot have arrived")
        for _ in range(arrived - self._arrived):
            self._kept.popleft()
        self._arrived = arrived

    def on_message(self, message: Any) -> bool:
        """Count a message of the other end; return whether it is for the owner of the channel. Raises ValueError as `attach` does."""
        if isinstance(message, Received):
            self.on_report(message.count)
            return False
        self.received += not isinstance(message, UNCOUNTED)
        return True

    def report(self) -> None:
        """Report the messages that have arrived here, if any have since the last report."""
        if self.received != self._reported:
            self._reported = self.received
            self._write_line(encode(Received(self.received)))

    def _write_line(self, line: bytes) -> None:
        if self._write is not None:
            with suppress(ConnectionError):  # the end of the connection is noticed where it is read
                self._write(line)
