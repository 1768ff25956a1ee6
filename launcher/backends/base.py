"""The interface of a backend: `Backend`, and what it is capable of."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.agent.health import gpus
from launcher.config.check import Check
from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.lifecycle.trust import ANY_ID, check_id
from launcher.request.spec import Plan, State


@dataclass(frozen=True)
class Capabilities:
    """How a backend differs from others, for the code that serves all of them.

    Attributes:
        poll_seconds: seconds for which one answer of `Backend.poll` serves everybody who watches the run; 0: ask each time.
        interrupt_stops: Ctrl-C stops the run; otherwise it ends only the watching.
        queue: a run waits for resources in a queue before it starts.
        precheck: the target is imported before it is sent, since its ranks start later or elsewhere.
        multi_node: a run can have more than one node.
        spare_nodes: an allocation can hold more nodes than the run uses (``--spare-nodes``).
        time_limit: a run is a job that ends when its time limit is reached.
        requeue: the scheduler starts a preempted run again.
        elastic: a run can continue with fewer ranks after it lost a node (``ray.elastic``).
    """

    poll_seconds: float = 0.0
    interrupt_stops: bool = False
    queue: bool = True
    precheck: bool = True
    multi_node: bool = True
    spare_nodes: bool = False
    time_limit: bool = False
    requeue: bool = False
    elastic: bool = False


class Backend(ABC):
    """An engine that starts runs. Logs, metrics and results are files of the run directory and no concern of it."""

    name: str
    capabilities: Capabilities

    @abstractmethod
    def survey(self, cluster: Cluster) -> Cluster:
        """Return `cluster` with what its profile leaves open and the engine reports: nodes, and the devices of a node.

        Raises:
            BadRequest: the engine cannot be reached and the profile does not say enough.
        """

    def unusable_gpus(self) -> str:
        """Return why torch cannot use the GPUs that the engine lists; empty if it can, or if it cannot be tried here."""
        return ""

    @abstractmethod
    def render(self, plan: Plan) -> str:
        """Return what `submit` would send, word for word. Sends nothing and works without the engine."""

    def check(self, plan: Plan) -> str:
        """Return when and where the engine would start `plan`; empty if unknown.

        Raises:
            BadRequest: the engine would refuse the plan, or would never start it.
        """
        return ""

    @abstractmethod
    def submit(self, plan: Plan) -> str:
        """Send what `render` shows and return the job id.

        Raises:
            BadRequest: the engine cannot be reached, or it refuses the request.
        """

    def check_id(self, job_id: str) -> None:
        """Check a job id that was read back from a file, before anything is done with it.

        Raises:
            BadRequest: it has not the form of this engine's job ids.
        """
        check_id(ANY_ID, job_id)

    @abstractmethod
    def poll(self, job_id: str) -> State:
        """Return the state of a job. LOST: it ended, and the run directory says how."""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """End a job now. A stop with a checkpoint is requested through the run directory before."""

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        """Examine the engine for ``launch doctor``; `cwd` is the folder that the command was called in."""
        yield from ()

    def at_hand(self) -> bool:
        """Whether this machine can submit to the engine, judged without a request to it."""
        return False

    def new_profile(self) -> str:
        """Return a profile (TOML) of the engine that can be reached from here.

        Raises:
            BadRequest: it cannot be reached, or needs no profile.
        """
        raise BadRequest(f"--backend {self.name}: this backend does not write profiles.")


def this_machine(cluster: Cluster) -> Cluster:
    """Count the GPUs and cores of this machine, without importing torch."""
    node = cluster.node
    shown = gpus.count(os.environ.get("CUDA_VISIBLE_DEVICES")) if node.gpus is None else node.gpus
    found = replace(node, gpus=shown, cpus=node.cpus or len(os.sched_getaffinity(0)))
    return replace(cluster, node=found, nodes=1, oversubscribe=True)
