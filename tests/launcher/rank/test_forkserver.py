"""The real forkserver over a socketpair: it starts ranks, reports their ends, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.config.cluster import Cluster
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.environment import rank_environment
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
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target
from training.distributed.heartbeat import SLOT
from training.distributed.world import World

TARGET = """
import os, signal, subprocess, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], sys.argv[1:], flush=True)
print("preloaded:", "fs_preloaded" in sys.modules, file=sys.stderr, flush=True)
print("stdin:", sys.stdin.read() == "", "group:", os.getpgrp() == os.getpid() == os.getsid(0), flush=True)
match sys.argv[1]:
    case "exit":
        sys.exit(int(os.environ["RANK"]))
    case "sleep":
        time.sleep(600)
    case "leave":  # a daemon that moved to a session of its own, and a child of its own
        subprocess.Popen(["setsid", "sh", "-c", "sleep 601 & echo $$ $! > daemon.tmp; mv daemon.tmp daemon; wait"])
        while not os.path.exists("daemon"):
            time.sleep(0.01)
        if sys.argv[2] == "stay":
            time.sleep(600)
"""


class Server:
    """A forkserver, and the agent's end of its socket."""

    def __init__(self, run: RunDir, log: Path) -> None:
        self.run = run
        self.local, remote = socket.socketpair()
        self.local.settimeout(60)
        self.buffer = b""
        self.earlier: list[FromForkServer] = []  # ends of ranks that were read before they were asked for
        heartbeats = os.memfd_create("pulses")
        os.ftruncate(heartbeats, 16 * SLOT)
        with remote, log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launcher.rank.forkserver", str(run.path), str(heartbeats)],
                stdin=remote.fileno(), stdout=output, stderr=output, start_new_session=True, pass_fds=[heartbeats],
                env=os.environ | {"PYTHONPATH": str(run.path)},
            )  # fmt: skip
        os.close(heartbeats)

    def send(self, message: ToForkServer) -> None:
        self.local.sendall(encode(message))

    def receive_message(self) -> FromForkServer:
        return self.earlier.pop(0) if self.earlier else self._read()

    def _read(self) -> FromForkServer:
        while b"\n" not in self.buffer:
            data = self.local.recv(4096)
            assert data, "the forkserver is gone"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: FromForkServer = decode(FromForkServer, line)
        return message

    def preload(self, *modules: str) -> None:
        self.send(Preload(list(modules)))
        assert isinstance(self.receive_message(), Ready)

    def start(self, rank: int, world_size: int = 1) -> int:
        world = World(rank, rank, 0, world_size, world_size, 1, master_port=1)
        environment = rank_environment(os.environ, self.run.plan(), world, {})
        self.send(StartRank(world, str(self.run.path / f"{rank}.log"), environment))
        while isinstance(started := self._read(), RankEnded):  # an earlier rank may have ended meanwhile
            self.earlier.append(started)
        assert isinstance(started, RankStarted)
        assert started.rank == rank
        return started.pid

    def log(self, rank: int) -> list[str]:
        path = self.run.path / f"{rank}.log"
        return path.read_text().splitlines() if path.exists() else []

    def close(self) -> None:
        self.local.close()
        assert self.process.wait(30) == 0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "target.py").write_text(TARGET)
    (tmp_path / "fs_preloaded.py").write_text("print('imported once')")
    (tmp_path / "fs_exits.py").write_text("import sys; sys.exit(3)")
    (tmp_path / "fs_raises.py").write_text("raise RuntimeError")
    return RunDir(tmp_path)


@pytest.fixture
def server(run: RunDir) -> Iterator[Server]:
    each = Server(run, run.path / "server.log")
    yield each
    each.close()
    assert "Traceback" not in (run.path / "server.log").read_text()


def aim(run: RunDir, *args: str) -> None:
    """The plan of a run of the target with `args`."""
    target = Target("script", str(run.path / "target.py"), args, path=(str(run.path),))
    site, placement = Cluster("local", "local"), Placement(1, 1, "cpu")
    run.write_plan(Plan("run", run.path, RunSpec("target.py"), "local", site, placement, target, run.path, 60))


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def daemon(run: RunDir) -> list[int]:
    until((run.path / "daemon").exists)
    return [int(pid) for pid in (run.path / "daemon").read_text().split()]


def test_ranks_start_from_what_was_imported_once_and_their_ends_are_reported(run: RunDir, server: Server) -> None:
    aim(run, "exit", "a 'b' $(c)\n")
    server.preload("fs_preloaded")
    for rank in range(3):
        server.start(rank, world_size=3)
    ends = {server.receive_message() for _ in range(3)}
    # A script's own exit status is a rank's "raised"; what it was is in the error that it left.
    assert ends == {RankEnded(0, 0), RankEnded(1, 1), RankEnded(2, 1)}
    for rank in range(3):
        assert sorted(server.log(rank)[:3]) == [
            "preloaded: True",
            f"rank {rank} of 3 ['exit', \"a 'b' $(c)\\n\"]",
            "stdin: True group: True",
        ]
    assert (run.path / "server.log").read_text() == "imported once\n"
    assert json.loads(run.error(1, 2).read_text())["message"] == "the script ended with exit status 2"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15)])
