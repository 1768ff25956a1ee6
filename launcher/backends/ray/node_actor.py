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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from launcher.agent.network import reserve_port
from launcher.agent.node_ranks import AgentInfo, Message, NodeRanks
from launcher.agent.peers import PULSE_SECONDS
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
