"""Messages between the node agents of a run and the process that coordinates them; the same on every engine.

The coordinator is that of node 0 (`launcher.agent.coordinator`) or the Ray driver. Between nodes messages are lines of
JSON over TCP, on Ray arguments of calls.

====================  ===================================================
to an agent           its answer
====================  ===================================================
`Start`               `RankExit` for each rank, when it ends
`Signal`              none
`DumpStacks`          `Stacks`, and `Collectives` for each rank
`CheckNode`           `NodeChecked`
`Visit`               none; a session connects to the client that asked
`Alive`, every four   `Heartbeats`, without being asked: once a second, or every
seconds               two seconds in a large run (`seconds_between_reports`)
`End`                 none; the agent ends its ranks and exits
====================  ===================================================

An agent also sends `StopRequest` for each signal that it receives.

A connection begins with `Hello`. An agent that has a secret gets `Welcome` or `Refused`, and may connect again with this secret
after it has lost the connection. Both ends count the messages that they receive, without `Heartbeats` and `Alive`; they report
the count in `Received`, and after a reconnection in `Hello` and `Welcome`, so that each message arrives exactly once.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.agent.hangs.detection import MOST_STEPS, RankStatus, StackLocation, columns_of, statuses_of
from launcher.agent.hangs.records import GroupRecord
from launcher.lifecycle.history import JobFate
from launcher.rank.messages import JsonObject
from launcher.request.placement import tpu
from launcher.request.spec import Plan
from training.distributed.world import World


@dataclass(frozen=True)
class AgentInfo:
    """The position of an agent among those of its job. The backend makes it; the agent reads no environment.

    Attributes:
        host: this node's name, for people.
        address: node 0's IP address, as the other nodes reach it.
        switches: the network switches above this node, from the top; empty if they are not known.
        session: differs between two submissions of a run, and between two starts of a job, so that an old rendezvous is
            not taken for a new one.
        requeue: asks the scheduler to start the job again later, away from the given hosts; returns whether it will.
            None if there is no scheduler.
        fate: asks the scheduler what it does with the job.
        unfit: returns what failed, before the ranks, on each host of the job whose agent will not come.
    """

    node: int = 0
    nodes: int = 1
    host: str = field(default_factory=socket.gethostname)
    address: str = "127.0.0.1"
    switches: tuple[str, ...] = ()
    session: str = ""
    requeue: Callable[[Sequence[str]], bool] | None = None
    fate: Callable[[], JobFate] = lambda: ""
    unfit: Callable[[], Mapping[str, str]] = dict


# ---- to an agent ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Start ranks of an attempt.

    Attributes:
        worlds: one for each rank of this node.
        environments: variables of a rank beside those of its world, by rank; on Ray and on TPUs.
    """

    attempt: int
    worlds: list[World]
    environments: dict[int, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plan: Plan,
        attempt: int,
        node: int,
        hosts: Sequence[str],
        port: int,
        debug: Mapping[str, str] | None = None,
    ) -> Start:
        """Return the message to the agent on node number `node` of the placement.

        Args:
            hosts: the addresses of all nodes.
            debug: further variables of every rank.
        """
        placement = plan.placement
        each = placement.ranks_per_node
        worlds = [
            World(
                rank=node * each + local,
                local_rank=local,
                node_rank=node,
                world_size=placement.world_size,
                local_world_size=each,
                num_nodes=placement.nodes,
                master_addr=hosts[0],
                master_port=port,
                device=placement.device,
                threads=placement.threads,
                attempt=attempt,
                run_id=plan.name,
            )
            for local in range(each)
        ]
        if not placement.on_tpu:
            return cls(attempt, worlds, {w.rank: dict(debug) for w in worlds} if debug else {})
        session = f"{plan.name}-{attempt}"
        environments = {w.rank: tpu.environment_of(placement, hosts, node, w.local_rank, session) for w in worlds}
        return cls(attempt, worlds, environments)


@dataclass(frozen=True)
class Signal:
    """Send the signal `number` to `ranks`; None means all ranks of the node.

    Attributes:
        after: wait so many seconds, in which a scheduler may send SIGTERM to the ranks itself; then it is not sent again.
    """

    number: int
    ranks: list[int] | None = None
    after: float = 0.0


