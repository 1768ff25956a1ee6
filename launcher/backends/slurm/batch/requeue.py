"""Requeue a SLURM job from inside, and ask what has become of it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.backends.slurm import shell
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.run_dir import RunDir
from launcher.lifecycle.trust import SLURM_ID, check_id
from training.files import write_atomic


@dataclass(frozen=True)
class JobStart:
    """One start of a SLURM job.

    Attributes:
        job: the job id.
        restarts: how often SLURM requeued the job before this start.
    """

    job: str
    restarts: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> JobStart:
        """Read the start from the environment of one of its processes."""
        return cls(environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0")))

    def __str__(self) -> str:
        return f"{self.job}.{self.restarts}"


def requeue(run_dir: RunDir, start: JobStart, exclude: Sequence[str] = (), script_runs: bool = True) -> bool:
    """Requeue the job with the hosts `exclude` excluded; returns whether it will start again.

    If the site or the profile does not allow a requeue, submit the same script as a job that depends on this one. Without
    scontrol, as in a container, the batch script is asked for the requeue, if it runs.
    """
    if script_runs and shutil.which("scontrol") is None:
        write_atomic(request_file(run_dir, start), _excluded_hosts(run_dir, exclude))
        return True
    # SLURM ends this job after the requeue; nothing that takes time may follow.
    done = _scontrol("requeue", start.job)
    if done is None or done.returncode:
        # SLURM also refuses a job that it has requeued itself.
        if done is not None and (
            final_job_fate(run_dir, start) == "requeued" or _follow_up(run_dir, start.job, exclude)
        ):
            return True
        print(
            f"launch: SLURM did not requeue job {start.job}: {done.stderr.strip() if done else 'no answer'}",
            file=sys.stderr,
        )
        return False
    _exclude_hosts(run_dir, start.job, exclude)
    return True


def request_file(run_dir: RunDir, start: JobStart) -> Path:
    """Return the file by which a process without scontrol asks the batch script for a requeue (`script.REQUEUE`)."""
    return run_dir.path / "submitit" / f"{start}.requeue"


def _exclude_hosts(run_dir: RunDir, job: str, exclude: Sequence[str] = ()) -> None:
    """Exclude bad hosts from the pending job's next start; SLURM cannot change a running job.

    SLURM sends SIGTERM when it requeues a job, and SIGKILL only after KillWait (default 30 s), so this process has time.
    """
    if not (hosts := _excluded_hosts(run_dir, exclude)):
        return
    changed = _scontrol("update", f"JobId={job}", f"ExcNodeList={hosts}")
    if changed is None or changed.returncode:
        reason = changed.stderr.strip() if changed else "no answer"
        print(f"launch: SLURM did not exclude {hosts} from job {job}: {reason}", file=sys.stderr)


def _excluded_hosts(run_dir: RunDir, exclude: Sequence[str]) -> str:
    """All excluded hosts: the profile's, those of earlier failures, and `exclude`."""
    own = run_dir.plan().cluster.slurm.exclude
    known = history.read(run_dir.events()).excluded
    return ",".join(dict.fromkeys([*([own] if own else []), *known, *exclude]))


def _follow_up(run_dir: RunDir, job: str, exclude: Sequence[str]) -> bool:
    """Submit the job's script again, to start after this job; returns whether sbatch accepted it."""
    hosts = _excluded_hosts(run_dir, exclude)
    options = [f"--exclude={hosts}"] if hosts else []
    done = shell.run("sbatch", "--parsable", f"--dependency=afterany:{job}", *options, str(run_dir.script_file))
    if done.returncode:
        return False
    follower = check_id(SLURM_ID, done.stdout.split(";")[0].strip())[0]
    folder = run_dir.path / "submitit"  # submitit's file names hold the job id
    shutil.copy(folder / f"{job}_submitted.pkl", folder / f"{follower}_submitted.pkl")
    run_dir.write_job(run_dir.plan().cluster.engine, follower)
    return True


def final_job_fate(run_dir: RunDir, start: JobStart) -> JobFate:
    """`fate` of the job; a requeued one also gets its excluded hosts."""
    found = fate(start)
    if found == "requeued":
        _exclude_hosts(run_dir, start.job)
    return found


def fate(start: JobStart) -> JobFate:
    """The job's fate after `start`.

    ``requeued``: the job is in the queue again, after ``scontrol requeue``, a node failure or a preemption. ``preempting``:
    SLURM sent SIGTERM to take the nodes; a job that exits before the end of the grace time is not requeued. Empty: neither,
    as after scancel.
    """
    facts = _facts(start.job)
    if int(facts.get("Restarts", "0")) > start.restarts:
        return "requeued"
    preempted = facts.get("PreemptTime", "None")
    # ISO times compare as text. A time before StartTime belongs to an earlier start.
    return "preempting" if preempted[:1].isdigit() and preempted >= facts.get("StartTime", "") else ""


def _facts(job: str) -> dict[str, str]:
    """The fields of ``scontrol show job``; empty without an answer."""
    done = _scontrol("show", "job", "--oneliner", job)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout)) if done is not None and not done.returncode else {}


def _scontrol(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Run scontrol, with retries while the controller does not answer; None without an answer or without scontrol."""
    deadline = time.monotonic() + TIMEOUTS.slurm_controller
    while True:
        try:
            done = shell.run("scontrol", *words, timeout=TIMEOUTS.slurm_controller, preexec_fn=ignore_sigterm)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        if "Unable to contact" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def ignore_sigterm() -> None:
    """Ignore the SIGTERM that a requeue sends to all processes of the job."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def runs(start: JobStart) -> bool:
    """Whether this start of the job is running; also true without an answer of SLURM."""
    facts = _facts(start.job)
    return (
        facts.get("JobState", "RUNNING") == "RUNNING" and int(facts.get("Restarts", start.restarts)) == start.restarts
    )
