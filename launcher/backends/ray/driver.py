"""The Ray driver: a detached process that connects to the cluster, holds workers of Ray Train, and writes the result.

``python -m launcher.backends.ray.driver RUN_DIR``. It has the role of the coordinator of the other engines, with the same
policy::

    driver ── fit() of Ray Train ── one worker a rank: devices and environment    (`WorkerGroup`, `train_worker`)
       └───── an actor on each node ── forkserver ── the ranks                    (`RayAttempt`, `node_actor`)

A rank that dies starts again with the same worker group. The group is replaced after a worker or a node is lost, and if a
node is drained or excluded; the next group is requested on the remaining nodes.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.agent.inside.visits import VisitRequests
from launcher.agent.protocol import Lost, StopRequest
from launcher.agent.worker_messages import Drained, EndWorker, KillWorker, RayMessage, WorkerGone, WorkerReady
from launcher.backends.ray.attempt import BY_FILE, DRIVER, RayAttempt
from launcher.backends.ray.capacity import ClusterCapacity
from launcher.backends.ray.cluster import draining, join, leave, own_node, reservations, shortage
from launcher.backends.ray.node_actor import NodeActors
from launcher.backends.ray.worker_group import Inbox, Member, WorkerGroup
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle import history
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.policy import ADVICE, Failure, Outcome
from launcher.lifecycle.recovery import Elsewhere, End, Recovery
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.output import drop_output_on_full_disk
from launcher.request.spec import Plan, State


@dataclass
class Requests:
    """What the driver was asked for beside the run: a stop (its reason, else empty), and all nodes that Ray has announced to
    drain, with the time at which each goes."""

    stop: str = ""
    drained: dict[str, float] = field(default_factory=dict)


class WorkerGroups:
    """Requests worker groups from Ray Train, one after the other, and ends them.

    Attributes:
        current: the complete group that the run has now.
        leaving: `current` is to be replaced before the next attempt.
        ranks: how many ranks the newest group has.
    """

    def __init__(
        self, run_dir: RunDir, plan: Plan, node_actors: NodeActors, capacity: ClusterCapacity, requests: Requests
    ) -> None:
        self.run_dir, self.plan, self.node_actors = run_dir, plan, node_actors
        self.capacity, self.requests = capacity, requests
        self.current: WorkerGroup | None = None
        self.leaving = False
        self.ranks = plan.placement.world_size
        self.inbox: Inbox = asyncio.Queue()
        self._number = run_dir.last_attempt()
        self._lost_at: dict[str, float] = {}  # when the actor of each node was lost; Ray may list the node for a while

    @property
    def unusable(self) -> bool:
        """Whether the current group cannot carry another attempt, or is to be replaced."""
        return self.current is not None and (self.current.broken or self.leaving)

    async def request(self) -> tuple[int, Outcome] | End | None:
        """Request workers and wait for them: the outcome of an attempt that they did not start, the end, or None.

        None means that `current` has its workers, or that the cluster did not provide them and has to be looked at again.
        """
        ranks = await self._wait_for_capacity()
        if isinstance(ranks, End):
            return ranks
        if own_node() in draining():
            text = "Ray takes away the node of the run's driver, without which it starts no workers"
            return End(State.FAILED, Failure("node lost", text, advice="`launch resume` sends the run anew."))
        self._number += 1
        group = WorkerGroup(self.plan, self._number, ranks, lost_before=len(self.capacity.lost))
        at_first = {node.id for node in self.capacity.nodes()}
        group.start(self.capacity.request(self._number, ranks))
        self.ranks = ranks
        if await self._wait_for_workers(group):
            self.capacity.lacking, self.current, self.leaving = None, group, False
            return None
        if self.requests.stop:
            return End(State.STOPPED)  # the workers that start end with the connection to Ray
        await self.finish(group, "the workers did not start")
        return self._not_started(group, at_first)

    async def _wait_for_capacity(self) -> int | End:
        """Wait until the cluster can hold the run, for a limited time; return the number of ranks, or the end."""
        while True:
            nodes = self.capacity.nodes()
            if self.requests.stop:
                return End(State.STOPPED)
            late = time.monotonic() - TIMEOUTS.ray_node_listed
            if any(self._lost_at.get(node.id, late) > late for node in nodes):
                await self._receive_one()
                continue
            if ranks := self.capacity.ranks_for(nodes):
                if not self.plan.cluster.ray.autoscales:  # else only workers that start are an answer
                    self.capacity.lacking = None
                return ranks
            if self.capacity.readmit():
                continue
            if failure := self.capacity.too_small(shortage(nodes, self.capacity.scaling())):
                return End(State.FAILED, failure)
            await self._receive_one()

    async def _receive_one(self, group: WorkerGroup | None = None) -> None:
        """Take in the next messages, if there are any within `Timeouts.ray_look`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUTS.ray_look):
                self.note(*await self.inbox.get(), group)
                while not self.inbox.empty():
                    self.note(*self.inbox.get_nowait(), group)

    async def _wait_for_workers(self, group: WorkerGroup) -> bool:
        """Wait until all workers of the group are ready; return False if they will not be."""
        recorded, started, before = False, time.monotonic(), reservations()
        while not group.complete:
            if group.done.is_set() or group.broken or self.requests.stop:
                return False
            if not recorded and time.monotonic() - started > TIMEOUTS.ray_in_use:
                recorded = True
                history.record_waiting(self.run_dir, "the cluster's nodes are in use by others, or starting")
            await self.capacity.start_actors(self.capacity.nodes())
            # Once Ray has chosen the nodes, their forkservers can import while it still starts its workers.
            made = reservations().items() - before.items()
            self.node_actors.open({node for _, nodes in made for node in nodes if len(nodes) == group.ranks})
            await self._receive_one(group)
        return not group.misplaced()

    def note(self, node: str, message: RayMessage, group: WorkerGroup | None) -> None:
        """Take in what matters also between attempts; `group` is the one that is starting or in use."""
        match message:
            case WorkerReady(worker, number, environment) if group and number == group.number:
                group.register(Member(worker, self.node_actors.nodes[node], environment))
            case WorkerGone(_, number) if group and number == group.number:
                group.broken = True
            case Lost():
                self._lost_at[node] = time.monotonic()
                if node not in self.requests.drained:
                    self.capacity.lost.append(str(self.node_actors.nodes[node]))
                if group and any(member.node.id == node for member in group.members):
                    group.broken = True
            case _:
                pass  # of an attempt

    def _not_started(self, group: WorkerGroup, nodes: Set[str]) -> tuple[int, Outcome] | End | None:
        """Return what follows if workers did not start: wait for what the cluster lacks, else a failed attempt.

        `nodes` are those that there were when the group was requested. If Ray takes one of them away meanwhile, other workers
        are requested: no rank had started, and nothing has failed.
        """
        if type(group.cause).__name__ == "WorkerGroupStartupTimeoutError":
            if not self.plan.cluster.ray.autoscales:
                return None
            failure = self.capacity.too_small("the workers that Ray was asked for did not come")
            return End(State.FAILED, failure) if failure else None
        if gone := self.capacity.lost[group.lost_before :]:
            return self.run_dir.claim_attempt(), Outcome({}, lost=gone)
        if nodes & (self.requests.drained.keys() | draining().keys()):
            return None
        if type(group.cause).__name__ == "ActorUnschedulableError":  # Ray had chosen a node that has left since
            return self.run_dir.claim_attempt(), Outcome({}, lost=["a node on which workers were to start"])
        cause = str(group.cause or "one of them ended").strip().splitlines()[-1]
        text = f"Ray Train could not start the workers: {cause}"
        return self.run_dir.claim_attempt(), Outcome({}, not_started=text)

    async def finish(self, group: WorkerGroup, error: str) -> None:
        """End a group in any state; `error` is the run's failure for Ray Train's own record, empty if there is none."""
        for rank, member in enumerate(group.members):
            self.node_actors.send(member.node.id, EndWorker(member.worker, error if rank == 0 else ""))
        for _ in range(2):
            with suppress(TimeoutError):
                async with asyncio.timeout(TIMEOUTS.ray_group_end):
                    await group.done.wait()
                    return
            for member in group.members:
                self.node_actors.send(member.node.id, KillWorker(member.worker))


