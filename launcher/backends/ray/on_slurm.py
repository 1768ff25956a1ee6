"""Ray inside a job of SLURM's: a Ray is started for the run in an allocation of its own, and goes with it.

The job is one that the backend `slurm` would send. What its tasks do is in `ray_node`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.backends.base import Backend
from launcher.backends.ray.backend import RayBackend
from launcher.backends.slurm.backend import SlurmBackend
from launcher.config.check import Check
from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.lifecycle.trust import SLURM_ID, check_id
from launcher.request.spec import Plan, State


class RayOnSlurmBackend(Backend):
    """A SLURM job in which a Ray runs: scheduled by the one, described by both."""

    name = "ray_on_slurm"
    slurm, ray = SlurmBackend(), RayBackend()
    # The nodes are SLURM's to give, and what they do is Ray's: it has no use for a node that waits.
    capabilities = replace(slurm.capabilities, spare_nodes=False, elastic=ray.capabilities.elastic)

    def survey(self, cluster: Cluster) -> Cluster:
        """Ask SLURM; where another Ray is, is none of this run's business."""
        if cluster.ray.address is not None:
            raise BadRequest(
                f"ray.address = {cluster.ray.address!r} and ray.inside = {cluster.ray.inside!r}: a Ray that is started"
                " inside a job has no address before. Leave one of them out of the profile."
            )
        return self.slurm.survey(cluster)

    def render(self, plan: Plan) -> str:
        """The sbatch script, and the arguments of the TorchTrainer inside."""
        inside = f"# inside, on a Ray of {plan.placement.nodes} nodes\n{self.ray.render(plan)}"
        return f"{self.slurm.render(plan)}\n{inside}"

    def check(self, plan: Plan) -> str:
        return self.slurm.check(plan)

    def submit(self, plan: Plan) -> str:
        """Hand the job to sbatch."""
        from launcher.backends.ray.in_job import RayTask

        if plan.placement.on_tpu:
            raise BadRequest(f"{plan.cluster.name}: TPU slices are Ray's to find, not SLURM's. Use the backend slurm.")
        return self.slurm.submit(plan, RayTask(plan.run_dir))

    def check_id(self, job_id: str) -> None:
        check_id(SLURM_ID, job_id)

    def poll(self, job_id: str) -> State:
        return self.slurm.poll(job_id)

    def cancel(self, job_id: str) -> None:
        self.slurm.cancel(job_id)

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        return self.slurm.diagnose(cluster, cwd)
