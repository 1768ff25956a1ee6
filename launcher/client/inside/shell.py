"""A shell on a node of a running run, in the user's terminal."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from launcher.agent.inside.line import FIELDS, NO_STATUS, OUTPUT, SIZE, TYPED, Line, fields_of
from launcher.client.inside.target import Target
from launcher.client.inside.visitor import Session, Visitor
from launcher.client.terminal import window_size
from launcher.errors import BadRequest
from training.flags.typed import is_count

KEYBOARD, SCREEN = 0, 1


def shell(target: Target) -> tuple[int, str]:
    """Open a shell on the node of `target` until it ends; return its exit status, and why it has none, if so.

    Raises:
        BadRequest: this process has no terminal, or the node does not answer.
    """
    if sys.stdin is None or not (os.isatty(KEYBOARD) and os.isatty(SCREEN)):
        raise BadRequest(
            f"a shell needs a terminal. Without one, `launch exec {target.name} -- COMMAND` runs a command."
        )
    try:
        return asyncio.run(_shell(target))
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM, "the shell was ended by a signal to this command"


async def _shell(target: Target) -> tuple[int, str]:
    async with Visitor(target, "shell") as visitor:
        async for session in visitor.sessions():
            print(_greeting(target, session), file=sys.stderr, flush=True)
            visitor.withdraw()
            with _raw_mode(session.line):
                return await _relay(session.line)
    raise AssertionError("a visit without a session raises")


def _greeting(target: Target, session: Session) -> str:
    from launcher.client.tail import printable

    who = f" as rank {target.ranks[0]}" if target.ranks else ""
    return printable(f"launch: on {session.host}{who} of {target.name}; exit ends this shell, the run goes on")


@contextmanager
def _raw_mode(line: Line) -> Iterator[None]:
    """Have each typed byte delivered unchanged, and follow the size of the window; the terminal is restored afterwards."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    saved = termios.tcgetattr(KEYBOARD)

    def resized() -> None:
        with suppress(OSError):
            line.write(SIZE, window_size(SCREEN))

    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    loop.add_signal_handler(signal.SIGWINCH, resized)
    try:
        tty.setraw(KEYBOARD, termios.TCSANOW)
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(KEYBOARD, termios.TCSADRAIN, saved)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGWINCH):
            loop.remove_signal_handler(number)


async def _relay(line: Line) -> tuple[int, str]:
    """Pass on what is typed and what the shell writes, to its end."""
    await line.send(size=window_size(SCREEN).hex(), term=os.environ.get("TERM", ""))
    loop = asyncio.get_running_loop()

    def typed() -> None:
        try:
            data = os.read(KEYBOARD, 4096)
        except OSError:
            data = b""
        if data:
            line.write(TYPED, data)
        else:  # the terminal is gone
            loop.remove_reader(KEYBOARD)
            line.abort()

    loop.add_reader(KEYBOARD, typed)
    try:
        while True:
            kind, data = await line.receive()
            if kind == OUTPUT:
                while data:
                    data = data[os.write(SCREEN, data) :]
            elif kind == FIELDS:
                fields = fields_of(data)
                if is_count(fields.get("status")):
                    return fields["status"], ""
                return NO_STATUS, str(fields.get("ended") or fields.get("error") or "the session ended")
            elif not kind:
                return NO_STATUS, "the connection to the node has ended"
    finally:
        loop.remove_reader(KEYBOARD)
