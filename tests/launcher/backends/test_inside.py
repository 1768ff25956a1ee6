"""Look inside a running run on each engine: all commands, in one run of four ranks, on several nodes where there are any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.launcher.engines import Project, until

pytestmark = pytest.mark.slow

SHOW = """
import json, os, sys
pid, above = os.getpid(), []
while pid > 1:
    name, _, rest = open(f"/proc/{pid}/stat").read().rpartition(")")
    above.append(name.partition("(")[2])
    pid = int(rest.split()[1])
names = ("RANK", "SLURM_JOB_ID", "SLURM_STEP_ID", "WORLD_SIZE")
print(json.dumps({"above": above, **{name: os.environ.get(name) for name in names}}))
"""


def stacks(project: Project) -> list[dict[str, Any]]:
    found = json.loads(project.call("stacks", "v", "--json").stdout)
    assert found["missing"] == {}
    return found["stacks"]  # type: ignore[no-any-return]


def places(project: Project) -> dict[str, list[int]]:
    return {each["where"]: each["ranks"] for each in stacks(project)}


def executed(project: Project, *argv: str) -> list[dict[str, Any]]:
    return json.loads(project.call("exec", "v", "--json", *argv).stdout)  # type: ignore[no-any-return]


@pytest.fixture
def visited(project: Project) -> Project:
    nodes = {"local": (), "slurm": ("--nodes", "2"), "ray": ("--cluster", "./spread.toml")}[project.engine]
    (project.folder / "spread.toml").write_text('backend = "ray"\n[ray]\nplacement_strategy = "SPREAD"\n')
    backend = () if project.engine == "ray" else ("--backend", project.engine)
    project.call(*backend, "--cpus", "4", *nodes, "--name", "v", "--detach", "visited.py")
    until(lambda: "started" in [event["event"] for event in project.events("v")], "the ranks start")
    return project


def test_all_commands_that_look_inside(visited: Project) -> None:
    """Stacks, commands and a shell; the run goes on, and its logs have nothing of it."""
    project = visited
    until(
        lambda: places(project) == {"compute visited.py:12": [0, 1, 2], "load visited.py:8": [3]},
        lambda: str(stacks(project)),
    )
    check_commands(project)
    check_shell(project)
    [line] = [
        line for line in project.call("code", "v", "--node", "0").stdout.splitlines() if line.startswith("editor")
    ]
    assert "code --remote ssh-remote+" in line
    kinds = [event["kind"] for event in project.events("v") if event["event"] == "visited"]
    assert {*kinds} == {"stacks", "command", "shell"}
    assert list((project.folder / "runs/v/visits").iterdir()) == []
    assert project.logs("v") == []
    assert project.call("cancel", "v").stdout == "v: stopped\n"
    refused = project.call("stacks", "v", status=2).stderr
    assert "run 'v' has ended (stopped)" in refused


def check_commands(project: Project) -> None:
    [nodes] = [len(event["hosts"]) for event in project.events("v") if event["event"] == "started"]
    assert (nodes > 1) == (project.engine != "local")
    found = executed(project, "--all", "--", project.python, "-c", SHOW)
    assert [(each["node"], each["status"], each["stderr"]) for each in found] == [(n, 0, "") for n in range(nodes)]
    shown = [json.loads(each["stdout"]) for each in found]
    assert {each["RANK"] for each in shown} == {None}
    [ranked] = executed(project, "--rank", "3", "--", project.python, "-c", SHOW)
    of_rank = json.loads(ranked["stdout"])
    assert (of_rank["RANK"], of_rank["WORLD_SIZE"]) == ("3", "4")
    if project.engine == "slurm":
        job = json.loads(Path(project.folder, "runs/v/job.json").read_text())["job_id"]
        assert {each["SLURM_JOB_ID"] for each in (*shown, of_rank)} == {job}
        assert all("slurmstepd" in each["above"] for each in (*shown, of_rank))
    failed = project.call(
        "exec", "v", "--node", str(nodes - 1), "--", "sh", "-c", "echo out; echo err >&2; exit 7", status=7
    )
    assert (failed.stdout, failed.stderr) == ("out\n", "err\n")


def check_shell(project: Project) -> None:
    command = ["-P", "-m", "launcher", "shell", "v", "--rank", "3"]
    shell = pexpect.spawn(
        project.python, command, cwd=str(project.folder), dimensions=(33, 101), encoding="utf-8", timeout=60
    )
    shell.delaybeforesend = None
    try:
        shell.expect("as rank 3 of v; exit ends this shell, the run goes on")
        shell.sendline("echo rank=$RANK; stty size; exit 5")
        shell.expect("rank=3\r\n33 101\r\n")
        shell.expect(pexpect.EOF)
        shell.wait()
        assert shell.exitstatus == 5
    finally:
        shell.close(force=True)
