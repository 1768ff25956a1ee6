"""The end of a job, where the batch script looks at the run after srun."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends.slurm import job
from launcher.lifecycle.run_dir import RunDir
from tests.launcher.plans import planned_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run that job 7 ended and a person resumed, but of whose second job SLURM has not said the number yet."""
    run = planned_run(tmp_path / "n", "slurm")
    run.event("submitted")
    run.write_job("slurm", "7")
    run.event("started", attempt=1)
    run.event("finished", state="stopped")
    run.event("submitted")
    return run


def look(run: RunDir, submission: int) -> int:
    """Run what the batch script of job 7 runs if srun ended with status 3, on a node without SLURM's commands."""
    command = [sys.executable, "-P", "-m", "launcher.backends.slurm.job", str(run.path), "3", str(submission)]
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "PATH": ""}
    return subprocess.run(command, env=environment, check=False).returncode


def test_the_job_before_leaves_a_resumed_run_alone(run: RunDir) -> None:
    before = run.events()
    assert look(run, submission=1) == 3
    assert run.result() is None
    assert run.events() == before


def test_the_job_of_the_last_submission_says_that_its_supervisor_was_lost(run: RunDir) -> None:
    assert look(run, submission=2) != 0
    assert (run.result() or {})["failure"]["host"] == "the agent on n1"


@pytest.fixture
def begun(tmp_path: Path) -> RunDir:
    """A run whose job 7 had started its ranks, and then lost its supervisor."""
    run = planned_run(tmp_path / "n", "slurm")
    run.event("submitted")
    run.write_job("slurm", "7")
    run.claim_attempt()
    run.event("started", attempt=1, world_size=2, hosts=["n1"])
    return run


def test_of_many_that_see_the_end_of_a_job_one_handles_it(begun: RunDir) -> None:
    """The batch script and agents of other nodes may see it at the same moment."""
    variables = {**os.environ, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "PATH": ""}
    command = [sys.executable, "-P", "-m", "launcher.backends.slurm.job", str(begun.path), "9", "1"]
    looks = [subprocess.Popen(command, env=variables) for _ in range(6)]
    assert {look.wait() for look in looks} == {9}
    assert [e["event"] for e in begun.events()].count("requeued") == 1
    assert (begun.path / "submitit/7.0.requeue").read_text() == "", (
        "which the batch script looks for; nothing is excluded"
    )


def test_if_the_batch_script_is_gone_nobody_waits_for_its_requeue(
    begun: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    environment = {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1"}
    assert job.after(begun, 9, 1, environment, script_runs=False) == 1
    assert (begun.result() or {})["failure"]["kind"] == "node lost"


@pytest.mark.parametrize(
    "text",
    [
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch. Some of your processes may have been killed",
    ],
)
def test_a_supervisor_that_was_killed_for_memory_is_not_a_lost_node(begun: RunDir, text: str) -> None:
    (begun.path / "submitit").mkdir()
    (begun.path / "submitit/7_1_log.err").write_text(f"{text}\n")
    look(begun, submission=1)
    failure = (begun.result() or {})["failure"]
    assert (failure["kind"], failure["host"]) == ("out of memory", "n1")


@pytest.mark.parametrize(("nodes", "kind"), [(["n1"], "requeued"), (["n1", "n2"], "failed")])
def test_nodes_that_failed_before_their_ranks_are_left_if_others_may_not(
    begun: RunDir, nodes: list[str], kind: str
) -> None:
    plan = begun.plan()
    begun.write_plan(replace(plan, placement=replace(plan.placement, nodes=2)))
    (begun.path / "submitit").mkdir()
    for node in nodes:
        (begun.path / f"submitit/7.0.{node}.unfit").write_text("before the ranks: false failed with status 1\n")
    (begun.path / "submitit/7.1.n9.unfit").write_text("of another start of the job\n")
    look(begun, submission=1)
    events = begun.events()
    assert [e["message"] for e in events if e["event"] == "failed"] == [
        "; ".join(f"{node}: before the ranks: false failed with status 1" for node in nodes)
    ]
    requeued = [e["exclude"] for e in events if e["event"] == "requeued"]
    assert requeued == ([["n1"]] if kind == "requeued" else [])
