"""The Ray driver: a detached process that connects to the cluster, holds workers of Ray Train, and leaves the result.

``python -m launcher.backends.ray_driver RUN_DIR``. It is to Ray what the coordinator is to the other engines, with the
same policy::

    driver ── fit() of Ray Train ── one worker a rank: devices and environment     (a lease; `ray_lease`, `ray_worker`)
       └───── a steward on each node ── forkserver ── the ranks                    (attempts; `ray_steward`)

A rank that dies starts again within its lease, and Ray does not notice. A worker or node that dies, or a node that is
drained or struck, ends the lease; the next one is asked of the nodes that are left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launcher import history
from launcher.backends.ray_attempt import DRIVER, RayAttempt
from launcher.backends.ray_cluster import draining, join, leave, reservations, shortage
from launcher.backends.ray_lease import Lease, Member
from launcher.backends.ray_reports import Reports
from launcher.backends.ray_room import Room
from launcher.backends.ray_stewards import Stewards
from launcher.ending import end_run, note_failure, note_interruption, until_writable
from launcher.errors import BadRequest
from launcher.output import outlive_a_full_disk
from launcher.policy import ADVICE, Action, Failure, Outcome, back_off, decide, no_progress, unfit
from launcher.ranks import Message
from launcher.rundir import BEAT_SECONDS, RunDir
from launcher.spec import Plan, State

LOOK_SECONDS = 0.5
"""How often the driver looks for a request to stop, for drained and new nodes, and for new checkpoints."""

DEATH_SECONDS = 15.0
"""How long Ray may take to notice that a node is gone whose steward is; after that, only the steward is."""

FAREWELL_SECONDS = 10.0
"""How long Ray Train gets to end a lease; workers that are still there are then killed, and it gets as long again."""


@dataclass(frozen=True)
class End:
    """How the run ended: its state, what failed, and after which step."""

    state: State
    failure: Failure | None = None
    step: int | None = None


class Driver:
    """Brings one submission of a run to its end."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.plan = run_dir.plan()
        self.started = time.monotonic()
        self.inbox: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self.stewards = Stewards(run_dir, lambda node, message: self.inbox.put_nowait((node, message)))
        self.room = Room(run_dir, self.plan, self.stewards)
        self.reports = Reports(run_dir)
        self.ranks = self.plan.placement.world_size  # of the newest lease
        self.stop = ""  # why the run was asked to stop
        self.going: dict[str, float] = {}  # drained nodes, and when they go
        self.suspects: dict[str, float] = {}  # when each was found silent; Ray may list it for a while

    async def run(self) -> State:
        """Connect, check, train, and leave nothing on the cluster; returns the state in which the run ended."""
        self.run_dir.reserve()
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            await join(self.plan)
            await self.room.check()
        except BadRequest as error:
            end = End(State.FAILED, Failure("bad request", str(error), advice=ADVICE["bad request"]))
        else:
            self.run_dir.event("accepted")
            looking = asyncio.create_task(self._look())
            end = await self._leases()
            looking.cancel()
        self.stewards.close()
        await leave()
        attempt = self.run_dir.last_attempt()
        return end_run(self.run_dir, self._as_it_went(), end.state, attempt, self.started, end.failure, end.step)

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
            if self.reports.new():
                self.inbox.put_nowait((DRIVER, {"saved": True}))
            await asyncio.sleep(LOOK_SECONDS)

    # ---- leases ---------------------------------------------------------------------------------------------------

    async def _leases(self) -> End:
        number = self.run_dir.last_attempt()
        while True:
            ranks = await self._room()
            if isinstance(ranks, End):
                return ranks
            number += 1
            lease = Lease(self.plan, number, ranks, lost_before=len(self.room.lost))
            self.reports.begin()
            lease.start(self.room.request(number, ranks))
            self.ranks = ranks
            end = await self._hold(lease)
            if end is not None:
                return end

    async def _room(self) -> int | End:
        """Wait until the cluster can hold the run, for a bounded time; returns the number of ranks, or how it ended."""
        while True:
            nodes = self.room.nodes()
            if self.stop:
                return End(State.STOPPED)
            late = time.monotonic() - DEATH_SECONDS
            if any(self.suspects.get(node.id, late) > late for node in nodes):
                await self._hear_idle()
                continue
            if ranks := self.room.ranks_for(nodes):
                if not self.plan.cluster.ray.autoscales:  # there, only workers that come are an answer
                    self.room.lacking = None
                return ranks
            if self.room.forgive():
                continue
            if failure := self.room.too_small(shortage(nodes, self.room.scaling())):
                return End(State.FAILED, failure)
            await self._hear_idle()

    async def _hear_idle(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                node, message = await self.inbox.get()
                self._note(node, message, None)

    async def _hold(self, lease: Lease) -> End | None:
        """Run attempts until the run or the lease is over; returns the state of the run, None for another lease."""
        if not await self._gather(lease):
            if self.stop:
                return End(State.STOPPED)  # leaving ends what is being started
            await self._finish(lease, "the workers did not start")
            return await self._not_started(lease)
        self.room.lacking = None
        while not self.stop:
            attempt = RayAttempt(self.run_dir, lease, self.stewards, self.reports, self._note)
            outcome = await attempt.run(self.inbox, self.going)
            await until_writable(self.run_dir)
            attempt.report()
            past = history.read(self.run_dir.events())
            left = self.plan.spec.max_restarts - len(past.setbacks)
            action, failure, struck = self._decide(outcome, left, past)
            if action is Action.RESTART:
                note_failure(self.run_dir, attempt.number, failure, left - 1, outcome.step)
                if struck:
                    self.room.strike(struck, attempt.number)
                if lease.broken or struck:
                    await self._finish(lease, str(failure and failure.message))
                    return None
                await asyncio.sleep(back_off(past, outcome.step))
                continue
            await self._finish(lease, f"{failure.kind}: {failure.message}" if failure is not None else "")
            if action is Action.FINISH:
                return End(State.SUCCEEDED)
            if action is Action.STOP:
                return self._stopped(attempt.number, outcome)
            return End(State.FAILED, failure, outcome.step)
        await self._finish(lease, "")
        return End(State.STOPPED)

    def _decide(
        self, outcome: Outcome, left: int, past: history.History
    ) -> tuple[Action, Failure | None, tuple[str, ...]]:
        """What follows from an attempt, the failure if it was one, and the nodes to stay away from.

        A node that failed is left where the others can hold the run; one that is unfit also where they cannot yet.
        """
        spare = self.room.steerable or not outcome.unfit
        action, failure = decide(outcome, left, past, movable=self.room.steerable, spare=spare)
        if action is not Action.MOVE:
            return action, failure, tuple(outcome.unfit) if action is Action.RESTART else ()
        assert failure is not None, "only a failure is a reason to leave"
        struck = unfit(failure, past, outcome.step)
        return Action.RESTART, failure, struck if self.room.ranks_for(self.room.nodes(but=struck)) else ()

    def _stopped(self, attempt: int, outcome: Outcome) -> End | None:
        """The ranks stopped because they were asked to: go on on other nodes where it was Ray that asked."""
        note_interruption(self.run_dir, attempt, outcome)
        if self.stop:
            return End(State.STOPPED)
        step = outcome.step or self.run_dir.newest_step()
        past = history.read(self.run_dir.events())
        if failure := no_progress(past, step, self.plan.cluster.requeues_without_progress):
            return End(State.STOPPED, failure, step)
        self.run_dir.event("requeued", attempt=self.run_dir.last_attempt(), reason="preempted", step=step)
        return None

    async def _gather(self, lease: Lease) -> bool:
        """Wait until all workers of the lease are ready; False where they will not be."""
        told = False
        since, before = time.monotonic(), reservations()
        while not lease.complete:
            if lease.done.is_set() or lease.broken or self.stop:
                return False
            if not told and time.monotonic() - since > 30:
                told = True
                self.run_dir.event("waiting", message="the cluster's nodes are in use by others, or starting")
            await self.room.hire(self.room.nodes())
            # Ray has chosen the nodes, and their stewards can import while it still starts its workers there.
            made = reservations().items() - before.items()
            self.stewards.open({node for _, nodes in made for node in nodes if len(nodes) == lease.ranks})
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    node, message = await self.inbox.get()
                    self._note(node, message, lease)
                    while not self.inbox.empty():
                        self._note(*self.inbox.get_nowait(), lease)
        return not lease.misplaced()

    def _note(self, node: str, message: Message, lease: Lease | None) -> None:
        """Take in what matters also between attempts."""
        match message:
            case {"enrolled": worker, "lease": number, "environment": environment} if lease and number == lease.number:
                lease.enrol(Member(worker, self.stewards.nodes[node], environment))
            case {"gone": _, "lease": number} if lease and number == lease.number:
                lease.broken = True
            case {"lost": _}:
                self.suspects[node] = time.monotonic()
                self.room.lost.append(str(self.stewards.nodes[node]))
                if lease and any(member.node.id == node for member in lease.members):
                    lease.broken = True

    async def _not_started(self, lease: Lease) -> End | None:
        """Workers that never came: what the cluster lacks is waited for, anything else counts as a failed attempt."""
        if type(lease.cause).__name__ == "WorkerGroupStartupTimeoutError":
            if self.plan.cluster.ray.autoscales:
                failure = self.room.too_small("the workers that Ray was asked for did not come")
                return End(State.FAILED, failure) if failure else None
            return None
        attempt, past = self.run_dir.claim_attempt(), history.read(self.run_dir.events())
        left = self.plan.spec.max_restarts - len(past.setbacks)
        gone = self.room.lost[lease.lost_before :]
        action, failure = decide(Outcome({} if gone else {0: -signal.SIGKILL}, lost=gone), left, past, spare=True)
        assert failure is not None
        if not gone:
            said = str(lease.cause or "one of them ended").strip().splitlines()[-1]
            text = f"Ray Train could not start the workers: {said}"
            failure = replace(failure, kind="not started", message=text, advice=ADVICE["not started"])
        if action is Action.RESTART:
            note_failure(self.run_dir, attempt, failure, left - 1)
            await asyncio.sleep(back_off(past, None))
            return None
        return End(State.FAILED, failure)

    async def _finish(self, lease: Lease, text: str) -> None:
        """End the lease, whatever state it is in; `text` says why the run failed, for Ray Train's record of it."""
        for rank, member in enumerate(lease.members):
            self.stewards.tell(member.node.id, {"order": member.worker, "end": text if rank == 0 else ""})
        for _ in range(2):
            with suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await lease.done.wait()
                    return
            for member in lease.members:
                self.stewards.tell(member.node.id, {"evict": member.worker})


def main() -> None:
    """``python -m launcher.backends.ray_driver RUN_DIR``."""
    outlive_a_full_disk()
    run_dir = RunDir(Path(sys.argv[1]))
    state = asyncio.run(Driver(run_dir).run())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(state.exit_status)  # what still waits for an answer of Ray's would hold this process up


if __name__ == "__main__":
    main()
