"""One attempt on a worker group of Ray Train: the ranks are started through the node actors and supervised to their end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import assert_never

from launcher.agent.attempt import Attempt
from launcher.agent.hangs.timeouts import causes_of_aborts
from launcher.agent.health import preflight
from launcher.agent.protocol import (
    CheckNode,
    Collectives,
    Heartbeats,
    Joined,
    Lost,
    NodeChecked,
    RankExit,
    Signal,
    Stacks,
    StopRequest,
)
from launcher.agent.worker_messages import Drained, GroupEnded, RayMessage, WorkerGone, WorkerReady
from launcher.backends.ray.node_actor import NodeActors
from launcher.backends.ray.worker_group import Inbox, WorkerGroup
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.run_dir import RunDir

DRIVER = ""
"""The sender of the driver's own messages; the others are sent by nodes, whose names are Ray's ids."""

BY_FILE = "the file stop"
"""Why the run stops if its directory holds the file `stop`."""


class RayAttempt:
    """Runs one attempt. `note` records the messages that matter beyond it."""

    def __init__(
        self,
        run_dir: RunDir,
        worker_group: WorkerGroup,
        node_actors: NodeActors,
        note: Callable[[str, RayMessage, WorkerGroup | None], None],
    ) -> None:
        self.run_dir, self.worker_group, self.node_actors, self.note = run_dir, worker_group, node_actors, note
        self.cluster = worker_group.plan.cluster
        self.number = run_dir.claim_attempt()
        one_each = {rank: rank for rank in range(worker_group.ranks)}  # every rank is an agent of its own to `Attempt`
        self.ranks = Attempt(self.number, one_each, 1, self.cluster.hang_after, node_actors.send_all)
        self.stop = ""  # why the ranks were asked to stop
        self.started = False

    async def run(self, inbox: Inbox, going: Mapping[str, float]) -> Outcome:
        """Run the attempt to its end. `going` are the nodes that are being drained already."""
        worker_group = self.worker_group
        unfit: dict[str, str] = {}
        ended = asyncio.create_task(self._report_end(inbox))
        try:
            if self.cluster.preflight:
                unfit = await self._preflight(inbox)
            if not unfit and not self.stop and not worker_group.broken:
                hosts = [str(node) for node in worker_group.nodes()]
                self.started = True
                history.record_started(self.run_dir, self.number, worker_group.ranks, hosts)
                await self._start()
                self._check_drains(going)
                await self._watch(inbox)
        finally:
            ended.cancel()
        if not self.ranks.joined:  # a stop may have ended the ranks before it was read
            while not inbox.empty():
                self._take_in(*inbox.get_nowait())
        if any(code < 0 for code in self.ranks.exits.values()):
            # A node that goes down ends its processes one by one, and may report the end of a rank before its actor ends.
            if worker_group.broken:  # a worker has ended, too; the next worker group takes longer than this
                await asyncio.sleep(TIMEOUTS.ray_node_dying)
            await self.node_actors.settle([node.id for node in worker_group.nodes()], TIMEOUTS.ray_node_answer)
            while not inbox.empty():
                self._take_in(*inbox.get_nowait())
        host_of = {rank: str(member.node) for rank, member in enumerate(worker_group.members)}
        if not self.ranks.exits and not self.started:
            host_of = {}  # stopped before a rank began, and no rank was killed
        lost = list(dict.fromkeys(host_of[rank] for rank in self.ranks.lost))
        exits = self.ranks.exits
        if worker_group.broken and not exits and not lost:
            exits = {0: -signal.SIGKILL}  # Ray ended its workers, after which the ranks were killed
        errors = self.run_dir.errors(self.number)
        ends = Outcome(exits, errors, self.stop, lost, host_of, self.ranks.progress, self.ranks.hung, unfit)
        finished = self.run_dir.finished(self.number, 0).exists()
        aborts = await asyncio.to_thread(causes_of_aborts, self.run_dir, self.number, host_of, exits)
        before = self.ranks.ended_before_stop
        return replace(ends, joined=self.ranks.joined, finished=finished, aborts=aborts, ended_before_stop=before)

    async def _watch(self, inbox: Inbox) -> None:
        """Receive messages until the last rank has ended."""
        while not self.ranks.over:
            try:
                async with asyncio.timeout_at(self.ranks.kill_at):
                    node, message = await inbox.get()
            except TimeoutError:
                self.ranks.on_deadline()
            else:
                self._take_in(node, message)

    async def _preflight(self, inbox: Inbox) -> dict[str, str]:
        """Check the nodes; return what is wrong with each that is unfit."""
        worker_group, nodes = self.worker_group, {node.id: str(node) for node in self.worker_group.nodes()}

        def send(node: str) -> None:
            self.node_actors.send(node, CheckNode(self.number, worker_group.visible_on(node)))

        answers = await preflight.ask(
            self.number,
            list(nodes),
            send,
            inbox,
            awaited=lambda _: not self.stop and not worker_group.broken,
            other=self._take_in,
        )
        if self.stop or worker_group.broken:
            return {}
        facts = {nodes[node]: found for node, found in answers.items()}
        ranks = {name: len(worker_group.ranks_on(node)) for node, name in nodes.items()}
        history.record_warnings(self.run_dir, self.number, preflight.warnings(facts, ranks))
        return preflight.judge(facts, ranks)

    async def _start(self) -> None:
        from ray.exceptions import RayError

        try:
            port = await self.node_actors.port(self.worker_group.members[0].node.id)
        except (RayError, KeyError):
            port = 1  # the node is gone, which is reported next; the ranks of this attempt cannot connect
        for node, start in self.worker_group.starts(self.number, port).items():
            if not self.node_actors.send(node, start):
                self._lost(node)

    async def _report_end(self, inbox: Inbox) -> None:
        await self.worker_group.done.wait()
        inbox.put_nowait((DRIVER, GroupEnded(self.worker_group.number)))

    def _take_in(self, node: str, message: RayMessage) -> None:
        self.note(node, message, self.worker_group)
        match message:
            case RankExit(rank):
                self.ranks.on_message(rank, message)
            case Heartbeats() | Stacks() | Collectives():
                self.ranks.on_message(0, message)
            case WorkerGone(worker, group) if group == self.worker_group.number:
                # Without its worker a rank has no claim to its devices. Its end is then the cause of the others'.
                self.node_actors.send(node, Signal(signal.SIGKILL, [self.worker_group.rank_of(worker)]))
            case Lost():
                self._lost(node)
            case GroupEnded(group) if group == self.worker_group.number:
                self.worker_group.broken = True
                self.ranks.kill_within(1.0)
            case StopRequest() if not self.stop:  # else the ranks are stopping, and a handler would run twice
                self._ask_to_stop(BY_FILE, self.cluster.grace)
            case Drained(going):
                self._check_drains(going)
            case StopRequest() | WorkerGone() | GroupEnded() | WorkerReady() | NodeChecked() | Joined():
                pass
            case _:
                assert_never(message)

    def _lost(self, node: str) -> None:
        for rank in self.worker_group.ranks_on(node):
            self.ranks.on_message(rank, Lost())

    def _check_drains(self, going: Mapping[str, float]) -> None:
        """Stop the ranks in time if Ray drains one of their nodes; the run then goes on elsewhere."""
        used = {node.id: node for node in self.worker_group.nodes() if node.id in going}
        if not used or self.stop:
            return
        left = [going[node] - time.time() - TIMEOUTS.ray_before_drained for node in used if going[node]]
        names = ", ".join(map(str, used.values()))
        history.record_preempted(self.run_dir, attempt=self.number, node=names)
        self._ask_to_stop(f"Ray takes {names} away", max(1.0, min([self.cluster.grace, *left])))

    def _ask_to_stop(self, reason: str, grace: float) -> None:
        self.stop = self.stop or reason
        history.record_stopping(self.run_dir, reason, **self.ranks.ask_to_stop(grace))
