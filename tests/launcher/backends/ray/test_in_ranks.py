"""Ray inside a rank: its cluster, and functions for Ray Train."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.launcher.engines import Project

if TYPE_CHECKING:
    from tests.testbed.ray import RayCluster

PROGRAM = """
import json, os
import ray
import ray.train

try:
    ray.train.get_context()
    raised = ""
except RuntimeError as error:
    raised = str(error)
given = os.environ["RAY_ADDRESS"]
ray.init(log_to_driver=False)
where = ray.get_runtime_context()

@ray.remote(num_cpus=1)
def double(x):
    return 2 * x

found = [given, where.gcs_address, sum(node["Alive"] for node in ray.nodes()), ray.get(double.remote(21)), raised]
open("found.json", "w").write(json.dumps(found))
"""

TRAIN = """
import ray.train
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

def train_loop_per_worker(config):
    context = ray.train.get_context()
    where = [context.get_world_rank(), context.get_world_size(), context.get_local_rank()]
    ray.train.report({"where": where, "lr": config["lr"]})

def main():
    trainer = TorchTrainer(
        train_loop_per_worker, train_loop_config={"lr": 0.5}, scaling_config=ScalingConfig(num_workers=0)
    )
    return trainer.fit().metrics
"""


def test_ray_init_connects_to_the_cluster_of_the_run(ray_project: Project, ray_cluster: RayCluster) -> None:
    (ray_project.folder / "uses_ray.py").write_text(PROGRAM)
    ray_project.launch("--cpus", "1", "--name", "run", "uses_ray.py")
    given, connected, nodes, doubled, raised = json.loads((ray_project.folder / "found.json").read_text())
    assert given == connected == ray_cluster.address
    assert (nodes, doubled) == (len(ray_cluster.node_ids()), 42)
    assert "only available within a function launched by `trainer.fit()`" in raised


@pytest.mark.slow
def test_a_train_function_runs_in_the_ranks(local_project: Project) -> None:
    (local_project.folder / "fit.py").write_text(TRAIN)
    local_project.launch("--cpus", "2", "--name", "run", "fit:main")
    value = json.loads((local_project.folder / "runs" / "run" / "value.json").read_text())
    assert value == {"where": [0, 2, 0], "lr": 0.5}
