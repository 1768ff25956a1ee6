"""The stewards of a run, as its driver sees them: one on each node that may be used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from launcher.agent.node_ranks import Message
from launcher.backends.ray.cluster import RayNode
from launcher.lifecycle.run_dir import RunDir

ANSWER_SECONDS = 60.0
"""How long new stewards are waited for; a node that is too busy to start one must not hold up the others."""


class NodeActors:
    """Starts an actor on each node and listens to it. What it says goes to `emit`, with the id of its node."""

    def __init__(self, run_dir: RunDir, emit: Callable[[str, Message], None]) -> None:
        self.run_dir, self.emit = run_dir, emit
        self.nodes: dict[str, RayNode] = {}
        self._actors: dict[str, Any] = {}
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._count = 0

    async def ensure(self, nodes: Iterable[RayNode], towards: str, several: bool) -> list[RayNode]:
        """Have one on each of `nodes`; return the nodes that do not see the run directory. `towards`: the head's address."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from launcher.backends.ray.node_actor import NodeActor
        from launcher.backends.ray.train_worker import node_actor_name

        new = [node for node in nodes if node.id not in self._actors]
        for node in new:
            self._count += 1
            options = {
                "num_cpus": 0,
                "name": node_actor_name(str(self.run_dir.path), node.id),
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
            }
            actor = ray.remote(NodeActor).options(**options)
            self._actors[node.id] = actor.remote(str(self.run_dir.path), self._count, towards if several else "")
            self.nodes[node.id] = node
            self._listening[node.id] = asyncio.create_task(self._listen(node.id))
        plan = str(self.run_dir.plan_file)
        asked = {node.id: asyncio.ensure_future(self._sees(node.id, plan)) for node in new}
        if asked:
            await asyncio.wait(asked.values(), timeout=ANSWER_SECONDS)
        return [node for node in new if asked[node.id].done() and not asked[node.id].result()]

    async def _sees(self, node: str, path: str) -> bool:
        from ray.exceptions import RayError

        try:
            return bool(await self._actors[node].sees.remote(path))
        except (RayError, KeyError):
            return True  # gone meanwhile, which is another matter

    async def _listen(self, node: str) -> None:
        from ray.exceptions import RayError

        try:
            while True:
                for message in await self._actors[node].news.remote():
                    self.emit(node, message)
        except RayError:  # the actor died, alone or with its node
            del self._actors[node]
            self.emit(node, {"lost": node})

    async def settle(self, nodes: Iterable[str], seconds: float) -> None:
        """Wait until each of `nodes` answers, or has been told of as lost; not longer than `seconds`."""
        asked = [asyncio.ensure_future(self._answers_or_is_lost(node)) for node in nodes if node in self._actors]
        if asked:
            await asyncio.wait(asked, timeout=seconds)

    async def _answers_or_is_lost(self, node: str) -> None:
        from ray.exceptions import RayError

        try:
            await self._actors[node].sees.remote("")
        except RayError:
            await asyncio.wait([self._listening[node]])  # it tells of it

    def open(self, nodes: Iterable[str]) -> None:
        """Let their forkservers import already."""
        for node in nodes:
            if node in self._actors:
                self._actors[node].open.remote()

    def send(self, node: str, message: Message) -> bool:
        """Send `message`; returns False for a node that is gone, with which the message is lost."""
        if node not in self._actors:
            return False
        self._actors[node].send.remote(message)
        return True

    async def port(self, node: str) -> int:
        """Reserve a port there.

        Raises:
            ray.exceptions.RayError: the steward is gone.
        """
        return int(await self._actors[node].port.remote())

    def send_all(self, message: Message) -> None:
        for node in list(self._actors):
            self.send(node, message)

    def close(self) -> None:
        """Stop listening."""
        for task in self._listening.values():
            task.cancel()
