"""The lines of the batch script around srun. A real bash runs them, where what stands for srun is the word after them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.slurm.batch import script
from launcher.client.run import Run
from launcher.config.cluster import Container, Slurm
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import State
from tests.launcher.plans import planned_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that was sent as job 7; its folder has a quote in its name."""
    run = planned_run(tmp_path / "it's a run", "slurm")
    (run.path / "submitit").mkdir()
    run.event("submitted", format=2)
    run.write_job("slurm", "7")
    return run


def batch(run: RunDir, command: str, python: str | None = None, path: str = "", **slurm: Any) -> tuple[int, str]:
    """Run the batch script of `run` with `command` for srun; returns its exit status and output."""
    plan = run.plan()
    plan = replace(plan, cluster=replace(plan.cluster, python=python, slurm=Slurm(**slurm)))
    run.write_plan(plan)
    lines = [*script.before(plan), command, *script.after(plan)]
    (run.path / "script").write_text("\n".join(lines))
    variables = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "PATH": f"{path}:{os.environ['PATH']}"}
    with (run.path / "submitit/7_0_log.err").open("ab") as log:
        done = subprocess.run(
            ["bash", run.path / "script"], env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=log
        )
    return done.returncode, done.stdout.decode()


@pytest.mark.parametrize(
    ("line", "command", "status"),
    [
        ("false", "false", 1),
        ("cd /no/such/folder  # the data", "cd /no/such/folder  # the data", 1),
        ("source /no/such/file", "source /no/such/file", 1),
        ("nosuch-command 'a \"b\\\" c'", "nosuch-command 'a \"b\\\" c'", 127),
        ("exit 3", "exit 3", 3),
        ("true; (exit 4); true", "true; (exit 4); true", 4),
        ("set -e; false", "set -e; false", 1),
        (': "${NO_SUCH_VARIABLE:?is not set}"', ': "${NO_SUCH_VARIABLE:?is not set}"', 1),
        ("return 5", "return 5", 2),
        ("test -d /größe/no", "test -d /größe/no", 1),
    ],
)
def test_a_setup_line_that_fails_ends_the_run(run: RunDir, line: str, command: str, status: int) -> None:
    code, said = batch(run, "echo reached", setup=("A=1", line, "echo not reached"))
    assert (code, said) == (1, "")
    text = f"slurm.setup: {command} failed with status {status} on n1"
    result = run.result() or {}
    assert (result["state"], result["attempts"], result["failure"]["message"]) == ("failed", 0, text)
    assert [e["event"] for e in run.events()] == ["submitted", "failed", "finished"]
    assert Run(run).state() is State.FAILED
    assert Run(run).explain().startswith(f"{text} [on n1]")
    assert "|| true" in Run(run).explain()
    assert f"launch: {text}" in (run.path / "submitit/7_0_log.err").read_text()
    modes = {path.stat().st_mode & 0o077 for path in (run.result_file, run.events_file)}
    assert modes == {0}


def test_so_does_a_module_that_is_not_there(run: RunDir) -> None:
    """Module systems are functions of the shell; a command inside of one may fail."""
    setup = "module() { false; [ $2 != nosuch/1 ]; }"
    assert batch(run, "echo reached", setup=(setup, "module load a", "module load nosuch/1")) == (1, "")
    assert "slurm.setup: module load nosuch/1 failed with status 1" in (run.result() or {})["failure"]["message"]
    run.result_file.unlink()
    assert batch(run, "echo reached", modules=("nosuch/1", "b"))[0] == 1
    assert "module load nosuch/1 b failed with status 127 on n1" in (run.result() or {})["failure"]["message"]


@pytest.mark.parametrize(
    "setup",
    [
        ("false || true",),
        ("if false", "then false", "fi"),
        ("[ -d /no ] && cd /no", "! false", "while false; do :; done"),
        ("f() { false; true; }", "f"),
        ("set -e", "set -u", "export A=1 # a comment's quote"),
        ("trap 'echo theirs' EXIT",),
        ("cat > /dev/null <<END", "false", "END"),
    ],
)
def test_what_does_not_fail_goes_on(run: RunDir, setup: tuple[str, ...]) -> None:
    code, said = batch(run, "echo reached; (exit 0)", setup=setup)
    assert (code, said.replace("theirs\n", "")) == (0, "reached\n")
    assert ("theirs" in said) == any("theirs" in line for line in setup)
    assert run.result() is None


