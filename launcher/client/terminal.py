"""The foreground side of a single local rank: its standard input, and the user's terminal.

If the command writes to a terminal, the rank gets a pseudo-terminal of its own, whose other end is the node agent
(`launcher.rank.terminal.relay`). This process passes on what is typed and shows what the rank writes. Otherwise the rank has the
standard input of the command, and its output goes into its log.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from launcher import backends
from launcher.client.screen import Screen
from launcher.rank.terminal import messages
from launcher.rank.terminal.messages import CHUNK, CONNECTION, CONTINUED, MASTER, SIZE, SLAVE, STDIN, TYPED
from launcher.request.spec import Plan

ABOVE = SLAVE + 5
"""Descriptors that are passed on have higher numbers here, so that none is replaced before it is passed on."""


class Attachment:
    """Streams of this process for the rank of a run that is about to start.

    Attributes:
        kind: ``stdin``: descriptor 0 of the agent is the standard input of the rank. ``terminal``: besides, the agent has a
            connection to this process and the two ends of a pseudo-terminal.
        passed: descriptors of this process with their numbers in the agent.
        terminal: the user's terminal, if the rank uses it.
    """

    def __init__(self, kind: str, passed: dict[int, int], terminal: Terminal | None = None) -> None:
        self.kind, self.terminal = kind, terminal
        self.passed = [(_above(own), number) for number, own in sorted(passed.items())]

    def sent(self) -> None:
        """Close the descriptors, which the agent has now."""
        for own, _ in self.passed:
            os.close(own)


def _above(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, ABOVE)


def attach(plan: Plan, out: TextIO) -> Attachment | None:
    """Return the streams for the rank of `plan`, whose output is shown on `out`; None if its ranks read nothing."""
    if plan.placement.world_size != 1 or not backends.of(plan.cluster).capabilities.attaches:
        return None
    if not out.isatty():
        return Attachment("stdin", {STDIN: 0}) if sys.stdin is not None else None
    master, slave = os.openpty()
    connection, remote = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keyboard = sys.stdin is not None and os.isatty(0)
    screen = 0 if keyboard else out.fileno()
    termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(screen))
    fcntl.ioctl(slave, termios.TIOCSWINSZ, window_size(screen))
    with remote, open(os.devnull, "rb") as null:
        stdin = slave if keyboard else null.fileno() if sys.stdin is None else 0
        passed = {STDIN: stdin, CONNECTION: remote.fileno(), MASTER: master, SLAVE: slave}
        attachment = Attachment("terminal", passed, Terminal(connection, screen, keyboard))
    os.close(master)
    os.close(slave)
    return attachment


def _in_foreground(terminal: int) -> bool:
    """Whether this process may read the terminal now."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError as error:
        return error.errno == errno.ENOTTY  # it is not that of this session, so that it has no job control


def window_size(descriptor: int) -> bytes:
    """The size of the window of a terminal, as ``struct winsize``."""
    return fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8))


class Terminal:
    """The user's terminal while a rank uses it.

    Attributes:
        on_start: called before the output of an attempt.
        on_stop: called when Ctrl-C has asked the run to stop.
    """

    def __init__(self, connection: socket.socket, descriptor: int, keyboard: bool) -> None:
        self.connection: socket.socket | None = connection
        self.descriptor, self.keyboard = descriptor, keyboard
        self.on_start: Callable[[], None] = lambda: None
        self.on_stop: Callable[[], None] = lambda: None
        self._saved: list[Any] | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Follow the size of the window while the block runs; the terminal is restored after it, and after a signal."""
        main = threading.current_thread() is threading.main_thread()
        handlers: dict[int, Callable[[int, Any], None]] = (
            {signal.SIGWINCH: self._resized, signal.SIGHUP: self._hung_up} if main else {}
        )
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup
            handlers.pop(signal.SIGHUP, None)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            self.restore()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _resized(self, *_: object) -> None:
        with suppress(OSError):
            self._send(SIZE + window_size(self.descriptor))

    def _hung_up(self, number: int, _: object) -> None:
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _send(self, message: bytes) -> None:
        if self.connection is not None:
            with suppress(OSError):
                self.connection.send(message, socket.MSG_NOSIGNAL)

    def _claim(self, screen: Screen) -> None:
        """Have each typed byte delivered at once and unchanged, if this process is in the foreground of the terminal."""
        if self._saved is None and self.keyboard and _in_foreground(self.descriptor):
            self._saved = termios.tcgetattr(self.descriptor)
            tty.setraw(self.descriptor, termios.TCSANOW)
        screen.raw = self._saved is not None

    def restore(self) -> None:
        """Give the terminal back as it was."""
        saved, self._saved = self._saved, None
        if saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(self.descriptor, termios.TCSANOW, saved)

    def relay(self, screen: Screen, seconds: float) -> None:
        """Pass on what is typed and what the rank writes, for so long or until the agent has closed the connection."""
        deadline = time.monotonic() + seconds
        while self.connection is not None and (left := deadline - time.monotonic()) > 0:
            self._claim(screen)
            watched: list[Any] = [self.connection, *([self.descriptor] if self._saved is not None else [])]
            ready, _, _ = select.select(watched, [], [], left)
            if self.connection in ready:
                self._show(screen)
            if self.descriptor in ready:
                self._type()
        if self.connection is None:
            self.restore()
            screen.raw = False

    def _type(self) -> None:
        try:
            typed = os.read(self.descriptor, 4096)
        except OSError:
            typed = b""
        if typed:
            self._send(TYPED + typed)
        else:  # the terminal is gone
            self.keyboard, self._saved = False, None

    def _show(self, screen: Screen) -> None:
        assert self.connection is not None
        try:
            message = self.connection.recv(CHUNK + 1)
        except OSError:
            message = b""
        match message[:1], message[1:]:
            case b"", _:
                self.connection.close()
                self.connection = None
            case messages.STARTING, _:
                self.on_start()
            case messages.OUTPUT, data:
                screen.data(data)
            case messages.STOPPING, _:
                self.on_stop()
            case messages.SUSPEND, _:
                self._suspend(screen)

    def _suspend(self, screen: Screen) -> None:
        """Suspend this command, as Ctrl-Z does; the rank is suspended already, and goes on when this returns."""
        screen.flush()
        self.restore()
        screen.raw = False
        os.killpg(0, signal.SIGTSTP)
        self._resized()
        self._send(CONTINUED)
