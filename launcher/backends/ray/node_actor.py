"""The node agent on Ray: an actor on each node, which starts the ranks there through the node's forkserver.

A worker of Ray Train is a rank's claim to its devices and the environment that Ray gave it; the rank itself is forked
beside it from a process that imported everything once. So an attempt imports nothing, a rank that died starts again
without Ray noticing, and targets run in a main thread, where signals work.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.agent.network import reserve_port
from launcher.agent.node_ranks import NodeRanks
from launcher.agent.peers import PULSE_SECONDS
from launcher.agent.protocol import AgentInfo, Message
from launcher.backends.ray.cluster import RayNode
from launcher.config.codec import from_data
from launcher.lifecycle.run_dir import RunDir
from training.distributed.world import World


class RayRanks(NodeRanks):
    """The ranks of one node, whose worlds and environments come with the message that starts them."""

    given: list[World]
    environments: dict[int, dict[str, str]]

    def handle(self, message: Message) -> None:
        """Do what the driver says; in addition to what other agents understand, ``{"kill": rank}``."""
        match message:
            case {"start": _, "worlds": worlds, "environments": environments}:
                self.given = [from_data(World, world, "world") for world in worlds]
                self.environments = {int(rank): each for rank, each in environments.items()}
                super().handle(message | {"node": 0})
            case {"kill": rank} if self.writer is not None:
                self._send(signal=int(signal.SIGKILL), ranks=[rank])
            case _:
                super().handle(message)

    def worlds(self, attempt: int, address: str, port: int) -> list[World]:
        """The worlds that the driver gave; Ray chose the nodes."""
        return self.given

    def environment(self, world: World, hosts: Sequence[str]) -> dict[str, str]:
        return self.environments[world.rank]

    def _inherited(self) -> dict[str, str]:
        environment = super()._inherited()
        if not environment.get("CUDA_VISIBLE_DEVICES", "-"):
            del environment["CUDA_VISIBLE_DEVICES"]  # Ray hides the devices from this actor; ranks are given theirs
        return environment


class NodeActor:
    """The actor. `number` counts the nodes of a run from 1; `towards` is an address of another node, or empty."""

    def __init__(self, run_dir: str, number: int, towards: str) -> None:
        self.run_dir = RunDir(Path(run_dir))
        plan = self.run_dir.plan()
        # Ray may put any number of the ranks on this node.
        placement = replace(plan.placement, nodes=1, ranks_per_node=plan.placement.world_size)
        agent_info = AgentInfo(number, nodes=2 if towards else 1, address=towards)
        self.ranks = RayRanks(self.run_dir, replace(plan, placement=placement), agent_info, self._emit)
        self.said: asyncio.Queue[Message] = asyncio.Queue()
        self.commands_of: dict[int, asyncio.Queue[Message]] = {}
        self.pids: dict[int, int] = {}
        self.holder: socket.socket | None = None
        self.opening: asyncio.Task[None] | None = None
        self.beating: asyncio.Task[None] | None = None

    def _emit(self, message: Message) -> None:
        self.said.put_nowait(message)

    async def sees(self, path: str) -> bool:
        """Whether this node sees that file."""
        return Path(path).is_file()

    async def open(self) -> None:
        """Start the forkserver, once; it imports while Ray Train is still starting its workers."""
        if self.opening is None:
            self.run_dir.logs.mkdir(exist_ok=True)
            self.opening = asyncio.create_task(self.ranks.open())
            self.beating = asyncio.create_task(self._beat())
        await self.opening

    async def _beat(self) -> None:
        while True:
            if self.ranks.running:
                self._emit({"beats": self.ranks.report()})
            await asyncio.sleep(PULSE_SECONDS)

    async def news(self) -> list[Message]:
        """What happened since the last call; waits until there is something."""
        messages = [await self.said.get()]
        while not self.said.empty():
            messages.append(self.said.get_nowait())
        return messages

    async def send(self, message: Message) -> None:
        """Do what the driver says, or pass an order on to a worker of Ray Train."""
        match message:
            case {"command": worker}:
                self.commands_of[worker].put_nowait(message)
            case {"kill_worker": worker}:
                with suppress(ProcessLookupError):
                    os.kill(self.pids[worker], signal.SIGKILL)
            case _:
                self.ranks.handle(message)

    async def port(self) -> int:
        """A port for the process group of the next attempt, held until the one after it."""
        if self.holder is not None:
            self.holder.close()
        self.holder = reserve_port()
        return int(self.holder.getsockname()[1])

    # ---- the workers of Ray Train on this node ------------------------------------------------------------------------

    async def register(self, worker_group: int, worker: int, pid: int, environment: dict[str, str]) -> None:
        """A worker of a lease is ready: `environment` is what Ray gave it, `pid` its process, whose end is news."""
        await self.open()
        own = {k: v for k, v in environment.items() if os.environ.get(k) != v and not k.startswith("RAY_")}
        self.commands_of[worker] = asyncio.Queue()
        self.pids[worker] = pid
        with suppress(OSError):  # a container of its own, or gone already: then Ray's word has to do
            descriptor = os.pidfd_open(pid)
            asyncio.get_running_loop().add_reader(descriptor, self._gone, worker_group, worker, descriptor)
        self._emit({"registered": worker, "lease": worker_group, "environment": own})

    def _gone(self, worker_group: int, worker: int, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        self._emit({"gone": worker, "lease": worker_group})

    async def commands(self, worker: int) -> Message:
        """The next order for `worker`; waits until there is one."""
        return await self.commands_of[worker].get()


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
