"""Run a Ray cluster inside a SLURM job: one task per node starts Ray there.

    node 0: Ray head, the run's Ray driver        other nodes: one raylet each

Node 0 writes the address of the head, and at the end ``over``, to ``ray-head.json`` in the run directory. The system
assigns all ports, and all files are in a folder of the node's own, so several such jobs can share a node. Each Ray has its
own token, because clients of a Ray can run code and other users may be on the node.
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
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.agent.network.addresses import source_towards
from launcher.agent.protocol import AgentInfo
from launcher.backends.base import Backend
from launcher.backends.ray.backend import RayBackend, trainer
from launcher.backends.ray.cluster import TEMPORARY, short_folder
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
"""Size of Ray's object store, which ranks hardly use; the default is 30 % of the node's memory."""

RAY = (
    "import sys, ray.scripts.scripts as scripts; sys.argv.pop(0);"
    " scripts.get_ray_client_dependency_error = lambda: ImportError('not used'); scripts.main()"
)
"""The command ``ray``, without the server for Ray clients: its port would be fixed, and nobody uses it."""

STARTS = 3
"""How often Ray is started on a node. Ray itself gives up after 30 s, which may be too short on a busy machine."""

TOKEN = "LAUNCH_RAY_NODE"
"""Variable that marks all processes of a node, to find them again: Ray's daemons leave their parents."""


