"""Supervise the daemons of a test cluster, so that none outlives the tests.

A cluster is a folder and one keeper. The keeper starts the daemons as its children, adopts processes that daemonise (it
is a child subreaper), and monitors its owner. When the owner sends ``stop``, closes the pipe or exits, even by SIGKILL,
the keeper kills all descendants and removes the folder. If the keeper itself was killed, the next keeper in the same
parent folder finds the folder unlocked and cleans up.

This module imports the standard library only and also runs as a plain script: ``python keeper.py FOLDER OWNER_PID``.
The protocol is one JSON object per line: ``{"start": argv, "env": {...}, "log": path, "cwd": path}`` answers
``{"pid": n}``; ``{"poll": pid}`` answers ``{"status": null | n}``; ``{"stop": true}`` answers when all is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

SESSION = "LAUNCH_TEST_SESSION"  # "<pid of the owner>-<random>", in the environment of all processes of a test session
FOLDER = "LAUNCH_TESTBED"  # in the environment of a cluster's daemons: its folder
PREFIX = "launch-testbed-"
PR_SET_CHILD_SUBREAPER = 36


class TestbedError(Exception):
    """A test cluster did not start, or an operation failed; the message has the daemon and its last lines."""

    __test__ = False


class Keeper:
    """The owner's side: starts and stops daemons through a keeper process.

    Raises `TestbedError` if the keeper is gone or a daemon cannot be started.
    """

    def __init__(self, kind: str) -> None:
        base = tempfile.gettempdir()
        if len(base) > 30:  # the path of a UNIX socket has at most 107 bytes
            base = "/tmp"
        self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=base))
        self.folder.chmod(0o755)  # munged and daemons of other users need access
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self.folder), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal must only reach the owner
        )

    @property
    def pid(self) -> int:
        """The process id of the keeper, of which all daemons descend."""
        return self._process.pid

    def start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """Start a daemon in the foreground, with its output in ``<folder>/<name>.out``; returns its pid."""
        binary = shutil.which(argv[0], path=env.get("PATH", os.defpath))
        if binary is None:
            raise TestbedError(f"cannot start {argv[0]}: not found")
        log = str(self.folder / f"{name}.out")
        return int(
            self._ask({"start": [binary, *argv[1:]], "env": dict(env), "log": log, "cwd": str(self.folder)})["pid"]
        )

    def poll(self, pid: int) -> int | None:
        """The exit status of a daemon, as in `subprocess.Popen.returncode`; None while it runs."""
        status = self._ask({"poll": pid})["status"]
        return None if status is None else int(status)

    def stop(self) -> None:
        """Kill the daemons and their children, remove the folder, end the keeper."""
        if self._process.poll() is None:
            with contextlib.suppress(TestbedError):
                self._ask({"stop": True})
        self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            raise TestbedError(f"the keeper of {self.folder} is gone")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise TestbedError(answer["error"])
        return answer


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) or "(empty)"
    return "(no log)"


def processes_with(*needles: str) -> dict[int, str]:
    """Pid -> command line of other processes whose environment contains all `needles`.

    The environment is that of the last exec, without variables set later in the process.
    """
    found = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            if pid != os.getpid() and all(needle.encode() in environ for needle in needles):
                found[pid] = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
    return found


def descendants(root: int) -> set[int]:
    """All running descendants of `root`."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            if stat[0] != "Z":
                children.setdefault(int(stat[1]), []).append(pid)
    found: set[int] = set()
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo.extend(below)
    return found


def kill(pids: Sequence[int] | set[int]) -> None:
    """Send SIGKILL to each; a process that is gone is no error."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Free ports below the range of outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def listening(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a process accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, port)) == 0


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


# --- clusters by hand


class Cluster(Protocol):
    """The common interface of test clusters."""

    def __enter__(self) -> Cluster: ...

    def __exit__(self, *error: object) -> None: ...

    def environment(self) -> dict[str, str]: ...


def run_by_hand(cluster: Cluster, command: Sequence[str] | None) -> int:
    """Run `command` in the cluster and return its exit status; without one, print its address and wait for Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with cluster:
            if command:
                return subprocess.run(command, env=os.environ | cluster.environment(), check=False).returncode
            print("\n".join(f"export {k}={v}" for k, v in cluster.environment().items()), flush=True)
            signal.pause()
    except TestbedError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


# --- the keeper process


def main(folder: Path, owner: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    lock = lock_folder(folder)
    _finish_work_of_dead_keepers(folder)
    ended: dict[int, int] = {}

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = os.waitstatus_to_exitcode(found[1])

    signal.signal(signal.SIGCHLD, reap)
    told = False
    for request in _requests(owner):
        if "start" in request:
            answer = _spawn(request)
        elif "poll" in request:
            answer = {"status": ended.get(request["poll"])}
        else:
            told = True
            break
        print(json.dumps(answer), flush=True)
    left = _kill_all()
    if not told:  # the owner died: kill its own processes (srun, sbatch, launch), too
        session = os.environ.get(SESSION, "")
        if session.startswith(f"{owner}-"):
            strays = processes_with(f"{SESSION}={session}")
            kill([pid for pid, command in strays.items() if __file__ not in command])
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"error": f"these do not die: {sorted(left)}"} if left else {"stopped": True}), flush=True)


def _requests(owner: int) -> Any:
    """Requests, until the pipe closes or the owner dies (a forked child may still hold the pipe)."""
    try:
        watch = [0, os.pidfd_open(owner)]
    except ProcessLookupError:
        return
    pending = b""
    while True:
        ready, _, _ = select.select(watch, [], [])
        chunk = os.read(0, 1 << 16) if 0 in ready else b""
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _spawn(request: dict[str, Any]) -> dict[str, Any]:
    # setpriv: if the keeper is killed, the kernel kills its daemons
    argv = ["setpriv", "--pdeathsig", "KILL", *request["start"]]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    env = request["env"] | {FOLDER: request["cwd"]}
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # Python ignores it, and a child would inherit that
    os.chdir(request["cwd"])
    try:
        return {"pid": os.posix_spawnp(argv[0], argv, env, file_actions=actions, setsid=True, setsigdef=ignored)}
    except OSError as error:
        return {"error": f"cannot start {request['start'][0]}: {error}"}


def _kill_all() -> set[int]:
    deadline = time.monotonic() + 20
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        kill(left)
        time.sleep(0.02)
    return left


def lock_folder(folder: Path) -> int:
    """Lock a folder while its keeper lives; raises BlockingIOError if it is locked."""
    handle = os.open(folder / "keeper.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    return handle


def _finish_work_of_dead_keepers(own: Path) -> None:
    for folder in own.parent.glob(f"{PREFIX}*"):
        # a folder without a lock file is new and will get one
        if folder == own or not (folder / "keeper.lock").exists():
            continue
        with contextlib.suppress(OSError):
            lock = lock_folder(folder)
            # SLURM_CONF alone may also be set in a user's shell, which must not be killed
            while strays := processes_with(f"{FOLDER}={folder}\0") | processes_with(f"{folder}/", "SLURMD_NODENAME="):
                kill(set(strays))
                time.sleep(0.02)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
