"""What a Ray cluster has for one run: the nodes that it may use, and with how many ranks it can go on there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from launcher.backends.ray.backend import trainer, whole_host
from launcher.backends.ray.cluster import RayNode, capacity, fitting, look, shortage
from launcher.backends.ray.node_actor import NodeActors
from launcher.errors import BadRequest
from launcher.lifecycle import history
from launcher.lifecycle.policy import ADVICE, Failure
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.tpu import Topology
from launcher.request.spec import Plan


class ClusterCapacity:
    """The cluster as a run sees it. The caller is connected to Ray.

    Attributes:
        away: nodes that were struck, and that the run stays away from, as people call them.
        lost: nodes that died, likewise.
        lacking: since when the cluster is too small, and what it lacks; None while it is not.
    """

    def __init__(self, run_dir: RunDir, plan: Plan, node_actors: NodeActors) -> None:
        self.run_dir, self.plan, self.node_actors = run_dir, plan, node_actors
        self.away = history.read(run_dir.events()).excluded
        self.lost: list[str] = []
        self.lacking: tuple[float, str] | None = None

    @property
    def steerable(self) -> bool:
        """Whether Ray Train can be kept from a node. Slices of TPUs it chooses by itself."""
        return not self.plan.placement.on_tpu

    def nodes(self, *, but: Sequence[str] = ()) -> list[RayNode]:
        """The nodes that are up, without the struck ones and those called as in `but`."""
        return [node for node in look() if str(node) not in (*self.away, *but)]

    def exclude(self, nodes: Sequence[str], attempt: int) -> None:
        """Exclude `nodes` from now on."""
        history.record_excluded(self.run_dir, attempt, nodes)
        self.away = tuple(dict.fromkeys((*self.away, *nodes)))

    def readmit(self) -> bool:
        """Take back the struck nodes where the others cannot hold the run; says whether that helps.

        Not where a preflight has found them unfit: it would again.
        """
        if not self.away or self.plan.cluster.preflight:
            return False
        if self.ranks_for(self.nodes()) or not self.ranks_for(look()):
            return False
        self.run_dir.event("readmitted", nodes=list(self.away))
        self.away = ()
        return True

    async def check(self) -> None:
        """Refuse what this cluster can never run, and a run directory that a node does not see. Raises BadRequest."""
        self.readmit()
        nodes, scaling = self.nodes(), self.scaling()
        lacks = shortage(nodes, scaling)
        if lacks and not self.plan.cluster.ray.autoscales and not self.ranks_for(nodes):
            raise BadRequest(
                f"{self._staying_away()}{lacks}. Ask for at most {capacity(nodes, scaling)} ranks; if the cluster grows on"
                " demand, set ray.autoscales = true in its profile."
            )
        hosts_without_run_dir = await self.start_actors(nodes)
        if hosts_without_run_dir:
            raise BadRequest(
                f"the run directory {self.run_dir.path} is not visible on the nodes"
                f" {', '.join(node.address for node in hosts_without_run_dir)}. All nodes have to share it: set `runs` in the cluster's"
                " profile to a shared folder."
            )

    def request(self, number: int, ranks: int) -> dict[str, Any]:
        """What Ray Train is asked for, the run's `number`-th time: see `launcher.backends.ray.backend.trainer`."""
        away = [node.id for node in look() if str(node) in self.away]
        return trainer(self.plan, number, ranks, away, self._marked())

    def scaling(self) -> dict[str, Any]:
        """The arguments of Ray's ScalingConfig for what the run was sent for."""
        scaling: dict[str, Any] = trainer(self.plan, marked=self._marked())["scaling_config"]
        return scaling

    def _marked(self) -> bool:
        """Whether hosts say by a resource which kind of slice they are; some clusters do so for slices of several only."""
        names = whole_host(self.plan.placement).keys() if self.plan.placement.on_tpu else ()
        return not names or any(names & node.resources.keys() for node in look())

    async def start_actors(self, nodes: list[RayNode]) -> list[RayNode]:
        """Have a steward on each node that can hold a rank; returns those that do not see the run directory."""
        useful = [node for node in nodes if capacity([node], self.scaling() | {"topology": None})]
        if len(useful) <= self.plan.placement.nodes:
            towards = next((n.address for n in nodes), "")
            hosts_without_run_dir = await self.node_actors.ensure(useful, towards, len(nodes) > 1)
            self.node_actors.open(node.id for node in useful)  # every one of them will be used
            return hosts_without_run_dir
        return await self.node_actors.ensure(useful, nodes[0].address, len(nodes) > 1)

    def ranks_for(self, nodes: list[RayNode]) -> int:
        """With how many ranks the run can go on, on these nodes; 0: with none."""
        asked = self.plan.placement.world_size
        if self.plan.cluster.ray.autoscales:
            return asked
        most = capacity(nodes, self.scaling())
        if most >= asked or not self._elastic:
            return asked if most >= asked else 0
        topology = self.plan.placement.topology
        return fitting(asked, most, Topology.parse(topology).chips if topology else 1)

    @property
    def _elastic(self) -> bool:
        """What has begun may go on with fewer ranks; what begins gets what was asked for."""
        return self.plan.cluster.ray.elastic and self.run_dir.last_attempt() > 0

    def too_small(self, lacks: str) -> Failure | None:
        """The failure of a run that has waited long enough for what the cluster `lacks`; None while it may still come."""
        patience = self.plan.cluster.ray.wait
        if self.lacking is None:
            self.lacking = time.monotonic(), lacks
            history.record_waiting(self.run_dir, f"{self._staying_away()}{lacks}", seconds=patience)
        if time.monotonic() - self.lacking[0] < patience:
            return None
        gone = f"node {', '.join(dict.fromkeys(self.lost))} stopped answering, and " if self.lost else ""
        text = f"{gone}{self._staying_away()}the cluster is too small: {lacks}; waited {patience:g} s"
        kind = "unfit node" if self.away and self.plan.cluster.preflight and not self.lost else "node lost"
        return Failure(kind, text, advice=ADVICE[kind])

    def _staying_away(self) -> str:
        return f"the run stays away from {', '.join(self.away)}, and " if self.away else ""
