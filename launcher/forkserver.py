"""Start the ranks of one node from a process that has already imported what they need.

``python -m launcher.forkserver`` imports once and forks a rank whenever its parent, the node agent, asks for it. It is a
server of its own rather than `multiprocessing`'s because that one takes module names only, dies silently when a preloaded
module raises, and gives no say over sessions, logs and orphans. Measured beside it in ``benchmarks/first_step.py``.

The protocol is one JSON object a line, over one socket (file descriptor 0):

======================================================  ===============================================================
from the agent                                          back
======================================================  ===============================================================
``{"preload": [...], "path": [...], "environment": {},``  ``{"ready": seconds}`` once the imports are done
``"spawn": false}``
``{"start": rank, "log": path, "world": {...},``          ``{"started": rank, "pid": n}``, at its end ``{"exit": rank, "code": n}``
``"environment": {...}}`` (optional)
``{"signal": n, "ranks": [...]}``                         nothing
``{"learn": [...]}``: imports for a quiet moment          nothing
======================================================  ===============================================================

End of file means that the agent is gone: every rank is killed and the server leaves. A rank's descendants die with it,
those that moved to a session of their own included, because the server is their reaper (PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from launcher.output import outlive_a_full_disk

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class ForkServer:
    """The server's side: imports, forks, reaps."""

    def __init__(self, control: socket.socket, run_dir: Path, pulses: int) -> None:
        self.control = control
        self.run_dir = run_dir
        self.pulses = pulses  # the descriptor of the memory that the agent watches
        self.ranks: dict[int, int] = {}  # pid -> rank
        self.buffer = b""
        self.spawn = False
        self.lessons: deque[str] = deque()  # import statements for a quiet moment

    def serve(self) -> int | None:
        """Serve until the agent is gone. Returns a rank's exit status in a forked child, None in the server."""
        wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # The terminal's Ctrl-C and SLURM's signals are the agent's business.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while True:
                ready = selector.select(0 if self.lessons else None)
                if not ready:
                    # One at a time: a rank that dies meanwhile should be noticed at once.
                    self.spawn = not do_imports([self.lessons.popleft()], ()) or self.spawn
                for key, _ in ready:
                    if key.fileobj is not self.control:
                        with suppress(BlockingIOError):
                            os.read(wake, 4096)
                        self.reap()
                        continue
                    lines = self.receive()
                    if lines is None:
                        self.kill_all()
                        return None
                    for line in lines:
                        status = self.handle(json.loads(line))
                        if status is not None:
                            return status

    def receive(self) -> list[bytes] | None:
        """Return the whole lines that came, or None when the agent is gone."""
        try:
            data = self.control.recv(65536)
        except ConnectionError:
            data = b""
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return lines

    def send(self, **message: Any) -> None:
        with suppress(OSError):
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def handle(self, message: dict[str, Any]) -> int | None:
        """Do what the agent says. Returns a rank's exit status in a forked child, None in the server."""
        match message:
            case {"preload": preload, "path": path, "environment": environment, "spawn": spawn}:
                started = time.monotonic()
                os.environ.update(environment)
                self.spawn = spawn
                if not spawn and not do_imports(preload, path):
                    print("launch: an import initialised CUDA, so ranks are spawned instead of forked", file=sys.stderr)
                    self.spawn = True
                self.send(ready=round(time.monotonic() - started, 3))
            case {"start": rank, "log": log, "world": world}:
                os.environ.update(message.get("environment", {}))  # the next rank's own values take their place
                return self.fork(rank, Path(log), world)
            case {"learn": statements} if not self.spawn:
                self.lessons.extend(statements)
            case {"signal": number, "ranks": ranks}:
                for pid, rank in list(self.ranks.items()):
                    if rank in ranks:
                        # A polite signal is for the rank alone, which knows best what its children need.
                        if number == signal.SIGKILL:
                            kill_group(pid)
                        else:
                            os.kill(pid, number)
        return None

    def fork(self, rank: int, log: Path, world: dict[str, Any]) -> int | None:
        """Start a rank. Returns its exit status in the forked child, None in the server."""
        sys.stdout.flush()
        sys.stderr.flush()
        server = os.getpid()
        # Held back until the rank has handlers of its own: this server ignores them, and a stop would be lost.
        held = (signal.SIGTERM, signal.SIGUSR2)
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
            self.ranks[pid] = rank
            self.send(started=rank, pid=pid)
            return None
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)  # the server died between the fork and the line above
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            from launcher.exit_status import unheard

            print(f"launch: rank {rank}: {log}: {error.strerror}", file=sys.stderr)
            os._exit(unheard(error))
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        # Last, so that the socket (descriptor 0) is gone from the rank: its end must not hold the server's open.
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self.control.detach()
        if self.spawn:
            arguments = [str(self.run_dir), json.dumps(world), str(self.pulses)]
            os.execv(sys.executable, [sys.executable, "-P", "-m", "launcher.worker", *arguments])
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed()  # it was seeded by its import, once for all ranks of the node
        from launcher.worker import main

        return main(self.run_dir, world, self.pulses)

    def reap(self) -> None:
        """Tell the agent about every rank that has ended, once what it left behind is killed."""
        while True:
            try:
                # Look before reaping: while the rank is a zombie its process group cannot be given to anyone else.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            rank = self.ranks.pop(found.si_pid, None)
            if rank is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(found.si_pid, signal.SIGKILL)
            _, status = os.waitpid(found.si_pid, 0)
            if rank is not None:
                if not self.ranks:
                    self.kill_orphans()
                self.send(exit=rank, code=os.waitstatus_to_exitcode(status))

    def kill_orphans(self) -> None:
        """Kill what ranks left behind; orphans of descendants come to this process one generation at a time."""
        for _ in range(100):
            children = Path("/proc/self/task", str(threading.get_native_id()), "children").read_text().split()
            orphans = [int(pid) for pid in children if int(pid) not in self.ranks]
            if not orphans:
                return
            for pid in orphans:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def kill_all(self) -> None:
        """Kill every rank and what it left behind, and wait for their ends."""
        for pid in self.ranks:
            kill_group(pid)
        for pid in list(self.ranks):
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
            del self.ranks[pid]
        self.kill_orphans()


def kill_group(pid: int) -> None:
    """Kill a rank and its process group, its data workers; a rank just forked does not lead its group yet."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def do_imports(statements: Sequence[str], path: Sequence[str]) -> bool:
    """Run import statements, each on its own; one that fails is left for the rank to fail on, with its traceback.

    Returns whether this process can still be forked: a CUDA context, which an import may make, does not survive that.
    """
    sys.path[:0] = [p for p in path if p not in sys.path]
    for statement in ("import launcher.worker", *statements):
        with suppress(Exception, SystemExit):
            exec(statement, {})
    torch = sys.modules.get("torch")
    return torch is None or not torch.cuda.is_initialized()


def finish(status: int) -> NoReturn:
    """End a forked rank: wait for its threads, run its exit handlers, flush, and leave without tearing down modules.

    The interpreter's own teardown of a process with CUDA or gloo threads in it can hang or crash after the work is done.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """``python -m launcher.forkserver RUN_DIR DESCRIPTOR``, with the agent's socket as descriptor 0."""
    outlive_a_full_disk()  # the ranks inherit this
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    status = ForkServer(socket.socket(fileno=0), Path(sys.argv[1]), int(sys.argv[2])).serve()
    if status is not None:
        finish(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to unload thousands of modules takes seconds, in which the run would seem not to have ended


if __name__ == "__main__":
    main()
