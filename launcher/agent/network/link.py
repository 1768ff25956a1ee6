"""The connection of an agent to the coordinator, which is opened again when it is lost."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, replace

from launcher.agent.network.channel import FRAME_BYTES, Channel
from launcher.agent.protocol import FromAgent, Hello, OverTcp, Refused, ToAgent, Welcome
from launcher.config.timeouts import TIMEOUTS
from launcher.rank.messages import decode, encode

SLICES = 4
"""A time without a message is measured in parts: one in which this process slept counts as one of them."""


MANY_NODES = 256
"""Agents of a larger run report half as often, which its coordinator would otherwise be busy with."""


def seconds_between_reports(nodes: int) -> float:
    """Return how long an agent waits between two reports in a run of so many nodes; less than `Timeouts.reconnect`.

    An agent may notice only at its next report that the other end of its connection is gone.
    """
    return TIMEOUTS.heartbeat * (2 if nodes > MANY_NODES else 1)


class CoordinatorGone(Exception):
    """The coordinator has exited, cannot be reached, or refuses this agent."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the coordinator listens, and its token."""

    address: str
    port: int
    token: str


class Link:
    """The messages between this agent and the coordinator.

    Args:
        hello: the message that each connection begins with; the token and the secret are filled in.
    """

    def __init__(self, hello: Hello) -> None:
        self._hello = replace(hello, secret=secrets.token_hex(16))
        self._channel = Channel()
        self._rendezvous: Rendezvous | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, rendezvous: Rendezvous) -> None:
        """Connect to the coordinator and wait until it accepts this agent, `Timeouts.silence` / `SLICES` at most.

        Raises:
            OSError: it cannot be reached, or does not answer in time (TimeoutError).
            CoordinatorGone: it refuses this agent.
        """
        self._disconnect()
        self._rendezvous = rendezvous
        try:
            async with asyncio.timeout(TIMEOUTS.silence / SLICES):
                welcome = await self._send_hello(rendezvous)
            assert self._writer is not None
            self._channel.attach(self._writer.write, welcome.received)
        except BaseException:
            self._disconnect()
            raise

    async def _send_hello(self, rendezvous: Rendezvous) -> Welcome:
        self._reader, self._writer = await asyncio.open_connection(
            rendezvous.address, rendezvous.port, limit=FRAME_BYTES
        )
        hello = replace(self._hello, token=rendezvous.token, received=self._channel.received)
        self._writer.write(encode(hello))
        line = await self._reader.readline()
        answer = decode(OverTcp, line) if line else None
        if isinstance(answer, Refused):
            raise CoordinatorGone(f"the coordinator refuses this agent: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise ConnectionError("the coordinator closed the connection")
        return answer

    def send(self, message: FromAgent) -> None:
        """Send `message`, after a reconnection if there is no connection now."""
        self._channel.send(message)

    def report(self) -> None:
        """Report the messages that have arrived here."""
        self._channel.report()

    async def receive(self) -> ToAgent:
        """Return the next message of the coordinator, over a new connection if the present one is lost.

        Raises:
            CoordinatorGone: it has exited, has been silent for `Timeouts.silence`, or has given this agent up.
        """
        silent = 0
        while silent < SLICES:
            try:
                if self._writer is None:
                    await self._reopen()
                async with asyncio.timeout(TIMEOUTS.silence / SLICES):
                    message = await self._next()
            except TimeoutError:
                silent += 1
                if silent > 1:  # the connection may be half open
                    self._disconnect()
            except (OSError, ValueError):
                self._disconnect()
            else:
                if message is not None:
                    return message
        raise CoordinatorGone("the coordinator on node 0 is gone")

    async def _next(self) -> ToAgent | None:
        """Return the next message; None if it was one of the connection."""
        assert self._reader is not None
        line = await self._reader.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the connection has ended")
        message = decode(OverTcp, line)
        return message if self._channel.on_message(message) else None

    async def _reopen(self) -> None:
        """Connect again. Raises TimeoutError, or CoordinatorGone."""
        assert self._rendezvous is not None
        async with asyncio.timeout(TIMEOUTS.silence / SLICES):
            while True:
                try:
                    await self.open(self._rendezvous)
                except TimeoutError:
                    raise
                except ConnectionRefusedError:  # its process has ended
                    raise CoordinatorGone("the coordinator on node 0 is gone") from None
                except (OSError, ValueError):
                    await asyncio.sleep(TIMEOUTS.heartbeat / 10)
                else:
                    return

    def _disconnect(self) -> None:
        self._channel.detach()
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    def close(self) -> None:
        """Report what has arrived, and close the connection."""
        self.report()
        if self._writer is not None:
            self._writer.close()
