"""A real Ray cluster on one machine: ``with RayCluster() as cluster: ...`` or ``python -m tests.testbed.ray``.

    keeper.py ── ray_host.py ── gcs_server · one raylet a node ── workers

Each node is a raylet, with the CPUs, GPUs, resources and labels that a test sets. Ports, sockets and session files belong
to the folder, so another Ray on the machine is not affected.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, Self

from tests.testbed.keeper import Keeper, TestbedError, descendants, run_by_hand, tail

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; the present one warns
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # the default is 15, with which Ray is slow on a busy machine
}


@dataclass(frozen=True)
class RayNode:
    """The resources of one raylet, not checked against the machine; `env` is the environment of its processes."""

    num_cpus: float = 4
    num_gpus: float = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def params(self) -> dict[str, Any]:
        return {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "resources": dict(self.resources),
            "labels": dict(self.labels),
            "env_vars": dict(self.env),
        }


THREE_NODES = (RayNode(), RayNode(), RayNode())


def missing() -> list[str]:
    """What this machine lacks for a Ray cluster; empty if nothing is missing."""
    return [] if importlib.util.find_spec("ray") else ["ray (Python package ray[train])"]


class RayCluster:
    """A cluster of raylets "node1", "node2", ...; the first is the head, where drivers connect.

    Raises `TestbedError` with the last lines of Ray's output.
    """

    def __init__(self, nodes: Sequence[RayNode] = THREE_NODES) -> None:
        self._first = nodes
        self._count = 0
        self.address = ""

    # --- life cycle

    def __enter__(self) -> Self:
        if lacks := missing():
            raise TestbedError("a Ray cluster cannot start here; missing: " + "; ".join(lacks))
        self._keeper = Keeper("ray")
        self.folder = self._keeper.folder
        try:
            env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | QUIET
            env |= {"RAY_TMPDIR": str(self.folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            self._host = self._keeper.start(
                "host", [sys.executable, "-m", "tests.testbed.ray_host", str(self.folder)], env
            )
            self._connection = self._connect()
            self.address = self._ask("start", {self._name(): node.params() for node in self._first})
        except BaseException:
            self._keeper.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._keeper.stop()

    # --- for tests

    def environment(self) -> dict[str, str]:
        """The environment of a driver, so that ``ray.init()`` connects to this cluster and logs little."""
        return {"RAY_ADDRESS": self.address, **QUIET}

    def add_node(self, node: RayNode = THREE_NODES[0]) -> str:
        """Start another raylet; returns its name."""
        name = self._name()
        self._ask("start", {name: node.params()})
        return name

    def remove_node(self, name: str, *, graceful: bool = False) -> None:
        """Stop a raylet and its workers; by default like a machine that fails."""
        self._ask("remove", name, graceful)

    def node_ids(self) -> dict[str, str]:
        """Name -> Ray's node id (hexadecimal) of the running nodes."""
        ids: dict[str, str] = self._ask("ids")
        return ids

    def drain_node(self, name: str, seconds: int = 60) -> None:
        """Drain a node with a deadline in `seconds`, like a cloud's notice of preemption."""
        node = self.node_ids()[name]
        words = ("--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back")
        ray = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.address]
        done = subprocess.run(
            [*ray, *words, "--deadline-remaining-seconds", str(seconds)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise TestbedError(f"{name} cannot be drained\n{done.stdout}{done.stderr}")

    def processes(self, words: str) -> dict[int, int]:
        """The cluster's processes with `words` in their command, with their parents."""
        found = {}
        for pid in descendants(self._keeper._process.pid):
            with suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " "):
                    found[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return found

    # --- inside

    def _name(self) -> str:
        self._count += 1
        return f"node{self._count}"

    def _connect(self) -> Any:
        deadline = time.monotonic() + 60
        while True:
            try:
                return Client(str(self.folder / "host"))
            except (FileNotFoundError, ConnectionRefusedError):
                if self._keeper.poll(self._host) is not None or time.monotonic() > deadline:
                    raise TestbedError(f"ray_host did not start\n{tail(self.folder / 'host.out')}") from None
            time.sleep(0.02)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        try:
            self._connection.send((operation, arguments))
            if not self._connection.poll(90):
                raise TestbedError(f"ray_host: no answer to {operation}\n{tail(self.folder / 'host.out')}")
            outcome, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise TestbedError(f"ray_host died\n{tail(self.folder / 'host.out')}") from error
        if outcome == "error":
            logs = sorted((self.folder / "session_latest" / "logs").glob("*.*"))
            said = [
                f"{log.name}:\n{tail(log)}" for log in logs if log.suffix in (".err", ".log") and log.stat().st_size
            ]
            raise TestbedError(f"ray_host: {operation} failed\n{value}\n" + "\n".join(said))
        return value


def main() -> int:
    """Run a cluster of three nodes until Ctrl-C, or run one command in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbed.ray", description=main.__doc__)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each node, as numbers")
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="run this in the cluster and exit with its status")
    args = parser.parse_args()
    return run_by_hand(RayCluster([RayNode(num_gpus=args.gpus)] * 3), args.command)


if __name__ == "__main__":
    sys.exit(main())