class Driver:
    """Brings one submission of a run to its end."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.plan = run_dir.plan()
        self.recovery = Recovery(run_dir, self.plan)
        self.requests = Requests()
        self.node_actors = NodeActors(run_dir, lambda node, message: self.inbox.put_nowait((node, message)))
        self.capacity = ClusterCapacity(run_dir, self.plan, self.node_actors)
        self.groups = WorkerGroups(run_dir, self.plan, self.node_actors, self.capacity, self.requests)
        self.inbox = self.groups.inbox

    async def run(self) -> State:
        """Connect, check, train, and leave nothing on the cluster; return the state in which the run ended."""
        self.run_dir.reserve()
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            await join(self.plan)
            if not (stopped := self.run_dir.stop_file.exists()):
                await self.capacity.check()
        except BadRequest as error:
            end = End(State.FAILED, Failure("bad request", str(error), advice=ADVICE["bad request"]))
        else:
            self.run_dir.event("accepted")
            visits = VisitRequests(self.run_dir)
            visits.prepare()
            looking = [
                asyncio.create_task(self._look()),
                asyncio.create_task(visits.pass_on(self.node_actors.send_all)),
            ]
            end = End(State.STOPPED) if stopped else await self.recovery.run(self)
            for task in looking:
                task.cancel()
        if self.groups.current is not None:
            text = f"{end.failure.kind}: {end.failure.message}" if end.failure else ""
            await self.groups.finish(self.groups.current, text)
        self.node_actors.close()
        await leave()
        return self.recovery.finish(end, self._final_plan())

    def _final_plan(self) -> Plan:
        """Return the plan with the number of ranks that there were in the end."""
        ranks = self.groups.ranks
        if ranks == self.plan.placement.world_size:
            return self.plan
        return replace(self.plan, placement=replace(self.plan.placement, nodes=1, ranks_per_node=ranks))

    def _beat(self) -> None:
        """Touch the heartbeat, in a thread: the event loop may wait for Ray."""
        while True:
            with suppress(OSError):
                self.run_dir.beat()
            time.sleep(TIMEOUTS.run_heartbeat / 4)

    async def _look(self) -> None:
        """Look for the file `stop` and for drained nodes, and report them."""
        requests = self.requests
        while True:
            if not requests.stop and self.run_dir.stop_file.exists():
                requests.stop = BY_FILE
                self.inbox.put_nowait((DRIVER, StopRequest(by_file=True)))
            going = requests.drained
            with suppress(Exception):  # Ray's control store may not answer; the next look may succeed
                going = draining()
            if new := going.keys() - requests.drained.keys():
                requests.drained.update(going)
                self.inbox.put_nowait((DRIVER, Drained({node: going[node] for node in new})))
            await asyncio.sleep(TIMEOUTS.ray_look)

    # ---- the engine of the recovery loop ----------------------------------------------------------------------------

    @property
    def movable(self) -> bool:
        """Whether Ray Train can be kept from a node."""
        return self.capacity.steerable

    def spare(self, outcome: Outcome) -> bool:
        """Return whether other workers can be requested: always after a loss; not away from TPU hosts that are unfit."""
        return self.capacity.steerable or not outcome.unfit

    async def attempt(self) -> tuple[int, Outcome] | End:
        """Run the next attempt, with a new worker group if the current one cannot carry it."""
        if self.groups.current is not None and self.groups.unusable:
            await self.groups.finish(self.groups.current, "an attempt failed, and the run goes on with other workers")
            self.groups.current = None
        while self.groups.current is None:
            if (found := await self.groups.request()) is not None:
                return found
        if self.requests.stop:
            return End(State.STOPPED)
        attempt = RayAttempt(self.run_dir, self.groups.current, self.node_actors, self.groups.note)
        return attempt.number, await attempt.run(self.inbox, self.requests.drained)

    def exclude(self, attempt: int, hosts: tuple[str, ...]) -> None:
        """Request other workers, away from `hosts`."""
        self.capacity.exclude(hosts, attempt)
        self.groups.leaving = True

    def fate(self) -> JobFate:
        """Return why the ranks were stopped: empty if a person asked for it, else Ray takes nodes away."""
        # A Context looks for the file, too, and its rank may end before this process has looked.
        return "" if self.requests.stop or self.run_dir.stop_file.exists() else "preempting"

    def start_elsewhere(self, attempt: int, hosts: tuple[str, ...]) -> Elsewhere:
        """Request other workers; `hosts` are excluded if the other nodes can hold the run."""
        if not hosts:
            self.groups.leaving = True
        elif self.capacity.ranks_for(self.capacity.nodes(but=hosts)):
            self.exclude(attempt, hosts)
        return Elsewhere.NOW

    @property
    def stopping(self) -> bool:
        return bool(self.requests.stop)

    async def pause(self, seconds: float) -> None:
        """Wait, unless the worker group is replaced, which takes longer."""
        if not self.groups.unusable:
            await asyncio.sleep(seconds)


def main() -> None:
    """``python -m launcher.backends.ray.driver RUN_DIR``."""
    drop_output_on_full_disk()
    run_dir = RunDir(Path(sys.argv[1]))
    state = asyncio.run(Driver(run_dir).run())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(state.exit_status)  # pending calls to Ray would keep this process alive


if __name__ == "__main__":
    main()
