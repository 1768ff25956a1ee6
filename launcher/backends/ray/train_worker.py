"""A worker of Ray Train: it holds the devices of a rank, and reports the environment that Ray gave it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from launcher.agent.worker_messages import EndWorker
from launcher.config.timeouts import TIMEOUTS


class RunEnded(RuntimeError):
    """The run failed; raised so that Ray Train's own record of it says so."""


class NoProcessGroupBackend(Backend):  # type: ignore[misc]
    """Leaves the process group to the target.

    Ray's own backend makes the group before the target runs, and a script written for torchrun then fails on
    `init_process_group`, "trying to initialize the default process group twice".
    """

    share_cuda_visible_devices = True


@dataclass
class RankConfig(BackendConfig):  # type: ignore[misc]
    """A BackendConfig whose backend is `NoProcessGroupBackend`. Not a TorchConfig, which would import torch into the controller."""

    @property
    def backend_cls(self) -> type[Backend]:
        return NoProcessGroupBackend


SPARED = ("DatasetsCallback", "PlacementGroupCleanerCallback")
"""What Ray Train starts an actor each for, with an import of a second or more, in each worker group: datasets, of which it has
none here, and the end of a controller that dies alone, after which our driver leaves and Ray ends all that the job has."""


class LeanTrainer(DataParallelTrainer):  # type: ignore[misc]
    """What TorchTrainer is, with another backend (see `NoProcessGroupBackend`) and without `SPARED`."""

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if type(each).__name__ not in SPARED]


def node_actor_name(run_dir: str, node: str) -> str:
    """The name of the actor that is the agent of `node`."""
    return f"launch {run_dir} {node}"


def hold_rank(config: dict[str, Any]) -> None:
    """The train function: register with the node actor of this node, then wait for `EndWorker`.

    Raises:
        RunEnded: the run failed.
    """
    context = ray.get_runtime_context()
    worker = ray.train.get_context().get_world_rank()
    node_actor = _find(node_actor_name(config["run_dir"], context.get_node_id()))
    ray.get(node_actor.register.remote(config["group"], worker, os.getpid(), dict(os.environ)))
    command: EndWorker = ray.get(node_actor.commands.remote(worker))
    if command.error:
        raise RunEnded(command.error)


def _find(name: str) -> Any:
    deadline = time.monotonic() + TIMEOUTS.ray_node_actor
    while True:
        try:
            return ray.get_actor(name)
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
