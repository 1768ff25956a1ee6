"""The ranks of one node: started through its forkserver, watched and stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from launcher.agent.hangs import evidence
from launcher.agent.hangs.detection import STOPPED_STATES, RankStatus
from launcher.agent.health import preflight
from launcher.agent.health.memory_kills import MemoryKills
from launcher.agent.inside.visits import Sessions
from launcher.agent.network.addresses import interface_of, interface_variables, source_towards
from launcher.agent.processes import process_state
from launcher.agent.protocol import (
    AgentInfo,
    Alive,
    CheckNode,
    Collectives,
    DumpStacks,
    End,
    FromAgent,
    Heartbeats,
    NodeChecked,
    RankExit,
    Signal,
    Stacks,
    Start,
    StopRequest,
    ToAgent,
    Visit,
)
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.exit_status import ERROR_NOT_WRITTEN
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.environment import complete_environment, shared_environment
from launcher.rank.messages import (
    FromForkServer,
    Preload,
    RankEnded,
    RankStarted,
    Ready,
    SignalRanks,
    StartRank,
    ToForkServer,
    decode,
    encode,
)
from launcher.rank.terminal.relay import Streams
from launcher.request import own_packages
from launcher.request.spec import Plan, RunSpec
from training.distributed.heartbeat import DEBUGGING, SLOT, Heartbeat

Emit = Callable[[FromAgent], None]


class NodeRanks:
    """The ranks of one node, started and watched through its forkserver.

    It acts on the coordinator's messages (`handle`) and reports what happens through `emit` (`launcher.agent.protocol`).

    Attributes:
        streams: the standard streams of the rank, if it is a single one that a foreground command started.
        foreground: what the user asks for at the terminal of that rank.
    """

    def __init__(
        self, run_dir: RunDir, plan: Plan, agent_info: AgentInfo, emit: Emit, streams: Streams | None = None
    ) -> None:
        self.streams, self.foreground = streams or Streams(), Foreground(self)
        self.run_dir, self.plan, self.agent_info, self.emit = run_dir, plan, agent_info, emit
        self.sessions = Sessions(run_dir, plan, agent_info)
        self.running: set[int] = set()
        self.pids: dict[int, int] = {}
        self.memory = -1  # of the heartbeats; anonymous, so that nothing is left of it if this process is killed
        self.heartbeats: dict[int, Heartbeat] = {}
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.reading: asyncio.Task[None] | None = None
        self.task: asyncio.Task[None] | None = None  # a task without a reference may be collected before it is done

    async def open(self) -> None:
        """Start the forkserver; it imports while the agents find each other."""
        local, remote = socket.socketpair()
        self.streams.open(self.foreground)
        if self.memory < 0:
            self.memory = os.memfd_create("heartbeats")
            os.ftruncate(self.memory, SLOT * self.plan.placement.ranks_per_node)
        inherited = [self.memory, *self.streams.descriptors]
        with self.run_dir.open_agent_log(self.agent_info.node) as log:
            self.process = await asyncio.create_subprocess_exec(
                *own_packages.command("launcher.rank.forkserver", str(self.run_dir.path), *map(str, inherited)),
                pass_fds=[each for each in inherited if each >= 0],
                stdin=remote.fileno(),
                stdout=log,
                stderr=log,
                env=server_environment(self.plan, node_environment(self.agent_info)),
                start_new_session=True,
            )
        remote.close()
        reader, self.writer = await asyncio.open_connection(sock=local)
        self._send(preload(self.plan))
        self.reading = asyncio.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message: FromForkServer = decode(FromForkServer, line)
            match message:
                case RankStarted(rank, pid):
                    self.pids[rank] = pid
                case RankEnded(rank, code):
                    self._ended(rank, code)
                case Ready():
                    pass
                case _:
                    assert_never(message)
        self.writer = None  # the forkserver is gone, and by PR_SET_PDEATHSIG its ranks with it
        for rank in sorted(self.running):
            self._ended(rank, -signal.SIGKILL)

    def _ended(self, rank: int, code: int) -> None:
        self.running.discard(rank)
        self.pids.pop(rank, None)
        self.streams.drain()
        self.memory_kills.note(rank, code)
        self.emit(RankExit(rank, code, self.heartbeats[rank].read().step))

    def _send(self, message: ToForkServer) -> None:
        assert self.writer is not None
        self.writer.write(encode(message))

    def handle(self, message: ToAgent) -> None:
        """Do what the coordinator asks for."""
        match message:
            case Start() if self.writer is None:  # its forkserver died with the ranks before
                self.task = asyncio.create_task(self._open_and_start(message))
            case Start():
                self._start(message)
            case Signal(number, ranks, after):
                self._signal(number, self.running if ranks is None else self.running & {*ranks}, after)
            case DumpStacks(attempt):
                self.task = asyncio.create_task(self._stacks(attempt))
            case CheckNode():
                self.task = asyncio.create_task(check_node(self, message))
            case Visit():
                self.sessions.visit(message, self.pids)
            case Alive() | End():
                pass
            case _:
                assert_never(message)

    def _start(self, start: Start) -> None:
        self.foreground.suspended = self.foreground.interrupted = False
        self.memory_kills = MemoryKills(self.run_dir, start.attempt, self.agent_info.host)
        self.heartbeats = {world.rank: Heartbeat.of(self.memory, world.local_rank) for world in start.worlds}
        inherited = node_environment(self.agent_info)
        self.sessions.begin(start.worlds, shared_environment(inherited, self.plan))
        for world in start.worlds:
            self.heartbeats[world.rank].clear()
            self.running.add(world.rank)
            environment = complete_environment(inherited, self.plan, self.run_dir, world, start.environments)
            self.sessions.environments[world.rank] = environment
            log = self.run_dir.log(start.attempt, world.rank)
            self.streams.start(log)
            self._send(StartRank(world, str(log), environment))

    async def _open_and_start(self, start: Start) -> None:
        try:
            await self.open()
        except OSError as error:
            print(f"launch: node {self.agent_info.node}: {error}", file=sys.stderr)
            for world in start.worlds:
                self.emit(RankExit(world.rank, ERROR_NOT_WRITTEN, -1))
            return
        self._start(start)

    def _signal(self, number: int, ranks: set[int], after: float) -> None:
        if self.foreground.suspended:
            self.foreground.suspend(False)  # a suspended rank cannot act on the signal
        if self.writer is None:
            return
        if number == signal.SIGKILL and ranks - self.pids.keys() and self.process is not None:
            self.process.kill()  # it is importing, and would read the message only afterwards
        self._send(SignalRanks(number, sorted(ranks), after))

    def report(self) -> Heartbeats:
        """Return the status of the ranks that run."""
        found = {}
        for rank in sorted(self.running):
            beat = self.heartbeats[rank].read()
            if self.heartbeats[rank].interactive:
                beat = replace(beat, phase=DEBUGGING)
            found[rank] = RankStatus(beat.step, beat.phase, beat.age, process_state(self.pids.get(rank)))
        return Heartbeats(found)

    async def _stacks(self, attempt: int) -> None:
        """Have every rank write the stacks of its threads into its log and its collectives, and report both."""
        asked = {rank for rank in self.running if self.heartbeats[rank].request_dump()}
        asked -= {rank for rank in asked if process_state(self.pids.get(rank)) in [*STOPPED_STATES]}
        for rank in self.running - asked:
            self.emit(Collectives(rank))
        places = await evidence.stack_locations(self.run_dir, attempt, self.running, self._quit)
        self.emit(Stacks({rank: place for rank, place in places.items() if rank in self.running}))
        async for rank, groups in evidence.records(self.run_dir, attempt, asked, self.running):
            self.emit(Collectives(rank, groups))

    def _quit(self, ranks: list[int]) -> None:
        if self.writer is not None:
            self._send(SignalRanks(signal.SIGQUIT, ranks))

    async def close(self) -> None:
        """Kill what still runs and wait until the forkserver, every rank and every session are gone."""
        ending = asyncio.create_task(self.sessions.close())
        if self.writer is not None:
            self.writer.close()
        if self.process is not None:
            with suppress(TimeoutError):  # a rank in the D state cannot be killed, and must not hold the nodes
                await asyncio.wait_for(self.process.wait(), TIMEOUTS.ranks_end)
        if self.reading is not None:
            self.running.clear()
            await self.reading
        await ending
        self.streams.close()
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1


async def check_node(ranks: NodeRanks, message: CheckNode) -> None:
    """Run the preflight checks of the node and report what they found."""
    plan, visible = ranks.plan, message.visible
    if visible is None:
        visible = plan.environment.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    node, device = ranks.agent_info.node, plan.placement.device
    facts = await preflight.look(ranks.run_dir, message.attempt, node, device, visible)
    ranks.emit(NodeChecked(message.attempt, facts))


class Foreground:
    """What the user asks for at the terminal of a single local rank.

    Attributes:
        suspended: the rank is suspended, by Ctrl-Z.
        interrupted: Ctrl-C was passed on to the program, which was at a prompt or in a debugger.
    """

    def __init__(self, ranks: NodeRanks) -> None:
        self.ranks = ranks
        self.suspended = self.interrupted = False

    def interrupt(self) -> bool:
        """Return whether Ctrl-C is for the program, at a prompt or in a debugger; else ask the run to stop."""
        if any(self.ranks.heartbeats[rank].interactive for rank in self.ranks.running):
            self.interrupted = True
            return True
        self.ranks.emit(StopRequest(signal.SIGINT))
        return False

    def kill(self) -> None:
        """End the run at once: of two requests to stop by SIGINT, the second one kills."""
        for _ in range(2):
            self.ranks.emit(StopRequest(signal.SIGINT))

    def suspend(self, suspended: bool) -> None:
        """Suspend the processes of the rank, or let them continue."""
        self.suspended = suspended
        for pid in self.ranks.pids.values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGSTOP if suspended else signal.SIGCONT)


def forks(plan: Plan) -> bool:
    """Return whether ranks are forked from a server that imports ahead of them: only those of the reference job."""
    reference = plan.target.kind == "function" and plan.target.name == RunSpec.target
    return reference and plan.cluster.start_method == "auto"


def preload(plan: Plan) -> Preload:
    """Return the first message to the forkserver."""
    if forks(plan):
        return Preload(["training.libraries"])
    target = plan.target
    folders = [*target.path, *([str(Path(target.name).parent)] if target.kind == "script" else [])]
    return Preload([], plan.cluster.start_method == "auto", target.name, folders)


def server_environment(plan: Plan, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the forkserver."""
    environment = shared_environment(inherited, plan)
    if forks(plan) and plan.target.path:  # it imports the code as it was submitted
        path = [*plan.target.path, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    return environment


def node_environment(agent_info: AgentInfo) -> dict[str, str]:
    """Return the environment of this process with what the node adds: the network interface for the process group."""
    environment = dict(os.environ)
    if agent_info.nodes > 1:
        interface = interface_of(source_towards(agent_info.address))
        environment = interface_variables(interface) | environment
    return environment


def on_signals(send: Callable[[int], None]) -> None:
    """Call `send` with the number of each signal that asks the agent to stop."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        loop.add_signal_handler(number, send, int(number))
    # SLURM sends a program's SIGUSR1 to this process, too. A handler is not inherited, as SIG_IGN would be.
    loop.add_signal_handler(signal.SIGUSR1, lambda: None)
