"""Inside a SLURM job: where a task sits, and what submitit runs there."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.ranks import Seat
from launcher.rundir import RunDir


def seat(environment: Mapping[str, str]) -> Seat:
    """Read where this task sits from SLURM's variables; the only place that reads them.

    The address is the one srun was launched from, which is the first node's as the others reach it: a number, not a name
    that some node might not resolve.
    """
    job = environment["SLURM_JOB_ID"]
    return Seat(
        node=int(environment["SLURM_NODEID"]),
        nodes=int(environment["SLURM_NNODES"]),
        host=environment["SLURMD_NODENAME"],
        address=environment["SLURM_LAUNCH_NODE_IPADDR"],
        session=f"{job}.{environment.get('SLURM_RESTART_COUNT', '0')}",
        requeue=lambda: subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0,
    )


class AgentTask:
    """What submitit runs on each node."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        from launcher.agent import run_agent

        status = asyncio.run(run_agent(RunDir(self.run_dir), seat(os.environ)))
        if status:
            # Not an exception: the job's exit status should be the run's, and its log not end in our traceback.
            sys.exit(status)
