"""Run a task inside a SLURM job, and handle the end of a job that lost its supervisor.

The batch script runs ``python -m launcher.backends.slurm.job RUN_DIR STATUS SUBMISSION`` after srun. The batch shell outlives
the agents, so it can requeue the job after the agent of node 0 was killed.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launcher.agent.health import memory_kills
from launcher.agent.protocol import AgentInfo
from launcher.agent.switches import switches_of
from launcher.backends.slurm import shell
from launcher.backends.slurm.batch.requeue import JobStart, final_job_fate, ignore_sigterm, request_file, requeue, runs
from launcher.backends.slurm.node_command import UNFIT
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
from training.files import read_plain


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
        unfit=lambda: unfit_nodes(run_dir, start),
    )


def unfit_nodes(run_dir: RunDir, start: JobStart) -> dict[str, str]:
    """Return what failed before the ranks on the nodes of this start of the job, as their shells left it."""
    found = {}
    for path in sorted((run_dir.path / "submitit").glob(f"{start}.*{UNFIT}")):
        with suppress(OSError):
            host = path.name.removeprefix(f"{start}.").removesuffix(UNFIT)
            found[host] = read_plain(path, 64 * 1024).decode(errors="replace").strip()
    return found


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
    where = agent_info(run_dir, os.environ)
    status = work(where)
    if os.getppid() != step_daemon:
        orphaned(run_dir, status, submission, os.environ)
    elif 0 < where.node <= WATCHERS:
        survive(run_dir, status, submission, os.environ)
    if status:
        # No exception: the job gets the exit status of the run, and its log does not end with our traceback.
        sys.exit(status)


def orphaned(run_dir: RunDir, status: int, submission: int, environment: Mapping[str, str]) -> None:
    """Release the nodes of a job whose slurmstepd was killed.

    SLURM does not notice the exit of such a task, so srun would wait for it without limit and hold the nodes. If the run
    has no result and no supervisor, this task handles its end.
    """
    start = JobStart.read(environment)
    while run_dir.result() is None and runs(start):
        beat = _modified(run_dir.heartbeat_file)
        time.sleep(5 * TIMEOUTS.run_heartbeat)
        if _modified(run_dir.heartbeat_file) == beat:  # compares two times of one clock
            after(run_dir, status, submission, environment, script_runs=False)
            break
    if runs(start):  # not a job that was requeued
        shell.run("scancel", "--state=RUNNING", check_id(SLURM_ID, start.job)[0])


WATCHERS = 8
"""How many of the other nodes watch for the loss of the first one; the answers of slurmctld are for all of them."""


def survive(run_dir: RunDir, status: int, submission: int, environment: Mapping[str, str]) -> None:
    """Handle the end of a job of which the first node has lost all processes: agent, srun and batch script.

    While the batch script runs, it handles the end. Else the job ends, or, if the step daemons were killed too, only the
    heartbeats stop: the script's and the coordinator's.
    """
    start = JobStart.read(environment)
    signs = (run_dir.path / "submitit" / f"{start}.batch", run_dir.heartbeat_file)
    ignore_sigterm()  # SLURM sends it when the job ends
    seen: list[int] = []
    still_since = 0.0
    while run_dir.result() is None and _newest(run_dir, "started", "requeued", "finished") == "started":
        # The first time also because the processes of a node do not all end at the same moment.
        time.sleep(TIMEOUTS.batch_heartbeat)
        found = [_modified(path) for path in signs]
        if seen and found[0] != seen[0]:
            return
        if found != seen:
            seen, still_since = found, time.monotonic()
        if not runs(start) or time.monotonic() - still_since > 5 * TIMEOUTS.run_heartbeat:
            hosts = next((e["hosts"] for e in reversed(run_dir.events()) if e["event"] == "started"), ["node 0"])
            after(run_dir, status, submission, {**environment, "SLURMD_NODENAME": hosts[0]}, script_runs=False)
            return


def _modified(path: Path) -> int:
    with suppress(OSError):
        # Opened, since an NFS client may use the attributes that it has for a minute.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.fstat(handle).st_mtime_ns
        finally:
            os.close(handle)
    return 0


def _newest(run_dir: RunDir, *kinds: str) -> str:
    """The newest event of `kinds`; empty if there is none."""
    return next((e["event"] for e in reversed(run_dir.events()) if e["event"] in kinds), "")


def _claim_end(run_dir: RunDir, start: JobStart, submission: int) -> bool:
    """Return whether this process is the first to handle the end of this start of the job."""
    folder = run_dir.path / "submitit"
    folder.mkdir(0o700, exist_ok=True)
    try:
        os.close(
            os.open(folder / f"{start}-{submission}.end", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        )
    except FileExistsError:
        return False
    return True


def after(
    run_dir: RunDir, status: int, submission: int, environment: Mapping[str, str], script_runs: bool = True
) -> int:
    """Handle the end of srun with `status`; returns the job's exit status.

    A run without a result lost its supervisor; this counts as a lost node. If no attempt had started, the run is not
    restarted. Nothing is done for a run that was sent again since `submission`, which numbers the submission of this job.
    `script_runs`: the batch script runs, and can ask for the requeue.
    """
    start, events = JobStart.read(environment), run_dir.events()
    # A resume may come while srun still ends, and `job.json` then names this job until the next one has its number.
    resumed = history.submissions(events) > submission
    replaced = resumed or (run_dir.job() or {}).get("job_id", start.job) != start.job
    newest_event = _newest(run_dir, "submitted", "started", "finished")
    if run_dir.result() is not None or newest_event == "finished" or replaced:
        return status
    if request_file(run_dir, start).exists() or final_job_fate(run_dir, start) == "requeued":
        return status
    if not _claim_end(run_dir, start, submission):
        return status
    recovery, attempt = Recovery(run_dir, run_dir.plan()), run_dir.last_attempt()
    if run_dir.stop_file.exists():
        return recovery.finish(End(State.STOPPED)).exit_status
    outcome = _outcome(run_dir, start, environment.get("SLURMD_NODENAME", "node 0"))
    script = BatchScript(lambda hosts: requeue(run_dir, start, hosts, script_runs))
    end = recovery.after(script, attempt, outcome, may_restart=newest_event == "started")
    assert isinstance(end, End), "the batch script starts no attempt"
    return status if end.requeued else recovery.finish(end).exit_status


OOM = re.compile(r"\boom[-_]?kill", re.IGNORECASE)
"""What slurmstepd reports of a step of which the kernel killed processes for memory."""


def _outcome(run_dir: RunDir, start: JobStart, host: str) -> Outcome:
    """How an attempt ended that left no result; `host` has lost its supervisor."""
    step = run_dir.newest_step()
    if unfit := unfit_nodes(run_dir, start):
        every = len(unfit) >= run_dir.plan().placement.nodes
        return Outcome({}, unfit=unfit, hosts=dict(enumerate(unfit)) if every else {}, step=step)
    # The last output of srun, or of Python before it ran our code, is the likely cause.
    logs = sorted((run_dir.path / "submitit").glob(f"{start.job}_*_log.err"), key=lambda path: path.stat().st_mtime)
    ends = ["\n".join(tail(log)) for log in logs]
    if any(map(OOM.search, ends)):
        record = {"kind": "out of memory", "type": "Killed", "message": memory_kills.TEXT, "rank": None, "host": host}
        return Outcome({0: -signal.SIGKILL}, [record], step=step)
    return Outcome({}, lost=[f"the agent on {host}"], step=step, traceback=ends[-1] if ends else "")


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
    print("started", flush=True)  # the batch script reports a Python that could not be started
    ignore_sigterm()  # the requeue sends SIGTERM to this process before it has written the event
    sys.exit(after(RunDir(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), os.environ))