class RayTask:
    """The callable that submitit runs on each node."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def __call__(self) -> None:
        as_task(RunDir(self.run_dir), self._run_node)

    def _run_node(self, where: AgentInfo) -> int:
        run_dir = RunDir(self.run_dir)
        run_dir.logs.mkdir(exist_ok=True)
        with RayNode(run_dir, where) as node:
            return node.follow() if where.node else node.lead()


class RayNode:
    """Ray's processes on this node, from start to exit."""

    def __init__(self, run_dir: RunDir, where: AgentInfo) -> None:
        self.run_dir, self.plan, self.where = run_dir, run_dir.plan(), where
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir=short_folder()))
        self.asked = False  # a signal asked the job to end
        self.preempted = False  # SLURM announced by SIGUSR2 that it takes the nodes
        self.process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a program's own signal, which SLURM sends to all processes

    def __enter__(self) -> RayNode:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        """End Ray and what it has started on this node; at once if the job is to end, since SLURM then kills this process, too."""
        if self.process is not None and not self.asked:
            with suppress(ProcessLookupError):
                self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(TIMEOUTS.ray_processes_end)
        deadline = time.monotonic() + TIMEOUTS.ray_processes_end
        while (left := _started_with(f"{TOKEN}={self.folder}")) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)  # what they write until they are gone would stay

    def _note(self, number: int, *_: object) -> None:
        self.asked = True
        self.preempted = self.preempted or number == signal.SIGUSR2

    # ---- Ray

    def _start(self, address: str, *words: str) -> None:
        """Start Ray on this node, which other nodes reach at `address`."""
        each = trainer(self.plan)["scaling_config"]["resources_per_worker"]
        ranks = self.plan.placement.ranks_per_node
        options = {
            "node-ip-address": address,
            "num-cpus": ranks * each["CPU"],
            "num-gpus": ranks * each.get("GPU", 0),
            "object-store-memory": STORE_BYTES,
            # The defaults are fixed ports, and another job may run a raylet on this node.
            "min-worker-port": 0,
            "max-worker-port": 0,
            "dashboard-agent-listen-port": 0,
            # Ray lets all users write to it; only this user can enter the folder above it.
            "temp-dir": self.folder / TEMPORARY,
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        ray = [sys.executable, "-P", "-c", RAY, "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        environment = self._environment() | {"RAY_worker_niceness": "0"}
        environment.pop("RAY_ADDRESS", None)
        with self.run_dir.open_agent_log(self.where.node) as log:
            self.process = subprocess.Popen(
                [*ray, *arguments, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=_unmoved,
            )

    def _environment(self) -> dict[str, str]:
        """The environment of the processes of this node."""
        own = {TOKEN: str(self.folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.run_dir.token_file)}
        return {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"} | own

    def _started_again(self) -> bool:
        """Clean up after a Ray that has exited too early; returns whether it is to be started again."""
        assert self.process is not None
        if self.asked:
            return False
        text = f"launch: Ray on {self.where.host} exited with status {self.process.returncode}"
        print(f"{text}; see {self.run_dir.agent_log(self.where.node)}", file=sys.stderr, flush=True)
        self._end()
        return True

    def _start_head(self) -> str:
        """Start the head; returns its address, empty if it exited."""
        for _ in range(STARTS):
            self._start(self.where.address, "--head", "--port=0", "--include-dashboard=false")
            if (address := self._await_head()) or not self._started_again():
                return address
        return ""

    def _await_head(self) -> str:
        """Wait for the head that this node has started; returns its address, empty if it exited."""
        assert self.process is not None
        file = self.folder / TEMPORARY / "ray_current_cluster"
        while self.process.poll() is None and not self.asked:
            with suppress(FileNotFoundError):
                if address := file.read_text().strip():
                    return address
            time.sleep(0.05)
        return ""

    # ---- node 0

    def lead(self) -> int:
        """Start the head, publish its address, and run the driver; returns the job's exit status."""
        if (result := self.run_dir.result()) is not None:  # the scheduler started a job again whose run had ended
            if result["state"] == State.SUCCEEDED:
                return 0
            self.run_dir.result_file.unlink()
        self.run_dir.token_file.unlink(missing_ok=True)
        with open(os.open(self.run_dir.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        address = self._start_head()
        try:
            if not address:
                return 1  # the batch script handles a run without a result
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
        with self.run_dir.open_agent_log(0) as log:
            driver = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, preexec_fn=_unmoved
            )
        requested_here = False  # this task created the stop file
        while driver.poll() is None:
            if self.asked and not requested_here and not self.run_dir.stop_file.exists():
                self.run_dir.stop_file.touch()
                requested_here = True
            time.sleep(0.1)
        result = self.run_dir.result()
        leaving = self.asked and (result is None or (requested_here and result["state"] == State.STOPPED))
        if leaving and (self.preempted or self.where.fate()):  # else somebody cancelled the job
            return go_on_later(self.run_dir, self.where)
        return driver.returncode

    # ---- other nodes

    def follow(self) -> int:
        """Join the Ray of node 0 until the run is over; returns exit status 0."""
        deadline = time.monotonic() + TIMEOUTS.connect
        while not (head := self._head()).get("address"):
            if head.get("over") or self.asked or time.monotonic() > deadline:
                return 0
            time.sleep(0.1)
        own = source_towards(head["address"].rpartition(":")[0])
        for _ in range(STARTS):
            self._start(own, f"--address={head['address']}")
            assert self.process is not None
            while self.process.poll() is None and not self._head().get("over"):
                time.sleep(0.2)
            if self._head().get("over") or not self._started_again():
                break
        return 0

    def _head(self) -> dict[str, Any]:
        """The content of ``ray-head.json`` of this start of the job; empty if there is none yet."""
        content: dict[str, Any] = read_json(self.run_dir.head_file) or {}
        return content if content.get("session") == self.where.session else {}


def go_on_later(run_dir: RunDir, where: AgentInfo) -> int:
    """Requeue the job, whose ranks stopped because SLURM takes the nodes."""
    run_dir.stop_file.unlink(missing_ok=True)
    assert where.requeue is not None
    recovery, attempt = Recovery(run_dir, run_dir.plan()), run_dir.last_attempt()
    run_dir.result_file.unlink(missing_ok=True)  # before the requeue, after which SLURM ends this job
    end = recovery.stopped(BatchScript(where.requeue), attempt, run_dir.newest_step())
    assert isinstance(end, End), "the next attempt is started by another job"
    return 0 if end.requeued else recovery.finish(end).exit_status


def _unmoved() -> None:
    """Ignore SIGUSR1 and SIGUSR2, which SLURM sends to all processes of a job, not only to ranks and this task."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _started_with(text: str) -> list[int]:
    """The processes of this user with `text` in their environment, without this one."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if text.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


class RayOnSlurmBackend(Backend):
    """A Ray cluster inside a SLURM job."""

    name = "ray_on_slurm"
    slurm, ray = SlurmBackend(), RayBackend()
    # SLURM allocates the nodes; Ray cannot keep a spare node idle.
    capabilities = replace(slurm.capabilities, spare_nodes=False, elastic=ray.capabilities.elastic)

    def from_shell(self, cluster: Cluster, time: str | None = None) -> tuple[Cluster, tuple[str, ...]]:
        return self.slurm.from_shell(cluster, time)

    def survey(self, cluster: Cluster) -> Cluster:
        """Query SLURM. A profile with ``ray.address`` is refused: the Ray is started inside the job."""
        if cluster.ray.address is not None:
            raise BadRequest(
                f"ray.address = {cluster.ray.address!r} and ray.inside = {cluster.ray.inside!r}: a Ray inside a job has no"
                " address before the job starts. Remove one of them from the profile."
            )
        return self.slurm.survey(cluster)

    def render(self, plan: Plan) -> str:
        """The sbatch script, and the arguments of the TorchTrainer in the job."""
        inside = f"# inside, on a Ray of {plan.placement.nodes} nodes\n{self.ray.render(plan)}"
        return f"{self.slurm.render(plan)}\n{inside}"

    def check(self, plan: Plan) -> str:
        return self.slurm.check(plan)

    def submit(self, plan: Plan) -> str:
        """Submit the job with sbatch."""
        if plan.placement.on_tpu:
            raise BadRequest(
                f"{plan.cluster.name}: TPU slices cannot be used with Ray inside a SLURM job. Use --backend slurm."
            )
        return self.slurm.submit(plan, RayTask(plan.run_dir))

    def check_id(self, job_id: str) -> None:
        check_id(SLURM_ID, job_id)

    def poll(self, job_id: str) -> State:
        return self.slurm.poll(job_id)

    def poll_all(self, job_ids: Sequence[str]) -> dict[str, State]:
        """Return the states of the jobs, and of all jobs of this user."""
        return self.slurm.poll_all(job_ids)

    def identity(self) -> str:
        """Return the configuration, and the command, by which SLURM is asked."""
        return self.slurm.identity()

    def waits_for(self, job_id: str) -> str:
        return self.slurm.waits_for(job_id)

    def ended_as(self, job_id: str) -> str:
        return self.slurm.ended_as(job_id)

    def cancel(self, job_id: str) -> None:
        self.slurm.cancel(job_id)

    def way_in(self, job_id: str, host: str) -> str:
        return self.slurm.way_in(job_id, host)

    def ssh_note(self) -> str:
        return self.slurm.ssh_note()

    def diagnose(self, cluster: Cluster, cwd: Path) -> Iterator[Check]:
        return self.slurm.diagnose(cluster, cwd)
