"""One attempt on a lease of Ray: the ranks are started through the stewards and watched to their end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from launcher.agent.attempt import Attempt
from launcher.agent.health import preflight
from launcher.agent.protocol import Message
from launcher.backends.ray.node_actor import NodeActors
from launcher.backends.ray.worker_group import WorkerGroup
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.recovery import abort_causes
from launcher.lifecycle.run_dir import RunDir

DRIVER = ""
"""Where messages of the driver itself come from; the others come from nodes, by Ray's ids."""

ANSWER_SECONDS = 5.0
"""How long, after a rank was killed, the nodes are waited for that may have gone with it."""

DYING_SECONDS = 1.0
"""How long a node that lost a worker of Ray's may still answer, should it be about to go."""

BEFORE_DRAINED = 2.0
"""How many seconds before a drained node goes the ranks have to be gone; the next lease waits for nothing else."""


class RayAttempt:
    """Hears what nodes and the driver say during one attempt, and tells the stewards what follows.

    `note` takes in what matters beyond the attempt; `going` are the nodes that are being drained already.
    """

    def __init__(
        self,
        run_dir: RunDir,
        worker_group: WorkerGroup,
        node_actors: NodeActors,
        note: Callable[[str, Message, WorkerGroup | None], None],
    ) -> None:
        self.run_dir, self.worker_group, self.node_actors, self.note = run_dir, worker_group, node_actors, note
        self.cluster = worker_group.plan.cluster
        self.number = run_dir.claim_attempt()
        one_each = {rank: rank for rank in range(worker_group.ranks)}  # every rank is an agent of its own to `Attempt`
        self.ranks = Attempt(self.number, one_each, 1, self.cluster.hang_after, node_actors.send_all)
        self.stop = ""  # why the ranks were asked to stop

    async def run(self, inbox: asyncio.Queue[tuple[str, Message]], going: Mapping[str, float]) -> Outcome:
        """Bring the attempt to its end."""
        worker_group = self.worker_group
        unfit: dict[str, str] = {}
        ended = asyncio.create_task(self._report_end(inbox))
        try:
            if self.cluster.preflight:
                unfit = await self._preflight(inbox)
            if not unfit and not self.stop and not worker_group.broken:
                hosts = [str(node) for node in worker_group.nodes()]
                self.run_dir.event("started", attempt=self.number, world_size=worker_group.ranks, hosts=hosts)
                await self._start()
                self._check_drains(going)
                await self._watch(inbox)
        finally:
            ended.cancel()
        if not self.ranks.joined:  # a stop may have ended the ranks before it was read
            while not inbox.empty():
                self._take_in(*inbox.get_nowait())
        if any(code < 0 for code in self.ranks.exits.values()):
            # A node that goes down ends its processes one by one, and may have told of a rank before its steward went.
            if worker_group.broken:  # a worker went, too; the next lease takes longer than this
                await asyncio.sleep(DYING_SECONDS)
            await self.node_actors.settle([node.id for node in worker_group.nodes()], ANSWER_SECONDS)
            while not inbox.empty():
                self._take_in(*inbox.get_nowait())
        host_of = {rank: str(member.node) for rank, member in enumerate(worker_group.members)}
        lost = list(dict.fromkeys(host_of[rank] for rank in self.ranks.lost))
        exits = self.ranks.exits
        if worker_group.broken and not exits and not lost:
            exits = {0: -signal.SIGKILL}  # Ray ended its workers, and we our ranks
        errors = self.run_dir.errors(self.number)
        ends = Outcome(exits, errors, self.stop, lost, host_of, self.ranks.progress, self.ranks.hung, unfit)
        finished = self.run_dir.finished(self.number, 0).exists()
        aborts = await asyncio.to_thread(abort_causes, self.run_dir, self.number, exits)
        return replace(ends, joined=self.ranks.joined, finished=finished, aborts=aborts)

    async def _watch(self, inbox: asyncio.Queue[tuple[str, Message]]) -> None:
        """Take in what is said until the last rank has ended."""
        while not self.ranks.over:
            try:
                async with asyncio.timeout_at(self.ranks.kill_at):
                    node, message = await inbox.get()
            except TimeoutError:
                self.ranks.on_deadline()
            else:
                self._take_in(node, message)

    async def _preflight(self, inbox: asyncio.Queue[tuple[str, Message]]) -> dict[str, str]:
        """Ask the nodes how they are; return what is wrong with each that is unfit."""
        worker_group, nodes = self.worker_group, {node.id: str(node) for node in self.worker_group.nodes()}

        def send(node: str) -> None:
            self.node_actors.send(node, {"look": self.number, "visible": worker_group.visible_on(node)})

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
        fields = {nodes[node]: facts for node, facts in answers.items()}
        return preflight.judge(fields, {name: len(worker_group.ranks_on(node)) for node, name in nodes.items()})

    async def _start(self) -> None:
        from ray.exceptions import RayError

        try:
            port = await self.node_actors.port(self.worker_group.members[0].node.id)
        except (RayError, KeyError):
            port = 1  # its node is gone, which is told next; no rank will get far
        worlds = self.worker_group.worlds(self.number, port)
        for node in self.worker_group.nodes():
            mine = self.worker_group.ranks_on(node.id)
            start = {"start": self.number, "address": worlds[0].master_addr, "port": port}
            start["worlds"] = [asdict(worlds[rank]) for rank in mine]
            start["environments"] = {rank: self.worker_group.environment(rank) for rank in mine}
            if not self.node_actors.send(node.id, start):
                self._lost(node.id)

    async def _report_end(self, inbox: asyncio.Queue[tuple[str, Message]]) -> None:
        await self.worker_group.done.wait()
        inbox.put_nowait((DRIVER, {"ended": self.worker_group.number}))

    def _take_in(self, node: str, message: Message) -> None:
        self.note(node, message, self.worker_group)
        match message:
            case {"exit": rank}:
                self.ranks.on_message(rank, message)
            case {"beats": _} | {"stacks": _}:
                self.ranks.on_message(0, message)
            case {"gone": worker, "lease": number} if number == self.worker_group.number:
                # Its claim is gone, so its rank has to go, too; that one's end is then the cause of the others'.
                self.node_actors.send(node, {"kill": self.worker_group.rank_of(worker)})
            case {"lost": _}:
                self._lost(node)
            case {"ended": number} if number == self.worker_group.number:
                self.worker_group.broken = True
                self.ranks.kill_within(1.0)
            case {"stop": reason}:
                self._ask_to_stop(reason, self.cluster.grace)
            case {"drained": going}:
                self._check_drains(going)

    def _lost(self, node: str) -> None:
        for rank in self.worker_group.ranks_on(node):
            self.ranks.on_message(rank, {"lost": rank})

    def _check_drains(self, going: Mapping[str, float]) -> None:
        """Ray wants a node back: the ranks stop together, in time, and the run goes on elsewhere."""
        ours = {node.id: node for node in self.worker_group.nodes() if node.id in going}
        if not ours or self.stop:
            return
        left = [going[node] - time.time() - BEFORE_DRAINED for node in ours if going[node]]
        names = ", ".join(map(str, ours.values()))
        self.run_dir.event("preempted", attempt=self.number, node=names)
        self._ask_to_stop(f"Ray takes {names} away", max(1.0, min([self.cluster.grace, *left])))

    def _ask_to_stop(self, reason: str, grace: float) -> None:
        self.stop = self.stop or reason
        self.run_dir.event("stopping", reason=reason, **self.ranks.ask_to_stop(grace))
