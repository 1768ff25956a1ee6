"""The coordinator: node 0's second hat. It opens attempts, decides what follows from their ends, and leaves the result."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from launcher import environment, exit_status, history, preflight
from launcher.attempt import Attempt
from launcher.ending import end_run, note_failure, until_writable
from launcher.network import reserve_port
from launcher.peers import CONNECT_SECONDS, PULSE_SECONDS, Peers
from launcher.policy import Action, Failure, Outcome, back_off, decide, no_progress, unfit
from launcher.ranks import Message, NodeRanks, Seat, on_signals
from launcher.rundir import BEAT_SECONDS, RunDir
from launcher.spec import Plan, State


class Coordinator:
    """Runs one job: all attempts inside one allocation."""

    def __init__(self, run_dir: RunDir, plan: Plan, seat: Seat) -> None:
        self.run_dir, self.plan, self.seat = run_dir, plan, seat
        self.inbox: asyncio.Queue[tuple[int, Message]] = asyncio.Queue()
        self.own = NodeRanks(run_dir, plan, seat, lambda message: self.inbox.put_nowait((seat.node, message)))
        self.peers = Peers(run_dir, seat, lambda node, message: self.inbox.put_nowait((node, message)))
        self.stop: signal.Signals | None = None  # the first request to stop
        self.preempted = False
        self.struck: set[int] = set()  # agents of unfit nodes; they stay, since the job's exit status is theirs, too
        self.started = time.monotonic()

    async def run(self) -> int:
        """Bring the run to an end and return its exit status."""
        on_signals(lambda number: self.inbox.put_nowait((self.seat.node, {"signal": number})))
        session = self.run_dir.claim_session(self.seat.host)
        self.run_dir.reserve()
        self.run_dir.beat()
        beating = asyncio.create_task(self._beat(session))
        await self.own.open()
        if self.seat.nodes > 1:
            await self.peers.listen()
        with suppress(OSError):  # meanwhile the forkserver imports
            await asyncio.to_thread(environment.leave, self.run_dir.path)
        state = State.FAILED
        try:
            await self._wait_for_peers()
            state = await self._attempts()
        finally:
            await self.own.close()
            await self.peers.close(state.exit_status)
            beating.cancel()
        return state.exit_status

    async def _wait_for_peers(self) -> None:
        """Wait until every node has joined, or a stop came, or those that did not have had their time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                while len(self.peers.here()) < self.seat.nodes and not self.stop:
                    _, message = await self.inbox.get()
                    self._note_stop(message)

    async def _beat(self, session: str) -> None:
        """Touch the heartbeat, look how the ranks of this node get on, and whether somebody left a request to stop."""
        while True:
            # Not in this thread: a shared disk may take a minute to answer, and the other nodes would think us gone.
            if await asyncio.to_thread(self._look, session) and not self.stop:
                self.inbox.put_nowait((self.seat.node, {"signal": int(signal.SIGTERM)}))
            for _ in range(round(BEAT_SECONDS / PULSE_SECONDS)):
                self.inbox.put_nowait((self.seat.node, {"beats": self.own.report()}))
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

    # ---- attempts -------------------------------------------------------------------------------------------------

    async def _attempts(self) -> State:
        while True:
            past = history.read(self.run_dir.events())
            left = self.plan.spec.max_restarts - len(past.setbacks)
            attempt = self.run_dir.claim_attempt()
            outcome = await self._attempt(attempt)
            await until_writable(self.run_dir)
            # Ranks of this very node cannot be killed, or should not start: it is always one of those that are used.
            stuck = self._host(self.seat.node) in (*outcome.lost, *outcome.unfit)
            spare = len(self._fit()) >= self.plan.placement.nodes and not stuck
            action, failure = decide(outcome, left, past, self.seat.requeue is not None, spare)
            match action:
                case Action.FINISH:
                    return self._end(State.SUCCEEDED, attempt)
                case Action.FAIL:
                    return self._end(State.FAILED, attempt, failure, outcome.step)
                case Action.STOP:
                    return self._stopped(attempt, past, outcome.step)
                case Action.MOVE:
                    assert failure is not None, "only a failure is a reason to leave"
                    noted = note_failure(self.run_dir, attempt, failure, left - 1, outcome.step)
                    away = tuple(outcome.unfit) or unfit(failure, past, outcome.step)
                    if noted and self._requeue(attempt, failure.kind, outcome.step, away):
                        return State.STOPPED
                    return self._end(State.FAILED, attempt, failure, outcome.step)
                case Action.RESTART:
                    note_failure(self.run_dir, attempt, failure, left - 1, outcome.step)
                    if outcome.unfit:  # others take their places, which need no time to recover
                        self.run_dir.event("struck", attempt=attempt, exclude=list(outcome.unfit))
                    else:
                        await self._pause(back_off(past, outcome.step))

    async def _pause(self, seconds: float) -> None:
        """Wait, unless a stop comes; whatever else is said meanwhile is of the attempt that is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.stop:
                    _, message = await self.inbox.get()
                    self._note_stop(message)

    def _stopped(self, attempt: int, past: history.History, step: int | None) -> State:
        """The ranks stopped because they were asked to: go on later if it was the scheduler, else that was the end."""
        cancelled = self.run_dir.stop_file.exists()
        fate = "" if cancelled else self.seat.fate()
        if fate == "requeued":
            self.run_dir.event("requeued", attempt=attempt, reason="scheduler", step=step)
            return State.STOPPED
        if (self.preempted or fate == "preempting") and not cancelled:
            step = step or self.run_dir.newest_step()
            if failure := no_progress(past, step):
                return self._end(State.STOPPED, attempt, failure, step)
            if self._requeue(attempt, "preempted", step):
                return State.STOPPED
        return self._end(State.STOPPED, attempt)

    def _requeue(self, attempt: int, reason: str, step: int | None, exclude: tuple[str, ...] = ()) -> bool:
        if self.seat.requeue is None or not self.seat.requeue(exclude):
            return False
        self.run_dir.event("requeued", attempt=attempt, reason=reason, step=step, exclude=list(exclude))
        return True

    async def _attempt(self, number: int) -> Outcome:
        """Start all ranks and watch them to their end."""
        if self.stop:
            return Outcome({}, stop=self.reason)
        placement = self.plan.placement
        agents = self._fit()[: placement.nodes]  # those after them are spare
        if len(agents) < placement.nodes:
            here = self.peers.here()
            return Outcome({}, lost=[self._host(node) for node in range(self.seat.nodes) if node not in here])
        if self.plan.cluster.preflight and (kept := await self._preflight(number, agents)):
            return kept
        nodes = {agent: node for node, agent in enumerate(agents)}
        attempt = Attempt(number, nodes, placement.ranks_per_node, self.plan.cluster.hang_after, self._tell_all)
        holder = reserve_port()
        try:
            hosts = [self.peers.hosts[agent] for agent in agents]
            self.run_dir.event("started", attempt=number, world_size=placement.world_size, hosts=hosts)
            start = {"start": number, "address": self.seat.address, "port": holder.getsockname()[1]}
            if placement.on_tpu:
                start["hosts"] = [self.peers.addresses[agent] for agent in agents]
            for agent, node in nodes.items():
                self._tell(agent, start | {"node": node})
            while not attempt.over:
                await self._listen(attempt)
            host_of = self._host_of(agents)
            for agent in attempt.lost:
                self.peers.drop(agent)
            errors = self.run_dir.errors(number)
            lost = [self._host(agent) for agent in attempt.lost]
            aborts = await asyncio.to_thread(exit_status.causes, self.run_dir, number, attempt.exits)
            return Outcome(
                attempt.exits, errors, self.reason, lost, host_of, attempt.progress, attempt.hung, aborts=aborts
            )
        finally:
            holder.close()

    async def _preflight(self, number: int, agents: Sequence[int]) -> Outcome | None:
        """Ask the nodes of `agents` how they are; return what keeps the attempt from starting, None for nothing."""
        answers = await preflight.ask(
            number,
            agents,
            lambda agent: self._tell(agent, {"look": number}),
            self.inbox,
            awaited=lambda agent: not self.stop and agent in self.peers.here(),
            other=lambda _, message: self._note_stop(message),
        )
        if self.stop:
            return Outcome({}, stop=self.reason)
        if gone := set(agents) - {*self.peers.here()}:
            return Outcome({}, lost=[self._host(agent) for agent in sorted(gone)])
        ranks = dict.fromkeys(map(self._host, agents), self.plan.placement.ranks_per_node)
        unfit_hosts = preflight.judge({self._host(agent): facts for agent, facts in answers.items()}, ranks)
        self.struck |= {agent for agent in agents if self._host(agent) in unfit_hosts}
        return Outcome({}, hosts=self._host_of(agents), unfit=unfit_hosts) if unfit_hosts else None

    def _fit(self) -> list[int]:
        """The agents that ranks may start on."""
        return [agent for agent in self.peers.here() if agent not in self.struck]

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
            attempt.times_up()
            return
        attempt.hear(agent, message)
        if "signal" in message:
            # The first request is passed on; a second Ctrl-C, or the end of the grace, kills.
            first = not self.stop
            again = self.stop == message["signal"] == signal.SIGINT
            self._note_stop(message)
            if first:
                self.run_dir.event("stopping", reason=self.reason)
                attempt.kill_within(self.plan.cluster.grace)
                self._tell_all({"signal": int(signal.SIGTERM)})
            elif again:
                attempt.kill_within(0.0)

    def _tell_all(self, message: Message) -> None:
        for agent in self.peers.here():
            self._tell(agent, message)

    def _tell(self, agent: int, message: Message) -> None:
        if agent != self.seat.node:
            self.peers.tell(agent, message)
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
        return bool(limit) and time.monotonic() - self.started > limit - self.plan.cluster.grace - 60

    @property
    def reason(self) -> str:
        return self.stop.name if self.stop else ""

    def _end(self, state: State, attempt: int, failure: Failure | None = None, step: int | None = None) -> State:
        return end_run(self.run_dir, self.plan, state, attempt, self.started, failure, step)
