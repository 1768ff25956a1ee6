"""The ranks of one node: started through its forkserver, watched, and told when to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from launcher.agent.hang_detection import RankStatus, stack_location_of
from launcher.agent.health import preflight
from launcher.agent.network import interface_of, source_towards
from launcher.agent.protocol import AgentInfo, Message
from launcher.lifecycle.exit_status import ERROR_NOT_WRITTEN
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.environment import rank_environment, shared_environment
from launcher.request import own_packages
from launcher.request.placement import tpu
from launcher.request.spec import Plan, RunSpec
from training.distributed.heartbeat import SLOT, Heartbeat
from training.distributed.world import World

CLOSE_SECONDS = 20.0
"""How long the end of a node's ranks is waited for, once they are killed."""

STACK_SECONDS = 1.0
"""How long ranks get to write their stacks; it is done by a signal handler in C, which no stuck Python code holds up."""


class NodeRanks:
    """The ranks of one node, started and watched through its forkserver.

    It does what the coordinator's messages say (`handle`) and tells what happens through `emit`:

    ========================================================  ========================================================
    from the coordinator                                      back
    ========================================================  ========================================================
    ``{"start": attempt, "node": n, "address": ..., "port":   ``{"exit": rank, "code": n, "step": n}`` for each rank
    ..., "hosts": [address, ...]}``: be node n of the attempt
    ``{"look": attempt}``: is this node fit for it?           ``{"looked": attempt, "facts": ...}``, see `preflight.look`
    ``{"signal": n}``: for every rank of the node             ``{"signal": n}``: this agent was sent it
    ``{"stacks": attempt}``: where does each rank stand?      ``{"stacks": {rank: [line, waiting]}}``
    ``{"beat": 0}``: the coordinator is alive                 ``{"beats": {rank: [step, phase, age, state]}}``, likewise
    ``{"end": exit status}``: close and leave
    ========================================================  ========================================================

    The step of a rank that never opened a Context is -1.
    """

    def __init__(self, run_dir: RunDir, plan: Plan, agent_info: AgentInfo, emit: Callable[[Message], None]) -> None:
        self.run_dir, self.plan, self.agent_info, self.emit = run_dir, plan, agent_info, emit
        self.node = agent_info.node  # which node of the placement this is; a spare one learns it when it is needed
        self.running: set[int] = set()
        self.pids: dict[int, int] = {}
        self.memory = -1  # of the pulses; anonymous, so that nothing is left of it whatever happens
        self.heartbeats: dict[int, Heartbeat] = {}
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.reading: asyncio.Task[None] | None = None
        self.task: asyncio.Task[None] | None = None  # kept, or it could be collected before it is done

    async def open(self) -> None:
        """Start the forkserver; it imports while the agents find each other."""
        ours, theirs = socket.socketpair()
        if self.memory < 0:
            self.memory = os.memfd_create("pulses")
            os.ftruncate(self.memory, SLOT * self.plan.placement.ranks_per_node)
        with self.run_dir.agent_log(self.agent_info.node).open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *own_packages.command("launcher.rank.forkserver", str(self.run_dir.path), str(self.memory)),
                pass_fds=[self.memory],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                env=self._server_environment(),
                start_new_session=True,
            )
        theirs.close()
        reader, self.writer = await asyncio.open_connection(sock=ours)
        self._send(preload=["training.libraries"] if self._forks() else [])
        self.reading = asyncio.create_task(self._read(reader))

    def _forks(self) -> bool:
        """Whether ranks are forked from a server that imports ahead of them: only those of the reference job."""
        target = self.plan.target
        reference = target.kind == "function" and target.name == RunSpec.target
        return reference and self.plan.cluster.start_method == "auto"

    def _server_environment(self) -> dict[str, str]:
        environment = shared_environment(self._inherited(), self.plan)
        if self._forks() and self.plan.target.path:  # it imports the code as it was submitted
            path = [*self.plan.target.path, *filter(None, [environment.get("PYTHONPATH")])]
            environment["PYTHONPATH"] = os.pathsep.join(path)
        return environment

    def _inherited(self) -> dict[str, str]:
        """The variables that this node adds to those of this process."""
        environment = dict(os.environ)
        if self.agent_info.nodes > 1:
            # gloo and NCCL otherwise look the host's own name up, and fall back to loopback where it does not resolve.
            interface = interface_of(source_towards(self.agent_info.address))
            for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                if interface:
                    environment.setdefault(variable, interface)
        return environment

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "started" in message:
                self.pids[message["started"]] = message["pid"]
            elif "exit" in message:
                self._ended(message["exit"], message["code"])
        # The forkserver is gone, and by PR_SET_PDEATHSIG its ranks with it.
        self.writer = None
        for rank in sorted(self.running):
            self._ended(rank, -signal.SIGKILL)

    def _ended(self, rank: int, code: int) -> None:
        self.running.discard(rank)
        self.pids.pop(rank, None)
        self.emit({"exit": rank, "code": code, "step": self.heartbeats[rank].read().step})

    def _send(self, **message: Any) -> None:
        assert self.writer is not None
        self.writer.write(json.dumps(message).encode() + b"\n")

    def handle(self, message: Message) -> None:
        """Do what the coordinator says."""
        match message:
            case {"start": _} if self.writer is None:  # its forkserver died with the ranks before
                self.task = asyncio.create_task(self._open_and(message))
            case {"start": attempt, "node": node, "address": address, "port": port, **more}:
                self.node = node
                worlds = self.worlds(attempt, address, port)
                self.heartbeats = {world.rank: Heartbeat.of(self.memory, world.local_rank) for world in worlds}
                for world in worlds:
                    self.heartbeats[world.rank].clear()
                    self.running.add(world.rank)
                    log = str(self.run_dir.log(attempt, world.rank))
                    own = self.variables(world, more.get("hosts", ()))
                    environment = rank_environment(self._inherited(), self.plan, world, own)
                    self._send(start=world.rank, log=log, world=asdict(world), environment=environment)
            case {"signal": number} if self.writer is not None:
                if number == signal.SIGKILL and self.running - self.pids.keys() and self.process is not None:
                    self.process.kill()  # it is importing, and would hear of it only afterwards
                self._send(signal=number, ranks=sorted(self.running))
            case {"stacks": attempt}:
                self.task = asyncio.create_task(self._stacks(attempt))
            case {"look": attempt, **more}:
                visible = more.get("visible", os.environ.get("CUDA_VISIBLE_DEVICES"))
                self.task = asyncio.create_task(self._look(attempt, visible))

    async def _open_and(self, message: Message) -> None:
        try:
            await self.open()
        except OSError as error:
            print(f"launch: node {self.agent_info.node}: {error}", file=sys.stderr)
            self.node = message["node"]
            for world in self.worlds(message["start"], message["address"], message["port"]):
                self.emit({"exit": world.rank, "code": ERROR_NOT_WRITTEN, "step": -1})
            return
        self.handle(message)

    def report(self) -> dict[int, tuple[Any, ...]]:
        """What the ranks that run last said of themselves: the fields of `launcher.agent.hang_detection.RankStatus` by rank."""
        found = {}
        for rank in sorted(self.running):
            heartbeat = self.heartbeats[rank].read()
            found[rank] = astuple(
                RankStatus(heartbeat.step, heartbeat.phase, heartbeat.age, process_state(self.pids.get(rank)))
            )
        return found

    async def _look(self, attempt: int, visible: str | None) -> None:
        facts = await preflight.look(self.run_dir, attempt, self.agent_info.node, self.plan.placement.device, visible)
        self.emit({"looked": attempt, "facts": facts})

    async def _stacks(self, attempt: int) -> None:
        """Let every rank write the stacks of its threads into its log, and say where it stands by that."""
        logs = {rank: self.run_dir.log(attempt, rank) for rank in sorted(self.running)}
        sizes = {rank: log.stat().st_size for rank, log in logs.items() if log.exists()}
        if self.writer is not None:
            self._send(signal=int(signal.SIGQUIT), ranks=sorted(logs))
        await asyncio.sleep(STACK_SECONDS)
        found = {}
        for rank, size in sizes.items():
            with logs[rank].open("rb") as log:
                log.seek(size)
                place = stack_location_of(log.read(1 << 20).decode(errors="replace"))
            found[rank] = place.line, place.waiting
        self.emit({"stacks": found})

    def worlds(self, attempt: int, address: str, port: int) -> list[World]:
        """The worlds of this node's ranks."""
        placement, node = self.plan.placement, self.node
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

    def variables(self, world: World, hosts: Sequence[str]) -> dict[str, str]:
        """`environment`, and the file by which a program says that it has finished."""
        finished = str(self.run_dir.finished(world.attempt, world.rank))
        return self.environment(world, hosts) | {"LAUNCH_FINISHED": finished}

    def environment(self, world: World, hosts: Sequence[str]) -> dict[str, str]:
        """The variables of a rank beside those of its world; `hosts` are the addresses of the run's nodes."""
        if not self.plan.placement.on_tpu:
            return {}
        session = f"{self.plan.name}-{world.attempt}"
        return tpu.environment_of(self.plan.placement, hosts, world.node_rank, world.local_rank, session)

    async def close(self) -> None:
        """Kill what still runs and wait until the forkserver and every rank are gone."""
        if self.writer is not None:
            self.writer.close()
        if self.process is not None:
            with suppress(TimeoutError):  # a rank in the D state cannot be killed, and must not hold the nodes
                await asyncio.wait_for(self.process.wait(), CLOSE_SECONDS)
        if self.reading is not None:
            self.running.clear()
            await self.reading
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1


def process_state(pid: int | None) -> str:
    """The state letter of a process in ``/proc``, such as ``R``, ``S``, ``D`` or ``T``; empty where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def on_signals(send: Callable[[int], None]) -> None:
    """Call `send` with the number of each signal that asks the agent to stop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        loop.add_signal_handler(number, send, int(number))
