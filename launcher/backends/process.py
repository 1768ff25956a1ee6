"""A detached process of this machine as a job: what stands behind a local run and behind a Ray driver."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from launcher.errors import LaunchError
from launcher.spec import State


def start(module: str, run_dir: Path, log: Path) -> str:
    """Start ``python -m module RUN_DIR`` in a session of its own and return its job id.

    The job id is ``host:pid:start time``, the last in clock ticks since boot, so that a recycled pid is not mistaken for
    the process. It survives the shell that started it.
    """
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as output:
        # Not a Popen, which would warn of a process that outlives it; outliving is what this one is for.
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-P", "-m", module, str(run_dir)],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
            ],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores, and children would, too
        )
    _children.add(pid)
    return f"{socket.gethostname()}:{pid}:{_start_time(pid)}"


_children: set[int] = set()
"""Kept so that a long-lived Python (a notebook) reaps what it started; see `poll`."""


def poll(job_id: str) -> State:
    """RUNNING while the process lives, LOST once it is gone, UNKNOWN from another machine."""
    host, pid, started = job_id.rsplit(":", 2)
    if host != socket.gethostname():
        return State.UNKNOWN
    for child in list(_children):
        try:
            gone, _ = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:  # somebody else has reaped it
            gone = child
        if gone:
            _children.discard(child)
    return State.RUNNING if _start_time(int(pid)) == started else State.LOST


def kill(job_id: str) -> None:
    """Kill the process; its children watch for its end and go with it.

    Raises:
        LaunchError: the process is on another machine.
    """
    host, pid, _ = job_id.rsplit(":", 2)
    state = poll(job_id)
    if state is State.UNKNOWN:
        raise LaunchError(f"the run is supervised by a process on {host}; cancel it from there.")
    if state is State.RUNNING:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _start_time(pid: int) -> str:
    """The process's start in clock ticks since boot, or an empty string when it is gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()  # the command's name may hold spaces and brackets
    return "" if fields[0] in "ZX" else fields[19]
