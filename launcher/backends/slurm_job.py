"""Inside a SLURM job: where a task sits, what submitit runs there, and how the job asks to be started again.

``python -m launcher.backends.slurm_job RUN_DIR STATUS`` is the last line of the batch script. The batch shell outlives the
agents, so it is the one to act when node 0's agent died and nobody is left inside to say so.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher import history
from launcher.coordinator import end_run, note_failure
from launcher.policy import Action, Outcome, decide
from launcher.ranks import Seat
from launcher.rundir import RunDir
from launcher.spec import State

CONTROLLER_SECONDS = 60.0
"""How long to try again while slurmctld does not answer; it is restarted for upgrades, and fails over in minutes."""


def seat(run_dir: RunDir, environment: Mapping[str, str]) -> Seat:
    """Read where this task sits from SLURM's variables; the only place that reads them.

    The address is the one srun was launched from, which is the first node's as the others reach it: a number, not a name
    that some node might not resolve.
    """
    job, restarts = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0"))
    return Seat(
        node=int(environment["SLURM_NODEID"]),
        nodes=int(environment["SLURM_NNODES"]),
        host=environment["SLURMD_NODENAME"],
        address=environment["SLURM_LAUNCH_NODE_IPADDR"],
        session=f"{job}.{restarts}",
        requeue=lambda exclude: requeue(run_dir, job, exclude),
        requeued=lambda: taken_away(job, restarts),
    )


def requeue(run_dir: RunDir, job: str, exclude: Sequence[str] = ()) -> bool:
    """Ask for the job to be started again, away from the hosts `exclude`. Says whether it will be.

    Where the site or the profile does not allow a requeue, the same script is submitted as a job that follows this one.
    """
    done = _scontrol("requeue", job)
    if done is not None and done.returncode and _follow_up(run_dir, job, exclude):
        return True
    if done is None or done.returncode:
        print(
            f"launch: SLURM does not requeue job {job}: {done.stderr.strip() if done else 'no answer'}", file=sys.stderr
        )
        return False
    if exclude:
        # Only a job that waits can be changed. This one is about to be ended: SLURM sends SIGTERM now and SIGKILL after
        # KillWait, which is time enough.
        _scontrol("update", f"JobId={job}", f"ExcNodeList={','.join(exclude)}")
    return True


def _follow_up(run_dir: RunDir, job: str, exclude: Sequence[str]) -> bool:
    """Submit what this job was submitted as once more; submitit's name for what it runs holds the job's number."""
    known = history.read(run_dir.events()).excluded
    away = [f"--exclude={','.join((*known, *exclude))}"] if known or exclude else []
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job}", *away, str(run_dir.script_file)]
    # What this job is must not be handed on to the next one with the environment.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        return False
    follower = done.stdout.split(";")[0].strip()
    folder = run_dir.path / "submitit"
    shutil.copy(folder / f"{job}_submitted.pkl", folder / f"{follower}_submitted.pkl")
    run_dir.write_job("slurm", follower)
    return True


def taken_away(job: str, restarts: int) -> bool:
    """Whether SLURM itself took the nodes from the job's start number `restarts` to start it again: an operator's
    ``scontrol requeue``, or a preemption that said so by SIGTERM only."""
    done = _scontrol("show", "job", "--oneliner", job)
    if done is None or done.returncode:
        return False
    count = re.search(r"\bRestarts=(\d+)", done.stdout)
    return count is not None and int(count[1]) > restarts


def _scontrol(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Run scontrol, again and again while the controller does not answer; None where it never did, or is missing."""
    deadline = time.monotonic() + CONTROLLER_SECONDS
    while True:
        try:
            done = subprocess.run(
                ["scontrol", *words], capture_output=True, text=True, check=False, timeout=CONTROLLER_SECONDS,
                preexec_fn=_deaf,
            )  # fmt: skip
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        if "Unable to contact" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def _deaf() -> None:
    """Keep the SIGTERM that a requeue sends to the whole job from ending the command that asked for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class AgentTask:
    """What submitit runs on each node."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        from launcher.agent import run_agent

        step_daemon = os.getppid()
        status = asyncio.run(run_agent(RunDir(self.run_dir), seat(RunDir(self.run_dir), os.environ)))
        if os.getppid() != step_daemon:
            # Without its slurmstepd nobody hears of this task's end: srun would wait, and the nodes be held, for ever.
            subprocess.run(["scancel", os.environ["SLURM_JOB_ID"]], check=False)
        if status:
            # Not an exception: the job's exit status should be the run's, and its log not end in our traceback.
            sys.exit(status)


def after(run_dir: RunDir, status: int, environment: Mapping[str, str]) -> int:
    """What the batch script does when srun has come back with `status`; returns the job's exit status.

    Nothing, unless the run has been left without an end: then its supervisor was killed, a lost node like any other. An
    agent that never got as far as an attempt would not do better the next time.
    """
    job, restarts = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0"))
    replaced = (run_dir.job() or {}).get("job_id", job) != job
    if run_dir.result() is not None or replaced or taken_away(job, restarts):
        return status
    plan, attempt = run_dir.plan(), run_dir.last_attempt()
    if run_dir.stop_file.exists():
        return end_run(run_dir, plan, State.STOPPED, attempt, time.time()).exit_status
    past = history.read(run_dir.events())
    started = any(event["event"] == "started" for event in run_dir.events())
    left = plan.spec.max_restarts - len(past.setbacks) if started else 0
    step = max((int(m.get("step", 0)) for m in run_dir.metrics()), default=None)
    outcome = Outcome({}, lost=[f"the agent on {environment.get('SLURMD_NODENAME', 'node 0')}"], step=step)
    action, failure = decide(outcome, left, past, movable=True)
    if action is Action.MOVE:
        note_failure(run_dir, attempt, failure, left - 1, step)
        if requeue(run_dir, job):
            run_dir.event("requeued", attempt=attempt, reason="node lost", step=step, exclude=[])
            return status
    return end_run(run_dir, plan, State.FAILED, attempt, time.time(), failure, step).exit_status


if __name__ == "__main__":
    sys.exit(after(RunDir(Path(sys.argv[1])), int(sys.argv[2]), os.environ))
