"""A backend for tests: records the submitted plans and runs nothing.

::

    from launcher import backends, launch
    from launcher.backends.fake import FakeBackend

    fake = FakeBackend()
    fake.on_submit = lambda job_id: fake.finish(job_id, {"loss": 0.1})
    backends.register(fake)                   # known in this process, until backends.unregister(fake)
    assert launch(train, backend="fake", gpus=16).result() == {"loss": 0.1}
    assert fake.plans[0].placement.nodes == 2

`FakeBackend(name="slurm")` replaces the shipped backend of that name. See docs/testing.md.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.backends.base import Backend, Capabilities
from launcher.config.cluster import Cluster, Node
from launcher.errors import BadRequest
from launcher.lifecycle import history
from launcher.lifecycle.policy import Failure
from launcher.lifecycle.recovery import end_run
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import Plan, State
from training.files import write_atomic


@dataclass
class FakeJob:
    """A submitted plan and its state; a test may set the state."""

    plan: Plan
    state: State = State.QUEUED
    started_at: float = field(default_factory=time.monotonic)


class FakeBackend(Backend):
    """A cluster of `nodes` nodes like `node`, whose jobs are controlled by a test.

    Attributes:
        jobs: every job by its id, in the order of submission.
        cancelled: the ids that `cancel` was called with.
        on_submit: called with the id of each new job; with `finish`, jobs succeed at once.
        refusal: if not empty, `submit` raises BadRequest with this text.
        start: what `check` returns: when a job would start.
        heeds_stop: a running job ends as stopped when its run is cancelled.
    """

    def __init__(
        self,
        name: str = "fake",
        capabilities: Capabilities = Capabilities(),  # noqa: B008 (frozen)
        nodes: int = 4,
        node: Node = Node(gpus=8, cpus=96),  # noqa: B008 (frozen)
    ) -> None:
        self.name, self.capabilities = name, capabilities
        self.nodes, self.node = nodes, node
        self.jobs: dict[str, FakeJob] = {}
        self.cancelled: list[str] = []
        self.on_submit: Callable[[str], None] | None = None
        self.refusal = self.start = ""
        self.heeds_stop = True
        self._identity = os.urandom(8).hex()

    def identity(self) -> str:
        """Return what no other fake cluster has: its jobs exist in this object alone."""
        return self._identity

    @property
    def plans(self) -> list[Plan]:
        """The submitted plans, in order."""
        return [job.plan for job in self.jobs.values()]

    def survey(self, cluster: Cluster) -> Cluster:
        """Set this backend's nodes where the profile describes none."""
        node = cluster.node if cluster.node != Node() else self.node
        return replace(cluster, nodes=cluster.nodes or self.nodes, node=node)

    def render(self, plan: Plan) -> str:
        """One line per rank."""
        target = f"{plan.target.kind} {plan.target.name} {plan.target.listed()}"
        return "".join(f"rank {rank}: {target}\n" for rank in range(plan.placement.world_size))

    def check(self, plan: Plan) -> str:
        return self.start

    def submit(self, plan: Plan) -> str:
        """Record the plan as a queued job."""
        if self.refusal:
            raise BadRequest(self.refusal)
        job_id = f"{self.name}-{len(self.jobs) + 1}"
        self.jobs[job_id] = FakeJob(plan)
        if self.on_submit is not None:
            self.on_submit(job_id)
        return job_id

    def poll(self, job_id: str) -> State:
        """Return the job's state; LOST for a job of another process."""
        job = self.jobs.get(job_id)
        if job is None:
            return State.LOST
        if job.state is State.RUNNING and self.heeds_stop and RunDir(job.plan.run_dir).stop_file.exists():
            self.finish(job_id, state=State.STOPPED)
        return job.state

    def cancel(self, job_id: str) -> None:
        """Record the call and end the job."""
        self.cancelled.append(job_id)
        if job_id in self.jobs:
            self.jobs[job_id].state = State.LOST

    def begin(self, job_id: str, host: str = "node1") -> RunDir:
        """Start the first attempt of a queued job; return its run directory, to which a test may add logs."""
        job = self.jobs[job_id]
        run_dir = RunDir(job.plan.run_dir)
        attempt = run_dir.claim_attempt()
        history.record_started(run_dir, attempt, job.plan.placement.world_size, [host])
        job.state = State.RUNNING
        return run_dir

    def finish(
        self, job_id: str, value: Any = None, state: State = State.SUCCEEDED, failure: Failure | None = None
    ) -> None:
        """End a job in `state`, with the `value` that rank 0 returned, or with `failure`."""
        import cloudpickle

        job = self.jobs[job_id]
        run_dir = RunDir(job.plan.run_dir) if job.state is State.RUNNING else self.begin(job_id)
        if value is not None:
            write_atomic(run_dir.value_pickle, cloudpickle.dumps(value))
        if isinstance(value, dict):
            write_atomic(run_dir.value_file, json.dumps(value))
        end_run(run_dir, job.plan, state, run_dir.last_attempt(), job.started_at, failure)
        job.state = State.LOST  # ended; the run directory has the result
