"""The node agent on Ray: an actor on each node, which starts the ranks there through the node's forkserver.

A worker of Ray Train holds the devices of a rank and the environment that Ray gave it; the rank itself is a process beside
it. So a rank that died starts again without a new worker, and targets run in a main thread, in which signals work.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.agent.network.store import Store
from launcher.agent.node_ranks import NodeRanks
from launcher.agent.protocol import AgentInfo, Lost
from launcher.agent.worker_messages import EndWorker, KillWorker, RayMessage, ToNodeActor, WorkerGone, WorkerReady
from launcher.backends.ray.cluster import RayNode
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.environment import of_the_shell


class NodeActor:
    """The actor.

    Args:
        number: counts the nodes of a run, from 1.
        towards: an address of another node, or empty.
        shell: variables of the submitting shell for the ranks.
    """

    def __init__(self, run_dir: str, number: int, towards: str, shell: dict[str, str]) -> None:
        self.run_dir = RunDir(Path(run_dir))
        if not os.environ.get("CUDA_VISIBLE_DEVICES", "-"):
            del os.environ["CUDA_VISIBLE_DEVICES"]  # Ray hides the devices from this actor; ranks are given their own
        self.given_by_ray = dict(os.environ)
        _prepare_for_drivers()
        os.environ.update(shell)
        plan = self.run_dir.plan()
        # Ray may put any number of the ranks on this node.
        placement = replace(plan.placement, nodes=1, ranks_per_node=plan.placement.world_size)
        agent_info = AgentInfo(number, nodes=2 if towards else 1, address=towards)
        self.ranks = NodeRanks(self.run_dir, replace(plan, placement=placement), agent_info, self._emit)
        self.outbox: asyncio.Queue[RayMessage] = asyncio.Queue()
        self.commands_of: dict[int, asyncio.Queue[EndWorker]] = {}
        self.pids: dict[int, int] = {}
        self.store = Store(self.run_dir, plan, number)
        self.opening: asyncio.Task[None] | None = None
        self.beating: asyncio.Task[None] | None = None

    def _emit(self, message: RayMessage) -> None:
        self.outbox.put_nowait(message)

    async def sees(self, path: str) -> bool:
        """Return whether that file exists on this node."""
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
                self._emit(self.ranks.report())
            await asyncio.sleep(TIMEOUTS.heartbeat)

    async def receive(self) -> list[RayMessage]:
        """Return the messages since the last call; wait until there is one."""
        messages = [await self.outbox.get()]
        while not self.outbox.empty():
            messages.append(self.outbox.get_nowait())
        return messages

    async def send(self, message: ToNodeActor) -> None:
        """Do what the driver asks for, or pass a command on to a worker of Ray Train."""
        match message:
            case EndWorker(worker):
                self.commands_of[worker].put_nowait(message)
            case KillWorker(worker):
                with suppress(ProcessLookupError):
                    os.kill(self.pids[worker], signal.SIGKILL)
            case _:
                self.ranks.handle(message)

    async def port(self) -> int:
        """Return the port for the process groups of the next attempt, whose rank 0 is on this node."""
        return self.store.open()

    # ---- the workers of Ray Train on this node ------------------------------------------------------------------------

    async def register(self, worker_group: int, worker: int, pid: int, environment: dict[str, str]) -> None:
        """Register a worker of a worker group: `environment` is what Ray gave it, `pid` its process, whose end is reported."""
        await self.open()
        own = {k: v for k, v in environment.items() if self.given_by_ray.get(k) != v and not k.startswith("RAY_")}
        self.commands_of[worker] = asyncio.Queue()
        self.pids[worker] = pid
        with suppress(OSError):  # in a container of its own, or gone already: then only Ray reports its end
            descriptor = os.pidfd_open(pid)
            asyncio.get_running_loop().add_reader(descriptor, self._gone, worker_group, worker, descriptor)
        self._emit(WorkerReady(worker, worker_group, own))

    def _gone(self, worker_group: int, worker: int, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        self._emit(WorkerGone(worker, worker_group))

    async def commands(self, worker: int) -> EndWorker:
        """Return the next command for `worker`; wait until there is one."""
        return await self.commands_of[worker].get()


def _prepare_for_drivers() -> None:
    """Set the variables of ranks such that ``ray.init()`` in one connects to this cluster, as a driver."""
    import ray

    for name in ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        os.environ.pop(name, None)  # of this actor, or of the Ray job that sent the run
    if os.environ.get("PYTHONBREAKPOINT", "").startswith("ray."):
        del os.environ["PYTHONBREAKPOINT"]  # Ray's debugger is for its tasks and actors
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


class NodeActors:
    """Starts an actor on each node and receives its messages, which go to `emit` with the id of its node."""

    def __init__(self, run_dir: RunDir, emit: Callable[[str, RayMessage], None]) -> None:
        self.run_dir, self.emit = run_dir, emit
        self.nodes: dict[str, RayNode] = {}
        self._actors: dict[str, Any] = {}
        self._listening: dict[str, asyncio.Task[None]] = {}
        self._count = 0

    async def ensure(self, nodes: Iterable[RayNode], towards: str, several: bool) -> list[RayNode]:
        """Start one on each of `nodes`; return the nodes without the run directory. `towards`: the head's address."""
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
            self._actors[node.id] = actor.remote(
                str(self.run_dir.path), self._count, towards if several else "", of_the_shell(os.environ)
            )
            self.nodes[node.id] = node
            self._listening[node.id] = asyncio.create_task(self._listen(node.id))
        plan = str(self.run_dir.plan_file)
        asked = {node.id: asyncio.ensure_future(self._sees(node.id, plan)) for node in new}
        if asked:
            await asyncio.wait(asked.values(), timeout=TIMEOUTS.ray_node_actor)
        return [node for node in new if asked[node.id].done() and not asked[node.id].result()]

    async def _sees(self, node: str, path: str) -> bool:
        from ray.exceptions import RayError

        try:
            return bool(await self._actors[node].sees.remote(path))
        except (RayError, KeyError):
            return True  # the node is gone, which `Lost` reports

    async def _listen(self, node: str) -> None:
        from ray.exceptions import RayError

        try:
            while True:
                for message in await self._actors[node].receive.remote():
                    self.emit(node, message)
        except RayError:  # the actor died, alone or with its node
            del self._actors[node]
            self.emit(node, Lost())

    async def settle(self, nodes: Iterable[str], seconds: float) -> None:
        """Wait until each of `nodes` answers or is reported as lost, `seconds` at most."""
        asked = [asyncio.ensure_future(self._answers_or_is_lost(node)) for node in nodes if node in self._actors]
        if asked:
            await asyncio.wait(asked, timeout=seconds)

    async def _answers_or_is_lost(self, node: str) -> None:
        from ray.exceptions import RayError

        try:
            await self._actors[node].sees.remote("")
        except RayError:
            await asyncio.wait([self._listening[node]])  # which reports it

    def open(self, nodes: Iterable[str]) -> None:
        """Start their forkservers."""
        for node in nodes:
            if node in self._actors:
                self._actors[node].open.remote()

    def send(self, node: str, message: ToNodeActor) -> bool:
        """Send `message`; return False if the node is gone."""
        if node not in self._actors:
            return False
        self._actors[node].send.remote(message)
        return True

    async def port(self, node: str) -> int:
        """Reserve a port there.

        Raises:
            ray.exceptions.RayError: the node actor is gone.
        """
        return int(await self._actors[node].port.remote())

    def send_all(self, message: ToNodeActor) -> None:
        for node in list(self._actors):
            self.send(node, message)

    def close(self) -> None:
        """Stop receiving."""
        for task in self._listening.values():
            task.cancel()
