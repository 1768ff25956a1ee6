"""Capacity of a Ray cluster for one run: its usable nodes, and how many ranks fit on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from launcher.backends.ray.backend import trainer, whole_host
from launcher.backends.ray.cluster import RayNode, capacity, draining, fitting, look, shortage
from launcher.backends.ray.node_actor import NodeActors
from launcher.errors import BadRequest
from launcher.lifecycle import history
from launcher.lifecycle.policy import ADVICE, Failure
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.tpu import Topology
from launcher.request.spec import Plan


class ClusterCapacity:
    """Capacity of the cluster for one run. The caller is connected to Ray.

    Attributes:
        excluded: names of the nodes that the run excludes.
        lost: names of the nodes that died.
        lacking: the time (`time.monotonic`) at which the cluster became too small, and what it lacks; None: it suffices.
    """

    def __init__(self, run_dir: RunDir, plan: Plan, node_actors: NodeActors) -> None:
        self.run_dir, self.plan, self.node_actors = run_dir, plan, node_actors
        self.excluded = history.read(run_dir.events()).excluded
        self.lost: list[str] = []
        self.lacking: tuple[float, str] | None = None

    @property
    def steerable(self) -> bool:
        """Whether Ray Train can exclude a node; it cannot for TPU slices, which it selects itself."""
        return not self.plan.placement.on_tpu

    def nodes(self, *, but: Sequence[str] = ()) -> list[RayNode]:
        """The nodes that are up, without the excluded ones and those named in `but`."""
        return [node for node in look() if str(node) not in (*self.excluded, *but)]

    def exclude(self, nodes: Sequence[str], attempt: int) -> None:
        """Exclude `nodes` from the next attempts."""
        history.record_excluded(self.run_dir, attempt, nodes)
        self.excluded = tuple(dict.fromkeys((*self.excluded, *nodes)))

    def readmit(self) -> bool:
        """Readmit the excluded nodes if the run does not fit without them; returns whether it then fits.

        With ``preflight`` they stay excluded, since the next check would find them unfit again.
        """
        if not self.excluded or self.plan.cluster.preflight:
            return False
        if self.ranks_for(self.nodes()) or not self.ranks_for(look()):
            return False
        self.run_dir.event("readmitted", nodes=list(self.excluded))
        self.excluded = ()
        return True

    async def check(self) -> None:
        """Check that the cluster can run the request and that its nodes share the run directory.

        Raises:
            BadRequest: the cluster is too small, or a node does not see the run directory.
        """
        self.readmit()
        nodes, scaling = self.nodes(), self.scaling()
        lacks = shortage(nodes, scaling)
        if lacks and not self.plan.cluster.ray.autoscales and not self.ranks_for(nodes):
            raise BadRequest(
                f"{self._excluding()}{lacks}. Ask for at most {capacity(nodes, scaling)} ranks; if the cluster grows on"
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
        """The run's `number`-th request to Ray Train; see `launcher.backends.ray.backend.trainer`."""
        excluded = [node.id for node in look() if str(node) in self.excluded]
        if self.steerable:
            excluded += draining()  # Ray reserves room on them, and then refuses to start workers there
        return trainer(self.plan, number, ranks, excluded, self._marked())

    def scaling(self) -> dict[str, Any]:
        """The arguments of Ray's ScalingConfig for the world size that was requested."""
        scaling: dict[str, Any] = trainer(self.plan, marked=self._marked())["scaling_config"]
        return scaling

    def _marked(self) -> bool:
        """Whether single hosts have the resource of `whole_host`; in some clusters only larger slices have it."""
        names = whole_host(self.plan.placement).keys() if self.plan.placement.on_tpu else ()
        return not names or any(names & node.resources.keys() for node in look())

    async def start_actors(self, nodes: list[RayNode]) -> list[RayNode]:
        """Start a node actor on each usable node; returns the nodes that do not see the run directory."""
        useful = [node for node in nodes if capacity([node], self.scaling() | {"topology": None})]
        if len(useful) <= self.plan.placement.nodes:
            towards = next((n.address for n in nodes), "")
            hosts_without_run_dir = await self.node_actors.ensure(useful, towards, len(nodes) > 1)
            self.node_actors.open(node.id for node in useful)  # all of them will be used
            return hosts_without_run_dir
        return await self.node_actors.ensure(useful, nodes[0].address, len(nodes) > 1)

    def ranks_for(self, nodes: list[RayNode]) -> int:
        """World size with which the run can continue on `nodes`; 0 if it cannot."""
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
        """Whether fewer ranks are allowed: not for the first attempt."""
        return self.plan.cluster.ray.elastic and self.run_dir.last_attempt() > 0

    def too_small(self, lacks: str) -> Failure | None:
        """The failure of a run whose cluster is too small after ``ray.wait`` seconds; None until then."""
        patience = self.plan.cluster.ray.wait
        if self.lacking is None:
            self.lacking = time.monotonic(), lacks
            history.record_waiting(self.run_dir, f"{self._excluding()}{lacks}", seconds=patience)
        if time.monotonic() - self.lacking[0] < patience:
            return None
        gone = f"node {', '.join(dict.fromkeys(self.lost))} stopped answering, and " if self.lost else ""
        text = f"{gone}{self._excluding()}the cluster is too small: {lacks}; waited {patience:g} s"
        kind = "unfit node" if self.excluded and self.plan.cluster.preflight and not self.lost else "node lost"
        return Failure(kind, text, advice=ADVICE[kind])

    def _excluding(self) -> str:
        return f"the run excludes {', '.join(self.excluded)}, and " if self.excluded else ""
