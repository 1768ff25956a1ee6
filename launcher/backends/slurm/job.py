"""Inside a SLURM job: where a task sits, what submitit runs there, and how the job asks to be started again.

``python -m launcher.backends.slurm.job RUN_DIR STATUS`` is the last line of the batch script. The batch shell outlives the
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.agent.protocol import AgentInfo
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.recovery import Elsewhere, End, Recovery
from launcher.lifecycle.run_dir import RunDir, tail
from launcher.lifecycle.trust import SLURM_ID, check_id
from launcher.rank.output import drop_output_on_full_disk
from launcher.request.own_packages import ROOT
from launcher.request.spec import State


@dataclass(frozen=True)
class JobStart:
    """One start of a SLURM job.

    Attributes:
        job: its number.
        restarts: how often SLURM requeued it before this start.
    """

    job: str
    restarts: int

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> JobStart:
        """The start that the process with this environment belongs to."""
        return cls(environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT", "0")))

    def __str__(self) -> str:
        return f"{self.job}.{self.restarts}"


def agent_info(run_dir: RunDir, environment: Mapping[str, str]) -> AgentInfo:
    """Read where this task sits from SLURM's variables; the only place that reads them.

    The address is the one srun was launched from, which is the first node's as the others reach it: a number, not a name
    that some node might not resolve.
    """
    start = JobStart.read(environment)
    return AgentInfo(
        node=int(environment["SLURM_NODEID"]),
        nodes=int(environment["SLURM_NNODES"]),
        host=environment["SLURMD_NODENAME"],
        address=environment["SLURM_LAUNCH_NODE_IPADDR"],
        session=str(start),
        requeue=lambda exclude: requeue(run_dir, start, exclude),
        fate=lambda: final_job_fate(run_dir, start),
    )


def requeue(run_dir: RunDir, start: JobStart, exclude: Sequence[str] = ()) -> bool:
    """Ask for `start` to be followed by another, away from the hosts `exclude`. Says whether it
    will be.

    Where the site or the profile does not allow a requeue, the same script is submitted as a job that follows this one.
    """
    # From the requeue on SLURM ends this job, and there is little time for anything else.
    done = _scontrol("requeue", start.job)
    if done is None or done.returncode:
        # One that SLURM has put back into the queue by itself is refused, too.
        if done is not None and (
            final_job_fate(run_dir, start) == "requeued" or _follow_up(run_dir, start.job, exclude)
        ):
            return True
        print(
            f"launch: SLURM does not requeue job {start.job}: {done.stderr.strip() if done else 'no answer'}",
            file=sys.stderr,
        )
        return False
    _keep_away(run_dir, start.job, exclude)
    return True


def _keep_away(run_dir: RunDir, job: str, exclude: Sequence[str] = ()) -> None:
    """Have the next start of a job that waits on none of the hosts to stay away from; one that runs cannot be changed.

    SLURM sends SIGTERM when it requeues a job, and SIGKILL after KillWait, which is time enough.
    """
    if not (away := _away(run_dir, exclude)):
        return
    changed = _scontrol("update", f"JobId={job}", f"ExcNodeList={away}")
    if changed is None or changed.returncode:
        print(f"launch: SLURM does not keep job {job} away from {away}: {changed and changed.stderr}", file=sys.stderr)


def _away(run_dir: RunDir, exclude: Sequence[str]) -> str:
    """All hosts to stay away from: the profile's, those of earlier failures, and `exclude`."""
    own = run_dir.plan().cluster.slurm.exclude
    known = history.read(run_dir.events()).excluded
    return ",".join(dict.fromkeys([*([own] if own else []), *known, *exclude]))


def _follow_up(run_dir: RunDir, job: str, exclude: Sequence[str]) -> bool:
    """Submit what this job was submitted as once more; submitit's name for what it runs holds the job's number."""
    hosts = _away(run_dir, exclude)
    away = [f"--exclude={hosts}"] if hosts else []
    command = ["sbatch", "--parsable", f"--dependency=afterany:{job}", *away, str(run_dir.script_file)]
    # What this job is must not be handed on to the next one with the environment.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        return False
    follower = check_id(SLURM_ID, done.stdout.split(";")[0].strip())[0]
    folder = run_dir.path / "submitit"
    shutil.copy(folder / f"{job}_submitted.pkl", folder / f"{follower}_submitted.pkl")
    run_dir.write_job(run_dir.plan().cluster.engine, follower)
    return True


def final_job_fate(run_dir: RunDir, start: JobStart) -> JobFate:
    """`fate`; and where the job is to start again, that is settled to be away from bad nodes."""
    found = fate(start)
    if found == "requeued":
        _keep_away(run_dir, start.job)
    return found


def fate(start: JobStart) -> JobFate:
    """What SLURM has in mind for the job after `start`.

    ``requeued``: it is in the queue again, by an operator's ``scontrol requeue``, a node that went down, or a preemption
    that is through. ``preempting``: SIGTERM was the word that its nodes are wanted; most sites send no other, and a job
    that has left before the grace is over is not started again. Empty: neither, as after scancel.
    """
    facts = _facts(start.job)
    if int(facts.get("Restarts", "0")) > start.restarts:
        return "requeued"
    preempted = facts.get("PreemptTime", "None")
    # Times are of one format, so their order is that of the letters; that of an earlier start is older than this start.
    return "preempting" if preempted[:1].isdigit() and preempted >= facts.get("StartTime", "") else ""


def _facts(job: str) -> dict[str, str]:
    """What SLURM knows of the job, by its own words; empty where it does not answer."""
    done = _scontrol("show", "job", "--oneliner", job)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout)) if done is not None and not done.returncode else {}


