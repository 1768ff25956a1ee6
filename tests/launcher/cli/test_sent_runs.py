"""Commands on runs that were sent: which one is meant without a name, what is listed, and how runs are waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest

import launcher
from launcher.lifecycle.policy import RULES
from launcher.lifecycle.records import registry
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import State
from tests.launcher.engines import COMMAND, Launch, Project, until
from tests.launcher.plans import planned_run

HOUR = 3600.0


def leave(path: Path, hours: float, state: State | None = None, **result: Any) -> RunDir:
    """Make a registered run of the local engine that was sent so many hours ago; without a state it is running."""
    run = planned_run(path, "local")
    if state is not None:
        run.write_job("local", f"{os.uname().nodename}:999999:1")
        run.write_result(state, **result)
    else:
        started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        run.write_job("local", f"{os.uname().nodename}:{os.getpid()}:{started}")
    run.event("started", attempt=1, world_size=1, hosts=["node"])
    sent = time.time() - hours * HOUR
    os.utime(run.plan_file, (sent, sent))
    registry.register(run.path)
    return run


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; beside it, another folder of runs."""
    for name in ("work", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def names(launch: Launch, *argv: str) -> list[str]:
    status, out, _ = launch("list", *argv)
    assert status == 0
    return [line.split()[0] for line in out.splitlines()]


# ---- without a run -----------------------------------------------------------------------------------------------


def test_status_and_logs_without_a_run_show_the_newest_of_all_folders(folders: Path, launch: Launch) -> None:
    leave(folders / "work/runs/older", 2, State.SUCCEEDED)
    newest = leave(folders / "other/runs/newer", 1, State.SUCCEEDED)
    newest.claim_attempt()
    newest.log(1, 0).write_text("hello\n")
    status, out, err = launch("status")
    assert (status, out.splitlines()[0], err) == (0, "newer: succeeded", "")
    assert f"run dir     {newest.path}" in out
    assert json.loads(launch("status", "--json")[1])["run_dir"] == str(newest.path)
    assert launch("logs") == (0, "hello\n", f"launch: the newest run, newer in {newest.path.parent}\n")
    assert launch("logs", "--json", "--rank", "0") == (0, '["hello"]\n', "")
    assert launch("status", "--runs", str(folders / "work/runs"))[1].startswith("older: ")


@pytest.mark.parametrize("command", ["status", "logs"])
def test_there_is_no_newest_run_without_runs(folders: Path, launch: Launch, command: str) -> None:
    status, _, err = launch(command)
    assert (status, err) == (
        2, "launch: there is no run in this folder or elsewhere yet. `launch TARGET` sends one.\n",
    )  # fmt: skip
    (folders / "empty").mkdir()
    assert f"there is no run in {folders / 'empty'} yet" in launch(command, "--runs", "../empty")[2]


def test_cancel_without_a_run_lists_the_running_ones_and_cancels_none(folders: Path, launch: Launch) -> None:
    runs = [
        leave(folders / "work/runs/both", 1),
        leave(folders / "other/runs/both", 2),
        leave(folders / "other/runs/one", 3),
    ]
    leave(folders / "work/runs/ended", 0, State.FAILED)
    status, out, err = launch("cancel", "--now")
    assert (status, out) == (2, "")
    commands = [line.split("  ")[1] for line in err.splitlines()[1:]]
    assert commands == ["launch cancel both --now", f"launch cancel {runs[1].path} --now", "launch cancel one --now"]
    assert not any(run.stop_file.exists() for run in runs)
    for each in range(20):
        leave(folders / f"other/runs/more-{each}", 4)
    err = launch("cancel")[2]
    assert (len(err.splitlines()), "  and 13 more; `launch list` shows them" in err) == (12, True)


def test_resume_without_a_run_lists_those_that_can_get_further(folders: Path, launch: Launch) -> None:
    def failed(name: str, hours: float, kind: str) -> None:
        leave(folders / "work/runs" / name, hours, State.FAILED, failure={"kind": kind, "message": "it failed"})

    leave(folders / "work/runs/going", 0)
    leave(folders / "work/runs/good", 0, State.SUCCEEDED)
    leave(folders / "other/runs/stopped", 3, State.STOPPED)
    leave(folders / "work/runs/lost", 2, State.SUCCEEDED).result_file.unlink()
    failed("full", 1, "disk full")
    failed("bug", 1, "user error")
    failed("odd", 1, "no such kind")
    before = {path: path.stat().st_mtime_ns for path in folders.rglob("*")}
    status, out, err = launch("resume", "--time", "2h", "--detach")
    assert (status, out) == (2, "")
    commands = [line.split("  ")[1] for line in err.splitlines()[1:]]
    assert commands == [f"launch resume {name} --time 2h --detach" for name in ("full", "lost", "stopped")]
    assert {path: path.stat().st_mtime_ns for path in folders.rglob("*")} == before


def test_which_failures_are_worth_another_try() -> None:
    never = {kind for kind, rule in RULES.items() if not rule.resumable}
    assert never == {"user error", "bad request", "out of memory", "diverged"}


@pytest.mark.slow
def test_resume_asks_on_a_terminal(local_project: Project) -> None:
    for name in ("r1", "r2"):
        local_project.call("--cpus", "1", "--detach", "--name", name, "steps:main", "--steps", "100000")
        until(lambda name=name: local_project.status(name)["progress"], "it has begun")  # type: ignore[misc]
        local_project.call("cancel", "--now", name)

    def terminal(*answers: str) -> tuple[int, str]:
        argv = [*COMMAND[1:], "resume", "--detach"]
        child = pexpect.spawn(COMMAND[0], argv, cwd=str(local_project.folder), encoding="utf-8", timeout=60)
        for answer in answers:
            child.expect(r"Resume (which one|r1)\? \[[^]]*\] ")
            child.sendline(answer)
        child.expect(pexpect.EOF)
        child.wait()
        return child.exitstatus, child.before

    def submissions() -> list[int]:
        return [sum(e["event"] == "submitted" for e in local_project.events(name)) for name in ("r1", "r2")]

    status, shown = terminal("")
    assert (status, "resume: nothing was resumed." in shown) == (2, True)
    status, shown = terminal("7")
    assert (status, "there is no run '7'" in shown) == (2, True)
    assert submissions() == [1, 1]
    assert terminal("1")[0] == 0, "the newest"
    assert submissions() == [1, 2]
    assert terminal("no")[0] == 2
    assert terminal("y")[0] == 0, "the only one that is left"
    assert submissions() == [2, 2]
    for name in ("r1", "r2"):
        local_project.call("cancel", "--now", name)


# ---- list --------------------------------------------------------------------------------------------------------


def test_a_long_list_has_the_newest_runs_and_says_how_many_there_are_more(folders: Path, launch: Launch) -> None:
    for number in range(25):
        leave(folders / ("work" if number % 2 else "other") / f"runs/r{number}", number, State.SUCCEEDED)
    status, out, err = launch("list")
    assert (status, [line.split()[0] for line in out.splitlines()]) == (0, [f"r{number}" for number in range(20)])
    assert err == "launch: 5 older runs are not shown; `--all` shows them, and --state and --since choose among them.\n"
    assert (len(names(launch, "--all")), launch("list", "--all")[2]) == (25, "")
    assert len(json.loads(launch("list", "--json")[1])) == 25
    assert names(launch, "--here") == [f"r{number}" for number in range(1, 25, 2)]


def test_runs_are_listed_by_state_and_time(folders: Path, launch: Launch) -> None:
    leave(folders / "work/runs/going", 1)
    leave(folders / "work/runs/bad", 2, State.FAILED)
    leave(folders / "other/runs/cut", 30, State.STOPPED)
    leave(folders / "other/runs/good", 100, State.SUCCEEDED)
    torn = leave(folders / "other/runs/torn", 3, State.SUCCEEDED)
    torn.result_file.write_text("{")
    assert names(launch, "--state", "failed,stopped") == ["bad", "cut"]
    assert names(launch, "--state", "failed", "--state=running") == ["going", "bad"]
    assert names(launch, "--state", "unknown") == ["torn"]
    assert names(launch, "--since", "90m") == ["going"]
    assert names(launch, "--since", "2d", "--state", "stopped,succeeded") == ["cut"]
    day = time.strftime("%Y-%m-%d", time.localtime(time.time() - 60 * HOUR))
    assert names(launch, "--since", day) == ["going", "bad", "torn", "cut"]
    assert [run["name"] for run in json.loads(launch("list", "--json", "--state", "succeeded")[1])] == ["good"]
    assert launch("list", "--state", "lost") == (0, "no runs of these in runs or elsewhere\n", "")


def test_python_chooses_as_the_command_does(folders: Path) -> None:
    leave(folders / "work/runs/bad", 2, State.FAILED)
    leave(folders / "other/runs/cut", 30, State.STOPPED)
    assert [run.name for run in launcher.runs()] == ["bad"]
    assert [run.name for run in launcher.runs(None)] == ["bad", "cut"]
    assert [run.name for run in launcher.runs(None, states=["stopped"])] == ["cut"]
    assert [run.name for run in launcher.runs(None, states="failed,stopped")] == ["bad", "cut"]
    assert [run.name for run in launcher.runs(None, sent_after=time.time() - 3 * HOUR)] == ["bad"]
    with pytest.raises(launcher.BadRequest, match="no such state"):
        launcher.runs(states=["done"])


# ---- wait --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ([State.SUCCEEDED, State.SUCCEEDED], 0),
        ([State.SUCCEEDED, State.STOPPED], 3),
        ([State.FAILED, State.STOPPED], 1),
        ([State.LOST, State.SUCCEEDED], 1),
    ],
)
def test_wait_ends_with_the_status_of_the_worst_run(
    folders: Path, launch: Launch, states: list[State], status: int
) -> None:
    for number, state in enumerate(states):
        run = leave(folders / f"work/runs/r{number}", 1, state)
        if state is State.LOST:
            run.result_file.unlink()
    found = launch("wait", "r0", "r1", "r0")
    assert found == (status, f"r0: {states[0].value}\nr1: {states[1].value}\n", "")
    data = json.loads(launch("wait", "r0", "--json", "r1")[1])
    assert [(each["name"], each["state"], each["done"]) for each in data] == [
        (f"r{number}", state.value, True) for number, state in enumerate(states)
    ]


