"""Look inside a run on this machine: strangers, ends of either side, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pexpect
import pytest

from launcher.client.inside.target import inside
from launcher.client.inside.visitor import Visitor
from launcher.client.run import Run
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import State
from tests.launcher.engines import Launch, Project, until


@pytest.fixture
def running(local_project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """A run of two ranks, called v."""
    monkeypatch.chdir(local_project.folder)
    local_project.launch("--cpus", "2", "--name", "v", "--detach", "visited.py")
    until(lambda: "started" in [event["event"] for event in local_project.events("v")], "the ranks start")
    yield local_project
    local_project.call("cancel", "v", "--now")


def run_of(project: Project) -> Run:
    return Run(RunDir(project.folder / "runs/v"))


def request_of(project: Project) -> dict[str, Any]:
    """The request of the client that waits now."""
    [file] = (project.folder / "runs/v/visits").glob("*.json")
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def test_strangers_who_connect_hold_up_nobody_and_get_nothing(running: Project) -> None:
    async def visit() -> None:
        async with Visitor(inside(run_of(running)), "stacks") as visitor:
            request = request_of(running)
            assert request["addresses"] == ["127.0.0.1"]
            silent = [socket.create_connection(("127.0.0.1", request["port"])) for _ in range(20)]
            silent[0].sendall(b"GET / HTTP/1.1\r\n" * 20)
            sessions = [session async for session in visitor.sessions()]
            assert [(session.node, session.ranks) for session in sessions] == [(0, (0, 1))]
            assert visitor.missing == {}
            for each in silent[1:]:
                with each:
                    assert await asyncio.to_thread(received, each) == b""
            with pytest.raises(OSError, match=r".+"):
                socket.create_connection(("127.0.0.1", request["port"]))
            silent[0].close()

    asyncio.run(visit())
    assert list((running.folder / "runs/v/visits").iterdir()) == []


def received(connection: socket.socket) -> bytes:
    with suppress(ConnectionResetError):
        return connection.recv(1)
    return b""


def test_a_client_that_cannot_be_reached_is_told_so(running: Project) -> None:
    """As behind a firewall: nobody listens at the address of the request."""

    async def visit() -> None:
        async with Visitor(inside(run_of(running)), "stacks") as visitor:
            visitor._server.close()
            [_ async for _ in visitor.sessions()]

    with pytest.raises(BadRequest, match=r"cannot reach this machine .*127\.0\.0\.1: Connection refused.*firewall"):
        asyncio.run(visit())


def lines_of(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


SLEEPS = "echo $$; sleep 600 & echo $!; wait"


def gone(pids: list[int]) -> bool:
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_the_client_ends_the_command_and_its_children(running: Project, number: signal.Signals) -> None:
    with running.start("exec", "v", "--", "sh", "-c", SLEEPS) as client:
        pids = [int(line) for line in lines_of(client, 2)]
        client.send_signal(number)
        until(lambda: gone(pids), "the command and its child end")
        assert client.wait() == (130 if number == signal.SIGINT else -number)


def test_the_end_of_the_run_ends_the_command_and_says_so(running: Project) -> None:
    with running.start("exec", "v", "--", "sh", "-c", SLEEPS) as client:
        pids = [int(line) for line in lines_of(client, 2)]
        running.call("cancel", "v")
        assert client.wait() == 255
        assert client.stderr is not None
        assert "the run or this attempt" in client.stderr.read()
    assert gone(pids)


def test_the_exit_status_is_that_of_the_command(running: Project) -> None:
    running.call("exec", "v", "--", "sh", "-c", "kill -9 $$", status=137)
    missing = running.call("exec", "v", "--", "no-such-program", status=127)
    assert missing.stderr == "no-such-program: No such file or directory\n"
    long = running.call("exec", "v", "--", running.python, "-c", "print('x' * 3_000_000)")
    assert len(long.stdout) == 3_000_001
    [kept] = json.loads(
        running.call("exec", "v", "--json", "--", "sh", "-c", "echo a; echo b >&2; exit 3", status=3).stdout
    )
    assert (kept["status"], kept["stdout"], kept["stderr"], kept["reason"]) == (3, "a\n", "b\n", "")


def test_a_rank_that_runs_a_command_is_not_harmed(local_project: Project) -> None:
    local_project.launch("--cpus", "1", "--name", "c", "--detach", "--", "sleep", "600")
    until(lambda: "started" in [event["event"] for event in local_project.events("c")], "the rank starts")
    until(lambda: "runs the command sleep" in local_project.call("stacks", "c").stdout, "the command runs")
    assert local_project.status("c")["state"] == "running"
    local_project.call("cancel", "c", "--now")


def sleeps(seconds: str) -> bool:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if file.read_bytes() == f"sleep\0{seconds}\0".encode():
                return True
    return False


def test_a_shell_follows_the_window_and_survives_control_characters(running: Project) -> None:
    command = ["-P", "-m", "launcher", "shell", "v", "--node", "0"]
    shell = pexpect.spawn(
        running.python, command, cwd=str(running.folder), dimensions=(20, 60), encoding="utf-8", timeout=60
    )
    shell.delaybeforesend = None
    try:
        shell.expect("of v; exit ends this shell, the run goes on")
        shell.sendline("stty size; echo rank=$RANK.")
        shell.expect("20 60\r\n")
        shell.expect(r"rank=\.\r\n")
        shell.setwinsize(44, 111)
        until(lambda: bool(shell.sendline("stty size") and shell.expect(["44 111\r\n", "20 60\r\n"]) == 0), "the size")
        shell.sendline("sleep 98765")
        until(lambda: sleeps("98765"), "the command runs")
        shell.sendcontrol("c")
        shell.sendline("echo st=$?")
        shell.expect("st=130\r\n")
        running.call("cancel", "v", "--now")
        shell.expect("the run or this attempt")
        shell.expect(pexpect.EOF)
        shell.wait()
        assert shell.exitstatus == 255
    finally:
        shell.close(force=True)


def test_what_is_refused(running: Project, launch: Launch) -> None:
    for argv, text in (
        (("stacks", "v", "--rank", "2"), "--rank 2: the ranks of v are 0 to 1."),
        (("exec", "v", "--rank", "-1", "--", "true"), "--rank"),
        (("exec", "v", "--node", "1", "--", "true"), f"--node 1: the nodes of v are 0 ({socket.gethostname()})."),
        (("exec", "v", "--all", "--rank", "0", "--", "true"), "not allowed with argument"),
        (("exec", "v"), "required: COMMAND"),
        (("shell", "v"), "a shell needs a terminal. Without one, `launch exec v -- COMMAND` runs a command."),
        (("shell", "v", "--json"), "a shell has no JSON"),
        (("code", "v", "--node", "nowhere"), "--node nowhere: the nodes of v are 0"),
        (("stacks", "nosuch"), "there is no run 'nosuch'"),
    ):
        status, out, err = launch(*argv)
        assert (status, text in out + err) == (2, True), (argv, out, err)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to somebody else")
def test_a_run_of_somebody_else_is_refused(running: Project, launch: Launch) -> None:
    path = Path(running.folder, "runs/v")
    os.chown(path, 12345, 12345)
    try:
        for argv in (("stacks", "v"), ("exec", "v", "--", "true"), ("shell", "v"), ("code", "v")):
            status, _, err = launch(*argv)
            assert status == 2
            assert "belongs to uid 12345" in err
    finally:
        os.chown(path, 0, 0)


def test_a_run_that_has_not_started_is_refused(
    launch: Launch, local_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(local_project.folder)
    local_project.launch("--cpus", "1", "--name", "e", "--", "true")
    status, _, err = launch("shell", "e")
    assert (status, "has ended (succeeded), so there is nothing left to look inside" in err) == (2, True)
    monkeypatch.setattr(Run, "state", lambda _: State.QUEUED)
    status, _, err = launch("stacks", "e")
    assert (status, "run 'e' is queued, and its ranks have not started." in err) == (2, True)
