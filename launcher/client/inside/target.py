"""The part of a running run that a command looks inside: a rank, a node, or all of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from launcher import backends
from launcher.client.run import Run
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import reading
from launcher.request.spec import State


@dataclass(frozen=True)
class Target:
    """The part of a running run that a client asks for.

    Attributes:
        hosts: of all nodes of the newest attempt, in the order of their numbers.
        ranks, nodes: see `VisitRequest`; neither: every node.
    """

    run: Run
    hosts: list[str]
    world_size: int
    ranks: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.run.name

    def of_rank(self, rank: int) -> Target:
        """Return the part that is one rank, and its node. Raises BadRequest if there is none of this number."""
        if not 0 <= rank < self.world_size:
            raise BadRequest(f"--rank {rank}: the ranks of {self.name} are 0 to {self.world_size - 1}.")
        return replace(self, ranks=(rank,), nodes=())

    def of_node(self, node: str) -> Target:
        """Return the part that is one node, given by its number or its host. Raises BadRequest if there is none."""
        named = [number for number in range(len(self.hosts)) if node in (self.hosts[number], self.host(number))]
        if len(named) == 1:
            return replace(self, ranks=(), nodes=(named[0],))
        if node.isdecimal() and len(node) < 10 and int(node) < len(self.hosts):
            return replace(self, ranks=(), nodes=(int(node),))
        shown = ", ".join(f"{number} ({host})" for number, host in list(enumerate(self.hosts))[:8])
        more = ", ..." if len(self.hosts) > 8 else ""
        raise BadRequest(f"--node {node}: the nodes of {self.name} are {shown}{more}.")

    def host(self, node: int) -> str:
        """Return the name of a node alone; on Ray, the hosts have the id of the node besides."""
        return self.hosts[node].partition(" (")[0]

    def everywhere(self) -> Target:
        """Return all of the run."""
        return replace(self, ranks=(), nodes=())

    @property
    def expected(self) -> int:
        """How many nodes it is about."""
        return len(self.ranks or self.nodes or self.hosts)

    @property
    def alone(self) -> bool:
        """Whether the run is on this machine alone."""
        return not backends.of(self.run.dir.plan().cluster).capabilities.multi_node

    def node(self) -> int:
        """Return the number of its node, the first one if there are several.

        Raises:
            BadRequest: the nodes have different numbers of ranks, so that only the run's driver has that of a rank.
        """
        if not self.ranks:
            return (self.nodes or (0,))[0]
        each, rest = divmod(self.world_size, len(self.hosts))
        if rest and self.ranks != (0,):
            raise BadRequest(f"the nodes of {self.name} have different numbers of ranks; choose one by --node.")
        return self.ranks[0] // each

    def ssh_note(self) -> str:
        """Return what the cluster has to allow for ssh to its nodes; empty: nothing that is known."""
        with suppress(BadRequest):
            if job := self.run.job():
                return backends.get(job["backend"]).ssh_note()
        return ""

    def other_way(self) -> str:
        """Return the engine's own command for a shell on the node; empty if it has none."""
        with suppress(BadRequest):
            if job := self.run.job():
                return backends.get(job["backend"]).way_in(job["job_id"], self.host(self.node()))
        return ""


def inside(run: Run) -> Target:
    """Return all of `run`.

    Raises:
        BadRequest: it does not run, belongs to somebody else, or others can write to its directory.
    """
    with reading(run.path):
        run.dir.check_own()
        name, state = run.name, run.state()
        if state.done:
            raise BadRequest(
                f"run {name!r} has ended ({state.value}), so there is nothing left to look inside."
                f" `launch status {name}` and `launch logs {name}` show what it left."
            )
        match run.dir.newest_event("started"):
            case {"hosts": [*hosts], "world_size": int(size)} if state is State.RUNNING and hosts:
                return Target(run, [str(host) for host in hosts], size)
        raise BadRequest(
            f"run {name!r} is {state.value}, and its ranks have not started. `launch status {name}` shows what it waits for,"
            f" `launch logs -f {name}` follows it."
        )