def test_a_signal_reaches_its_rank_and_no_other(run: RunDir, server: Server, number: int, code: int) -> None:
    aim(run, "sleep")
    server.preload()
    pids = [server.start(rank, world_size=2) for rank in range(2)]
    until(lambda: len(server.log(0)) == len(server.log(1)) == 3)
    server.send(SignalRanks(number, [1]))
    assert server.receive_message() == RankEnded(1, code)
    assert (alive(pids[0]), alive(pids[1])) == (True, False)


def test_a_stop_that_a_scheduler_sends_to_every_process_reaches_a_rank_once(run: RunDir, server: Server) -> None:
    aim(run, "sleep")
    server.preload()
    pid = server.start(0)
    until(lambda: len(server.log(0)) == 3)
    server.process.send_signal(signal.SIGTERM)  # as the rank has got it, too
    server.send(SignalRanks(signal.SIGTERM, [0]))
    other = server.start(1, world_size=2)  # answered after the signal was handled
    assert alive(pid)
    server.send(SignalRanks(signal.SIGKILL, [0, 1]))
    assert {server.receive_message() for _ in range(2)} == {RankEnded(0, -9), RankEnded(1, -9)}
    assert not alive(other)


@pytest.mark.parametrize("outside", [True, False])
def test_a_stop_that_overtakes_that_of_the_scheduler_reaches_a_rank_once(
    run: RunDir, server: Server, outside: bool
) -> None:
    """The agent's request waits for the scheduler's SIGTERM, and is sent if that does not come."""
    aim(run, "sleep")
    server.preload()
    pid = server.start(0)
    until(lambda: len(server.log(0)) == 3)
    server.send(SignalRanks(signal.SIGTERM, [0], after=0.5))
    if outside:
        other = server.start(1, world_size=2)  # answered after the request was read
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        assert alive(pid)
        server.send(SignalRanks(signal.SIGKILL, [0, 1]))
        assert {server.receive_message() for _ in range(2)} == {RankEnded(0, -9), RankEnded(1, -9)}
        assert not alive(other)
    else:
        assert server.receive_message() == RankEnded(0, -15)


def test_a_kill_right_after_the_start_is_not_lost(run: RunDir, server: Server) -> None:
    """The signal may arrive before the rank leads its process group."""
    aim(run, "sleep")
    server.preload()
    for _ in range(20):
        server.start(0)
        server.send(SignalRanks(signal.SIGKILL, [0]))
        assert server.receive_message() == RankEnded(0, -9)


def test_a_rank_killed_from_outside_is_reported(run: RunDir, server: Server) -> None:
    aim(run, "sleep")
    server.preload()
    os.kill(server.start(0), signal.SIGKILL)
    assert server.receive_message() == RankEnded(0, -9)


def test_what_a_rank_leaves_behind_goes_with_it(run: RunDir, server: Server) -> None:
    aim(run, "leave", "go")
    server.preload()
    server.start(0)
    pids = daemon(run)
    assert server.receive_message() == RankEnded(0, 0)
    until(lambda: not any(map(alive, pids)), seconds=5)


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_without_its_agent_nothing_stays(run: RunDir, server: Server, how: str) -> None:
    """`killed`: the server is killed and its ranks with it; then nobody ends a daemon that left them."""
    aim(run, "leave" if how == "closed" else "sleep", "stay")
    server.preload()
    pids = [server.start(0)]
    if how == "closed":
        pids += daemon(run)
        server.close()
    else:
        server.process.kill()
        assert server.process.wait() == -9
        server.process.returncode = 0  # as the fixture expects
    until(lambda: not any(map(alive, pids)), seconds=5)


def test_after_an_import_that_fails_ranks_are_fresh_interpreters(run: RunDir, server: Server) -> None:
    aim(run, "exit")
    server.preload("fs_preloaded", "fs_raises")
    server.start(0)
    assert server.receive_message() == RankEnded(0, 0)
    assert "preloaded: False" in server.log(0)
    assert "RuntimeError" in (run.path / "server.log").read_text()


POISON = """
import os, sys, types

torch = sys.modules["torch"] = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(is_initialized=lambda: False, _is_in_bad_fork=lambda: bad)
bad = False

def poison():
    global bad
    bad = True

os.register_at_fork(after_in_child=poison)
"""


def test_a_fork_in_which_cuda_would_fail_becomes_a_fresh_interpreter(run: RunDir, server: Server) -> None:
    """As in torch after CUDA devices were counted in the parent: the fork is marked, later."""
    (run.path / "fs_poison.py").write_text(POISON)
    aim(run, "exit")
    server.preload("fs_preloaded", "fs_poison")
    server.start(0)
    assert server.receive_message() == RankEnded(0, 0)
    assert "preloaded: False" in server.log(0)


def test_without_imports_ranks_are_fresh_interpreters(run: RunDir, server: Server) -> None:
    aim(run, "exit", "two words")
    server.preload()
    server.start(1, world_size=2)
    assert server.receive_message() == RankEnded(1, 1)
    assert "preloaded: False" in server.log(1)
    assert "rank 1 of 2 ['exit', 'two words']" in server.log(1)
    assert (run.path / "server.log").read_text() == ""
