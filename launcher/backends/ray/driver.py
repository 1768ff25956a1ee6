"""The Ray driver: a detached process that connects to the cluster, holds workers of Ray Train, and leaves the result.

``python -m launcher.backends.ray.driver RUN_DIR``. It is to Ray what the coordinator is to the other engines, with the
same policy::

    driver ── fit() of Ray Train ── one worker a rank: devices and environment     (a lease; `ray_lease`, `ray_worker`)
       └───── a steward on each node ── forkserver ── the ranks                    (attempts; `ray_steward`)

A rank that dies starts again within its lease, and Ray does not notice. A worker or node that dies, or a node that is
drained or struck, ends the lease; the next one is asked of the nodes that are left.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.agent.protocol import Message
from launcher.backends.ray.attempt import DRIVER, RayAttempt
from launcher.backends.ray.capacity import ClusterCapacity
from launcher.backends.ray.cluster import draining, join, leave, reservations, shortage
from launcher.backends.ray.node_actor import NodeActors
from launcher.backends.ray.worker_group import Member, WorkerGroup
from launcher.errors import BadRequest
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.policy import ADVICE, Failure, Outcome
from launcher.lifecycle.recovery import Elsewhere, End, Recovery
from launcher.lifecycle.run_dir import BEAT_SECONDS, RunDir
from launcher.rank.output import drop_output_on_full_disk
from launcher.request.spec import Plan, State

LOOK_SECONDS = 0.5
"""How often the driver looks for a request to stop, and for drained and new nodes."""

DEATH_SECONDS = 15.0
"""How long Ray may take to notice that a node is gone whose steward is; after that, only the steward is."""

CLOSE_GRACE_SECONDS = 10.0
"""How long Ray Train gets to end a lease; workers that are still there are then killed, and it gets as long again."""


class Driver:
    """Brings one submission of a run to its end."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.plan = run_dir.plan()
        self.recovery = Recovery(run_dir, self.plan)
        self.inbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self.node_actors = NodeActors(run_dir, lambda node, message: self.inbox.put_nowait((node, message)))
        self.capacity = ClusterCapacity(run_dir, self.plan, self.node_actors)
        self.ranks = self.plan.placement.world_size  # of the newest lease
        self.stop = ""  # why the run was asked to stop
        self.going: dict[str, float] = {}  # drained nodes, and when they go
        self.worker_group: WorkerGroup | None = None  # the workers that the run has now
        self.leaving = False  # these workers are given up before the next attempt
        self.asked = run_dir.last_attempt()  # counts the requests for workers
        self.suspects: dict[str, float] = {}  # when each was found silent; Ray may list it for a while

    async def run(self) -> State:
        """Connect, check, train, and leave nothing on the cluster; returns the state in which the run ended."""
        self.run_dir.reserve()
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            await join(self.plan)
            await self.capacity.check()
        except BadRequest as error:
            end = End(State.FAILED, Failure("bad request", str(error), advice=ADVICE["bad request"]))
        else:
            self.run_dir.event("accepted")
            looking = asyncio.create_task(self._look())
            end = await self.recovery.run(self)
            looking.cancel()
        if self.worker_group is not None:
            await self._finish(self.worker_group, f"{end.failure.kind}: {end.failure.message}" if end.failure else "")
        self.node_actors.close()
        await leave()
        return self.recovery.finish(end, self._as_it_went())

    def _as_it_went(self) -> Plan:
        """The plan with the number of ranks that there were in the end."""
        if self.ranks == self.plan.placement.world_size:
            return self.plan
        return replace(self.plan, placement=replace(self.plan.placement, nodes=1, ranks_per_node=self.ranks))

    def _beat(self) -> None:
        """Touch the heartbeat, in a thread: the event loop may wait for Ray."""
        while True:
            with suppress(OSError):
                self.run_dir.beat()
            time.sleep(BEAT_SECONDS / 4)

    async def _look(self) -> None:
        while True:
            if not self.stop and self.run_dir.stop_file.exists():
                self.stop = "the file stop"
                self.inbox.put_nowait((DRIVER, {"stop": self.stop}))
            going = self.going
            with suppress(Exception):  # Ray's control store may be away for a moment; the next look may go through
                going = draining()
            if new := going.keys() - self.going.keys():
                self.going = going
                self.inbox.put_nowait((DRIVER, {"drained": {node: going[node] for node in new}}))
            await asyncio.sleep(LOOK_SECONDS)

    # ---- the engine of the recovery loop ----------------------------------------------------------------------------

    @property
    def movable(self) -> bool:
        """Whether Ray Train can be kept from a node."""
        return self.capacity.steerable

    def spare(self, outcome: Outcome) -> bool:
        """Return whether other workers can be asked for: always after a loss; not away from TPU hosts that are unfit."""
        return self.capacity.steerable or not outcome.unfit

    async def attempt(self) -> tuple[int, Outcome] | End:
        """Run the next attempt, with other workers if those at hand are lost or given up."""
        if self.worker_group is not None and (self.worker_group.broken or self.leaving):
            await self._finish(self.worker_group, "an attempt failed, and the run goes on with other workers")
            self.worker_group = None
        while self.worker_group is None:
            if (found := await self._next_lease()) is not None:
                return found
        if self.stop:
            return End(State.STOPPED)
        attempt = RayAttempt(self.run_dir, self.worker_group, self.node_actors, self._note)
        return attempt.number, await attempt.run(self.inbox, self.going)

    def exclude(self, attempt: int, hosts: tuple[str, ...]) -> None:
        """Ask for other workers, away from `hosts`."""
        self.capacity.exclude(hosts, attempt)
        self.leaving = True

    def fate(self) -> JobFate:
        """Return why the ranks were stopped: empty if a person asked for it, else Ray takes nodes away."""
        return "" if self.stop else "preempting"

    def start_elsewhere(self, attempt: int, hosts: tuple[str, ...]) -> Elsewhere:
        """Ask for other workers; `hosts` are excluded if the other nodes can hold the run."""
        if not hosts:
            self.leaving = True
        elif self.capacity.ranks_for(self.capacity.nodes(but=hosts)):
            self.exclude(attempt, hosts)
        return Elsewhere.NOW

    async def pause(self, seconds: float) -> None:
        """Wait, unless the workers are given up, which takes time enough."""
        if self.worker_group is None or not (self.worker_group.broken or self.leaving):
            await asyncio.sleep(seconds)

    # ---- leases ---------------------------------------------------------------------------------------------------

    async def _next_lease(self) -> tuple[int, Outcome] | End | None:
        """Ask for workers and wait for them: the outcome of an attempt that they did not start, the end, or None.

        None says to look again: `worker_group` has its workers, or the cluster did not give them.
        """
        ranks = await self._capacity()
        if isinstance(ranks, End):
            return ranks
        self.asked += 1
        worker_group = WorkerGroup(self.plan, self.asked, ranks, lost_before=len(self.capacity.lost))
        worker_group.start(self.capacity.request(self.asked, ranks))
        self.ranks = ranks
        if await self._gather(worker_group):
            self.capacity.lacking, self.worker_group, self.leaving = None, worker_group, False
            return None
        if self.stop:
            return End(State.STOPPED)  # leaving ends what is being started
        await self._finish(worker_group, "the workers did not start")
        return self._not_started(worker_group)

    async def _capacity(self) -> int | End:
        """Wait until the cluster can hold the run, for a bounded time; returns the number of ranks, or how it ended."""
        while True:
            nodes = self.capacity.nodes()
            if self.stop:
                return End(State.STOPPED)
            late = time.monotonic() - DEATH_SECONDS
            if any(self.suspects.get(node.id, late) > late for node in nodes):
                await self._on_idle_message()
                continue
            if ranks := self.capacity.ranks_for(nodes):
                if not self.plan.cluster.ray.autoscales:  # there, only workers that come are an answer
                    self.capacity.lacking = None
                return ranks
            if self.capacity.readmit():
                continue
            if failure := self.capacity.too_small(shortage(nodes, self.capacity.scaling())):
                return End(State.FAILED, failure)
            await self._on_idle_message()

    async def _on_idle_message(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                node, message = await self.inbox.get()
                self._note(node, message, None)

    async def _gather(self, worker_group: WorkerGroup) -> bool:
        """Wait until all workers of the lease are ready; False where they will not be."""
        fields = False
        since, before = time.monotonic(), reservations()
        while not worker_group.complete:
            if worker_group.done.is_set() or worker_group.broken or self.stop:
                return False
            if not fields and time.monotonic() - since > 30:
                fields = True
                self.run_dir.event("waiting", message="the cluster's nodes are in use by others, or starting")
            await self.capacity.start_actors(self.capacity.nodes())
            # Ray has chosen the nodes, and their stewards can import while it still starts its workers there.
            made = reservations().items() - before.items()
            self.node_actors.open({node for _, nodes in made for node in nodes if len(nodes) == worker_group.ranks})
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    node, message = await self.inbox.get()
                    self._note(node, message, worker_group)
                    while not self.inbox.empty():
                        self._note(*self.inbox.get_nowait(), worker_group)
        return not worker_group.misplaced()

    def _note(self, node: str, message: Message, worker_group: WorkerGroup | None) -> None:
        """Take in what matters also between attempts."""
        match message:
            case {"registered": worker, "lease": number, "environment": environment} if (
                worker_group and number == worker_group.number
            ):
                worker_group.register(Member(worker, self.node_actors.nodes[node], environment))
            case {"gone": _, "lease": number} if worker_group and number == worker_group.number:
                worker_group.broken = True
            case {"lost": _}:
                self.suspects[node] = time.monotonic()
                self.capacity.lost.append(str(self.node_actors.nodes[node]))
                if worker_group and any(member.node.id == node for member in worker_group.members):
                    worker_group.broken = True

    def _not_started(self, worker_group: WorkerGroup) -> tuple[int, Outcome] | End | None:
        """Workers that never came: what the cluster lacks is waited for, anything else counts as a failed attempt."""
        if type(worker_group.cause).__name__ == "WorkerGroupStartupTimeoutError":
            if not self.plan.cluster.ray.autoscales:
                return None
            failure = self.capacity.too_small("the workers that Ray was asked for did not come")
            return End(State.FAILED, failure) if failure else None
        if gone := self.capacity.lost[worker_group.lost_before :]:
            return self.run_dir.claim_attempt(), Outcome({}, lost=gone)
        cause = str(worker_group.cause or "one of them ended").strip().splitlines()[-1]
        text = f"Ray Train could not start the workers: {cause}"
        return self.run_dir.claim_attempt(), Outcome({}, not_started=text)

    async def _finish(self, worker_group: WorkerGroup, text: str) -> None:
        """End the lease, whatever state it is in; `text` says why the run failed, for Ray Train's record of it."""
        for rank, member in enumerate(worker_group.members):
            self.node_actors.send(member.node.id, {"command": member.worker, "end": text if rank == 0 else ""})
        for _ in range(2):
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE_SECONDS):
                    await worker_group.done.wait()
                    return
            for member in worker_group.members:
                self.node_actors.send(member.node.id, {"kill_worker": member.worker})


def main() -> None:
    """``python -m launcher.backends.ray.driver RUN_DIR``."""
    drop_output_on_full_disk()
    run_dir = RunDir(Path(sys.argv[1]))
    state = asyncio.run(Driver(run_dir).run())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(state.exit_status)  # what still waits for an answer of Ray's would hold this process up


if __name__ == "__main__":
    main()
