"""A node of a Ray that lives inside a SLURM job: what srun starts there, one task a node.

    node 0: ray head · the run's Ray driver        other nodes: a raylet each

Node 0 says in ``ray-head.json`` of the run directory where its head is, and in the end that it is over. All ports are ones
that the system finds free and all files lie in a folder of the node's own, so any number of such jobs share a node. Each
Ray has a token of its own: what connects to a Ray runs code, and others may be on these nodes, too.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.agent.network import source_towards
from launcher.agent.protocol import AgentInfo
from launcher.backends.base import Backend
from launcher.backends.ray.backend import RayBackend, trainer
from launcher.backends.slurm.backend import SlurmBackend
from launcher.backends.slurm.job import BatchScript, as_task
from launcher.config.check import Check
from launcher.config.cluster import Cluster
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.recovery import End, Recovery
from launcher.lifecycle.run_dir import RunDir
from launcher.lifecycle.trust import SLURM_ID, check_id
from launcher.request import own_packages
from launcher.request.spec import Plan, State
from training.files import read_json, write_atomic

STORE_BYTES = 128 * 2**20
"""Of memory for Ray's objects. Ranks exchange data among themselves; by itself Ray would take a third of the node."""

LONGEST_FOLDER = 40
"""Characters of a folder under which Ray can put its sockets, whose paths have at most 107."""

TOKEN = "LAUNCH_RAY_NODE"
"""In the environment of all that a node starts, so that it finds them again: Ray's daemons leave their parents."""


