"""One attempt inside the allocation of a job: preflight, start, supervision and outcome."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from launcher.agent.attempt import Attempt
from launcher.agent.hangs.timeouts import causes_of_aborts
from launcher.agent.health import preflight
from launcher.agent.network.peers import Peers
from launcher.agent.network.store import Store
from launcher.agent.node_ranks import NodeRanks
from launcher.agent.protocol import AgentInfo, AgentMessage, CheckNode, Start, StopRequest, ToAgent
from launcher.agent.switches import by_switches
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.exit_status import STOPPED
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan

Inbox = asyncio.Queue[tuple[int, AgentMessage]]


class Agents:
    """The agents of a job: that of this node and, over `peers`, the others.

    Attributes:
        store: of the ranks' process groups; rank 0 is always on this node.
        excluded: agents of unfit nodes. They stay connected, since they share the job's exit status.
        unfit: what failed on hosts that could not start an agent.
    """

    def __init__(self, agent_info: AgentInfo, local: NodeRanks, peers: Peers, store: Store) -> None:
        self.agent_info, self.local, self.peers, self.store = agent_info, local, peers, store
        self.excluded: set[int] = set()
        self.unfit: dict[str, str] = {}

    def available(self) -> list[int]:
        """Return the connected agents that ranks may be started on."""
        return [agent for agent in self.peers.connected() if agent not in self.excluded]

    def absent(self) -> list[str]:
        """Return the hosts whose agents are not connected."""
        return [self.host(node) for node in range(self.agent_info.nodes) if not self.peers.is_connected(node)]

    def host(self, agent: int) -> str:
        """Return the name of the agent's node."""
        return self.peers.hosts.get(agent, f"node {agent}, which never joined,")

    def host_of_rank(self, agents: Sequence[int], placement: Placement) -> dict[int, str]:
        """Return the host of each rank if `agents` are the nodes of the placement."""
        return {rank: self.host(agents[rank // placement.ranks_per_node]) for rank in range(placement.world_size)}

    def send(self, agent: int, message: ToAgent) -> None:
        """Send `message` to one agent."""
        if agent != self.agent_info.node:
            self.peers.send(agent, message)
        else:
            self.local.handle(message)

    def send_all(self, message: ToAgent) -> None:
        """Send `message` to every connected agent."""
        self.peers.send_all(self.peers.connected(), message)
        self.local.handle(message)


class StopRequests:
    """The requests to stop that a job has received.

    Attributes:
        first: the signal of the first request; None if there was none.
        preempted: whether SLURM announced by SIGUSR2 that it takes the nodes.
    """

    def __init__(self, run_dir: RunDir, plan: Plan) -> None:
        self.run_dir, self.plan = run_dir, plan
        self.started = time.monotonic()
        self.first: signal.Signals | None = None
        self.preempted = False

    @property
    def reason(self) -> str:
        """The name of the first signal; empty if there was no request."""
        return self.first.name if self.first else ""

    def note(self, message: AgentMessage) -> None:
        """Record `message` if it is a request to stop."""
        if not isinstance(message, StopRequest):
            return
        self.first = self.first or signal.Signals(message.number)
        if message.number == signal.SIGUSR2 and not self.preempted:
            self.preempted = True
            history.record_preempted(
                self.run_dir, signal="SIGUSR2", reason="time limit" if self._late() else "preemption"
            )

    def _late(self) -> bool:
        """Whether the time limit is near; SLURM may send its signal up to 60 s before it is due."""
        limit = self.plan.time_minutes * 60
        return bool(limit) and time.monotonic() - self.started > limit - self.plan.cluster.grace - 60


class JobAttempt:
    """Runs attempt `number` on the available agents."""

    def __init__(
        self, number: int, run_dir: RunDir, plan: Plan, agents: Agents, stops: StopRequests, inbox: Inbox
    ) -> None:
        self.number, self.run_dir, self.plan = number, run_dir, plan
        self.agents, self.stops, self.inbox = agents, stops, inbox

    @property
    def scheduled(self) -> bool:
        """Whether a scheduler sends its signals to every process of the job."""
        return self.agents.agent_info.requeue is not None

    async def run(self) -> Outcome:
        """Start all ranks and supervise them to their end."""
        if self.stops.first:
            return Outcome({}, stop=self.stops.reason)
        placement = self.plan.placement
        used = self.agents.available()[: placement.nodes]  # those after them are spare
        if len(used) < placement.nodes:
            unfit = self.agents.unfit
            return Outcome({}, unfit=unfit) if unfit else Outcome({}, lost=self.agents.absent())
        if not placement.on_tpu:  # whose order is that of the slice
            used = by_switches(used, self.agents.peers.switches)
        if self.plan.cluster.preflight and (outcome := await self.preflight(used)):
            return outcome
        nodes = {agent: node for node, agent in enumerate(used)}
        hang_after = self.plan.cluster.hang_after
        attempt = Attempt(self.number, nodes, placement.ranks_per_node, hang_after, self.agents.send_all)
        self._start(used, self.agents.store.open())
        while not attempt.over:
            await self._receive(attempt)
        if not attempt.joined and not self.stops.first:
            await self._settle(attempt)
        return await self._outcome(attempt, used)

    def _start(self, used: Sequence[int], port: int) -> None:
        peers, placement = self.agents.peers, self.plan.placement
        hosts = [peers.hosts[agent] for agent in used]
        switches = [".".join(peers.switches.get(agent, ())) for agent in used]
        history.record_started(self.run_dir, self.number, placement.world_size, hosts, switches)
        debug = debug_variables(self.plan, history.read(self.run_dir.events()))
        addresses = [peers.addresses[agent] for agent in used]
        for node, agent in enumerate(used):
            self.agents.send(agent, Start.of(self.plan, self.number, node, addresses, port, debug))

    async def _outcome(self, attempt: Attempt, used: Sequence[int]) -> Outcome:
        if self.agents.local.foreground.interrupted and {STOPPED, -signal.SIGINT} & {*attempt.exits.values()}:
            self.stops.first = self.stops.first or signal.SIGINT  # Ctrl-C ended the program at a prompt
        stop, finished = self.stops.reason, self.run_dir.finished(self.number, 0).exists()
        host_of_rank = self.agents.host_of_rank(used, self.plan.placement)
        for agent in attempt.lost:
            self.agents.peers.drop(agent)
        errors = self.run_dir.errors(self.number)
        lost = [self.agents.host(agent) for agent in attempt.lost]
        outcome = Outcome(attempt.exits, errors, stop, lost, host_of_rank, attempt.progress, attempt.hung)
        aborts = await asyncio.to_thread(causes_of_aborts, self.run_dir, self.number, host_of_rank, attempt.exits)
        before = attempt.ended_before_stop
        return replace(outcome, joined=attempt.joined, finished=finished, aborts=aborts, ended_before_stop=before)

    async def _receive(self, attempt: Attempt) -> None:
        try:
            async with asyncio.timeout_at(attempt.kill_at):
                agent, message = await self.inbox.get()
        except TimeoutError:
            attempt.on_deadline()
            return
        if not attempt.owns(agent, message):
            self.agents.peers.refuse(agent, f"sent {type(message).__name__} of ranks of other nodes")
            return
        attempt.on_message(agent, message)
        if isinstance(message, StopRequest):
            # The first request is passed on; a second Ctrl-C, or the end of the grace, kills.
            first = not self.stops.first
            again = self.stops.first == message.number == signal.SIGINT
            self.stops.note(message)
            if first:
                also_sent = message.number == signal.SIGTERM and not message.by_file and self.scheduled
                fields = attempt.ask_to_stop(self.plan.cluster.grace, also_sent)
                history.record_stopping(self.run_dir, self.stops.reason, **fields)
            elif again:
                attempt.kill_within(0.0)

    async def _settle(self, attempt: Attempt) -> None:
        """Take in a stop that ended the ranks before this process received it.

        A scheduler sends SIGTERM to every process of a step, and the ranks' ends may be received first. A request by the
        file `stop` does not count: it reaches the ranks through this process alone.
        """
        fate = self.agents.agent_info.fate
        seconds = TIMEOUTS.late_signal_scheduler if self.scheduled else TIMEOUTS.late_signal
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.stops.first:
                    _, message = await self.inbox.get()
                    if not (isinstance(message, StopRequest) and message.by_file):
                        self.stops.note(message)
        if not self.stops.first and -signal.SIGTERM in attempt.exits.values() and fate():
            self.stops.first = signal.SIGTERM
        if self.stops.first:
            attempt.stopped_before()
            history.record_stopping(self.run_dir, self.stops.reason)

    async def preflight(self, used: Sequence[int]) -> Outcome | None:
        """Check the nodes of `used`; return the outcome if the attempt cannot start, None if it can."""
        agents = self.agents
        answers = await preflight.ask(
            self.number,
            used,
            lambda agent: agents.send(agent, CheckNode(self.number)),
            self.inbox,
            awaited=lambda agent: not self.stops.first and agents.peers.is_connected(agent),
            other=lambda _, message: self.stops.note(message),
        )
        if self.stops.first:
            return Outcome({}, stop=self.stops.reason)
        each = self.plan.placement.ranks_per_node
        for agent in [agent for agent, facts in answers.items() if not preflight.is_report(facts, each)]:
            agents.peers.refuse(agent, "sent a preflight report that cannot be read")
            del answers[agent]
        if gone := set(used) - {*agents.peers.connected()}:
            return Outcome({}, lost=[agents.host(agent) for agent in sorted(gone)])
        ranks = dict.fromkeys(map(agents.host, used), each)
        found = {agents.host(agent): facts for agent, facts in answers.items()}
        history.record_warnings(self.run_dir, self.number, preflight.warnings(found, ranks))
        unfit = preflight.judge(found, ranks)
        agents.excluded |= {agent for agent in used if agents.host(agent) in unfit}
        hosts = agents.host_of_rank(used, self.plan.placement)
        return Outcome({}, hosts=hosts, unfit=unfit) if unfit else None


def debug_variables(plan: Plan, past: history.History) -> dict[str, str]:
    """Return what makes NCCL explain itself, for an attempt after one whose ranks never connected to each other."""
    chosen = "NCCL_DEBUG" in plan.environment or "NCCL_DEBUG" in os.environ
    if plan.placement.device != "cuda" or chosen or not past.never_connected():
        return {}
    return {"NCCL_DEBUG": "INFO"}