def test_a_wait_that_takes_too_long(folders: Path, launch: Launch) -> None:
    leave(folders / "work/runs/going", 1)
    leave(folders / "work/runs/bad", 1, State.FAILED, failure={"kind": "killed", "message": "rank 0 was killed"})
    status, out, err = launch("wait", "going", "bad", "--timeout", "0s")
    assert (status, out) == (124, "bad: failed (killed)\n")
    assert err == "launch: not ended after 0 s: going is running\n"
    assert launch("wait", "--any", "going", "bad", "--timeout", "0s")[:2] == (1, "bad: failed (killed)\n")
    status, out, _ = launch("wait", "--json", "going", "--timeout=0s")
    assert (status, json.loads(out)[0]["state"]) == (124, "running")


def test_a_run_that_is_removed_is_not_waited_for(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = leave(folders / "work/runs/going", 1)
    monkeypatch.setattr(time, "sleep", lambda _: run.path.rename(folders / "moved"))
    with pytest.raises(launcher.BadRequest, match=r"work/runs/going is gone; its run cannot be waited for"):
        launcher.wait(["going"], timeout=60)


def test_a_run_whose_state_is_unknown_is_waited_for_with_a_word(folders: Path, launch: Launch) -> None:
    planned_run(folders / "work/runs/begun", "local")
    status, _, err = launch("wait", "begun", "--timeout", "1s")
    assert status == 124
    assert err.startswith(
        "launch: the state of begun is unknown: its cluster does not answer, or its submission was int"
    )
    assert err.count("unknown: ") == 1


def test_ctrl_c_ends_the_waiting_and_not_the_run(folders: Path) -> None:
    run = leave(folders / "work/runs/going", 1)
    leave(folders / "work/runs/ended", 1, State.SUCCEEDED)
    with subprocess.Popen(
        [*COMMAND, "wait", "going", "ended"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ended: succeeded\n"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (130, "\nlaunch: no longer waiting; not ended: going\n")
    assert not run.stop_file.exists()


@pytest.mark.slow
def test_real_runs_are_waited_for(local_project: Project) -> None:
    for name, seconds, fail in (("slow", "0.05", "5"), ("quick", "0.001", "-1")):
        words = ("steps:main", "--steps", "30", "--seconds", seconds, "--fail-at", fail)
        local_project.call("--cpus", "1", "--detach", "--name", name, *words)
    assert local_project.call("wait", "slow", "quick", "--any", status=None).stdout != ""
    done = local_project.call("wait", "slow", "quick", status=1)
    assert sorted(done.stdout.splitlines()) == ["quick: succeeded", "slow: failed (user error)"]
    folder = local_project.folder / "runs"
    assert [run.name for run in launcher.wait([folder / "quick"], timeout=60)] == ["quick"]
