"""Start the ranks of one node and reap what they leave behind.

``python -m launcher.rank.forkserver`` starts a rank whenever its parent, the node agent, asks for it. Each rank is a fresh
interpreter that begins with the environment of its rank. Only the reference job is forked from this process, which has
imported its libraries by then: no module of a user is imported here. `multiprocessing`'s server has no control over
sessions, logs and orphans.

The messages (`launcher.rank.messages`) are lines over one socket, file descriptor 0.

End of file means that the agent is gone: every rank is killed and the server exits. A rank's descendants are killed with
it, including those in a session of their own, because the server is their reaper (PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import assert_never

from launcher.config.timeouts import TIMEOUTS
from launcher.rank.messages import (
    FromForkServer,
    Preload,
    RankEnded,
    RankStarted,
    Ready,
    SignalRanks,
    StartRank,
    ToForkServer,
    decode,
    encode,
)
from launcher.rank.output import drop_output_on_full_disk, redirect_output
from launcher.rank.standby import Standbys, kill_group
from launcher.rank.stop_signal import StopSignal
from launcher.request.own_packages import IMPORT_OURS

ENTER = (
    f"import sys; bare = frozenset(sys.modules); sys.path[:1] == [''] and sys.path.pop(0); {IMPORT_OURS}"
    "from launcher.rank.worker import enter; enter(bare)"
)
"""What a fresh interpreter runs. Its first entry of sys.path is the current folder, whose modules are the user's."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class ForkServer:
    """The server's side: imports, forks, reaps."""

    def __init__(self, control: socket.socket, run_dir: Path, heartbeats: int, streams: Sequence[int] = ()) -> None:
        self.control = control
        self.run_dir = run_dir
        self.stdin, self.terminal = streams or (-1, -1)  # of the rank; -1: none
        self.heartbeats = heartbeats  # the descriptor of the memory that the agent watches
        self.ranks: dict[int, int] = {}  # pid -> rank
        self.buffer = b""
        self.stop = StopSignal()
        self.forks = False  # ranks are forked; else each is a fresh interpreter
        self.standbys = Standbys(self.spawn, self.execute)

    def serve(self) -> int | None:
        """Serve until the agent is gone. Returns a rank's exit status in a forked child, None in the server."""
        wake, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # The terminal's Ctrl-C and SLURM's signals are the agent's business.
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self.stop.note_outside)
        with selectors.DefaultSelector() as selector:
            selector.register(self.control, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while True:
                more = self.standbys.prepare(set(self.ranks.values()))
                for key, _ in selector.select(self.stop.seconds(TIMEOUTS.standby / 4 if more else None)):
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
                        status = self.handle(decode(ToForkServer, line))
                        if status is not None:
                            return status
                self.send_signal(signal.SIGTERM, self.stop.take())

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

    def send(self, message: FromForkServer) -> None:
        with suppress(OSError):
            self.control.sendall(encode(message))

    def handle(self, message: ToForkServer) -> int | None:
        """Do what the agent asks for. Return a rank's exit status in a forked child, None in the server."""
        match message:
            case Preload(modules, standby, target, folders):
                started = time.monotonic()
                self.forks = bool(modules) and preload(modules)
                # A standby has other streams than its rank when its interpreter looks at them.
                self.standbys.enabled = standby and self.terminal < 0
                self.standbys.target, self.standbys.user_folders = target, tuple(folders)
                self.send(Ready(round(time.monotonic() - started, 3)))
            case StartRank():
                return self.fork(message)
            case SignalRanks(signal.SIGTERM, ranks, after):
                self.stop.request(ranks, after)
            case SignalRanks(number, ranks):
                self.send_signal(number, ranks)
            case _:
                assert_never(message)
        return None

    def send_signal(self, number: int, ranks: Sequence[int]) -> None:
        """Send a signal to `ranks`."""
        for pid, rank in list(self.ranks.items()):
            if rank in ranks:
                # Only SIGKILL is for the rank's children, too.
                if number == signal.SIGKILL:
                    kill_group(pid)
                else:
                    os.kill(pid, number)

    def fork(self, start: StartRank) -> int | None:
        """Start a rank. Return its exit status in the forked child, None in the server."""
        rank = start.world.rank
        pid = self.standbys.take(start)
        record = self.standbys.record_for(start) if pid is None else -1
        pid = pid or self.spawn()
        if pid:
            self.ranks[pid] = rank
            self.send(RankStarted(rank, pid))
            return None
        redirect_output(start.log, rank, self.terminal)
        if not self.forks or poisoned():
            self.execute(record, ["rank", json.dumps(asdict(start.world))], start.environment)
        os.environ.clear()
        os.environ.update(start.environment)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed()  # its import has seeded it, once for all ranks of the node
        for descriptor in (self.stdin, self.terminal):
            with suppress(OSError):
                os.close(descriptor)
        from launcher.rank.worker import main

        return main(self.run_dir, start.world, self.heartbeats)

    def spawn(self) -> int:
        """Fork a process with the signals and the session of a rank; return its pid, 0 in the child."""
        sys.stdout.flush()
        sys.stderr.flush()
        server = os.getpid()
        # Blocked until the rank's own dispositions hold: this server ignores SIGTERM, and a stop would be lost.
        blocked = (signal.SIGTERM,)
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        pid = os.fork()
        if pid == 0:
            leave_server(server, self.stdin, self.terminal)
            self.control.detach()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        return pid

    def execute(self, record: int, words: list[str], environment: Mapping[str, str]) -> None:
        """Make this process a fresh interpreter, with the arguments of `launcher.rank.worker.enter`."""
        if record >= 0:
            os.set_inheritable(record, True)
        arguments = [str(self.run_dir), str(self.heartbeats), str(record), *words]
        os.execve(sys.executable, [sys.executable, "-c", ENTER, *arguments], environment)

    def reap(self) -> None:
        """Report every rank that has ended to the agent, after its remaining processes are killed."""
        while True:
            try:
                # Look before reaping: while the rank is a zombie its process group cannot be given to anyone else.
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            self.standbys.forget(found.si_pid)
            rank = self.ranks.pop(found.si_pid, None)
            if rank is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(found.si_pid, signal.SIGKILL)
            _, status = os.waitpid(found.si_pid, 0)
            if rank is not None:
                if not self.ranks:
                    kill_orphans(self.ranks.keys() | self.standbys.pids)
                self.send(RankEnded(rank, os.waitstatus_to_exitcode(status)))

    def kill_all(self) -> None:
        """Kill every rank, every standby and what they left behind, and wait for their ends."""
        self.standbys.close()
        for pid in self.ranks:
            kill_group(pid)
        for pid in list(self.ranks):
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)
            del self.ranks[pid]
        kill_orphans(self.ranks.keys() | self.standbys.pids)


