"""Messages about the workers of Ray Train, which the node actors and the driver of a run on Ray exchange besides."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.agent.protocol import AgentMessage, ToAgent


@dataclass(frozen=True)
class WorkerReady:
    """A worker of Ray Train, number `worker` of the worker group `group`, has started with `environment`."""

    worker: int
    group: int
    environment: dict[str, str]


@dataclass(frozen=True)
class WorkerGone:
    """The process of a worker of Ray Train has ended."""

    worker: int
    group: int


@dataclass(frozen=True)
class GroupEnded:
    """Ray Train has ended the worker group `group`."""

    group: int


@dataclass(frozen=True)
class Drained:
    """Ray takes nodes away: the time at which each goes, in seconds since the epoch, by node id; 0: not known."""

    nodes: dict[str, float]


@dataclass(frozen=True)
class EndWorker:
    """A worker of Ray Train has to return; `error` is the run's failure, empty if there is none."""

    worker: int
    error: str


@dataclass(frozen=True)
class KillWorker:
    """The process of a worker of Ray Train has to be killed."""

    worker: int


ToNodeActor = ToAgent | EndWorker | KillWorker
RayMessage = AgentMessage | WorkerReady | WorkerGone | GroupEnded | Drained
