"""A real SLURM cluster on one machine: ``with SlurmCluster() as cluster: ...`` or ``python -m tests.testbed.slurm``.

    folder/   slurm.conf  gres.conf  slurmdbd.conf  munge/  db/  state/  <node>/  gpu/  *.out *.log
       keeper.py ── munged · mariadbd · slurmdbd · slurmctld · one slurmd a node ── slurmstepd ── jobs

Nodes are names on this machine; GPUs are character devices without a driver. Scheduling, CUDA_VISIBLE_DEVICES,
preemption, requeues and accounting are real. Ports, sockets and keys belong to the folder, so another SLURM on the
machine, such as the cluster of a second checkout, is not affected.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.testbed.keeper import (
    Keeper,
    TestbedError,
    descendants,
    free_ports,
    kill,
    listening,
    processes_with,
    run_by_hand,
    tail,
)
from tests.testbed.slurm_conf import FOUR_NODES, Node, config_files

BINARIES = {  # binary -> Debian package
    "munged": "munge",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "srun": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server-core",
}
PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"


@dataclass(frozen=True)
class Job:
    """A line of squeue; `state` as SLURM prints it, such as "RUNNING"."""

    id: str
    name: str
    state: str
    partition: str
    nodes: str
    reason: str


def missing() -> list[str]:
    """What this machine lacks for a SLURM cluster; empty if nothing is missing."""
    absent = [name for name in BINARIES if not shutil.which(name, path=PATH)]
    lacks = [f"{name} (Debian package {BINARIES[name]})" for name in absent]
    plugin = "slurm-wlm/accounting_storage_slurmdbd.so"
    if not any(found for lib in ("lib", "lib64", "lib/*") for found in Path("/usr").glob(f"{lib}/{plugin}")):
        lacks.append(f"{plugin} (Debian package slurm-wlm-basic-plugins)")
    if os.geteuid() != 0:
        lacks.append("root (SLURM's daemons, mknod)")
    return lacks


class SlurmCluster:
    """A cluster with partitions ``debug`` (the default, preempted after `grace_time` seconds) and ``urgent``.

    Without `accounting` there is no slurmdbd and no database, so sacct does not work. `extra` is appended to slurm.conf.
    `topology` is the text of topology.conf, for the plug-in topology/tree.
    Raises `TestbedError` with the daemon and its last lines.
    """

    def __init__(
        self,
        nodes: Sequence[Node] = FOUR_NODES,
        *,
        accounting: bool = True,
        grace_time: int = 30,
        extra: str = "",
        topology: str = "",
    ) -> None:
        self.nodes = tuple(nodes)
        self.accounting = accounting
        self.grace_time = grace_time
        self.extra = extra
        self.topology = topology
        self._pids: dict[str, int] = {}

    # --- life cycle

    def __enter__(self) -> Self:
        if lacks := missing():
            raise TestbedError("a SLURM cluster cannot start here; missing: " + "; ".join(lacks))
        self._keeper = Keeper("slurm")
        self.folder = self._keeper.folder
        try:
            self._start()
        except BaseException:
            self._keeper.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._keeper.stop()

    def _start(self) -> None:
        dbd_port, ctld_port, *ports = free_ports(2 + len(self.nodes))
        self._ports = dict(zip((node.name for node in self.nodes), ports, strict=True))
        self._write_files(dbd_port, ctld_port)
        munge, db = self.folder / "munge", self.folder / "db"
        self._daemon(
            *("munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2"),
        )
        if self.accounting:
            # no network and no users: the socket is protected by the folder's permissions
            self._daemon(
                *("mariadbd", "--no-defaults", "--user=root", f"--datadir={db}", f"--socket={db}/socket"),
                *("--skip-networking", "--skip-grant-tables", f"--pid-file={db}/pid", "--innodb-log-file-size=8M"),
                *("--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"),
                "--innodb-flush-method=nosync",
            )
            self._wait("mariadbd", (db / "socket").exists)
        self._wait("munged", (munge / "socket").exists)
        if self.accounting:
            self._daemon("slurmdbd", "-D")
            self._wait("slurmdbd", lambda: listening(dbd_port))
            self.run("sacctmgr", "-i", "add", "cluster", "testbed")
        self._daemon("slurmctld", "-D", "-c")
        self._wait("slurmctld", lambda: listening(ctld_port))
        for node in self.nodes:
            self._start_slurmd(node.name)
        self.wait_idle()

    # --- for tests

    def environment(self) -> dict[str, str]:
        """The environment of SLURM's commands for this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run a client command and return its stdout; raises `TestbedError` if it fails."""
        done = subprocess.run(command, env=self._env(), capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise TestbedError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}{done.stdout}")
        return done.stdout

    def jobs(self) -> list[Job]:
        """All jobs of the controller; ended ones are included for some minutes."""
        lines = self.run("squeue", "--noheader", "--states=all", "--format=%i|%j|%T|%P|%N|%r").splitlines()
        return [Job(*line.split("|")) for line in lines]

    def node_states(self) -> dict[str, str]:
        """Node -> state in lower case, such as "idle"; with a star if slurmd does not answer."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    def wait_idle(self, timeout: float = 30) -> None:
        """Wait until no job runs and all nodes are idle; raises `TestbedError` after `timeout` seconds."""
        idle = {node.name: "idle" for node in self.nodes}
        self._wait("slurmctld", lambda: self.node_states() == idle, timeout, lambda: f"nodes: {self.node_states()}")

    def set_node(self, name: str, state: str, reason: str = "test") -> None:
        """``scontrol update``: down, drain, resume, ..."""
        self.run("scontrol", "update", f"nodename={name}", f"state={state}", f"reason={reason}")

    def reset(self) -> None:
        """Cancel all jobs, resume all nodes and wait until they are idle, for the next test."""
        for name in self._ports:
            if self._keeper.poll(self._pids[name]) is not None:
                self.restart_slurmd(name)
        active = [job.id for job in self.jobs() if job.state in ("PENDING", "RUNNING", "SUSPENDED")]
        for how in (["--signal=KILL", "--full"], []) if active else ():
            with contextlib.suppress(TestbedError):  # jobs that have ended meanwhile cannot be cancelled
                self.run("scancel", *how, *active)
        for name, state in self.node_states().items():
            if state.rstrip("*") not in ("idle", "allocated", "mixed", "completing"):
                with contextlib.suppress(TestbedError):  # a node whose slurmd is registering cannot be resumed
                    self.set_node(name, "resume")
        self.set_grace_time(self.grace_time)
        with contextlib.suppress(TestbedError):
            self.wait_idle(15)
            return
        for name, state in self.node_states().items():
            if state != "idle":  # a message of its slurmd was lost, as while slurmctld is stopped
                self._start_over(name)
        self.wait_idle()

    def _start_over(self, name: str) -> None:
        """Reset the state of a node in slurmctld, and restart its slurmd."""
        self.kill_slurmd(name)
        for state in ("down", "resume"):
            with contextlib.suppress(TestbedError):
                self.set_node(name, state)
        self.restart_slurmd(name)

    def set_grace_time(self, seconds: int) -> None:
        """Set the grace time of preempted jobs in ``debug``, from the signal to SIGTERM, until the next `reset`."""
        self.run("scontrol", "update", "partitionname=debug", f"gracetime={seconds}")

    def kill_slurmd(self, name: str, *, jobs: bool = False) -> None:
        """Kill a node's slurmd; with `jobs` also its steps and tasks, like a power failure."""
        pid = self._pids[name]
        victims = {pid} | descendants(pid)
        if jobs:
            victims |= set(processes_with(f"{NODE}={self.folder}/{name}\0"))
            victims |= set(processes_with(f"{self.folder}/", f"SLURMD_NODENAME={name}\0"))
        kill(victims)
        self._wait("slurmctld", lambda: self._keeper.poll(pid) is not None)

    def kill_step_daemon(self, name: str) -> None:
        """Kill the slurmstepd of the newest task on a node; the task continues, and SLURM does not notice its exit."""
        steps = {pid: step for pid, step in self.step_daemons(name).items() if step < FIRST_SPECIAL_STEP}
        os.kill(max(steps, key=lambda pid: steps[pid]), signal.SIGKILL)

    def step_daemons(self, name: str) -> dict[int, int]:
        """The slurmstepds of a node: pid -> number of the step; those of batch scripts have numbers above all others.

        They are found by the sockets on which they listen, since from SLURM 24.11 on their titles hide their environment.
        """
        lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        spool = f"{self.folder}/{name}/spool/{name}_"
        inodes = {f"socket:[{line[6]}]": line[7] for line in lines if len(line) > 7 and line[7].startswith(spool)}
        found = {}
        for pid in descendants(os.getpid()) | descendants(self._keeper.pid):
            with contextlib.suppress(OSError):
                for handle in os.scandir(f"/proc/{pid}/fd"):
                    if path := inodes.get(os.readlink(handle.path)):
                        found[pid] = int(path.rpartition(".")[2])
        return found

    def restart_slurmd(self, name: str) -> None:
        """Start a node's slurmd again after `kill_slurmd`."""
        self._start_slurmd(name)

    def signal_daemon(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a daemon, such as ``slurmctld`` or a node's slurmd; SIGSTOP and SIGCONT simulate an outage."""
        os.kill(self._pids[name], number)

    # --- inside

    def _env(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(OPTIONS)}
        return clean | self.environment() | {"PATH": PATH, "MYSQL_UNIX_PORT": str(self.folder / "db" / "socket")}

    def _daemon(self, binary: str, *args: str, name: str = "", env: dict[str, str] | None = None) -> None:
        self._pids[name or binary] = self._keeper.start(name or binary, [binary, *args], self._env() | (env or {}))

    def _start_slurmd(self, name: str) -> None:
        self._daemon("slurmd", "-D", "-N", name, name=name, env={NODE: f"{self.folder}/{name}"})

    def _wait(
        self, daemon: str, ready: Callable[[], bool], timeout: float = 30, state: Callable[[], str] = lambda: ""
    ) -> None:
        deadline = time.monotonic() + timeout
        while not ready():
            status = self._keeper.poll(self._pids[daemon])
            if status is not None or time.monotonic() > deadline:
                what = f"not ready after {timeout} s" if status is None else f"ended with status {status}"
                raise TestbedError(f"{daemon}: {what}. {state()}\n{tail(self.folder / f'{daemon}.out')}")
            time.sleep(0.05)

    def _write_files(self, dbd_port: int, ctld_port: int) -> None:
        for name in ("munge", "db", "state", "gpu", *self._ports):
            (self.folder / name).mkdir(mode=0o700 if name == "db" else 0o755)
        (self.folder / "db/slurm").mkdir()  # newer clients refuse a database that slurmdbd has just created
        for i in range(max(node.gpus for node in self.nodes)):
            os.mknod(self.folder / "gpu" / f"gpu{i}", 0o20666, os.makedev(1, 3))
        files = config_files(
            self.folder, self.nodes, self._ports, ctld_port, dbd_port if self.accounting else None, self.grace_time
        )
        files["slurm.conf"] += self.extra
        if self.topology:
            files["slurm.conf"] += "TopologyPlugin=topology/tree\n"
            files["topology.conf"] = self.topology
        files["munge/key"] = os.urandom(64).hex()
        for name, text in files.items():
            (self.folder / name).touch(mode=0o644 if name in ("slurm.conf", "gres.conf", "topology.conf") else 0o600)
            (self.folder / name).write_text(text)


OPTIONS = ("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SCANCEL_")
FIRST_SPECIAL_STEP = 0xFFFFFFF0  # slurm.h: SLURM_BATCH_SCRIPT and the like
NODE = "LAUNCH_TESTBED_NODE"  # in the environment of a slurmd and of its slurmstepds


def main() -> int:
    """Run a cluster until Ctrl-C, or run one command in it."""
    parser = argparse.ArgumentParser(prog="python -m tests.testbed.slurm", description=main.__doc__)
    parser.add_argument("--no-accounting", action="store_true", help="without slurmdbd: sacct does not work")
    parser.add_argument("--grace-time", type=int, default=30, help="seconds of GraceTime in partition debug")
    parser.add_argument("--command", nargs=argparse.REMAINDER, help="run this in the cluster and exit with its status")
    args = parser.parse_args()
    return run_by_hand(SlurmCluster(accounting=not args.no_accounting, grace_time=args.grace_time), args.command)


if __name__ == "__main__":
    sys.exit(main())
