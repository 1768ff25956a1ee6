"""Damaged, hostile or foreign run directories: nothing is killed, followed, executed or lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.processes import start_time
from launcher.backends import detached
from launcher.backends.slurm import backend as slurm
from launcher.client.api import resubmit
from launcher.client.run import Run
from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target
from tests.launcher.engines import COMMAND

HOST = socket.gethostname()
OTHER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")


def make_run(folder: Path, backend: str = "local", state: State | None = None) -> RunDir:
    run = RunDir(folder)
    run.create()
    placement, target = Placement(1, 1, "cpu"), Target("script", str(run.code / "x.py"), path=(str(run.code),))
    run.code.mkdir()
    (run.code / "x.py").write_text("print('hello')\n")
    cluster = Cluster(backend, backend)
    run.write_plan(Plan(folder.name, folder, RunSpec("x.py"), backend, cluster, placement, target, folder.parent, 60))
    if state is not None:
        run.write_result(state, attempts=1)
        run.value_pickle.write_bytes(b"the value")
        run.request_stop("cancelled")
        run.event("finished", state=state.value)
    return run


def command(folder: Path, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *argv], cwd=folder, capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user that is not part of a run."""
    with subprocess.Popen(["sleep", "300"]) as child:
        yield child
        child.kill()


def id_of(pid: int) -> str:
    return f"{HOST}:{pid}:{start_time(pid)}"


# ---- ids -----------------------------------------------------------------------------------------------------------

PROCESS_IDS = [
    f"{HOST}:-1:5", f"{HOST}:0:5", f"{HOST}:1:5", f"{HOST}:self:5", f"{HOST}:+12:5", f"{HOST}:١٢:5", f"{HOST}:12:",
    f"{HOST}:{'9' * 5000}:5", f"{HOST}:12:5\n", f"{HOST}: 12:5", "12", "", None, 12, ["a"], {"a": 1}, True,
]  # fmt: skip
SLURM_IDS = [
    "--me", "2,5", "--user=root", "-1", "0", "", "12.0", "12 13", "12\n", "١٢", "9" * 5000, "12_", "[1-3]", "12_[1-3]", None, 12,
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "job_id"), [*(("local", i) for i in PROCESS_IDS), *(("ray", i) for i in PROCESS_IDS[:5]),
    *(("slurm", i) for i in SLURM_IDS), ("nosuch", "1"), (None, "1"), (["slurm"], "1")],
)  # fmt: skip
def test_a_bad_id_is_refused_by_the_name_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, job_id: Any
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("scancel", "squeue", "sacct"):  # the called command creates a file
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("something was killed"))
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: pytest.fail("something was killed"))
    run = make_run(tmp_path / "run")
    run.job_file.write_text(json.dumps({"backend": backend, "job_id": job_id}))
    before = sorted(p.name for p in run.path.iterdir())
    for act in (Run(run).cancel, Run(run).kill, Run(run).state):
        with pytest.raises(BadRequest, match=r"job\.json: "):
            act()
    assert not (tmp_path / "called").exists()
    assert sorted(p.name for p in run.path.iterdir()) == before


@pytest.mark.parametrize("job_id", SLURM_IDS)
def test_no_command_of_slurm_gets_what_is_no_job_id(job_id: Any) -> None:
    for act in (slurm.poll, slurm.cancel):
        with pytest.raises(BadRequest, match="is not a job id"):
            act(job_id)


def test_a_recycled_pid_is_left_alone(victim: subprocess.Popen[bytes]) -> None:
    detached.kill(f"{HOST}:{victim.pid}:1")
    assert detached.poll(f"{HOST}:{victim.pid}:1") is State.LOST
    assert victim.poll() is None
    detached.kill(id_of(victim.pid))
    assert victim.wait() == -signal.SIGKILL


@as_root
def test_a_process_of_another_user_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "300"], user=OTHER) as child:
        run = make_run(tmp_path / "run")
        run.write_job("local", id_of(child.pid))
        with pytest.raises(
            BadRequest, match=rf"job\.json: process {child.pid} belongs to uid {OTHER}; it was not killed"
        ):
            Run(run).kill()
        assert child.poll() is None
        child.kill()


# ---- owners and modes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077, 0o777])
def test_a_run_directory_is_for_its_owner_alone(tmp_path: Path, mask: int) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "runs").mkdir()
        os.umask(mask)
        run = RunDir(tmp_path / "runs" / "run")
        run.create()
        run.event("submitted")
        run.write_job("local", "host:12:3")
        run.beat()
    finally:
        os.umask(before)
    assert run.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in run.path.iterdir()} == {0}


