"""The contract of all engines: the same command, files and result."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.launcher.engines import Project, until

pytestmark = pytest.mark.slow


def test_a_torchrun_script_runs_unchanged(project: Project) -> None:
    arguments = ("torchrun_style.py", "--value", "3", "--note", "a 'b' $(c)\n\"d\"")
    project.launch("--cpus", "2", "--detach", "--name", "t", *arguments)
    assert project.call("wait", "t", "--timeout", "3m").stdout == "t: succeeded\n"
    lines = project.logs("t")
    assert [line.split(" master=")[0] for line in lines] == [
        "[0] rank=0 local=0 world=2 sum=9",
        "[1] rank=1 local=1 world=2 sum=9",
    ]
    for line in lines:
        address, note = line.split("master=")[1].split(" note=")
        assert all(part.isdigit() for part in address.split(".")), "an address that needs no name resolution"
        assert note == repr("a 'b' $(c)\n\"d\"")


def test_an_accelerate_script_runs_unchanged(project: Project) -> None:
    project.launch("--cpus", "2", "--name", "a", "accelerate_style.py", "--value", "2")
    assert project.logs("a") == [
        "[0] rank=0 world=2 device=cpu sum=6",
        "[1] rank=1 world=2 device=cpu sum=6",
    ]


def test_what_a_function_returns_comes_back(project: Project) -> None:
    done = project.launch("--json", "--cpus", "2", "--name", "f", "steps:main", "--steps", "3")
    status = json.loads(done.stdout)
    assert status["state"] == "succeeded"
    assert status["metrics"] == {"first": 0, "ranks": [0, 1], "steps": 3}
    assert status["progress"]["step"] == 3
    listed = json.loads(project.call("list", "--json").stdout)
    assert [(run["name"], run["state"], run["backend"]) for run in listed] == [("f", "succeeded", project.engine)]
    kinds = [event["event"] for event in project.events("f")]
    assert [k for k in kinds if k in ("submitted", "started", "finished")] == ["submitted", "started", "finished"]


def test_the_first_exception_is_shown_first_and_not_retried(project: Project) -> None:
    done = project.launch("--cpus", "2", "--name", "x", "steps:main", "--steps", "5", "--fail-at", "2", status=1)
    failed = done.stdout[done.stdout.index("launch: failed") :]
    assert failed.startswith("launch: failed: LookupError: no sample at step 2 [rank 1 on ")
    assert "in main\n" in failed
    assert "launcher/" not in failed, "frames of the launcher are no news"
    status = project.status("x")
    assert (status["state"], status["attempt"]) == ("failed", 1)
    assert (status["failure"]["kind"], status["failure"]["rank"]) == ("user error", 1)


def test_a_run_outlives_the_shell_that_sent_it(project: Project) -> None:
    """The command is killed (SIGKILL) while it follows; then status, logs, cancel and resume from another shell."""
    arguments = ("--backend", project.engine, "--cpus", "2", "--name", "k", "steps:main", "--steps", "4000")
    with project.start(*arguments) as submitting:
        until(lambda: (project.folder / "runs/k/metrics.jsonl").exists(), "a first step")
        os.kill(submitting.pid, signal.SIGKILL)
    assert project.status("k")["state"] == "running"
    assert "[1] step 1" in project.logs("k")
    for argv in (("resume", "k"), ("rm", "k", "--yes")):
        assert "is running" in project.call(*argv, status=2).stderr
    assert "k is running" in project.call("wait", "k", "--timeout", "0s", status=124).stderr
    assert "  launch cancel k  running" in project.call("cancel", status=2).stderr
    assert project.call("cancel", "k").stdout == "k: stopped\n"
    stopped = project.status("k")
    assert stopped["state"] == "stopped"
    reached = stopped["progress"]["step"]
    assert 1 <= reached < 4000
    assert "  launch resume k  stopped" in project.call("resume", status=2).stderr
    # A resumed run keeps its flags, so it is shortened by its state.
    (project.folder / "runs/k/state.json").write_text("3998")
    done = project.call("resume", "k", "--json")
    status = json.loads(done.stdout)
    assert status["state"] == "succeeded"
    assert status["metrics"] == {"first": 3998, "ranks": [0, 1], "steps": 4000}
    assert status["attempt"] == 2
    project.call("rm", "k", "--yes")
    assert json.loads(project.call("list", "--json").stdout) == []


def test_bad_input_is_refused_before_anything_is_sent(project: Project) -> None:
    (project.folder / "broken_import.py").write_text("import no_such_package\n\n\ndef main():\n    pass\n")
    for arguments, words in (
        (("steps:main", "--stepz", "3"), ["--stepz", "--steps"]),
        (("steps:main", "--steps", "many"), ["--steps", "many"]),
        (("steps:broken",), ["--needs and --three and --things must be given"]),
        (("broken_import:main",), ["no_such_package", "broken_import.py", "line 1"]),
    ):
        done = project.launch("--cpus", "2", "--name", "b", *arguments, status=2)
        for word in words:
            assert word in done.stderr
        assert "launcher/" not in done.stderr
        assert not (project.folder / "runs/b").exists(), "the name stays free"
