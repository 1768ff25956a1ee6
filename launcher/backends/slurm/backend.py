"""SLURM, through submitit: one job, one task per node, each task a node agent."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.backends.base import Backend, Capabilities
from launcher.backends.slurm import limits, node_command, query, queue, shell
from launcher.backends.slurm.batch import script
from launcher.config.check import Check
from launcher.config.cluster import Cluster, NodeKind
from launcher.errors import BadRequest
from launcher.lifecycle import history
from launcher.lifecycle.run_dir import RunDir
from launcher.lifecycle.trust import SLURM_ID, check_id
from launcher.request.spec import Plan, State
from training.files import write_atomic


def _completed(cluster: Cluster, found: Sequence[NodeKind]) -> Cluster:
    """`cluster` with the values of the `found` nodes for those that its profile leaves open."""
    node = cluster.node
    if node.gpus is not None:
        found = [kind for kind in found if kind.gpus == node.gpus]
    if not found:
        return cluster
    kinds = tuple(
        replace(
            kind,
            count=min(kind.count, cluster.nodes or kind.count),
            cpus=node.cpus or kind.cpus,
            memory_gb=node.memory_gb or kind.memory_gb,
            accelerator=node.accelerator or kind.accelerator,
        )
        for kind in found
    )
    first = kinds[0]
    # `cluster.node` describes the largest kind; `place` uses `cluster.kinds`.
    node = replace(node, gpus=first.gpus, cpus=first.cpus, memory_gb=first.memory_gb)
    return replace(cluster, nodes=cluster.nodes or sum(kind.count for kind in kinds), node=node, kinds=kinds)


def parameters(plan: Plan) -> dict[str, Any]:
    """The submitit parameters of `plan`, by `submitit.SlurmExecutor`'s names."""
    placement, slurm = plan.placement, plan.cluster.slurm
    wanted: dict[str, Any] = {
        "job_name": plan.name,
        "time": plan.time_minutes,
        "nodes": placement.nodes + plan.spec.spare_nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": node_command.cpus_per_node(plan) or None,
        # Per node: SLURM 24.11 and later isolate per-task GPUs, and the ranks of a task could not use each other's.
        "gpus_per_node": _gpu_request(plan) if placement.device == "cuda" else None,
        "mem": slurm.mem or _memory(plan),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": _constraint(plan),
        "exclude": ",".join((*([slurm.exclude] if slurm.exclude else []), *_excluded_hosts(plan))) or None,
        "nodelist": slurm.nodelist,
        "exclusive": slurm.exclusive or placement.on_tpu or None,  # a TPU host cannot be shared by runs
        # SLURM sends the signal up to 60 s early; at most a quarter of a short time limit is grace.
        "signal_delay_s": int(min(plan.cluster.grace, plan.time_minutes * 60 / 4)),
        "setup": script.before(plan),
        "teardown": script.after(plan),
        "srun_args": node_command.srun_args(plan) or None,
        "comment": "launch",
        "additional_parameters": _without_none(
            # `requeue = false` in a profile removes the option.
            {"requeue": True, "no-kill": plan.spec.spare_nodes > 0 or None, "reservation": slurm.reservation}
            | {key: None if value is False else value for key, value in slurm.sbatch.items()}
        ),
    }
    # submitit's own default is a key that sites with TrackWCKey refuse.
    return {**_without_none(wanted), "wckey": None}


def _excluded_hosts(plan: Plan) -> tuple[str, ...]:
    """The hosts that earlier attempts of the run excluded."""
    return history.read(RunDir(plan.run_dir).events()).excluded


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _gpu_request(plan: Plan) -> str | int:
    placement = plan.placement
    each = placement.ranks_per_node
    return f"{placement.gpu_type}:{each}" if placement.gpu_type else each


def _memory(plan: Plan) -> str | None:
    megabytes = int(plan.placement.memory_gb * 1024 + 1e-6)  # rounding must not lose a megabyte
    return f"{megabytes}MB" if megabytes else None


def _constraint(plan: Plan) -> str | None:
    """The profile's constraint, and the feature that stands for the GPU type."""
    both = [text for text in (plan.cluster.slurm.constraint, plan.placement.feature) if text]
    return "&".join(f"({text})" if len(both) > 1 and re.search(r"[|&]", text) else text for text in both) or None


def _executor(plan: Plan) -> Any:
    import submitit

    class Executor(submitit.SlurmExecutor):  # type: ignore[misc]
        """Writes scripts without srun, and starts sbatch with the environment of every SLURM command."""

        @classmethod
        def affinity(cls) -> int:
            return 2

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            # submitit starts the command with this process's environment. Names alone: others can read the arguments.
            hidden = [word for name in shell.hidden() for word in ("-u", name)]
            return ["env", *hidden, *super()._make_submission_command(submission_file_path)]

    executor = Executor(folder=plan.run_dir / "submitit", python=node_command.command(plan))
    executor.update_parameters(**parameters(plan))
    return executor


def _script(plan: Plan) -> str:
    executor = _executor(plan)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def _check_paths(plan: Plan) -> None:
    if "%" in str(plan.run_dir):
        raise BadRequest(f"{plan.run_dir}: SLURM would replace the % in this path. Set `runs` to a folder without %.")


