"""SLURM, through submitit: one job, one task per node, each task a node agent."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.backends.slurm_job import AgentTask
from launcher.cluster import Cluster
from launcher.errors import BadRequest
from launcher.rundir import RunDir
from launcher.spec import Plan, State

STATES: dict[str, State] = {
    **dict.fromkeys(
        ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
        State.QUEUED,
    ),
    **dict.fromkeys(
        ("RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"), State.RUNNING
    ),
    **dict.fromkeys(
        [
            "BOOT_FAIL",
            "CANCELLED",
            "COMPLETED",
            "DEADLINE",
            "FAILED",
            "NODE_FAIL",
            "OUT_OF_MEMORY",
            "PREEMPTED",
            "REVOKED",
            "TIMEOUT",
        ],
        State.LOST,
    ),
}
"""SLURM's job states. Source: "JOB STATE CODES" of squeue(1). One that is missing here is UNKNOWN, never an end."""


def survey(cluster: Cluster) -> Cluster:
    """Ask `sinfo` for what the profile leaves open: the number of nodes, and a node's GPUs and cores."""
    if cluster.nodes and cluster.node.cpus and cluster.node.gpus is not None:
        return cluster
    unknown = replace(cluster, node=replace(cluster.node, gpus=cluster.node.gpus or 0))
    partition = ["--partition", cluster.slurm.partition] if cluster.slurm.partition else []
    try:
        listed = _command("sinfo", "--noheader", "--Node", "--format", "%N|%c|%G", *partition)
    except BadRequest:
        return unknown  # a dry run may be made where there is no SLURM; submitting says so
    nodes = {name: (int(cpus), _gpus(gres)) for name, cpus, gres in (line.split("|") for line in set(listed.split()))}
    if not nodes:
        return unknown
    cpus, gpus = (min(column) for column in zip(*nodes.values(), strict=True))
    node = replace(
        cluster.node, cpus=cluster.node.cpus or cpus, gpus=gpus if cluster.node.gpus is None else cluster.node.gpus
    )
    return replace(cluster, nodes=cluster.nodes or len(nodes), node=node)


def partitions() -> dict[str, str]:
    """What `sinfo` says of each partition: nodes, cores, GPUs and time limit.

    Raises:
        BadRequest: SLURM cannot be reached.
    """
    listed = _command("sinfo", "--noheader", "--format", "%R|%D nodes of %c cores, %G, limit %l")
    return dict(line.split("|", 1) for line in listed.splitlines())


def _gpus(gres: str) -> int:
    """Count the GPUs in sinfo's generic resources, such as ``gpu:a100:8(S:0-1)`` or ``(null)``."""
    return sum(int(count) for count in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))


def parameters(plan: Plan) -> dict[str, Any]:
    """The submitit parameters of `plan`, by `submitit.SlurmExecutor`'s names."""
    placement, slurm, node = plan.placement, plan.cluster.slurm, plan.cluster.node
    cpus = placement.cpus_per_rank * placement.ranks_per_node
    wanted: dict[str, Any] = {
        "job_name": plan.name,
        "time": plan.time_minutes,
        "nodes": placement.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus or None,
        # Not per task: SLURM 24.11 and later bind per-task GPUs so that the ranks of a task do not see each other's.
        "gpus_per_node": _gpu_request(plan) if placement.device == "cuda" else None,
        "mem": _memory(plan, node.memory_gb),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "nodelist": slurm.nodelist,
        "exclusive": slurm.exclusive or None,
        "signal_delay_s": int(plan.cluster.grace),
        "setup": list(slurm.setup) or None,
        "teardown": _teardown(plan),
        "srun_args": list(slurm.srun_args) or None,
        "comment": "launch",
        "additional_parameters": _without_none(
            # `requeue = false` in a profile takes the option out.
            {"requeue": True, "reservation": slurm.reservation}
            | {key: None if value is False else value for key, value in slurm.sbatch.items()}
        ),
    }
    return _without_none(wanted)