def leave_server(server: int, stdin: int, terminal: int) -> None:
    """Give a forked process a session, the default signal handlers and a standard input, which is empty without `stdin`.

    If that is the pseudo-terminal of the rank, it becomes the controlling terminal of the session.
    SIGUSR2 stays ignored, also across exec: SLURM sends it to every process of a step, and it is for the agent.
    """
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)  # the server died between the fork and the line above
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # Ray blocks it in all that its nodes start
    # Descriptor 0 is the server's socket, whose connection this process would keep open.
    if stdin >= 0:
        os.dup2(stdin, 0)
        if terminal >= 0 and os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        return
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def kill_orphans(kept: Set[int]) -> None:
    """Kill the children that ranks left behind; orphans of descendants come to this process one generation at a time."""
    for _ in range(100):
        children = Path("/proc/self/task", str(threading.get_native_id()), "children").read_text().split()
        orphans = {int(pid) for pid in children} - kept
        if not orphans:
            return
        for pid in orphans:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def preload(modules: Sequence[str]) -> bool:
    """Import `modules`; return whether ranks can be forked from this process afterwards."""
    try:
        for module in ("launcher.rank.worker", *modules):
            importlib.import_module(module)
    except (Exception, SystemExit) as error:  # then each rank raises it again, and its log has the whole traceback
        print(f"launch: {type(error).__name__}: {error}; ranks are not forked", file=sys.stderr)
        return False
    return not poisoned()


def poisoned() -> bool:
    """Whether CUDA cannot be used in this process, or in a fork of it.

    A CUDA context does not survive a fork, and torch refuses CUDA in a fork of a process that only counted its devices.
    """
    torch = sys.modules.get("torch")
    return torch is not None and (torch.cuda.is_initialized() or torch.cuda._is_in_bad_fork())


def main() -> None:
    """``python -m launcher.rank.forkserver RUN_DIR HEARTBEATS [STDIN TERMINAL]``, with the agent's socket as descriptor 0.

    STDIN and TERMINAL are the descriptors of a rank's standard input and pseudo-terminal; -1: none.
    """
    drop_output_on_full_disk()  # the ranks inherit this
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    streams = [int(word) for word in sys.argv[3:]]
    for descriptor in streams:
        if descriptor >= 0:
            os.set_inheritable(descriptor, False)  # a rank has copies of them as descriptors 0, 1 and 2
    status = ForkServer(socket.socket(fileno=0), Path(sys.argv[1]), int(sys.argv[2]), streams).serve()
    if status is not None:
        from launcher.rank.worker import finish

        finish(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to unload thousands of modules takes seconds, in which the run would seem not to have ended


if __name__ == "__main__":
    main()
