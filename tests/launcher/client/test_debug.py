"""Debuggers and profilers in ranks of running runs, on each engine."""

from __future__ import annotations

import importlib.util
import json
import socket
import time
from typing import Any, BinaryIO

import pexpect
import pytest
import torch.distributed

from launcher.cli.parser import ranks_of
from launcher.errors import BadRequest
from launcher.rank.inside import debugger
from tests.launcher.engines import Launch, Project, until
from tests.launcher.plans import planned_run
from tests.testbed.keeper import free_ports

PDB = r"\[1\] \(Pdb\) "
HANG_AFTER = 2.0


def digest(project: Project, name: str) -> Any:
    return json.loads((project.folder / "runs" / name / "value.json").read_text())["digest"]


def started(project: Project) -> bool:
    return any(event["event"] == "started" for event in project.events("run"))


def spawn(project: Project, *words: str) -> Any:
    child = pexpect.spawn(
        project.python, ["-P", "-m", "launcher", *words], cwd=str(project.folder), encoding="utf-8", timeout=120
    )
    child.delaybeforesend = None
    return child


@pytest.mark.slow
def test_a_breakpoint_opens_here_and_the_run_ends_as_without_it(project: Project) -> None:
    """Rank 1 is held for longer than a hang may last; another debugger and a profile wait for rank 0 meanwhile."""
    ranks = ("--cpus", "4") if project.engine == "slurm" else ("--cpus", "2")
    nodes = ("--nodes", "2") if project.engine == "slurm" else ()
    site = ("--backend", project.engine, *ranks, *nodes, "--set", f"hang_after={HANG_AFTER}")
    project.call(*ranks, "--name", "plain", "debugged:main")

    words = ("--debug", "1", "--name", "held", "debugged:main", "--breakpoint-at", "5")
    with spawn(project, *site, *words) as held:
        held.expect(PDB)
        held.sendline("p step, ctx.world.rank")
        held.expect(r"\(5, 1\)")
        held.expect(PDB)
        held.sendline("w")
        held.expect("breakpoint|time.sleep")
        assert "launcher" not in held.before, "our own calls are not shown"
        held.expect(PDB)
        begun = time.monotonic()
        stacks = json.loads(project.call("stacks", "held", "--json").stdout)["stacks"]
        assert sorted(rank for each in stacks for rank in each["ranks"]) == list(range(int(ranks[1])))
        profiling = project.start("profile", "held", "--ranks", "0,1", "--steps", "3", "--json")
        other = spawn(project, "debug", "held", "--rank", "0")
        other.expect("rank 0 is in native code")
        until(lambda: time.monotonic() > begun + 2 * HANG_AFTER, "the time of a hang")
        held.sendline("c")
        held.expect("rank 1 goes on")
        other.expect(r"\[0\] \(Pdb\) ")
        other.sendline("p 6 * 7")
        other.expect("42")
        other.expect(r"\(Pdb\) ")
        other.sendeof()
        other.expect("rank 0 goes on")
        other.expect(pexpect.EOF)
        held.expect("succeeded")
        held.expect(pexpect.EOF)
        profiles = json.loads(profiling.communicate(timeout=120)[0])
    assert digest(project, "held") == digest(project, "plain")
    assert [event["event"] for event in project.events("held") if event["event"] in ("failed", "restarted")] == []
    assert [each["rank"] for each in profiles] == [0, 1]
    for each in profiles:
        assert "aten::" in each.get("table", ""), profiles
        with open(each["trace"]) as file:
            assert json.load(file)["traceEvents"]


def test_who_leaves_lets_the_program_go_on(local_project: Project) -> None:
    """A command, a debugger whose terminal ends, and one that quits: none of them ends the run."""
    (local_project.folder / "loop.py").write_text(
        "import os, time\nwhile not os.path.exists('enough'):\n    time.sleep(0.01)\nprint('the end')\n"
    )
    local_project.call("--cpus", "2", "--detach", "--name", "run", "loop.py")
    until(lambda: started(local_project), "the ranks")
    for leave in ("sendeof", "close", "q"):
        child = spawn(local_project, "debug", "run", "--rank", "1")
        child.expect(PDB)
        if leave == "q":
            child.sendline("q")
            child.expect("rank 1 goes on")
        else:
            getattr(child, leave)()
        child.close(force=True)
    profile = local_project.call("profile", "run", "--seconds", "0.1", status=1)
    assert "rank 0: the program has not imported torch" in profile.stderr
    (local_project.folder / "enough").touch()
    until(lambda: local_project.status("run")["state"] == "succeeded", "the end")


