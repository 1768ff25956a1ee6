"""Rendezvous, supervision and stop of many nodes: ``python -m benchmarks.scale_agents [NODES ...]``.

The coordinator is the real one, in a process of its own; the agents are clients that speak the protocol through the agents' own
`Link`, in `CLIENTS` other processes. What they report is made up: `RANKS` ranks a node that train. All of
it shares the cores of this machine, so that the figures are upper bounds.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from benchmarks.scale_torchrun import LARGEST, LIMIT, rendezvous_of_torchrun
from launcher.agent.coordinator import Coordinator
from launcher.agent.hangs.detection import RankStatus
from launcher.agent.network.addresses import raise_file_limit
from launcher.agent.network.link import Link, Rendezvous, seconds_between_reports
from launcher.agent.protocol import (
    AgentInfo,
    End,
    FromAgent,
    Heartbeats,
    Hello,
    RankExit,
    Signal,
    Start,
    ToAgent,
)
from launcher.config.cluster import Cluster
from launcher.lifecycle.exit_status import STOPPED
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target
from training.files import read_json

SIZES = (64, 256, 1000, 10000)
RANKS = 8
CLIENTS = 2
WINDOW = 10.0
"""Seconds of supervision that are measured."""


class SimulatedRanks:
    """The ranks of a node, which end as soon as they are signalled; the interface is that of `NodeRanks`."""

    def __init__(self, emit: Callable[[FromAgent], None]) -> None:
        self.emit = emit
        self.ranks: list[int] = []
        self.step = 0
        self.started_at = self.signalled_at = 0.0
        self.foreground = SimpleNamespace(suspended=False, interrupted=False)

    def handle(self, message: ToAgent) -> None:
        match message:
            case Start(worlds=worlds):
                self.ranks, self.started_at = [world.rank for world in worlds], time.monotonic()
            case Signal():
                self.signalled_at = time.monotonic()
                for rank in self.ranks:
                    self.emit(RankExit(rank, STOPPED, self.step))
                self.ranks = []

    def report(self) -> Heartbeats:
        self.step += 1
        return Heartbeats({rank: RankStatus(self.step, "training", 0.1234, "S") for rank in self.ranks})

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass


# ---- the coordinator ----------------------------------------------------------------------------------------------


class TimedCoordinator(Coordinator):
    """A coordinator without ranks and store of its own, which prints when all agents have joined, and its end."""

    def __init__(self, run_dir: RunDir, plan: Plan) -> None:
        super().__init__(run_dir, plan, AgentInfo(nodes=plan.placement.nodes, host="node0"))
        self.local = self.agents.local = cast(Any, SimulatedRanks(self._emit))
        self.store = self.agents.store = cast(
            Any, SimpleNamespace(prepare=lambda: None, open=lambda: 1, close=lambda: None)
        )

    async def _wait_for_peers(self) -> None:
        await super()._wait_for_peers()
        print(json.dumps({"joined": len(self.peers.connected()), "at": time.monotonic()}), flush=True)


def coordinate(folder: Path, nodes: int) -> None:
    raise_file_limit()
    run_dir = RunDir(folder / "run")
    run_dir.create()
    plan = Plan(
        *("run", run_dir.path, RunSpec("x.py"), "local", Cluster("local", "local"), Placement(nodes, RANKS, "cpu")),
        *(Target("script", "x.py"), folder, 60),
    )
    run_dir.write_plan(plan)
    run_dir.logs.mkdir()
    asyncio.run(TimedCoordinator(run_dir, plan).run())


# ---- the agents ---------------------------------------------------------------------------------------------------


async def agent(node: int, seconds: float, rendezvous: Rendezvous, done: list[SimulatedRanks]) -> None:
    """Be one agent until the run ends."""
    link = Link(Hello(node, "", f"node{node}"))
    ranks = SimulatedRanks(link.send)
    while True:
        with suppress(OSError):
            await link.open(rendezvous)
            break
        await asyncio.sleep(0.1)
    reporting = asyncio.create_task(report(node, seconds, link, ranks))
    while not isinstance(message := await link.receive(), End):
        ranks.handle(message)
    reporting.cancel()
    link.close()
    done.append(ranks)


async def report(node: int, seconds: float, link: Link, ranks: SimulatedRanks) -> None:
    await asyncio.sleep(node * 0.618 % seconds)  # agents of a real run do not report at the same moment either
    while True:
        link.send(ranks.report())
        link.report()
        await asyncio.sleep(seconds)


async def be_agents(folder: Path, first: int, last: int, nodes: int) -> None:
    raise_file_limit()
    found = read_json(RunDir(folder / "run").rendezvous_file)
    assert found is not None
    rendezvous = Rendezvous(found["address"], found["port"], found["token"])
    print("ready", flush=True)
    sys.stdin.readline()
    done: list[SimulatedRanks] = []
    seconds = seconds_between_reports(nodes)
    await asyncio.gather(*(agent(node, seconds, rendezvous, done) for node in range(first, last)))
    times = {name: max(getattr(ranks, name) for ranks in done) for name in ("started_at", "signalled_at")}
    print(json.dumps(times | {"signalled": sum(ranks.signalled_at > 0 for ranks in done)}), flush=True)


# ---- the measurement ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Seconds, but `share`: the part of one core that the coordinator takes."""

    rendezvous: float
    start: float
    share: float
    stop: float


