"""The end of a job, where the batch script looks at the run after srun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