@dataclass(frozen=True)
class DumpStacks:
    """Write the stacks of every rank into its log, and report the locations."""

    attempt: int


@dataclass(frozen=True)
class CheckNode:
    """Run the preflight checks. `visible` are the run's GPUs, as CUDA_VISIBLE_DEVICES names them; None: the agent's own."""

    attempt: int
    visible: str | None = None


@dataclass(frozen=True)
class Visit:
    """Start a session for the client that left the request `id` (`launcher.lifecycle.records.visits`).

    Attributes:
        attempt: the newest one; a node that has no ranks in it starts no session.
        ranks: for the nodes of these ranks.
        nodes: for these nodes, by their numbers in the placement; with no ranks and no nodes, for every node.
    """

    id: str
    attempt: int
    ranks: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Alive:
    """The coordinator is alive."""


@dataclass(frozen=True)
class End:
    """The run has ended."""

    exit_status: int


# ---- of a connection ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Welcome:
    """The answer to `Hello`; `received` messages of the agent have arrived over earlier connections."""

    received: int = 0


@dataclass(frozen=True)
class Refused:
    """The answer to a `Hello` with the right token that is not accepted, for the `reason`; the agent exits."""

    reason: str


@dataclass(frozen=True)
class Received:
    """The other end has received `count` messages in all."""

    count: int


# ---- from an agent --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """The first message of a connection.

    Attributes:
        token: that of the rendezvous file.
        secret: chosen by the agent when it starts; without one, the agent is lost with its connection.
        received: how many messages the agent has received over earlier connections.
    """

    node: int
    token: str
    host: str
    switches: tuple[str, ...] = ()
    secret: str = ""
    received: int = 0


@dataclass(frozen=True)
class RankExit:
    """A rank has ended.

    Attributes:
        code: its exit status; negative: it was ended by that signal.
        step: the newest step that it reported; -1 if it never opened a Context.
    """

    rank: int
    code: int
    step: int

    def __post_init__(self) -> None:
        if not (-256 < self.code < 256 and -MOST_STEPS <= self.step < MOST_STEPS):
            raise ValueError(f"no rank ends like this: {self}")


@dataclass(frozen=True)
class Heartbeats:
    """The status of each running rank of the node."""

    ranks: dict[int, RankStatus]

    def to_wire(self) -> dict[str, list[Any]]:
        """Return the fields as JSON data."""
        return columns_of(self.ranks)

    @classmethod
    def from_wire(cls, columns: Any) -> Heartbeats:
        """Return the message of these fields. Raises ValueError for other data."""
        return cls(statuses_of(columns))


@dataclass(frozen=True)
class Stacks:
    """The stack location of each running rank of the node."""

    ranks: dict[int, StackLocation]


@dataclass(frozen=True)
class Collectives:
    """The collectives that a rank has entered; `groups` is None if it has no record of them. A message stays below 64 KiB."""

    rank: int
    groups: list[GroupRecord] | None = None


@dataclass(frozen=True)
class NodeChecked:
    """What the preflight checks found (`launcher.agent.health.preflight.look`)."""

    attempt: int
    facts: JsonObject


@dataclass(frozen=True)
class StopRequest:
    """The run is to stop: an agent received the signal `number`, or the run directory holds the file `stop`."""

    number: int = signal.SIGTERM
    by_file: bool = False

    def __post_init__(self) -> None:
        signal.Signals(self.number)  # raises ValueError for a number that is none


# ---- what the coordinator's own process reports ---------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """An agent has connected."""


@dataclass(frozen=True)
class Lost:
    """The connection of an agent has ended, or it has been silent for too long."""


ToAgent = Start | Signal | DumpStacks | CheckNode | Visit | Alive | End
FromAgent = RankExit | Heartbeats | Stacks | Collectives | NodeChecked | StopRequest
OverTcp = Welcome | Refused | Received | ToAgent
FromTcp = Received | FromAgent
AgentMessage = FromAgent | Joined | Lost
