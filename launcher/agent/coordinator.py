"""Coordinate the agents of one run from node 0: attempts, recovery and the result."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from contextlib import suppress

from launcher.agent.health import environment_record
from launcher.agent.inside.visits import VisitRequests
from launcher.agent.job_attempt import Agents, Inbox, JobAttempt, StopRequests
from launcher.agent.network.peers import Peers
from launcher.agent.network.store import Store
from launcher.agent.node_ranks import NodeRanks, on_signals
from launcher.agent.protocol import AgentInfo, AgentMessage, StopRequest
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.recovery import Elsewhere, Recovery
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.terminal.relay import Streams
from launcher.request.spec import Plan, State


class Coordinator:
    """Runs one job: all attempts inside one allocation."""

    def __init__(self, run_dir: RunDir, plan: Plan, agent_info: AgentInfo, streams: Streams | None = None) -> None:
        self.run_dir, self.plan, self.agent_info = run_dir, plan, agent_info
        self.inbox: Inbox = asyncio.Queue()
        self.local = NodeRanks(run_dir, plan, agent_info, self._emit, streams)
        self.peers = Peers(run_dir, agent_info, lambda node, message: self.inbox.put_nowait((node, message)))
        self.store = Store(run_dir, plan, agent_info.node)
        self.agents = Agents(agent_info, self.local, self.peers, self.store)
        self.stops = StopRequests(run_dir, plan)
        self.visits = VisitRequests(run_dir)
        self.recovery = Recovery(run_dir, plan)

    def _emit(self, message: AgentMessage) -> None:
        self.inbox.put_nowait((self.agent_info.node, message))

    async def run(self) -> int:
        """Bring the run to an end and return its exit status."""
        on_signals(lambda number: self._emit(StopRequest(number)))
        gc.freeze()  # else each full collection looks at all that was imported
        session = self.run_dir.claim_session(self.agent_info.host)
        self.run_dir.reserve()
        self.run_dir.beat()
        self.visits.prepare()
        background = [
            asyncio.create_task(self._beat(session)),
            asyncio.create_task(self.visits.pass_on(self.agents.send_all)),
        ]
        await self.local.open()
        self.store.prepare()
        if self.agent_info.nodes > 1:
            await self.peers.listen()
        with suppress(OSError):  # meanwhile the forkserver imports
            await asyncio.to_thread(environment_record.leave, self.run_dir.path)
        state = State.FAILED
        try:
            await self._wait_for_peers()
            state = self.recovery.finish(await self.recovery.run(self))
        finally:
            await self.local.close()
            self.store.close()
            await self.peers.close(state.exit_status)
            for task in background:
                task.cancel()
        return state.exit_status

    async def _wait_for_peers(self) -> None:
        """Wait until every node has joined or will not, or a stop is requested, `Timeouts.connect` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TIMEOUTS.connect):
                while (
                    len(self.peers.connected()) + len(self.agents.unfit) < self.agent_info.nodes
                    and not self.stops.first
                ):
                    _, message = await self.inbox.get()
                    self.stops.note(message)

    async def _beat(self, session: str) -> None:
        """Touch the run's heartbeat, report the status of this node's ranks, and look for the file `stop`."""
        while True:
            # Not in this thread: a shared disk may take a minute to answer, and the other nodes would think us gone.
            if await asyncio.to_thread(self._look, session) and not self.stops.first:
                self._emit(StopRequest(by_file=True))
            for _ in range(round(TIMEOUTS.run_heartbeat / TIMEOUTS.heartbeat)):
                if not self.local.foreground.suspended:
                    self._emit(self.local.report())
                await asyncio.sleep(TIMEOUTS.heartbeat)

    def _look(self, session: str) -> bool:
        """Touch the heartbeat; returns whether somebody asked for a stop."""
        with suppress(OSError, ValueError):  # a disk that fails must not end the run; the next look may go through
            if self.run_dir.session() not in (session, None):
                # A scheduler that thought this job dead has started it again: two must not write to one run.
                print("launch: this run has been taken over by another job; leaving", file=sys.stderr)
                os._exit(State.FAILED.exit_status)  # the forkserver sees the agent go and kills the ranks
            self.run_dir.beat()
            if len(self.peers.connected()) < self.agent_info.nodes:
                self.agents.unfit = dict(self.agent_info.unfit())
            return self.run_dir.stop_file.exists()
        return False

    # ---- the engine of the recovery loop ----------------------------------------------------------------------------

    @property
    def movable(self) -> bool:
        """Whether a scheduler can start the job again on other nodes."""
        return self.agent_info.requeue is not None

    @property
    def stopping(self) -> bool:
        return self.stops.first is not None

    def spare(self, outcome: Outcome) -> bool:
        """Return whether nodes enough are left; the ranks of this very node are always among those that are used."""
        stuck = self.agents.host(self.agent_info.node) in (*outcome.lost, *outcome.unfit)
        return len(self.agents.available()) >= self.plan.placement.nodes and not stuck

    async def attempt(self) -> tuple[int, Outcome]:
        """Run the next attempt; return its number and its outcome."""
        number = self.run_dir.claim_attempt()
        attempt = JobAttempt(number, self.run_dir, self.plan, self.agents, self.stops, self.inbox)
        return number, await attempt.run()

    def exclude(self, attempt: int, hosts: tuple[str, ...]) -> None:
        """Record the excluded hosts; the preflight has excluded their agents already."""
        history.record_excluded(self.run_dir, attempt, hosts)

    def fate(self) -> JobFate:
        """Return what the scheduler does with this job; empty after a request to cancel."""
        if self.run_dir.stop_file.exists():
            return ""
        fate = self.agent_info.fate()
        return "preempting" if self.stops.preempted and not fate else fate

    def start_elsewhere(self, attempt: int, hosts: tuple[str, ...]) -> Elsewhere:
        """Ask the scheduler to start the job again away from `hosts`."""
        requeued = self.agent_info.requeue is not None and self.agent_info.requeue(hosts)
        return Elsewhere.LATER if requeued else Elsewhere.NOWHERE

    async def pause(self, seconds: float) -> None:
        """Wait, unless a stop is requested; other messages that arrive meanwhile belong to the attempt that is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.stops.first:
                    _, message = await self.inbox.get()
                    self.stops.note(message)