class RayTask:
    """What submitit runs on each node."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        as_task(RunDir(self.run_dir), self._be_a_node)

    def _be_a_node(self, where: AgentInfo) -> int:
        run_dir = RunDir(self.run_dir)
        run_dir.logs.mkdir(exist_ok=True)
        with RayNode(run_dir, where) as node:
            return node.follow() if where.node else node.lead()


class RayNode:
    """Ray's processes on this node, from their start to their end."""

    def __init__(self, run_dir: RunDir, where: AgentInfo) -> None:
        self.run_dir, self.plan, self.where = run_dir, run_dir.plan(), where
        base = tempfile.gettempdir()
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir=base if len(base) <= LONGEST_FOLDER else "/tmp"))
        self.asked = False  # somebody wants the job to end
        self.process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    def __enter__(self) -> RayNode:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(TIMEOUTS.ray_processes_end)
        for pid in _started_with(f"{TOKEN}={self.folder}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _note(self, *_: object) -> None:
        self.asked = True

    # ---- Ray

    def _start(self, address: str, *words: str) -> None:
        """Start this node of the Ray whose head is, or is seen from here, at `address`."""
        each = trainer(self.plan)["scaling_config"]["resources_per_worker"]
        ranks = self.plan.placement.ranks_per_node
        options = {
            "node-ip-address": address,
            "num-cpus": ranks * each["CPU"],
            "num-gpus": ranks * each.get("GPU", 0),
            "object-store-memory": STORE_BYTES,
            # By themselves these are the same for every raylet of a machine, which another job may be on, too.
            "min-worker-port": 0,
            "max-worker-port": 0,
            "dashboard-agent-listen-port": 0,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        ray = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        environment = self._environment() | {"RAY_worker_niceness": "0"}
        environment.pop("RAY_ADDRESS", None)
        with self.run_dir.agent_log(self.where.node).open("ab") as log:
            self.process = subprocess.Popen(
                [*ray, *arguments, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=_unmoved,
            )

    def _environment(self) -> dict[str, str]:
        """That of all which this node starts."""
        own = {TOKEN: str(self.folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.run_dir.token_file)}
        return {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"} | own

    def _await_head(self) -> str:
        """The address of the head that this node has started, once it is there; empty where it ended."""
        assert self.process is not None
        file = self.folder / "ray_current_cluster"
        while self.process.poll() is None and not self.asked:
            with suppress(FileNotFoundError):
                if address := file.read_text().strip():
                    return address
            time.sleep(0.05)
        return ""

    # ---- node 0

    def lead(self) -> int:
        """Start the head, run the driver to its end, and tell the others; returns the job's exit status."""
        if (result := self.run_dir.result()) is not None:  # a scheduler started a job again that had come to an end
            if result["state"] == State.SUCCEEDED:
                return 0
            self.run_dir.result_file.unlink()
        self.run_dir.token_file.unlink(missing_ok=True)
        with open(os.open(self.run_dir.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        self._start(self.where.address, "--head", "--port=0", f"--temp-dir={self.folder}", "--include-dashboard=false")
        address = self._await_head()
        try:
            if not address:
                return 1  # the batch script sees that the run has no end
            self._send(address=address)
            return self._drive(address)
        finally:
            self._send(over=True)
            self.run_dir.token_file.unlink(missing_ok=True)

    def _send(self, **what: Any) -> None:
        write_atomic(self.run_dir.head_file, json.dumps({"session": self.where.session, **what}))

    def _drive(self, address: str) -> int:
        environment = self._environment() | {"RAY_ADDRESS": address}
        command = own_packages.command("launcher.backends.ray.driver", str(self.run_dir.path))
        with self.run_dir.agent_log(0).open("ab") as log:
            driver = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=_unmoved
            )
        mine = False  # the request to stop is this task's own
        while driver.poll() is None:
            if self.asked and not mine and not self.run_dir.stop_file.exists():
                self.run_dir.stop_file.touch()
                mine = True
            time.sleep(0.1)
        result = self.run_dir.result()
        if self.asked and (result is None or (mine and result["state"] == State.STOPPED)):
            return self._go_on_later()
        return driver.returncode

    def _go_on_later(self) -> int:
        """The ranks stopped since SLURM wants the nodes: have the job start again."""
        self.run_dir.stop_file.unlink(missing_ok=True)
        assert self.where.requeue is not None
        recovery, attempt = Recovery(self.run_dir, self.plan), self.run_dir.last_attempt()
        self.run_dir.result_file.unlink(missing_ok=True)  # first: from the requeue on SLURM ends this job
        end = recovery.stopped(BatchScript(self.where.requeue), attempt, self.run_dir.newest_step())
        assert isinstance(end, End), "the next attempt is another job's"
        return 0 if end.requeued else recovery.finish(end).exit_status

    # ---- the others

    def follow(self) -> int:
        """Be a node of the Ray of node 0 until it is over."""
        deadline = time.monotonic() + TIMEOUTS.connect
        while not (head := self._head()).get("address"):
            if head.get("over") or self.asked or time.monotonic() > deadline:
                return 0
            time.sleep(0.1)
        own = source_towards(head["address"].rpartition(":")[0])
        self._start(own, f"--address={head['address']}")
        assert self.process is not None
        while self.process.poll() is None and not self._head().get("over"):
            time.sleep(0.2)
        return 0

    def _head(self) -> dict[str, Any]:
        """What node 0 says, in this start of the job."""
        said: dict[str, Any] = read_json(self.run_dir.head_file) or {}
        return said if said.get("session") == self.where.session else {}


def _unmoved() -> None:
    """SLURM sends a signal to every process of a job; that it is time to save is for ranks and for this task."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _started_with(text: str) -> list[int]:
    """The processes of this user that have `text` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if text.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


class RayOnSlurmBackend(Backend):
    """A SLURM job in which a Ray runs: scheduled by the one, described by both."""

    name = "ray_on_slurm"
    slurm, ray = SlurmBackend(), RayBackend()
    # The nodes are SLURM's to give, and what they do is Ray's: it has no use for a node that waits.
    capabilities = replace(slurm.capabilities, spare_nodes=False, elastic=ray.capabilities.elastic)

    def survey(self, cluster: Cluster) -> Cluster:
        """Ask SLURM; where another Ray is, is none of this run's business."""
        if cluster.ray.address is not None:
            raise BadRequest(
                f"ray.address = {cluster.ray.address!r} and ray.inside = {cluster.ray.inside!r}: a Ray that is started"
                " inside a job has no address before. Leave one of them out of the profile."
            )
        return self.slurm.survey(cluster)

    def render(self, plan: Plan) -> str:
        """The sbatch script, and the arguments of the TorchTrainer inside."""
        inside = f"# inside, on a Ray of {plan.placement.nodes} nodes\n{self.ray.render(plan)}"
        return f"{self.slurm.render(plan)}\n{inside}"

    def check(self, plan: Plan) -> str:
        return self.slurm.check(plan)

    def submit(self, plan: Plan) -> str:
        """Hand the job to sbatch."""

        if plan.placement.on_tpu:
            raise BadRequest(f"{plan.cluster.name}: TPU slices are Ray's to find, not SLURM's. Use the backend slurm.")
        return self.slurm.submit(plan, RayTask(plan.run_dir))

    def check_id(self, job_id: str) -> None:
        check_id(SLURM_ID, job_id)

    def poll(self, job_id: str) -> State:
        return self.slurm.poll(job_id)

    def cancel(self, job_id: str) -> None:
        self.slurm.cancel(job_id)

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        return self.slurm.diagnose(cluster, cwd)
