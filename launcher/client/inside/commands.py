"""Run a command on nodes of a running run."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from launcher.agent.inside.line import ERROR, FIELDS, NO_STATUS, OUTPUT, NotTrusted, fields_of
from launcher.client.inside.target import Target
from launcher.client.inside.visitor import Session, Visitor
from training.flags.typed import is_count

MOST_KEPT = 16 << 20
"""Bytes of output of a node that are kept for ``--json``; what follows is left out."""


@dataclass
class Ended:
    """The end of the command on a node.

    Attributes:
        status: its exit status, as a shell has it: 128 and the number of the signal that ended it.
        reason: why there is no status of the command; empty if there is.
    """

    node: int
    host: str
    status: int = NO_STATUS
    reason: str = ""


@dataclass
class Printed:
    """Whole lines of the output of nodes, each with a prefix; used as the argument `on_output` of `execute`."""

    write: Callable[[bytes, str], None]
    prefix: bool
    rests: dict[tuple[int, bytes], bytes] = field(default_factory=dict)

    def __call__(self, session: Session, kind: bytes, data: bytes) -> None:
        """Write the lines that `data` completes; all that is left, without data."""
        key = session.node, kind
        *lines, rest = (self.rests.pop(key, b"") + data).split(b"\n")
        if rest and (not data or len(rest) > MOST_KEPT):
            lines, rest = [*lines, rest], b""
        self.rests[key] = rest
        for line in lines:
            shown = line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
            self.write(kind, f"[{session.host}] {shown}" if self.prefix else shown)


@dataclass
class Kept:
    """The output of nodes, for ``--json``; used as `on_output`."""

    output: dict[tuple[int, bytes], bytearray] = field(default_factory=dict)

    def __call__(self, session: Session, kind: bytes, data: bytes) -> None:
        """Keep `data`."""
        kept = self.output.setdefault((session.node, kind), bytearray())
        kept += data[: max(0, MOST_KEPT - len(kept))]

    def text(self, node: int, kind: bytes) -> str:
        """Return what is kept of a node."""
        return self.output.get((node, kind), bytearray()).decode(errors="replace")


OnOutput = Callable[[Session, bytes, bytes], None]


def execute(target: Target, command: Sequence[str], on_output: OnOutput) -> list[Ended]:
    """Run `command` once on each node of `target`, and return the ends. Ctrl-C is sent to the commands.

    A second Ctrl-C closes the connections, upon which the nodes kill the commands.

    Raises:
        BadRequest: no node answers.
        KeyboardInterrupt: Ctrl-C was typed before a command had started, or twice.
    """
    return asyncio.run(_execute(target, command, on_output))


async def _execute(target: Target, command: Sequence[str], on_output: OnOutput) -> list[Ended]:
    async with Visitor(target, "command") as visitor:
        running: dict[int, Session] = {}
        with _interrupts_to(running):
            ends = []
            async for session in visitor.sessions():
                running[session.node] = session
                ends.append(asyncio.create_task(_supervise(session, command, on_output, running)))
            found = list(await asyncio.gather(*ends))
        for host, reason in visitor.missing.items():
            found.append(Ended(target.hosts.index(host), host, NO_STATUS, reason))
        return sorted(found, key=lambda end: end.node)


@contextmanager
def _interrupts_to(running: dict[int, Session]) -> Iterator[None]:
    """Send the first SIGINT of this process to the commands of the sessions; a second one cancels the calling task."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    times = 0

    def interrupt() -> None:
        nonlocal times
        times += 1
        if times > 1 or not running:
            task.cancel()
        for session in running.values():
            with suppress(OSError):
                session.line.write(FIELDS, b'{"signal": %d}' % signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    except asyncio.CancelledError:
        if times:
            raise KeyboardInterrupt from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _supervise(
    session: Session, command: Sequence[str], on_output: OnOutput, running: dict[int, Session]
) -> Ended:
    end = Ended(session.node, session.host, reason="its session ended before the command")
    try:
        await session.line.send(command=list(command))
        while True:
            kind, data = await session.line.receive()
            if kind in (OUTPUT, ERROR):
                on_output(session, kind, data)
            elif kind == FIELDS:
                fields = fields_of(data)
                if is_count(fields.get("status")):
                    end.status, end.reason = fields["status"], ""
                else:
                    end.reason = str(fields.get("ended") or fields.get("error") or end.reason)
                return end
            else:
                return end
    except NotTrusted as error:
        end.reason = str(error)
        return end
    except OSError:
        return end
    finally:
        running.pop(session.node, None)
        for kind in (OUTPUT, ERROR):
            on_output(session, kind, b"")
