"""What the processes of a run say goes into its run directory; a disk that is full must not end them for that."""

from __future__ import annotations

import faulthandler
import fcntl
import io
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from training.files import FULL_DISK, open_plain


class DropOnFullDisk(io.FileIO):
    """A file that drops what the disk has no room for, and says how much that was once there is room again.

    Attributes:
        dropped: bytes since there was room.
    """

    dropped = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        """Write `data`, or drop it; other errors are raised. Returns how much of it needs no further call."""
        try:
            if self.dropped:
                super().write(f"launch: {self.dropped} bytes are missing here: the disk was full\n".encode())
                self.dropped = 0
            return super().write(data)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self.dropped += len(data)
            return len(data)


def drop_output_on_full_disk() -> None:
    """From here on this process goes on where its standard output and error cannot be written to a full disk."""
    sys.stdout, sys.stderr = _patient(sys.stdout), _patient(sys.stderr)


def _patient(stream: TextIO) -> TextIO:
    stream.flush()
    raw = DropOnFullDisk(stream.fileno(), "w", closefd=False)
    buffered = io.BufferedWriter(raw)  # type: ignore[type-var]  # typeshed knows of no name for the buffers it takes
    return io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True)


def redirect_output(log: str, rank: int, terminal: int = -1) -> None:
    """Append the output of this process to the log of a rank; exit if that cannot be opened.

    With `terminal`, the descriptor of a pseudo-terminal, the output goes there, and the agent writes the log.
    """
    if terminal >= 0:
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        return
    try:
        output = open_plain(Path(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError as error:
        from launcher.lifecycle.exit_status import error_not_written_status

        print(f"launch: rank {rank}: {log}: {error.strerror}", file=sys.stderr)
        os._exit(error_not_written_status(error))
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


STACK_SIGNAL = signal.SIGRTMAX - 5
"""Asks a rank for its stacks (`launch stacks`). The C libraries and frameworks that ranks use leave it alone."""

STACK_FILE = "launch-stacks"


def write_stacks_on_signal() -> None:
    """From here on this process writes the stacks of its threads into an anonymous file at `STACK_SIGNAL`.

    The handler is in C, so that it works while no Python code can run. The first line of the file is the number of its
    descriptor: a program may close that, and open something else under the same number.
    """
    with suppress(OSError):  # a kernel or a sandbox without memfd
        descriptor = os.memfd_create(STACK_FILE)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
        os.write(descriptor, f"{descriptor}\n".encode())
        faulthandler.register(STACK_SIGNAL, descriptor)
