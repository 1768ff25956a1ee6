"""The ranks of one node: started through its forkserver, watched, and told when to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from launcher.network import interface_of, source_towards
from launcher.rundir import RunDir
from launcher.spec import Plan
from launcher.target import imports_of
from training.world import World

CONNECT_SECONDS = 300.0
"""How long the agents of a run wait for each other at the start; nodes of one allocation can boot minutes apart."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Seat:
    """Where an agent sits. The backend makes it; the agent reads no environment.

    Attributes:
        host: this node's name, for people.
        address: node 0's IP address, as the other nodes reach it.
        session: differs between two submissions of a run, and between two starts of a job, so that nobody takes an old
            rendezvous for a new one.
        requeue: asks the scheduler to start the job again later; None where it cannot.
    """

    node: int = 0
    nodes: int = 1
    host: str = field(default_factory=socket.gethostname)
    address: str = "127.0.0.1"
    session: str = ""
    requeue: Callable[[], bool] | None = None


class NodeRanks:
    """The ranks of one node, started and watched through its forkserver.

    It does what the coordinator's messages say (`handle`) and tells what happens through `post`:

    =====================================================  =====================================================
    from the coordinator                                   back
    =====================================================  =====================================================
    ``{"start": attempt, "address": ..., "port": ...}``     ``{"exit": rank, "code": n}`` for each rank
    ``{"signal": n}``: for every rank of the node           ``{"signal": n}``: this agent was sent it
    ``{"end": exit status}``: close and leave
    =====================================================  =====================================================
    """

    def __init__(self, run_dir: RunDir, plan: Plan, seat: Seat, post: Callable[[Message], None]) -> None:
        self.run_dir, self.plan, self.seat, self.post = run_dir, plan, seat, post
        self.running: set[int] = set()
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start the forkserver; it imports while the agents find each other."""
        ours, theirs = socket.socketpair()
        with self.run_dir.agent_log(self.seat.node).open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "launcher.forkserver", str(self.run_dir.path)),
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env=self._server_environment(),
                start_new_session=True,
            )
        theirs.close()
        reader, self.writer = await asyncio.open_connection(sock=ours)
        self._tell(
            preload=imports_of(self.plan.target.source) + self._target_import(),
            path=list(self.plan.target.path),
            environment=self.plan.environment,
            spawn=self.plan.cluster.start_method == "spawn",
        )
        self.reading = asyncio.create_task(self._read(reader))

    def _target_import(self) -> list[str]:
        target = self.plan.target
        return [f"import {target.name.partition(':')[0]}"] if target.kind == "function" else []

    def _server_environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        # The snapshot comes first for every process of the rank, so that it also wins in processes the rank starts.
        inherited = environment.get("PYTHONPATH")
        path = [*self.plan.target.path, *([inherited] if inherited else [])]
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(path)
        if self.seat.nodes > 1:
            # gloo and NCCL otherwise look the host's own name up, and fall back to loopback where it does not resolve.
            interface = interface_of(source_towards(self.seat.address))
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                if interface:
                    environment.setdefault(variable, interface)
        return environment

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "exit" in message:
                self.running.discard(message["exit"])
                self.post(message)
        # The forkserver is gone, and by PR_SET_PDEATHSIG its ranks with it.
        for rank in sorted(self.running):
            self.post({"exit": rank, "code": -signal.SIGKILL})
        self.running.clear()
        self.writer = None

    def _tell(self, **message: Any) -> None:
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\n")

    async def handle(self, message: Message) -> None:
        """Do what the coordinator says."""
        match message:
            case {"start": attempt, "address": address, "port": port}:
                if self.writer is None:
                    await self.open()
                for world in self.worlds(attempt, address, port):
                    self.running.add(world.rank)
                    self._tell(start=world.rank, log=str(self.run_dir.log(attempt, world.rank)), world=asdict(world))
            case {"signal": number} if self.writer is not None:
                self._tell(signal=number, ranks=sorted(self.running))

    def worlds(self, attempt: int, address: str, port: int) -> list[World]:
        """The worlds of this node's ranks."""
        placement, node = self.plan.placement, self.seat.node
        per_node = placement.ranks_per_node
        return [
            World(
                rank=node * per_node + local,
                local_rank=local,
                node_rank=node,
                world_size=placement.world_size,
                local_world_size=per_node,
                num_nodes=placement.nodes,
                master_addr=address,
                master_port=port,
                device=placement.device,
                threads=placement.threads,
                attempt=attempt,
                run_id=self.plan.name,
            )
            for local in range(per_node)
        ]

    async def close(self) -> None:
        """Kill what still runs and wait until the forkserver and every rank are gone."""
        if self.writer is not None:
            self.writer.close()
        if self.process is not None:
            await self.process.wait()
        if self.reading is not None:
            self.running.clear()
            await self.reading


def on_signals(tell: Callable[[int], None]) -> None:
    """Call `tell` with the number of each signal that asks the agent to stop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        loop.add_signal_handler(number, tell, int(number))