def test_a_file_that_a_line_reads_may_have_commands_that_fail(run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "profile.sh").write_text("false\n[ -n '' ] && echo no\nexport A=1\n")
    assert batch(run, "echo reached $A", setup=(f". {tmp_path}/profile.sh",)) == (0, "reached 1\n")


@pytest.mark.parametrize("python", ["/no/such/python", sys.executable + " -I -S", "false"])
def test_a_python_that_cannot_start_is_named(run: RunDir, python: str) -> None:
    """The node has no such file, or it lacks our packages; nothing in Python can report that."""
    batch(run, "(exit 2)", python)
    failure = (run.result() or {})["failure"]
    assert failure["message"].startswith("Python could not be started on n1: ")
    assert python == "false" or "/no/such/python" in failure["message"] or "No module named" in failure["message"]
    assert "lost" not in Run(run).explain()
    assert "supervisor" not in Run(run).explain()


def test_a_lost_supervisor_is_still_one(run: RunDir) -> None:
    assert batch(run, "(exit 9)")[0] == 1
    assert (run.result() or {})["failure"]["kind"] == "node lost"


def test_a_python_in_a_container_of_pyxis_is_not_looked_for_on_the_host(run: RunDir) -> None:
    batch(run, "(exit 9)", "/no/such/python", container=Container("x.sqsh"))
    assert run.result() is None


def test_a_job_that_is_cancelled_during_its_setup_has_not_failed(run: RunDir) -> None:
    """SLURM sends SIGTERM to the script and to what it runs; a preempted job starts again."""
    assert batch(run, "echo reached", setup=("true; sh -c 'kill -TERM $PPID; exit 143'; sleep 9",)) == (143, "")
    assert run.result() is None
    run.request_stop("cancelled")
    assert batch(run, "echo reached", setup=("false",)) == (1, "")
    assert run.result() is None


def test_after_its_setup_the_script_has_no_trap_of_ours(run: RunDir) -> None:
    # What this process ignores, such as SIGQUIT in the background of a shell, the script ignores, too.
    before = subprocess.run(["bash", "-c", "trap -p"], capture_output=True, text=True, check=True).stdout.splitlines()
    code, said = batch(run, "trap -p; (exit 0)", setup=("true",))
    assert code == 0
    assert set(said.splitlines()) - set(before) <= {"trap -- '' SIGUSR1", "trap -- '' SIGUSR2"}
    assert {"trap -- '' SIGUSR1", "trap -- '' SIGUSR2"} <= set(said.splitlines())


def test_a_result_that_is_there_is_kept(run: RunDir) -> None:
    run.write_result(State.STOPPED, attempts=1)
    assert batch(run, "echo reached", setup=("false",)) == (1, "")
    assert (run.result() or {})["state"] == "stopped"


def test_while_the_script_runs_it_touches_its_file(run: RunDir) -> None:
    file = "'" + str(run.path / "submitit/7.0.batch").replace("'", "'\"'\"'") + "'"
    wait = (
        f"while [ ! -e {file} ]; do sleep 0.05; done; touch -d @1 {file}; until [ {file} -nt / ]; do sleep 0.05; done"
    )
    assert batch(run, wait)[0] == 0
    assert (run.path / "submitit/7.0.batch").stat().st_mode & 0o077 == 0


SCONTROL = '#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n'


@pytest.mark.parametrize("hosts", ["", "n3,n4"])
def test_an_agent_without_scontrol_leaves_the_requeue_to_the_script(run: RunDir, tmp_path: Path, hosts: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text(SCONTROL)
    (tmp_path / "bin/scontrol").chmod(0o755)
    request = run.path / "submitit/7.0.requeue"
    request.write_text(hosts)
    assert batch(run, "(exit 3)", path=str(tmp_path / "bin"))[0] == 3
    asked = (tmp_path / "bin/asked").read_text().splitlines()
    assert asked == ["requeue 7", *([f"update JobId=7 ExcNodeList={hosts}"] if hosts else [])]
    assert run.result() is None, "the run goes on"


def test_if_the_script_has_no_scontrol_either_the_run_says_so(run: RunDir) -> None:
    (run.path / "submitit/7.0.requeue").touch()
    batch(run, "(exit 3)")
    assert (run.result() or {})["failure"]["message"] == "scontrol did not requeue job 7 on n1"
