"""This machine: one node agent, detached, so that it outlives the shell that started it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.backends import process
from launcher.backends.base import Backend, Capabilities
from launcher.cluster import Cluster
from launcher.config_check import Check
from launcher.errors import BadRequest
from launcher.rundir import RunDir
from launcher.spec import Plan, State


def survey(cluster: Cluster) -> Cluster:
    """Count the GPUs and cores of this machine, without importing torch."""
    node = cluster.node
    found = replace(
        node, gpus=_gpus() if node.gpus is None else node.gpus, cpus=node.cpus or len(os.sched_getaffinity(0))
    )
    return replace(cluster, node=found, nodes=1, oversubscribe=True)


def _gpus() -> int:
    visible = _visible_devices()
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    proc = Path("/proc/driver/nvidia/gpus")
    if proc.is_dir():
        return len(list(proc.iterdir()))
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return 0


def _visible_devices() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


class LocalBackend(Backend):
    """This machine: its ranks start at once, and report by themselves what is wrong with their target."""

    name = "local"
    capabilities = Capabilities(interrupt_stops=True, queue=False, precheck=False, multi_node=False)

    def survey(self, cluster: Cluster) -> Cluster:
        """See `survey`."""
        return survey(cluster)

    def render(self, plan: Plan) -> str:
        """The processes that would start, and the environment of each."""
        from launcher.ranks import NodeRanks, Seat

        run_dir = RunDir(plan.run_dir)
        ranks = NodeRanks(run_dir, plan, Seat(), lambda message: None)
        lines = [f"agent: python -m launcher.agent {plan.run_dir}"]
        here = Seat().address
        for world in ranks.worlds(attempt=1, address=here, port=1):
            environment = {**plan.environment, **world.environment(), "MASTER_PORT": "<a free port>"}
            environment |= ranks.environment(world, [here])
            lines.append(f"rank {world.rank}: {plan.target.kind} {plan.target.name} {json.dumps(plan.target.args)}")
            lines += [f"    {key}={value}" for key, value in sorted(environment.items())]
        return "\n".join(lines) + "\n"

    def submit(self, plan: Plan) -> str:
        """Start the agent."""
        if plan.placement.nodes != 1:
            raise BadRequest("the local backend has one node: this machine. Use --backend slurm or ray for more.")
        return process.start("launcher.agent", plan.run_dir, RunDir(plan.run_dir).agent_log(0))

    def poll(self, job_id: str) -> State:
        return process.poll(job_id)

    def cancel(self, job_id: str) -> None:
        process.kill(job_id)

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        """Count the devices."""
        node = survey(cluster).node
        yield Check("devices", True, f"{node.gpus or 'no'} GPUs, {node.cpus} cores")