def poll(job_id: str) -> State:
    return queue.poll_all([job_id])[job_id]


def cancel(job_id: str) -> None:
    query.ask("scancel", check_id(SLURM_ID, job_id)[0])


class SlurmBackend(Backend):
    """SLURM: each run is one job.

    All commands of a user on a machine that look at runs share an answer of slurmctld for 5 s.
    """

    name = "slurm"
    capabilities = Capabilities(poll_seconds=5.0, spare_nodes=True, time_limit=True, requeue=True)

    def from_shell(self, cluster: Cluster, time: str | None = None) -> tuple[Cluster, tuple[str, ...]]:
        """Take sbatch's variables that say where and how long a job runs; the others are not used."""
        return shell.from_shell(cluster, time)

    def survey(self, cluster: Cluster) -> Cluster:
        """Query SLURM for the kinds of nodes, unless the profile describes them.

        Raises:
            BadRequest: SLURM cannot be reached, and the profile does not describe a node.
        """
        node = cluster.node
        if cluster.kinds or (cluster.nodes and node.cpus and node.gpus is not None):
            return cluster
        try:
            found = query.kinds(cluster)
        except query.Unreachable as error:
            if node.gpus is not None:
                return cluster
            raise BadRequest(
                f"{error} Or describe the nodes in a profile (nodes = 4, [node] gpus = 8, cpus = 96) and plan with --dry-run."
            ) from None
        return _completed(cluster, found)

    def render(self, plan: Plan) -> str:
        """The submitit parameters, and the sbatch script made from them."""
        shown = json.dumps(parameters(plan), indent=4)
        return f"# submitit.SlurmExecutor(...).update_parameters(**{shown})\n\n{_script(plan)}"

    def check(self, plan: Plan) -> str:
        """Check the limits of the partition; returns SLURM's estimate of the start, empty if unknown.

        Raises:
            BadRequest: a limit is exceeded, or SLURM refuses the job.
        """
        _check_paths(plan)
        node_command.check_setup(plan)
        try:
            if found := query.partitions():  # else they are hidden, and sbatch alone knows
                limits.check_limits(plan, found)
            return query.verdict(_script(plan))
        except query.Unreachable:
            return ""  # a dry run needs no SLURM; `submit` reports the error

    def submit(self, plan: Plan, task: Callable[[], None] | None = None) -> str:
        """Submit the job and write its script to ``script.sh``. Each node runs `task` (default: an agent)."""
        import submitit

        from launcher.backends.slurm.job import AgentTask, with_our_packages

        if shutil.which("srun") is None or shutil.which("sbatch") is None:
            raise BadRequest(query.UNREACHABLE.format("the command srun or sbatch is missing."))
        _check_paths(plan)
        (plan.run_dir / "submitit").mkdir(0o700, exist_ok=True)  # submitit would make it by the umask
        executor = _executor(plan)
        try:
            # submitit prints the error of sbatch, which the exception holds, too.
            with contextlib.redirect_stderr(io.StringIO()):
                job = executor.submit(with_our_packages(task or AgentTask(plan.run_dir)))
        except submitit.core.utils.FailedJobError as error:
            refusal = query.refusal_text(str(error))
            answered = "Batch job submission failed" in refusal and "Unable to contact" not in refusal
            raise BadRequest(
                f"sbatch refused the job: {refusal}" if answered else query.UNREACHABLE.format(refusal)
            ) from None
        write_atomic(RunDir(plan.run_dir).script_file, job.paths.submission_file.read_bytes())
        return str(job.job_id)

    def check_id(self, job_id: str) -> None:
        check_id(SLURM_ID, job_id)

    def poll(self, job_id: str) -> State:
        return poll(job_id)

    def poll_all(self, job_ids: Sequence[str]) -> dict[str, State]:
        """Return the states of the jobs, and of all jobs of this user."""
        return queue.poll_all(job_ids)

    def identity(self) -> str:
        """Return the configuration, and the command, by which SLURM is asked."""
        return queue.identity()

    def waits_for(self, job_id: str) -> str:
        """Query the reason of squeue."""
        check_id(SLURM_ID, job_id)
        return query.waits_for(job_id)

    def ended_as(self, job_id: str) -> str:
        """Query squeue, then sacct."""
        check_id(SLURM_ID, job_id)
        return query.ended_as(job_id)

    def cancel(self, job_id: str) -> None:
        cancel(job_id)

    def way_in(self, job_id: str, host: str) -> str:
        """A step beside that of the run."""
        check_id(SLURM_ID, job_id)
        return f"srun --jobid={job_id} --overlap --nodelist={shlex.quote(host)} --pty bash"

    def ssh_note(self) -> str:
        return (
            "ssh to a node of a job has to be allowed, as by pam_slurm_adopt, which puts it into the job; ask the cluster's"
            " administrators if it is refused"
        )

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        """Check commands, controller, partitions, nodes and accounting."""
        from launcher.backends.slurm import doctor

        yield from doctor.diagnose(cluster)

    def at_hand(self) -> bool:
        return shutil.which("sinfo") is not None

    def new_profile(self) -> str:
        """Write a profile from SLURM's partitions and nodes."""
        from launcher.backends.slurm import doctor

        return doctor.profile_text(query.partitions(), query.kinds(Cluster("new", self.name)))
