"""Processes of this machine, as ``/proc`` shows them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def process_state(pid: int | None) -> str:
    """The state letter of a process in ``/proc``, such as ``R``, ``S``, ``D`` or ``T``; empty where there is none."""
    with suppress(OSError):
        # Bytes: the name of a process is cut after 15 of them, in any encoding.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    return ""


def start_time(pid: int) -> str:
    """Start of the process in clock ticks since boot; empty if it has exited (a zombie included)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()  # the command name may contain spaces and brackets
    return "" if fields[0] in "ZX" else fields[19]


def catches(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal `number`. Raises OSError if it has ended."""
    return has_signal(f"/proc/{pid}/status", "SigCgt", number)


def has_signal(path: str, name: str, number: int) -> bool:
    """Whether the set of signals `name` in a status file of ``/proc`` has `number`; see proc_pid_status(5). Raises OSError."""
    for line in Path(path).read_text(errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
