"""Commands and shells of a client on a node: with the environment of a rank or of the node, and in its working directory."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pwd
import signal
import termios
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from launcher.agent.inside.line import CHUNK, ERROR, FIELDS, OUTPUT, SIZE, TYPED, Line, NotTrusted, fields_of
from launcher.agent.inside.start import SessionStart
from launcher.config.timeouts import TIMEOUTS
from launcher.rank.forkserver import kill_orphans
from launcher.request import own_packages

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit statuses of a shell for a command that cannot be started."""

SHELLS = ("/bin/bash", "/bin/sh")


def environment_of(start: SessionStart) -> dict[str, str]:
    """Return the variables for what a client starts: those of the rank that it named, else those of the node."""
    found = start.ranks[0].environment if start.request.ranks else start.environment
    path = [*start.path, *own_packages.for_children(start.moved), *filter(None, [found.get("PYTHONPATH")])]
    return found | ({"PYTHONPATH": os.pathsep.join(path)} if path else {})


def folder_of(start: SessionStart) -> str:
    """Return the working directory for what a client starts: that of the rank, else that of the run."""
    if start.request.ranks and start.ranks[0].pid:
        with suppress(OSError):
            return os.readlink(f"/proc/{start.ranks[0].pid}/cwd")
    return start.cwd if os.path.isdir(start.cwd) else "/"


def shell_of(environment: dict[str, str]) -> str:
    """Return the user's shell, if this node has it."""
    known = [environment.get("SHELL", "")]
    with suppress(KeyError):
        known.append(pwd.getpwuid(os.geteuid()).pw_shell)
    usable = (path for path in (*known, *SHELLS) if os.path.isabs(path) and os.access(path, os.X_OK))
    return next((path for path in usable if os.path.basename(path) not in ("nologin", "false")), SHELLS[-1])


async def serve_command(line: Line, start: SessionStart, fields: dict[str, Any]) -> None:
    """Run ``command`` of `fields`; send its output as it comes, and its exit status."""
    command = [str(word) for word in fields["command"]]
    # Not by asyncio: its `wait` also waits for all processes that hold a pipe.
    (output, write_output), (errors, write_errors) = os.pipe(), os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_output,
            stderr=write_errors,
            cwd=folder_of(start),
            env=environment_of(start),
            start_new_session=True,
        )
    except OSError as error:
        status = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        line.write(ERROR, f"{command[0]}: {error.strerror or error}\n".encode(errors="backslashreplace"))
        await line.send(status=status)
        return
    finally:
        os.close(write_output)
        os.close(write_errors)
    pumps = [
        asyncio.create_task(_pump(line, kind, Descriptor(end))) for kind, end in ((OUTPUT, output), (ERROR, errors))
    ]
    await _supervise(line, process, pumps, {FIELDS: lambda data: _signal(process, data)})


async def serve_shell(line: Line, start: SessionStart, fields: dict[str, Any]) -> None:
    """Run the user's shell in a pseudo-terminal of the client's ``size`` and type (``term``), to its end."""
    environment = environment_of(start) | {"TERM": str(fields.get("term") or "dumb")}
    shell = shell_of(environment)
    master, slave = os.openpty()
    _resize(master, bytes.fromhex(str(fields.get("size") or "")))
    try:
        process = await asyncio.create_subprocess_exec(
            shell,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=folder_of(start),
            env=environment | {"SHELL": shell},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
    except OSError:
        os.close(master)
        raise
    finally:
        os.close(slave)
    terminal = Descriptor(master)
    pumps = [asyncio.create_task(_pump(line, OUTPUT, terminal))]
    await _supervise(line, process, pumps, {TYPED: terminal.write, SIZE: lambda data: _resized(master, data)})


class Descriptor:
    """An end of a pipe or of a pseudo-terminal, whose other end a program has. This process closes it by its own end."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        os.set_blocking(descriptor, False)

    async def read(self, most: int) -> bytes:
        """Return the next output; nothing once all programs have closed the other end."""
        while True:
            try:
                return os.read(self.descriptor, most)
            except BlockingIOError:
                await self._ready(writing=False)
            except OSError:
                return b""

    async def write(self, data: bytes) -> None:
        """Type `data`."""
        while data:
            try:
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:
                await self._ready(writing=True)
            except OSError:
                return

    async def _ready(self, writing: bool) -> None:
        loop = asyncio.get_running_loop()
        add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
        ready = asyncio.Event()
        add(self.descriptor, ready.set)
        try:
            await ready.wait()
        finally:
            remove(self.descriptor)


def _resize(master: int, size: bytes) -> None:
    if len(size) == 8:
        with suppress(OSError):
            fcntl.ioctl(master, termios.TIOCSWINSZ, size)


async def _resized(master: int, size: bytes) -> None:
    _resize(master, size)


async def _signal(process: asyncio.subprocess.Process, data: bytes) -> None:
    number = fields_of(data).get("signal")
    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


async def _pump(line: Line, kind: bytes, reader: Descriptor) -> None:
    """Send what comes from `reader`, at the pace of the client."""
    with suppress(ConnectionError):
        while data := await reader.read(CHUNK):
            line.write(kind, data)
            await line.drain()


async def _supervise(
    line: Line,
    process: asyncio.subprocess.Process,
    pumps: list[asyncio.Task[None]],
    actions: dict[bytes, Callable[[bytes], Awaitable[None]]],
) -> None:
    """Bring a process to its end, act on what the client sends, and send the exit status.

    With the end of the connection, or of this session, the process and all that it left behind are ended, too.
    """
    asking = asyncio.create_task(_act(line, actions))
    waiting = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({asking, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            kill_orphans(set())  # they could hold the other end of the pipes
            with suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUTS.session_end):
                    await asyncio.gather(*pumps)
            code = waiting.result()
            await line.send(status=code if code >= 0 else 128 - code)
    finally:
        for task in (asking, *pumps):
            task.cancel()
        if process.returncode is None:
            await _end(process)
        waiting.cancel()
        kill_orphans(set())


async def _act(line: Line, actions: dict[bytes, Callable[[bytes], Awaitable[None]]]) -> None:
    """Act on messages until the connection ends."""
    with suppress(NotTrusted):
        while True:
            kind, data = await line.receive()
            if not kind:
                return
            if (action := actions.get(kind)) is not None:
                await action(data)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process and its group: SIGHUP, as if its terminal were gone, and SIGKILL."""
    for number in (signal.SIGHUP, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUTS.session_end / 3):
                await process.wait()
                return