def _scontrol(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Run scontrol, again and again while the controller does not answer; None where it never did, or is missing."""
    deadline = time.monotonic() + TIMEOUTS.slurm_controller
    while True:
        try:
            done = subprocess.run(
                ["scontrol", *words], capture_output=True, text=True, check=False, timeout=TIMEOUTS.slurm_controller,
                preexec_fn=_ignore_sigterm,
            )  # fmt: skip
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        if "Unable to contact" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def _ignore_sigterm() -> None:
    """Keep the SIGTERM that a requeue sends to the whole job from ending the command that asked for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class AgentTask:
    """What submitit runs on each node."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        from launcher.agent.main import run_agent

        run_dir = RunDir(self.run_dir)
        as_task(run_dir, lambda where: asyncio.run(run_agent(run_dir, where)))


def with_our_packages(task: Callable[[], None]) -> Callable[[], None]:
    """Wrap `task` so that it finds this toolkit's packages on a node; pickled by value, since it imports none of them.

    submitit's process has the current folder, which is the user's, first on sys.path, and then PYTHONPATH.
    """
    import cloudpickle

    data, root = cloudpickle.dumps(task), str(ROOT)

    def run() -> None:
        import pickle
        import sys

        path = list(sys.path)
        sys.path[:] = [root, *path[1:]]
        import launcher.errors  # noqa: F401
        import training  # noqa: F401

        sys.path[:] = path
        pickle.loads(data)()

    return run


def as_task(run_dir: RunDir, work: Callable[[AgentInfo], int]) -> None:
    """Be a task of the job: do `work` on this seat, and end with the status that it returns, whether SLURM hears it or not."""
    drop_output_on_full_disk()
    step_daemon = os.getppid()
    status = work(agent_info(run_dir, os.environ))
    if os.getppid() != step_daemon:
        orphaned(run_dir, status, os.environ)
    if status:
        # Not an exception: the job's exit status should be the run's, and its log not end in our traceback.
        sys.exit(status)


def orphaned(run_dir: RunDir, status: int, environment: Mapping[str, str]) -> None:
    """Release the nodes of a job from a task that ends without its slurmstepd: nobody hears of it, and srun would wait for
    it, and the nodes be held, for ever.

    Where the run has not come to an end and nobody supervises it any more, this task is the last to see to it.
    """
    start = JobStart.read(environment)
    while run_dir.result() is None and _runs(start):
        beat = _modified(run_dir.heartbeat_file)
        time.sleep(5 * TIMEOUTS.run_heartbeat)
        if _modified(run_dir.heartbeat_file) == beat:  # whatever the clocks of the nodes say
            after(run_dir, status, environment)
            break
    if _runs(start):  # one that is in the queue again, or began anew, is left there
        subprocess.run(["scancel", "--state=RUNNING", check_id(SLURM_ID, start.job)[0]], check=False)


def _runs(start: JobStart) -> bool:
    """Whether this start of the job is running, as far as SLURM says."""
    facts = _facts(start.job)
    return (
        facts.get("JobState", "RUNNING") == "RUNNING" and int(facts.get("Restarts", start.restarts)) == start.restarts
    )


def _modified(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def after(run_dir: RunDir, status: int, environment: Mapping[str, str]) -> int:
    """What the batch script does when srun has come back with `status`; returns the job's exit status.

    Nothing, unless the run has been left without an end: then its supervisor was killed, a lost node like any other. An
    agent that never got as far as an attempt would not do better the next time.
    """
    start = JobStart.read(environment)
    replaced = (run_dir.job() or {}).get("job_id", start.job) != start.job
    fields = next(
        (e["event"] for e in reversed(run_dir.events()) if e["event"] in ("submitted", "started", "finished")), ""
    )
    if run_dir.result() is not None or fields == "finished" or replaced:
        return status
    if final_job_fate(run_dir, start) == "requeued":
        return status
    recovery, attempt = Recovery(run_dir, run_dir.plan()), run_dir.last_attempt()
    if run_dir.stop_file.exists():
        return recovery.finish(End(State.STOPPED)).exit_status
    # What srun, or Python before our first line, printed last is the likeliest cause.
    logs = sorted((run_dir.path / "submitit").glob(f"{start.job}_*_log.err"), key=lambda path: path.stat().st_mtime)
    outcome = Outcome(
        {},
        lost=[f"the agent on {environment.get('SLURMD_NODENAME', 'node 0')}"],
        step=run_dir.newest_step(),
        traceback="\n".join(tail(logs[-1])) if logs else "",
    )
    script = BatchScript(lambda hosts: requeue(run_dir, start, hosts))
    end = recovery.after(script, attempt, outcome, may_restart=fields == "started")
    assert isinstance(end, End), "a batch script starts no attempt itself"
    return status if end.requeued else recovery.finish(end).exit_status


class BatchScript:
    """How a job whose agents are gone goes on: it can be requeued, and has no nodes to spare."""

    movable = True

    def __init__(self, requeue: Callable[[Sequence[str]], bool]) -> None:
        self._requeue = requeue

    def spare(self, outcome: Outcome) -> bool:
        """Return that nothing can go on here without the agents."""
        return False

    def fate(self) -> JobFate:
        """Return that SLURM takes the nodes."""
        return "preempting"

    def start_elsewhere(self, attempt: int, hosts: tuple[str, ...]) -> Elsewhere:
        """Ask SLURM to start the job again away from `hosts`."""
        return Elsewhere.LATER if self._requeue(hosts) else Elsewhere.NOWHERE


if __name__ == "__main__":
    _ignore_sigterm()  # or the requeue that it asks for ends it before it has written that down
    sys.exit(after(RunDir(Path(sys.argv[1])), int(sys.argv[2]), os.environ))