def child(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.scale_agents", *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise RuntimeError(f"{process.args!r} ended with {process.wait()}")
    return line


def cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def measure(nodes: int) -> Measured:
    """Run a job of so many nodes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        coordinator = child("coordinator", folder, nodes)
        while not (folder / "run/rendezvous.json").exists():
            time.sleep(0.05)
        bounds = [1 + (nodes - 1) * part // CLIENTS for part in range(CLIENTS + 1)]
        clients = [child("agents", folder, *pair, nodes) for pair in pairwise(bounds)]
        for client in clients:
            line_of(client)
        began = time.monotonic()
        for client in clients:
            assert client.stdin is not None
            print("go", file=client.stdin, flush=True)
        joined = json.loads(line_of(coordinator))
        assert joined["joined"] == nodes, joined
        time.sleep(2.0 + nodes / 2000)  # the start of all ranks is over
        before = time.monotonic(), cpu_seconds(coordinator.pid)
        time.sleep(WINDOW)
        after = time.monotonic(), cpu_seconds(coordinator.pid)
        asked = time.monotonic()
        coordinator.send_signal(signal.SIGTERM)
        ends = [json.loads(line_of(client)) for client in clients]
        assert sum(end["signalled"] for end in ends) == nodes - 1
        for process in (coordinator, *clients):
            process.communicate()
        return Measured(
            joined["at"] - began,
            max(end["started_at"] for end in ends) - joined["at"],
            (after[1] - before[1]) / (after[0] - before[0]),
            max(end["signalled_at"] for end in ends) - asked,
        )


def growth(sizes: Sequence[int], values: Sequence[float]) -> str:
    """The exponent of growth from the last size but one to the last: 1 is linear; empty for the first."""
    if len(sizes) < 2:
        return ""
    ratio = max(values[-1], 1e-6) / max(values[-2], 1e-6)
    return f"n^{math.log(ratio) / math.log(sizes[-1] / sizes[-2]):.1f}"


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:]] or [*SIZES]
    versions = f"Python {platform.python_version()}, {os.cpu_count()} cores for all processes, {date.today()}"
    print(f"\nAgents: {RANKS} ranks a node; {versions}, load {os.getloadavg()[0]:.1f}\n")
    names = {"rendezvous": "rendezvous s", "start": "start s", "share": "share of a core", "stop": "stop s"}
    print(f"{'nodes':>7}" + "".join(f"{name:>17} {'growth':>7}" for name in names.values()) + f"{'torchrun s':>14}")
    found: list[Measured] = []
    for number, nodes in enumerate(sizes, 1):
        found.append(measure(nodes))
        row = f"{nodes:>7}"
        for name in names:
            values = [getattr(each, name) for each in found]
            row += f"{values[-1]:>17.3f} {growth(sizes[:number], values):>7}"
        peer = rendezvous_of_torchrun(nodes)
        print(row + (f"{peer:>14.3f}" if peer is not None else f"{'-':>14}"), flush=True)
    print("\nn^1 is linear. torchrun s: its c10d rendezvous of as many clients, in threads of as many processes;")
    print(f"- stands for more than {LARGEST} nodes, or more than {LIMIT:g} s.")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["coordinator", folder, nodes]:
            coordinate(Path(folder), int(nodes))
        case ["agents", folder, first, last, nodes]:
            asyncio.run(be_agents(Path(folder), int(first), int(last), int(nodes)))
        case _:
            main()