def test_a_run_that_others_can_change_is_refused_with_what_to_type(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run", state=State.STOPPED)
    run.path.chmod(0o775)
    for act in (Run(run).cancel, Run(run).kill, lambda: resubmit(Run(run))):
        with pytest.raises(BadRequest, match=r"mode 0775.* `chmod -R go-w '.*/my run'`"):
            act()
    run.path.chmod(0o755)
    (run.code / "x.py").chmod(0o666)
    with pytest.raises(BadRequest, match=r"x\.py can be changed by other users \(mode 0666\)"):
        resubmit(Run(run))
    subprocess.run(["chmod", "-R", "go-w", run.path], check=True)
    assert Run(run).cancel() is State.STOPPED


def test_in_a_closed_directory_the_modes_of_files_do_not_matter(tmp_path: Path) -> None:
    """Under umask 002 a scheduler makes logs that the group could write, were it able to enter the run directory."""
    run = make_run(tmp_path / "run", state=State.STOPPED)
    (run.path / "submitit").mkdir()
    (run.path / "submitit").chmod(0o775)
    (run.path / "submitit/7_0_log.out").touch()
    (run.path / "submitit/7_0_log.out").chmod(0o664)
    run.check_own()
    for mode in (0o710, 0o701, 0o750, 0o755):
        run.path.chmod(mode)
        with pytest.raises(BadRequest, match="can be changed by other users"):
            run.check_own()


@pytest.mark.parametrize(
    "name", ["events.jsonl", "metrics.jsonl", "heartbeat", "result.json", "job.json", "logs", "stop"]
)
def test_a_link_in_a_run_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    outside = tmp_path / "outside"
    outside.mkdir() if name == "logs" else outside.write_text("untouched")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(outside)
    for act in (Run(run).cancel, lambda: resubmit(Run(run))):
        with pytest.raises(BadRequest, match=f"{name} is a symbolic link"):
            act()
    if name == "logs":
        return
    run.event("x")
    if name == "heartbeat":
        with pytest.raises(OSError, match="is a link"):
            run.beat()
    assert outside.read_text() == "untouched"


@as_root
def test_a_run_of_another_user_is_looked_at_and_not_acted_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "theirs", state=State.SUCCEEDED)
    run.path.chmod(0o755)
    for path in (run.path, *run.path.rglob("*")):
        os.chown(path, OTHER, OTHER)
    assert json.loads(command(tmp_path, "list", "--json").stdout)[0]["state"] == "succeeded"
    for argv in (("cancel", "theirs"), ("cancel", "--now", "theirs"), ("resume", "theirs")):
        done = command(tmp_path, *argv)
        assert done.returncode == 2
        assert f"(uid {OTHER}), and you are" in done.stderr
    with pytest.raises(BadRequest, match=f"uid {OTHER}"):
        Run(run).result()


# ---- resume --------------------------------------------------------------------------------------------------------


def content(run: RunDir) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_refused_resume_leaves_the_end_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", state=State.FAILED)
    run.write_job("local", "host:12:3")
    before = content(run)
    with pytest.raises(BadRequest):
        resubmit(Run(run), time="nonsense")
    assert content(run) == before

    def refuse(*_: object, **__: object) -> str:
        run.write_result(State.FAILED)  # as a refused driver does
        run.beat()
        raise BadRequest("the engine cannot be reached")

    monkeypatch.setattr("launcher.backends.local.LocalBackend.submit", refuse)
    with pytest.raises(BadRequest, match="cannot be reached"):
        resubmit(Run(run))
    assert content(run) == before


def test_an_engine_that_is_not_there_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", backend="slurm", state=State.STOPPED)
    before = content(run)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadRequest, match="SLURM cannot be reached from here"):
        resubmit(Run(run))
    assert content(run) == before


@pytest.mark.slow
def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    old = make_run(tmp_path / "runs" / "old", state=State.STOPPED)
    new = tmp_path / "elsewhere" / "new"
    new.parent.mkdir()
    old.path.rename(new)
    done = command(tmp_path, "resume", str(new))
    assert done.returncode == 0, done.stderr + done.stdout
    assert "hello" in RunDir(new).log(1, 0).read_text()
    plan = RunDir(new).plan()
    assert (plan.name, plan.run_dir, plan.target.path) == ("new", new, (str(new / "code"),))
    assert not old.path.exists()


def test_a_moved_run_that_lacks_its_code_is_refused(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", state=State.STOPPED)
    new = old.path.rename(tmp_path / "new")
    (new / "code" / "x.py").unlink()
    before = content(RunDir(new))
    with pytest.raises(BadRequest, match=r"was moved from .*old without .*new/code/x\.py"):
        resubmit(Run(RunDir(new)))
    assert content(RunDir(new)) == before


# ---- reading -------------------------------------------------------------------------------------------------------

DAMAGE = ["{", "[]", "[" * 100_000, '"x"', "1e999", "null", '{"state": 1}', '{"state": "nosuch"}', "\0", "{}"]


@pytest.mark.parametrize("name", ["plan.json", "job.json", "result.json", "poll.json", "snapshot.json"])
def test_a_damaged_run_hides_no_other(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "runs" / "good", state=State.SUCCEEDED)
    for number, text in enumerate(DAMAGE):
        (make_run(tmp_path / "runs" / f"bad{number}").path / name).write_text(text)
    fifo = make_run(tmp_path / "runs" / "fifo").path / name
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo)
    zero = make_run(tmp_path / "runs" / "zero").path / name
    zero.unlink(missing_ok=True)
    zero.symlink_to("/dev/zero")
    done = command(tmp_path, "list")
    assert done.returncode == 0
    assert any(line.startswith("good") and "succeeded" in line for line in done.stdout.splitlines())
    assert len(done.stdout.splitlines()) == len(list((tmp_path / "runs").glob("*/plan.json")))


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl", "logs/1/0.log", "logs/²"])
def test_looking_at_a_pipe_does_not_wait(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "runs" / "run")
    run.claim_attempt()
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    for argv in (("list",), ("status", "run"), ("logs", "run")):
        assert command(tmp_path, *argv).returncode in (0, 2)


def test_lines_of_another_kind_are_survived(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "run")
    odd = [
        {"event": "started"},
        {"event": 5, "time": "x"},
        {"step": []},
        {"loss": {}, "step": "9" * 50},
        {"time": None},
    ]
    text = "".join(json.dumps(each) + "\n" for each in odd) + "[" * 100_000 + "\n\xff\n"
    run.events_file.write_text(text, encoding="latin-1")
    run.metrics_file.write_text(text, encoding="latin-1")
    for argv in (("list",), ("status", "run"), ("logs", "run")):
        assert command(tmp_path, *argv).returncode in (0, 2)
