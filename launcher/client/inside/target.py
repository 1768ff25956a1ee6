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
        if node in self.hosts:
            return replace(self, ranks=(), nodes=(self.hosts.index(node),))
        if node.isdecimal() and len(node) < 10 and int(node) < len(self.hosts):
            return replace(self, ranks=(), nodes=(int(node),))
        shown = ", ".join(f"{number} ({host})" for number, host in list(enumerate(self.hosts))[:8])
        more = ", ..." if len(self.hosts) > 8 else ""
        raise BadRequest(f"--node {node}: the nodes of {self.name} are {shown}{more}.")

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

    def other_way(self) -> str:
        """Return the engine's own command for a shell on the node; empty if it has none."""
        host = self.hosts[(self.nodes or (0,))[0]]
        with suppress(BadRequest):
            if job := self.run.job():
                return backends.get(job["backend"]).way_in(job["job_id"], host)
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
            f"run {name!r} is {state.value}: its ranks have not started. `launch status {name}` shows what it waits for,"
            f" `launch logs -f {name}` follows it."
        )
