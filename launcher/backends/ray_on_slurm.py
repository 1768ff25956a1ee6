"""Ray inside a job of SLURM's: a Ray is started for the run in an allocation of its own, and goes with it.

The job is one that the backend `slurm` would send. What its tasks do is in `ray_node`.
"""

from __future__ import annotations

from launcher.backends import ray, slurm
from launcher.backends.ray_node import RayTask
from launcher.cluster import Cluster
from launcher.errors import BadRequest
from launcher.spec import Plan

check = slurm.check
poll = slurm.poll
cancel = slurm.cancel


def survey(cluster: Cluster) -> Cluster:
    """Ask SLURM; where another Ray is, is none of this run's business."""
    if cluster.ray.address is not None:
        raise BadRequest(
            f"ray.address = {cluster.ray.address!r} and ray.inside = {cluster.ray.inside!r}: a Ray that is started inside"
            " a job has no address before. Leave one of them out of the profile."
        )
    return slurm.survey(cluster)


def render(plan: Plan) -> str:
    """The sbatch script, and the arguments of the TorchTrainer inside."""
    return f"{slurm.render(plan)}\n# inside, on a Ray of {plan.placement.nodes} nodes\n{ray.render(plan)}"


def submit(plan: Plan) -> str:
    """Hand the job to sbatch."""
    if plan.placement.on_tpu:
        raise BadRequest(f"{plan.cluster.name}: TPU slices are Ray's to find, not SLURM's. Use the backend slurm.")
    return slurm.submit(plan, RayTask(plan.run_dir))
