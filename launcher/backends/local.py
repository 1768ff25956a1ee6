"""This machine: one node agent, detached, so that it outlives the shell that started it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from launcher.backends import process
from launcher.cluster import Cluster
from launcher.errors import BadRequest
from launcher.rank_environment import rank_environment
from launcher.ranks import NodeRanks, Seat
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


def render(plan: Plan) -> str:
    """The processes that would start, and the environment of each."""
    run_dir = RunDir(plan.run_dir)
    ranks = NodeRanks(run_dir, plan, Seat(), lambda message: None)
    lines = [f"agent: python -m launcher.agent {plan.run_dir}"]
    here = Seat().address
    for world in ranks.worlds(attempt=1, address=here, port=1):
        environment = rank_environment({}, plan, world, ranks.variables(world, [here]))
        environment["MASTER_PORT"] = "<a free port>"
        lines.append(f"rank {world.rank}: {plan.target.kind} {plan.target.name} {json.dumps(plan.target.args)}")
        lines += [f"    {key}={value}" for key, value in sorted(environment.items())]
    return "\n".join(lines) + "\n"


def submit(plan: Plan) -> str:
    """Start the agent."""
    if plan.placement.nodes != 1:
        raise BadRequest("the local backend has one node: this machine. Use --backend slurm or ray for more.")
    return process.start("launcher.agent", plan.run_dir, RunDir(plan.run_dir).agent_log(0))


def poll(job_id: str) -> State:
    return process.poll(job_id)


def cancel(job_id: str) -> None:
    process.kill(job_id)
