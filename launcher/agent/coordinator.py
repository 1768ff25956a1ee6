"""The coordinator: node 0's second hat. It opens attempts, decides what follows from their ends, and leaves the result."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from launcher.agent.attempt import Attempt
from launcher.agent.health import environment_record, preflight
from launcher.agent.network import reserve_port
from launcher.agent.node_ranks import NodeRanks, on_signals
from launcher.agent.peers import CONNECT_SECONDS, PULSE_SECONDS, Peers
from launcher.agent.protocol import AgentInfo, Message
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.recovery import Elsewhere, Recovery, abort_causes
from launcher.lifecycle.run_dir import BEAT_SECONDS, RunDir
from launcher.request.spec import Plan, State

LOOP_SECONDS, SCHEDULER_SECONDS = 0.05, 0.5
"""How long after the last rank's end a signal to this process may still arrive; under a scheduler also from other nodes."""


class Coordinator:
    """Runs one job: all attempts inside one allocation."""

    def __init__(self, run_dir: RunDir, plan: Plan, agent_info: AgentInfo) -> None:
        self.run_dir, self.plan, self.agent_info = run_dir, plan, agent_info
        self.inbox: asyncio.Queue[tuple[int, Message]] = asyncio.Queue()
        self.own = NodeRanks(
            run_dir, plan, agent_info, lambda message: self.inbox.put_nowait((agent_info.node, message))
        )
        self.peers = Peers(run_dir, agent_info, lambda node, message: self.inbox.put_nowait((node, message)))
        self.stop: signal.Signals | None = None  # the first request to stop
        self.preempted = False
        self.excluded_nodes: set[int] = (
            set()
        )  # agents of unfit nodes; they stay, since the job's exit status is theirs, too
        self.recovery = Recovery(run_dir, plan)

    async def run(self) -> int:
        """Bring the run to an end and return its exit status."""
        on_signals(lambda number: self.inbox.put_nowait((self.agent_info.node, {"signal": number})))
        session = self.run_dir.claim_session(self.agent_info.host)
        self.run_dir.reserve()
        self.run_dir.beat()
        beating = asyncio.create_task(self._beat(session))
        await self.own.open()
        if self.agent_info.nodes > 1:
            await self.peers.listen()
        with suppress(OSError):  # meanwhile the forkserver imports
            await asyncio.to_thread(environment_record.leave, self.run_dir.path)
        state = State.FAILED
        try:
            await self._wait_for_peers()
            state = self.recovery.finish(await self.recovery.run(self))
        finally:
            await self.own.close()
            await self.peers.close(state.exit_status)
            beating.cancel()
        return state.exit_status

    async def _wait_for_peers(self) -> None:
        """Wait until every node has joined, or a stop came, or those that did not have had their time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                while len(self.peers.connected()) < self.agent_info.nodes and not self.stop:
                    _, message = await self.inbox.get()
                    self._note_stop(message)

    async def _beat(self, session: str) -> None:
        """Touch the heartbeat, look how the ranks of this node get on, and whether somebody left a request to stop."""
        while True:
            # Not in this thread: a shared disk may take a minute to answer, and the other nodes would think us gone.
            if await asyncio.to_thread(self._look, session) and not self.stop:
                self.inbox.put_nowait((self.agent_info.node, {"signal": int(signal.SIGTERM), "file": True}))
            for _ in range(round(BEAT_SECONDS / PULSE_SECONDS)):
                self.inbox.put_nowait((self.agent_info.node, {"beats": self.own.report()}))
                await asyncio.sleep(PULSE_SECONDS)

    def _look(self, session: str) -> bool:
        """Touch the heartbeat; returns whether somebody asked for a stop."""
        with suppress(OSError, ValueError):  # a disk that fails must not end the run; the next look may go through
            if self.run_dir.session() not in (session, None):
                # A scheduler that thought this job dead has started it again: two must not write to one run.
                print("launch: this run has been taken over by another job; leaving", file=sys.stderr)
                os._exit(State.FAILED.exit_status)  # the forkserver sees the agent go and kills the ranks
            self.run_dir.beat()
            return self.run_dir.stop_file.exists()
        return False

    # ---- the engine of the recovery loop ----------------------------------------------------------------------------

    @property
    def movable(self) -> bool:
        """Whether a scheduler can start the job again on other nodes."""
        return self.agent_info.requeue is not None

    def spare(self, outcome: Outcome) -> bool:
        """Return whether nodes enough are left; the ranks of this very node are always among those that are used."""
        stuck = self._host(self.agent_info.node) in (*outcome.lost, *outcome.unfit)
        return len(self._fit()) >= self.plan.placement.nodes and not stuck

    async def attempt(self) -> tuple[int, Outcome]:
        """Run the next attempt; return its number and its outcome."""
        number = self.run_dir.claim_attempt()
        return number, await self._attempt(number)

    def exclude(self, attempt: int, hosts: tuple[str, ...]) -> None:
        """Record the excluded hosts; `_preflight` has taken their agents out already."""
        self.run_dir.event("excluded", attempt=attempt, exclude=list(hosts))

    def fate(self) -> JobFate:
        """Return what the scheduler does with this job; empty after a request to cancel."""
        if self.run_dir.stop_file.exists():
            return ""
        fate = self.agent_info.fate()
        return "preempting" if self.preempted and not fate else fate

    def start_elsewhere(self, attempt: int, hosts: tuple[str, ...]) -> Elsewhere:
        """Ask the scheduler to start the job again away from `hosts`."""
        requeued = self.agent_info.requeue is not None and self.agent_info.requeue(hosts)
        return Elsewhere.LATER if requeued else Elsewhere.NOWHERE

    async def pause(self, seconds: float) -> None:
        """Wait, unless a stop comes; other messages that arrive meanwhile belong to the attempt that is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.stop:
                    _, message = await self.inbox.get()
                    self._note_stop(message)

    # ---- one attempt ------------------------------------------------------------------------------------------------

    async def _attempt(self, number: int) -> Outcome:
        """Start all ranks and watch them to their end."""
        if self.stop:
            return Outcome({}, stop=self.reason)
        placement = self.plan.placement
        agents = self._fit()[: placement.nodes]  # those after them are spare
        if len(agents) < placement.nodes:
            connected = self.peers.connected()
            return Outcome(
                {}, lost=[self._host(node) for node in range(self.agent_info.nodes) if node not in connected]
            )
        if self.plan.cluster.preflight and (kept := await self._preflight(number, agents)):
            return kept
        nodes = {agent: node for node, agent in enumerate(agents)}
        attempt = Attempt(number, nodes, placement.ranks_per_node, self.plan.cluster.hang_after, self._send_all_agents)
        holder = reserve_port()
        try:
            hosts = [self.peers.hosts[agent] for agent in agents]
            self.run_dir.event("started", attempt=number, world_size=placement.world_size, hosts=hosts)
            start = {"start": number, "address": self.agent_info.address, "port": holder.getsockname()[1]}
            if placement.on_tpu:
                start["hosts"] = [self.peers.addresses[agent] for agent in agents]
            for agent, node in nodes.items():
                self._send(agent, start | {"node": node})
            while not attempt.over:
                await self._listen(attempt)
            if not attempt.joined and not self.stop:
                await self._settle(attempt)
            stop, finished = self.reason, self.run_dir.finished(number, 0).exists()
            host_of = self._host_of(agents)
            for agent in attempt.lost:
                self.peers.drop(agent)
            errors = self.run_dir.errors(number)
            lost = [self._host(agent) for agent in attempt.lost]
            ends = Outcome(attempt.exits, errors, stop, lost, host_of, attempt.progress, attempt.hung)
            aborts = await asyncio.to_thread(abort_causes, self.run_dir, number, attempt.exits)
            return replace(ends, joined=attempt.joined, finished=finished, aborts=aborts)
        finally:
            holder.close()

    async def _settle(self, attempt: Attempt) -> None:
        """Take in a stop that ended the ranks before this process read it.

        A scheduler sends SIGTERM to every process of a step, and the ranks' ends may be read first. A request by the file
        `stop` does not count: it reaches the ranks through this process alone.
        """
        seconds = SCHEDULER_SECONDS if self.agent_info.requeue is not None else LOOP_SECONDS
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.stop:
                    _, message = await self.inbox.get()
                    if not message.get("file"):
                        self._note_stop(message)
        if not self.stop and -signal.SIGTERM in attempt.exits.values() and self.agent_info.fate():
            self.stop = signal.SIGTERM
        if self.stop:
            self.run_dir.event("stopping", reason=self.reason)

    async def _preflight(self, number: int, agents: Sequence[int]) -> Outcome | None:
        """Ask the nodes of `agents` how they are; return what keeps the attempt from starting, None for nothing."""
        answers = await preflight.ask(
            number,
            agents,
            lambda agent: self._send(agent, {"look": number}),
            self.inbox,
            awaited=lambda agent: not self.stop and agent in self.peers.connected(),
            other=lambda _, message: self._note_stop(message),
        )
        if self.stop:
            return Outcome({}, stop=self.reason)
        if gone := set(agents) - {*self.peers.connected()}:
            return Outcome({}, lost=[self._host(agent) for agent in sorted(gone)])
        ranks = dict.fromkeys(map(self._host, agents), self.plan.placement.ranks_per_node)
        unfit_hosts = preflight.judge({self._host(agent): facts for agent, facts in answers.items()}, ranks)
        self.excluded_nodes |= {agent for agent in agents if self._host(agent) in unfit_hosts}
        return Outcome({}, hosts=self._host_of(agents), unfit=unfit_hosts) if unfit_hosts else None

    def _fit(self) -> list[int]:
        """The agents that ranks may start on."""
        return [agent for agent in self.peers.connected() if agent not in self.excluded_nodes]

    def _host_of(self, agents: Sequence[int]) -> dict[int, str]:
        """Rank -> host, where `agents` are the nodes of the placement."""
        placement = self.plan.placement
        return {rank: self._host(agents[rank // placement.ranks_per_node]) for rank in range(placement.world_size)}

    def _host(self, agent: int) -> str:
        return self.peers.hosts.get(agent, f"node {agent}, which never joined,")

    async def _listen(self, attempt: Attempt) -> None:
        try:
            async with asyncio.timeout_at(attempt.kill_at):
                agent, message = await self.inbox.get()
        except TimeoutError:
            attempt.on_deadline()
            return
        attempt.on_message(agent, message)
        if "signal" in message:
            # The first request is passed on; a second Ctrl-C, or the end of the grace, kills.
            first = not self.stop
            again = self.stop == message["signal"] == signal.SIGINT
            self._note_stop(message)
            if first:
                self.run_dir.event("stopping", reason=self.reason, **attempt.ask_to_stop(self.plan.cluster.grace))
            elif again:
                attempt.kill_within(0.0)

    def _send_all_agents(self, message: Message) -> None:
        for agent in self.peers.connected():
            self._send(agent, message)

    def _send(self, agent: int, message: Message) -> None:
        if agent != self.agent_info.node:
            self.peers.send(agent, message)
        else:
            self.own.handle(message)

    def _note_stop(self, message: Message) -> None:
        """Remember a request to stop, if `message` is one."""
        if "signal" not in message:
            return
        self.stop = self.stop or signal.Signals(message["signal"])
        if message["signal"] == signal.SIGUSR2 and not self.preempted:
            self.preempted = True
            self.run_dir.event("preempted", signal="SIGUSR2", reason="time limit" if self._late() else "preemption")

    def _late(self) -> bool:
        """Whether the time limit is near; SLURM may send its signal a minute before it is due."""
        limit = self.plan.time_minutes * 60
        return bool(limit) and time.monotonic() - self.recovery.started > limit - self.plan.cluster.grace - 60

    @property
    def reason(self) -> str:
        return self.stop.name if self.stop else ""
