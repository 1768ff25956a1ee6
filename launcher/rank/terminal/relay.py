"""The terminal of a single local rank: a pseudo-terminal that the agent connects to the foreground command.

The agent copies what the rank prints to its log and to the foreground command, and passes on what the user types. When the
foreground command is gone, the rank keeps the pseudo-terminal: its output goes on into the log, and its input has ended.

The messages are those of `launcher.rank.terminal.messages`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import socket
import sys
import termios
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.config.timeouts import TIMEOUTS
from launcher.rank.output import DropOnFullDisk
from launcher.rank.terminal import messages
from launcher.rank.terminal.messages import CHUNK, CONNECTION, MASTER, OUTPUT, SLAVE, STARTING, STDIN, STOPPING, SUSPEND

TYPED_AHEAD = 65536
"""Bytes that the program has not read yet, beyond which typed input is dropped; a terminal keeps 4096."""


class Run(Protocol):
    """What the user can ask for at the terminal."""

    def interrupt(self) -> bool:
        """Take note of Ctrl-C; return whether it is for the program. If not, the run has been asked to stop."""

    def kill(self) -> None:
        """End the run at once."""

    def suspend(self, suspended: bool) -> None:
        """Suspend the rank, or let it continue."""


@dataclass(frozen=True)
class Streams:
    """The standard streams of a rank that a foreground command has passed on.

    Attributes:
        stdin: the descriptor of its standard input; -1: it is empty.
        terminal: where its output goes; None: into its log alone.
    """

    stdin: int = -1
    terminal: Terminal | None = None

    @classmethod
    def inherited(cls, kind: str) -> Streams:
        """Take over the descriptors with which the agent was started; `kind` is ``stdin`` or ``terminal``."""
        stdin = fcntl.fcntl(STDIN, fcntl.F_DUPFD_CLOEXEC, SLAVE + 1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, STDIN)  # the agent's other children must not read what is meant for the rank
        os.close(null)
        if kind == "stdin":
            return cls(stdin)
        for descriptor in (CONNECTION, MASTER, SLAVE):
            os.set_inheritable(descriptor, False)
        return cls(stdin, Terminal(socket.socket(fileno=CONNECTION), MASTER, SLAVE))

    def open(self, run: Run) -> None:
        """See `Terminal.open`."""
        if self.terminal is not None:
            self.terminal.open(run)

    def start(self, log: Path) -> None:
        """See `Terminal.start`."""
        if self.terminal is not None:
            file = DropOnFullDisk(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "w")
            self.terminal.start(file)

    def drain(self) -> None:
        """See `Terminal.drain`."""
        if self.terminal is not None:
            self.terminal.drain()

    def close(self) -> None:
        """See `Terminal.close`."""
        if self.terminal is not None:
            self.terminal.close()

    @property
    def descriptors(self) -> list[int]:
        """The descriptors of the standard input and of the pseudo-terminal, for the forkserver; -1: none."""
        return [self.stdin, -1 if self.terminal is None else self.terminal.slave]


class Keyboard:
    """What is typed: passed on to the program, but for the characters by which the user acts on the run.

    Those are the ones by which the pseudo-terminal would send signals, unless the program has switched them off.
    """

    def __init__(self, master: int, slave: int, run: Run, send: Callable[[bytes], None]) -> None:
        self.master, self.slave, self.run, self.send = master, slave, run, send
        self._typed = b""
        self._ending: asyncio.TimerHandle | None = None

    def _characters(self) -> list[bytes]:
        """The control characters of the pseudo-terminal, as the program has set them."""
        return [each if isinstance(each, bytes) else bytes((each,)) for each in termios.tcgetattr(self.slave)[6]]

    def type(self, data: bytes) -> None:
        """Act on typed bytes."""
        signals: dict[bytes, int] = {}
        if termios.tcgetattr(self.slave)[3] & termios.ISIG:
            characters = self._characters()
            signals = {characters[each]: each for each in (termios.VINTR, termios.VQUIT, termios.VSUSP)}
            signals.pop(b"\0", None)  # none
        for byte in (data[i : i + 1] for i in range(len(data))):
            if byte in signals:
                self._signal(signals[byte], byte)
            elif len(self._typed) < TYPED_AHEAD:
                self._typed += byte
        self._write()

    def _signal(self, kind: int, character: bytes) -> None:
        if kind == termios.VINTR:
            if self.run.interrupt():
                self._typed += character  # the pseudo-terminal sends SIGINT to the program
            else:
                self._typed = b""
                self.send(STOPPING)
        elif kind == termios.VQUIT:
            self.run.kill()
        else:
            self.run.suspend(True)
            self.send(SUSPEND)

    def _write(self) -> None:
        """Write typed bytes to the program, as many as its terminal takes."""
        loop = asyncio.get_running_loop()
        try:
            self._typed = self._typed[os.write(self.master, self._typed) :] if self._typed else b""
        except BlockingIOError:
            pass
        except OSError:
            self._typed = b""
        if self._typed:
            loop.add_writer(self.master, self._write)
        else:
            loop.remove_writer(self.master)

    def end(self) -> None:
        """From now on, have each read of the terminal return its end."""
        with suppress(OSError, ValueError):
            if not select.select([self.slave], [], [], 0)[0]:
                os.write(self.master, self._characters()[termios.VEOF])
        self._ending = asyncio.get_running_loop().call_later(TIMEOUTS.heartbeat, self.end)

    def close(self) -> None:
        """Pass on nothing more."""
        asyncio.get_running_loop().remove_writer(self.master)
        if self._ending is not None:
            self._ending.cancel()


class Terminal:
    """A pseudo-terminal and its connection to the foreground command."""

    def __init__(self, connection: socket.socket, master: int, slave: int) -> None:
        self.connection: socket.socket | None = connection
        self.master, self.slave = master, slave
        self.keyboard: Keyboard | None = None
        self._log: DropOnFullDisk | None = None
        self._fresh = termios.tcgetattr(slave)
        self._unsent: deque[bytes] = deque()
        self._return = False  # the last chunk ended in a carriage return

    def open(self, run: Run) -> None:
        """Begin to pass on input and output; later calls do nothing."""
        if self.keyboard is not None:
            return
        self.keyboard = Keyboard(self.master, self.slave, run, self._send)
        os.set_blocking(self.master, False)
        loop = asyncio.get_running_loop()
        loop.add_reader(self.master, self._read)
        if self.connection is not None:
            self.connection.setblocking(False)
            loop.add_reader(self.connection, self._receive)

    def start(self, log: DropOnFullDisk) -> None:
        """Prepare for a rank, whose output is also written to `log`."""
        self._close_log()
        self._send(STARTING)
        termios.tcsetattr(self.slave, termios.TCSANOW, self._fresh)  # a rank that was killed may have changed them
        self._log = log

    def drain(self) -> None:
        """Pass on all that a rank that has ended has written."""
        while self._read():
            pass

    def close(self) -> None:
        """Deliver what is left, and close everything."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.master)
        if self.keyboard is not None:
            self.keyboard.close()
        if self.connection is not None:
            loop.remove_reader(self.connection)
            loop.remove_writer(self.connection)
            self.connection.settimeout(TIMEOUTS.disconnect)
            with suppress(OSError):
                while self._unsent:
                    self.connection.send(self._unsent.popleft(), socket.MSG_NOSIGNAL)
            self.connection.close()
        self._close_log()
        for descriptor in (self.master, self.slave):
            os.close(descriptor)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()

    # ---- output -----------------------------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Pass on what the rank wrote; return whether there was anything."""
        try:
            data = os.read(self.master, CHUNK)
        except OSError:  # nothing at the moment
            return False
        if self._log is not None:
            try:
                self._log.write(self._lines(data))
            except OSError as error:
                print(f"launch: the log of the rank: {error.strerror}", file=sys.stderr)
                self._close_log()
                self._log = None
        self._send(OUTPUT + data)
        return bool(data)

    def _lines(self, data: bytes) -> bytes:
        r"""Return `data` with ``\n`` for the ``\r\n`` of the terminal, also between two chunks."""
        if self._return:
            data = b"\r" + data
        self._return = data.endswith(b"\r")
        return (data[:-1] if self._return else data).replace(b"\r\n", b"\n")

    def _send(self, message: bytes) -> None:
        if self.connection is not None:
            self._unsent.append(message)
            self._send_all()

    def _send_all(self) -> None:
        """Send as much as the foreground command takes; meanwhile nothing more is read from the rank."""
        assert self.connection is not None
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                self.connection.send(self._unsent[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                loop.remove_reader(self.master)
                loop.add_writer(self.connection, self._send_all)
                return
            except OSError:
                self._disconnected()
                return
            self._unsent.popleft()
        if loop.remove_writer(self.connection):
            loop.add_reader(self.master, self._read)

    def _disconnected(self) -> None:
        """Go on without the foreground command."""
        assert self.connection is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.connection)
        loop.remove_writer(self.connection)
        self.connection.close()
        self.connection = None
        self._unsent.clear()
        loop.add_reader(self.master, self._read)
        if self.keyboard is not None:
            self.keyboard.run.suspend(False)
            self.keyboard.end()

    def _receive(self) -> None:
        """Act on a message of the foreground command."""
        assert self.connection is not None
        assert self.keyboard is not None
        try:
            message = self.connection.recv(CHUNK + 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        match message[:1], message[1:]:
            case b"", _:
                self._disconnected()
            case messages.TYPED, data:
                self.keyboard.type(data)
            case messages.SIZE, size:
                with suppress(OSError):
                    fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)
            case messages.CONTINUED, _:
                self.keyboard.run.suspend(False)
