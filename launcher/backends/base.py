"""The interface of a backend: `Backend` and its `Capabilities`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config.check import Check
from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.lifecycle.trust import ANY_ID, check_id
from launcher.request.spec import Plan, State


@dataclass(frozen=True)
class Capabilities:
    """Properties of a backend, for code that handles all backends.

    Attributes:
        poll_seconds: seconds for which all commands of a user on this machine share an answer of `Backend.poll_all`; 0: none do.
        interrupt_stops: Ctrl-C stops the run; otherwise it only stops following it.
        attaches: a single rank can have the standard input and the terminal of the command (`Backend.attach`).
        queue: a run waits for resources in a queue before it starts.
        precheck: the target is imported before the submission, since its ranks start later or on other machines.
        multi_node: a run can have more than one node.
        spare_nodes: an allocation can hold more nodes than the run uses (``--spare-nodes``).
        time_limit: a run is a job that ends when its time limit is reached.
        requeue: the scheduler requeues a preempted run.
        elastic: a run can continue with fewer ranks after it lost a node (``ray.elastic``).
    """

    poll_seconds: float = 0.0
    interrupt_stops: bool = False
    attaches: bool = False
    queue: bool = True
    precheck: bool = True
    multi_node: bool = True
    spare_nodes: bool = False
    time_limit: bool = False
    requeue: bool = False
    elastic: bool = False


@dataclass(frozen=True)
class FreeGpu:
    """A GPU of this machine.

    Attributes:
        name: as CUDA_VISIBLE_DEVICES names it.
        why: it and the reason for the choice, for the plan.
    """

    name: str
    why: str


class Backend(ABC):
    """An engine that starts runs.

    Logs, metrics and results are files in the run directory, which a backend does not handle.
    """

    name: str
    capabilities: Capabilities

    def from_shell(self, cluster: Cluster, time: str | None = None) -> tuple[Cluster, tuple[str, ...]]:
        """Return `cluster` with the engine's variables of the shell, and a line for each that is used or is not.

        `time` is ``--time``, if given.

        Raises:
            BadRequest: the value of a variable cannot be used.
        """
        return cluster, ()

    @abstractmethod
    def survey(self, cluster: Cluster) -> Cluster:
        """Return `cluster` with the nodes and devices that its profile leaves open, as the engine reports them.

        Raises:
            BadRequest: the engine cannot be reached and the profile is incomplete.
        """

    def free_gpu(self, cluster: Cluster) -> FreeGpu | None:
        """Choose the GPU of a run that asks for no device; None if the engine or the user chooses."""
        return None

    def unusable_gpus(self, gpu: FreeGpu | None = None) -> str:
        """Return why torch cannot use `gpu`, or the first one; empty if it can, or if this cannot be tested."""
        return ""

    @abstractmethod
    def render(self, plan: Plan) -> str:
        """Return the request of `submit` as text. Sends nothing and works without the engine."""

    def check(self, plan: Plan) -> str:
        """Return when and where the engine would start `plan`; empty if unknown.

        Raises:
            BadRequest: the engine would refuse the plan, or would never start it.
        """
        return ""

    def way_in(self, job_id: str, host: str) -> str:
        """Return the engine's own command for a shell in the job on `host`; empty if it has none. Asks nothing."""
        return ""

    def ssh_note(self) -> str:
        """Return what a cluster has to allow for ssh to the nodes of a job; empty if nothing is known."""
        return ""

    @abstractmethod
    def submit(self, plan: Plan) -> str:
        """Submit the request that `render` shows; return the job id.

        Raises:
            BadRequest: the engine cannot be reached, or it refuses the request.
        """

    def attach(self, plan: Plan, kind: str, passed: Sequence[tuple[int, int]]) -> str:
        """Submit `plan`, of a single rank, with streams of this process; only with `Capabilities.attaches`.

        Args:
            kind: which streams, see `launcher.client.terminal.Attachment`.
            passed: descriptors of this process, each with its number in the supervisor of the run.

        Returns:
            The job id.
        """
        raise BadRequest(f"the {self.name} backend has no terminal for its ranks.")

    def check_id(self, job_id: str) -> None:
        """Check the form of a job id that was read from a file.

        Raises:
            BadRequest: it is not a job id of this engine.
        """
        check_id(ANY_ID, job_id)

    @abstractmethod
    def poll(self, job_id: str) -> State:
        """Return the state of a job. LOST: it ended; the run directory has the result."""

    def poll_all(self, job_ids: Sequence[str]) -> dict[str, State]:
        """Return the states of the jobs `job_ids`, and of other jobs that the same question gives; see `poll`."""
        return {job_id: self.poll(job_id) for job_id in job_ids}

    def identity(self) -> str:
        """Return what distinguishes the cluster that `poll_all` asks from others of this engine."""
        return ""

    def waits_for(self, job_id: str) -> str:
        """Return why a queued job has not started; empty if unknown."""
        return ""

    def ended_as(self, job_id: str) -> str:
        """Return how the engine says that a job ended, as a sentence that follows another; empty if unknown."""
        return ""

    @abstractmethod
    def cancel(self, job_id: str) -> None:
        """End a job now, without a checkpoint. The caller requests a stop with a checkpoint before."""

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        """Check the engine for ``launch doctor``; `cwd` is the working directory of the command."""
        yield from ()

    def at_hand(self) -> bool:
        """Whether this machine seems able to submit to the engine; sends no request."""
        return False

    def new_profile(self) -> str:
        """Return a profile (TOML) of the engine, from its own report.

        Raises:
            BadRequest: the engine cannot be reached, or needs no profile.
        """
        raise BadRequest(f"--backend {self.name}: this backend does not write profiles.")


def this_machine(cluster: Cluster) -> Cluster:
    """Count the GPUs and cores of this machine, without importing torch."""
    from launcher.agent.health import gpus  # only commands that place a run need it

    node = cluster.node
    shown = gpus.count(os.environ.get("CUDA_VISIBLE_DEVICES")) if node.gpus is None else node.gpus
    found = replace(node, gpus=shown, cpus=node.cpus or len(os.sched_getaffinity(0)))
    return replace(cluster, node=found, nodes=1, oversubscribe=True)