def _teardown(plan: Plan) -> list[str]:
    """The lines after srun: see to a run whose supervisor was killed, and end as the run did."""
    python = _python(plan.cluster.python) or shlex.quote(sys.executable)
    look = f"{python} -P -m launcher.backends.slurm_job {shlex.quote(str(plan.run_dir))} $status"
    return ["status=$?", f"[ $status = 0 ] || {look} || status=$?", "exit $status"]


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _python(command: str | None) -> str | None:
    """The profile's Python command with its words quoted: submitit puts it into the script as it is."""
    try:
        words = shlex.split(command or "")
    except ValueError as error:
        raise BadRequest(f"python = {command!r} in the cluster's profile: {error}.") from None
    return shlex.join(os.path.expanduser(os.path.expandvars(word)) for word in words) or None


def _gpu_request(plan: Plan) -> str | int:
    placement = plan.placement
    # The type is named only where the user asked for one: many sites define none in their gres.conf.
    if plan.spec.accelerator:
        return f"{plan.spec.accelerator}:{placement.ranks_per_node}"
    return placement.ranks_per_node


def _memory(plan: Plan, memory_gb: float) -> str | None:
    node, ranks = plan.cluster.node, plan.placement.ranks_per_node
    devices = node.gpus if plan.placement.device == "cuda" else node.cpus
    if not memory_gb or not devices:
        return None
    return f"{int(memory_gb * 1024 * ranks / devices)}MB"


def _executor(plan: Plan, offline: bool) -> Any:
    import submitit

    class Offline(submitit.SlurmExecutor):  # type: ignore[misc]
        """Writes scripts where there is no srun."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    kind = Offline if offline else submitit.SlurmExecutor
    executor = kind(folder=plan.run_dir / "submitit", python=_python(plan.cluster.python))
    executor.update_parameters(**parameters(plan))
    return executor


def render(plan: Plan) -> str:
    """The submitit parameters, and the sbatch script that comes of them, word for word."""
    executor = _executor(plan, offline=True)
    script = executor._make_submission_file_text(executor._submitit_command_str, "")
    return f"# submitit.SlurmExecutor(...).update_parameters(**{json.dumps(parameters(plan), indent=4)})\n\n{script}"


def submit(plan: Plan) -> str:
    """Hand the job to sbatch and keep what it got in ``script.sh``."""
    import submitit

    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise BadRequest(_UNREACHABLE.format("the command srun or sbatch is missing."))
    _check_paths(plan)
    executor = _executor(plan, offline=False)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats what sbatch said
            job = executor.submit(AgentTask(plan.run_dir))
    except submitit.core.utils.FailedJobError as error:
        refusal = _refusal(str(error))
        heard = "Batch job submission failed" in refusal and "Unable to contact" not in refusal
        raise BadRequest(f"sbatch refused the job: {refusal}" if heard else _UNREACHABLE.format(refusal)) from None
    RunDir(plan.run_dir).script_file.write_text(job.paths.submission_file.read_text())
    return str(job.job_id)


_UNREACHABLE = "SLURM cannot be reached from here: {} Log in to a submission host of the cluster, or use --dry-run."


def _check_paths(plan: Plan) -> None:
    if "%" in str(plan.run_dir):
        raise BadRequest(f"{plan.run_dir}: SLURM would replace the % in this path; use another runs folder.")


def _refusal(text: str) -> str:
    lines = [re.sub(r"^sbatch: (error|fatal): ", "", line) for line in text.splitlines()]
    return " ".join(line.rstrip(".") + "." for line in lines if line)


def poll(job_id: str) -> State:
    """Ask squeue, and sacct for a job that squeue has forgotten; where accounting is off, forgotten means ended."""
    try:
        listed = _command("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T")
    except BadRequest as error:
        if "Invalid job id" not in str(error):
            return State.UNKNOWN  # the controller does not answer just now
        listed = ""
    if not listed.strip():
        try:
            listed = _command(
                "sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", "--format=State"
            )
        except BadRequest:
            return State.LOST
    words = listed.split()  # "CANCELLED by 1000" is one state
    return STATES.get(words[0].rstrip("+"), State.UNKNOWN) if words else State.LOST


def cancel(job_id: str) -> None:
    _command("scancel", job_id)


def _command(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise BadRequest(f"SLURM cannot be reached from here: the command {command[0]} is missing.") from None
    except subprocess.TimeoutExpired:
        raise BadRequest(f"SLURM does not answer: {command[0]} took more than a minute.") from None
    if done.returncode:
        raise BadRequest(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout
