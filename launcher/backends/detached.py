"""Start, poll and kill a detached process of this machine: a local agent or a Ray driver."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launcher.agent.processes import start_time
from launcher.errors import BadRequest, LaunchError
from launcher.lifecycle.trust import PROCESS_ID, check_id
from launcher.request import own_packages
from launcher.request.spec import State
from training.files import open_plain


def start(module: str, run_dir: Path, log: Path, *words: str, passed: Sequence[tuple[int, int]] = ()) -> str:
    """Start ``python -m module RUN_DIR words`` in a session of its own and return its job id.

    `passed` are descriptors that the process is given, each with its number there, in ascending order of that number.

    The job id is ``host:pid:start time``, with the start time in clock ticks since boot to detect a reused pid. The process
    survives the shell that started it.
    """
    log.parent.mkdir(exist_ok=True)
    with os.fdopen(open_plain(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as output:
        # Not Popen, which warns about a child that outlives it.
        pid = os.posix_spawn(
            sys.executable,
            own_packages.command(module, str(run_dir), *words),
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
                *((os.POSIX_SPAWN_DUP2, own, number) for own, number in passed),
            ],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores them, and children inherit that
        )
    _children.add(pid)
    return f"{socket.gethostname()}:{pid}:{start_time(pid) or 0}"


_children: set[int] = set()
"""The started pids, so that `poll` can reap them in a long-lived Python process such as a notebook."""


def poll(job_id: str) -> State:
    """State of the process: RUNNING, LOST after its exit, UNKNOWN on another machine."""
    host, pid, started = check_id(PROCESS_ID, job_id).groups()
    if host != socket.gethostname():
        return State.UNKNOWN
    for child in list(_children):
        try:
            gone, _ = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:  # already reaped, by other code
            gone = child
        if gone:
            _children.discard(child)
    return State.RUNNING if start_time(int(pid)) == started else State.LOST


def kill(job_id: str) -> None:
    """Kill the process; its children detect this and exit.

    Raises:
        LaunchError: the process is on another machine.
        BadRequest: the job id is malformed, or the process belongs to another user.
    """
    host, pid, started = check_id(PROCESS_ID, job_id).groups()
    if poll(job_id) is State.UNKNOWN:
        raise LaunchError(f"the run is supervised by a process on {host}; cancel it on that machine.")
    with suppress(ProcessLookupError):
        _kill(int(pid), started)


def _kill(pid: int, started: str) -> None:
    """Send SIGKILL to the process `pid` if it was started at `started`, so that its pid was not reused."""
    try:
        handle = os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.EINVAL:  # the id of a thread, not of a process
            return
        if error.errno != errno.ENOSYS:
            raise
        handle = -1  # Linux before 5.3
    try:
        if start_time(pid) != started:
            return
        if (owner := _users(pid)) != {os.geteuid()}:
            raise BadRequest(f"process {pid} belongs to uid {', '.join(map(str, sorted(owner)))}; it was not killed.")
        if handle >= 0:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        if handle >= 0:
            os.close(handle)


def _users(pid: int) -> set[int]:
    """The real, effective, saved and file system uid of a process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return {int(uid) for line in status.splitlines() if line.startswith("Uid:") for uid in line.split()[1:]}