def test_a_command_has_no_debugger(local_project: Project) -> None:
    local_project.call("--cpus", "1", "--detach", "--name", "run", "--", "sleep", "1000")
    until(lambda: started(local_project), "the rank")
    refused = local_project.call("debug", "run", status=2)
    assert "rank 0 runs the command sleep, which is no Python program of launch" in refused.stderr
    refused = local_project.call("debug", "run", "--rank", "7", status=2)
    assert "--rank 7: the ranks of run are 0 to 0." in refused.stderr
    local_project.call("cancel", "run", "--now")
    assert "has ended" in local_project.call("debug", "run", status=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cpus", "2", "--debug", "2", "steps.py"], "--debug 2: the ranks of this run are 0 to 1."),
        (["--cpus", "2", "--debug", "0-9", "steps.py"], "--debug 0-9: the ranks of this run are 0 to 1."),
        (["--debug", "first", "steps.py"], "--debug first: write ranks, such as 0, 0,3 or 0-7, or all."),
        (["--debug", "3-1", "steps.py"], "--debug 3-1: write ranks"),
        (["--debug-port", "80", "steps.py"], "--debug-port 80: a port from 1024 to 65000 is needed"),
        (["debug", "nosuch"], "there is no run 'nosuch'"),
        (["debug", "ended", "--json"], "a debugger is for a person"),
        (["profile", "ended", "--steps", "0"], "at least one step"),
        (["profile", "ended", "--ranks", "x"], "--ranks x: write ranks"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], message: str, local_project: Project, monkeypatch: pytest.MonkeyPatch, launch: Launch
) -> None:
    monkeypatch.chdir(local_project.folder)
    planned_run(local_project.folder / "runs" / "ended", "local")
    status, out, error = launch(*words)
    assert (status, message in out + error) == (2, True), out + error


def test_ranks_are_written_as_numbers_and_ranges() -> None:
    assert ranks_of("all", "--debug") is None
    assert ranks_of("0,3-5, 1", "--debug") == [0, 1, 3, 4, 5]
    with pytest.raises(BadRequest):
        ranks_of("", "--debug")


def test_an_editor_attaches_before_the_program_begins(local_project: Project) -> None:
    """The few messages of the Debug Adapter Protocol with which an editor attaches."""
    [port] = free_ports(1)
    (local_project.folder / "edited.py").write_text("print('begun')\n")
    options = ("--cpus", "2", "--debug-port", str(port), "--name", "run")
    with local_project.start(*options, "edited.py") as command:
        log = local_project.folder / "runs" / "run" / "logs" / "1" / "0.log"
        until(lambda: log.exists() and f"waits for an editor on 127.0.0.1:{port}" in log.read_text(), "the rank waits")
        with socket.create_connection(("127.0.0.1", port), timeout=60) as editor, editor.makefile("rb") as answers:
            requests = {"initialize": {"adapterID": "x"}, "attach": {"justMyCode": True}, "configurationDone": {}}
            for number, (request, arguments) in enumerate(requests.items(), 1):
                fields = {"seq": number, "type": "request", "command": request, "arguments": arguments}
                body = json.dumps(fields).encode()
                editor.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
                while request == "attach" and message(answers).get("event") != "initialized":
                    pass
            out, _ = command.communicate(timeout=120)
    assert command.returncode == 0
    assert "begun" in out


def message(answers: BinaryIO) -> dict[str, Any]:
    """Read one message of the protocol."""
    size = 0
    while header := answers.readline().strip():
        if header.startswith(b"Content-Length:"):
            size = int(header.split()[1])
    found: dict[str, Any] = json.loads(answers.read(size))
    return found


def test_process_groups_wait_for_a_person() -> None:
    finder = debugger._LongTimeouts()
    spec = finder.find_spec("torch.distributed.constants", list(torch.distributed.__path__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.default_pg_timeout == debugger.PATIENCE
    assert torch.distributed.constants.default_pg_timeout < debugger.PATIENCE
    assert finder.find_spec("torch.distributed", None) is None
