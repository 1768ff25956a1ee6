"""Run a task inside a SLURM job, and requeue the job.

The batch script runs ``python -m launcher.backends.slurm.job RUN_DIR STATUS SUBMISSION`` after srun. The batch shell outlives
the agents, so it can requeue the job after the agent of node 0 was killed.
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
from launcher.agent.switches import switches_of
from launcher.backends.slurm import shell
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.recovery import Elsewhere, End, Recovery
from launcher.lifecycle.run_dir import RunDir, tail
from launcher.lifecycle.trust import SLURM_ID, check_id
from launcher.rank.output import drop_output_on_full_disk
from launcher.request.own_packages import IMPORT_OURS
from launcher.request.spec import State


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


def agent_info(run_dir: RunDir, environment: Mapping[str, str]) -> AgentInfo:
    """Read this task's place in the job from SLURM's variables.

    ``address`` is the IP address that srun was launched from, which is the first node's; a host name might not resolve on
    all nodes.
    """
    start = JobStart.read(environment)
    return AgentInfo(
        node=int(environment["SLURM_NODEID"]),
        nodes=int(environment["SLURM_NNODES"]),
        host=environment["SLURMD_NODENAME"],
        address=environment["SLURM_LAUNCH_NODE_IPADDR"],
        switches=switches_of(environment),
        session=str(start),
        requeue=lambda exclude: requeue(run_dir, start, exclude),
        fate=lambda: final_job_fate(run_dir, start),
    )


def requeue(run_dir: RunDir, start: JobStart, exclude: Sequence[str] = ()) -> bool:
    """Requeue the job with the hosts `exclude` excluded; returns whether it will start again.

    If the site or the profile does not allow a requeue, submit the same script as a job that depends on this one.
    """
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
            done = shell.run("scontrol", *words, timeout=TIMEOUTS.slurm_controller, preexec_fn=_ignore_sigterm)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        if "Unable to contact" not in done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(2)


def _ignore_sigterm() -> None:
    """Ignore the SIGTERM that a requeue sends to all processes of the job."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class AgentTask:
    """The callable that submitit runs on each node."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        from launcher.agent.main import run_agent

        run_dir = RunDir(self.run_dir)
        as_task(run_dir, lambda where: asyncio.run(run_agent(run_dir, where)))


def with_our_packages(task: Callable[[], None]) -> Callable[[], None]:
    """Wrap `task` so that it imports this toolkit's packages on a node.

    PYTHONPATH may lead to packages of the same name. The wrapper imports nothing of this toolkit, so that it can be unpickled before sys.path is set.
    """
    import cloudpickle

    data, import_ours = cloudpickle.dumps(task), IMPORT_OURS

    def run() -> None:
        import pickle

        exec(import_ours)
        pickle.loads(data)()

    return run


def as_task(run_dir: RunDir, work: Callable[[AgentInfo], int]) -> None:
    """Run `work` as a task of the job and exit with the status that it returns."""
    drop_output_on_full_disk()
    step_daemon, submission = os.getppid(), history.submissions(run_dir.events())
    status = work(agent_info(run_dir, os.environ))
    if os.getppid() != step_daemon:
        orphaned(run_dir, status, submission, os.environ)
    if status:
        # No exception: the job gets the exit status of the run, and its log does not end with our traceback.
        sys.exit(status)


def orphaned(run_dir: RunDir, status: int, submission: int, environment: Mapping[str, str]) -> None:
    """Release the nodes of a job whose slurmstepd was killed.

    SLURM does not notice the exit of such a task, so srun would wait for it without limit and hold the nodes. If the run
    has no result and no supervisor, this task handles its end.
    """
    start = JobStart.read(environment)
    while run_dir.result() is None and _runs(start):
        beat = _modified(run_dir.heartbeat_file)
        time.sleep(5 * TIMEOUTS.run_heartbeat)
        if _modified(run_dir.heartbeat_file) == beat:  # compares two times of one clock
            after(run_dir, status, submission, environment)
            break
    if _runs(start):  # not a job that was requeued
        shell.run("scancel", "--state=RUNNING", check_id(SLURM_ID, start.job)[0])


def _runs(start: JobStart) -> bool:
    """Whether this start of the job is running; also true without an answer of SLURM."""
    facts = _facts(start.job)
    return (
        facts.get("JobState", "RUNNING") == "RUNNING" and int(facts.get("Restarts", start.restarts)) == start.restarts
    )


def _modified(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def after(run_dir: RunDir, status: int, submission: int, environment: Mapping[str, str]) -> int:
    """Handle the end of srun with `status`; returns the job's exit status.

    A run without a result lost its supervisor; this counts as a lost node. If no attempt had started, the run is not
    restarted. Nothing is done for a run that was sent again since `submission`, which numbers the submission of this job.
    """
    start, events = JobStart.read(environment), run_dir.events()
    # A resume may come while srun still ends, and `job.json` then names this job until the next one has its number.
    resumed = history.submissions(events) > submission
    replaced = resumed or (run_dir.job() or {}).get("job_id", start.job) != start.job
    newest_event = next(
        (e["event"] for e in reversed(events) if e["event"] in ("submitted", "started", "finished")), ""
    )
    if run_dir.result() is not None or newest_event == "finished" or replaced:
        return status
    if final_job_fate(run_dir, start) == "requeued":
        return status
    recovery, attempt = Recovery(run_dir, run_dir.plan()), run_dir.last_attempt()
    if run_dir.stop_file.exists():
        return recovery.finish(End(State.STOPPED)).exit_status
    # The last output of srun, or of Python before it ran our code, is the likely cause.
    logs = sorted((run_dir.path / "submitit").glob(f"{start.job}_*_log.err"), key=lambda path: path.stat().st_mtime)
    outcome = Outcome(
        {},
        lost=[f"the agent on {environment.get('SLURMD_NODENAME', 'node 0')}"],
        step=run_dir.newest_step(),
        traceback="\n".join(tail(logs[-1])) if logs else "",
    )
    script = BatchScript(lambda hosts: requeue(run_dir, start, hosts))
    end = recovery.after(script, attempt, outcome, may_restart=newest_event == "started")
    assert isinstance(end, End), "the batch script starts no attempt"
    return status if end.requeued else recovery.finish(end).exit_status


class BatchScript:
    """Recovery options of a job without agents: it can be requeued, and has no spare nodes."""

    movable = True

    def __init__(self, requeue: Callable[[Sequence[str]], bool]) -> None:
        self._requeue = requeue

    def spare(self, outcome: Outcome) -> bool:
        """Return False: no attempt can start without agents."""
        return False

    def fate(self) -> JobFate:
        """Return ``preempting``."""
        return "preempting"

    def start_elsewhere(self, attempt: int, hosts: tuple[str, ...]) -> Elsewhere:
        """Requeue the job with `hosts` excluded."""
        return Elsewhere.LATER if self._requeue(hosts) else Elsewhere.NOWHERE


if __name__ == "__main__":
    _ignore_sigterm()  # the requeue sends SIGTERM to this process before it has written the event
    sys.exit(after(RunDir(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), os.environ))
