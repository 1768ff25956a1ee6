"""The faults: each function injects one into a running subject and returns a function that undoes it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.subject import Subject
from tests.testbed.keeper import descendants
from tests.testbed.ray import RayCluster
from tests.testbed.slurm import SlurmCluster
from training.files import write_atomic

OUTAGE_SECONDS = 60.0


@dataclass(frozen=True)
class Scene:
    """The target of a fault. `chance` selects the victim, so that a seed reproduces it."""

    subject: Subject
    chance: random.Random
    cluster: SlurmCluster | RayCluster | None = None

    @property
    def slurm(self) -> SlurmCluster:
        assert isinstance(self.cluster, SlurmCluster)
        return self.cluster

    @property
    def ray(self) -> RayCluster:
        assert isinstance(self.cluster, RayCluster)
        return self.cluster

    @property
    def job(self) -> str:
        """The job id of the engine."""
        job = self.subject.run.dir.job()
        assert job is not None
        return str(job["job_id"])

    def node(self) -> str:
        """One of the nodes of the run."""
        return self.chance.choice(self.subject.hosts())

    def rank(self) -> int:
        """The pid of one of the ranks."""
        return self.chance.choice(sorted(self.subject.ranks().items()))[1]


Undo = Callable[[], object]
Strike = Callable[[Scene], Undo | None]


@dataclass(frozen=True)
class Fault:
    """A fault, its engines, and whether it restarts training.

    Attributes:
        patience: seconds until the run counts as stuck; other tests may slow the machine.
        weight: relative frequency beyond the occurrences that every fault has; 0 if it takes minutes.
        by_hand: it kills the supervisor of the run, so that a user has to resume it.
    """

    name: str
    engines: tuple[str, ...]
    strike: Strike
    restarts: bool = True
    patience: float = 180.0
    weight: float = 1.0
    by_hand: bool = False


def signal_rank(number: signal.Signals) -> Strike:
    """Send one of the ranks a signal."""

    def strike(scene: Scene) -> None:
        os.kill(scene.rank(), number)

    return strike


def hang_rank(how: str) -> Strike:
    """Hang one rank in its own code (`loader`), or in a receive without a sender (`collective`)."""

    def strike(scene: Scene) -> None:
        rank = scene.chance.choice(sorted(scene.subject.ranks()))
        write_atomic(scene.subject.path / "hang", f"{rank} {how}")

    return strike


def kill_supervisor(scene: Scene) -> None:
    """Kill the supervisor of the run: the local agent, or the Ray driver."""
    os.kill(int(scene.job.rsplit(":", 2)[1]), signal.SIGKILL)


def kill_forkserver(scene: Scene) -> None:
    ranks = set(scene.subject.ranks().values())
    servers = [pid for pid in scene.subject.commands("launcher.rank.forkserver") if pid not in ranks]
    os.kill(scene.chance.choice(sorted(servers)), signal.SIGKILL)


def truncate_newest_checkpoint(scene: Scene) -> None:
    """Truncate the weights of the newest checkpoint by half, then kill a rank; there is an older checkpoint."""
    folder = scene.subject.path / "checkpoints"
    scene.subject.wait(lambda: len(list(folder.glob("step-*"))) > 1, 60)
    newest = max(folder.glob("step-*"))
    file = newest / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    os.kill(scene.rank(), signal.SIGKILL)


def fill_disk(scene: Scene) -> Undo:
    """Fill the file system of the runs for 10 s; needs a file system of its own."""
    filler = scene.subject.path.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"\0")
    time.sleep(10)
    filler.unlink()
    return lambda: None


def read_only(scene: Scene) -> None:
    """Make the file system of the runs read-only for 10 s, as the kernel does after an I/O error."""
    runs = str(scene.subject.path.parent)
    subprocess.run(["mount", "--bind", runs, runs], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", runs], check=True)
        time.sleep(10)
    finally:
        subprocess.run(["umount", "--lazy", runs], check=True)


# --- SLURM


def kill_agent(of_node_0: bool) -> Strike:
    """Kill the agent of node 0 (the coordinator), or of another node."""

    def strike(scene: Scene) -> None:
        agents: dict[str, int] = {}
        for pid in sorted(scene.subject.commands("submitit.core._submit"), reverse=True):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            agents |= {v.decode(): pid for v in variables if v.startswith(b"SLURM_NODEID=")}
        os.kill(agents[f"SLURM_NODEID={0 if of_node_0 else 1}"], signal.SIGKILL)

    return strike


def user_signal(scene: Scene) -> None:
    scene.slurm.run("scancel", "--signal=USR2", scene.job)


def requeue(scene: Scene) -> None:
    scene.slurm.run("scontrol", "requeue", scene.job)


def preempt(scene: Scene) -> None:
    """Preempt the run by a job of the partition `urgent` that takes all nodes for 3 s."""
    nodes = str(len(scene.slurm.nodes))
    where = ("--partition=urgent", "--nodes", nodes, "--exclusive", "--output=/dev/null")
    scene.slurm.run("sbatch", *where, "--wrap", "sleep 3")


def time_limit(scene: Scene) -> Undo:
    """Reduce the job's time limit to less than 2 min; SLURM sends the signal `grace` seconds before."""
    scene.subject.set_pace(1.5)
    elapsed = scene.slurm.run("squeue", "--noheader", "--jobs", scene.job, "--format=%M").strip()
    *_, hours, minutes, seconds = [0, 0, *map(int, elapsed.replace("-", ":").split(":"))]
    limit = hours * 60 + minutes + (1 if seconds < 40 else 2)
    scene.slurm.run("scontrol", "update", f"jobid={scene.job}", f"timelimit={limit}")
    return lambda: scene.slurm.run("scontrol", "update", f"jobid={scene.job}", "timelimit=60")


def node_down(scene: Scene) -> Undo:
    node = scene.node()
    scene.slurm.set_node(node, "down")
    return lambda: scene.slurm.set_node(node, "resume")


def drain(scene: Scene) -> Undo:
    """Drain a node: it takes no new jobs, the running one continues."""
    node = scene.node()
    scene.slurm.set_node(node, "drain")
    return lambda: scene.slurm.set_node(node, "resume")


def kill_slurmd(scene: Scene) -> None:
    """Kill and restart slurmd; jobs are not affected."""
    node = scene.node()
    scene.slurm.kill_slurmd(node)
    time.sleep(3)
    scene.slurm.restart_slurmd(node)


def power_loss(scene: Scene) -> Undo:
    """Kill slurmd and all processes of a node at once."""
    node = scene.node()
    scene.slurm.kill_slurmd(node, jobs=True)
    return lambda: scene.slurm.restart_slurmd(node)


def kill_slurmstepd(scene: Scene) -> None:
    """Kill slurmstepd on one node; its task continues."""
    scene.slurm.kill_step_daemon(scene.node())


def controller_outage(scene: Scene) -> None:
    """Stop slurmctld for one minute, while training continues slowly, so that it does not end meanwhile."""
    scene.subject.set_pace(OUTAGE_SECONDS / 30)
    scene.slurm.signal_daemon("slurmctld", signal.SIGSTOP)
    time.sleep(OUTAGE_SECONDS)
    scene.slurm.signal_daemon("slurmctld", signal.SIGCONT)


# --- Ray


def raylet_of_a_rank(scene: Scene) -> str:
    """The name of the node of one of the ranks; not the head node, which holds the cluster."""
    ranks = set(scene.subject.ranks().values())
    names = sorted(scene.ray.node_ids())[1:]
    busy = [name for name in names if ranks & descendants(raylet(scene, name))]
    return scene.chance.choice(busy)


def raylet(scene: Scene, name: str) -> int:
    socket = f"{scene.ray.folder}/{name}.raylet"
    listed = subprocess.run(["pgrep", "-f", f"raylet/raylet .*{socket}"], capture_output=True, text=True, check=True)
    return int(listed.stdout.split()[0])


def kill_raylet(scene: Scene) -> Undo:
    scene.ray.remove_node(raylet_of_a_rank(scene))
    return scene.ray.add_node


def kill_actor(words: str) -> Strike:
    """Kill a Ray process that holds an actor of the run."""

    def strike(scene: Scene) -> None:
        os.kill(scene.chance.choice(sorted(scene.ray.processes(words))), signal.SIGKILL)

    return strike


def kill_steward(scene: Scene) -> None:
    """Kill the node actor that starts the ranks of a node."""
    ranks = set(scene.subject.ranks().values())
    node_actors = [pid for pid in scene.ray.processes("ray::NodeActor") if ranks & descendants(pid)]
    os.kill(scene.chance.choice(sorted(node_actors)), signal.SIGKILL)


def drain_raylet(scene: Scene) -> Undo:
    """Drain a node with a deadline of 10 s, as a cloud's preemption notice does, then remove it."""
    name = raylet_of_a_rank(scene)
    scene.ray.drain_node(name, seconds=10)
    time.sleep(10)
    with contextlib.suppress(Exception):
        scene.ray.remove_node(name)
    return scene.ray.add_node


ALL = ("local", "slurm", "ray")

FAULTS: tuple[Fault, ...] = (
    Fault("kill -9 rank", ALL, signal_rank(signal.SIGKILL), weight=4),
    Fault("segfault in a rank", ALL, signal_rank(signal.SIGSEGV), weight=4),
    Fault("SIGSTOP rank (hang)", ALL, signal_rank(signal.SIGSTOP), weight=3),
    Fault("loader never returns", ALL, hang_rank("loader")),
    Fault("deadlocked collective", ALL, hang_rank("collective")),
    Fault("truncated newest checkpoint", ALL, truncate_newest_checkpoint, weight=4),
    Fault("disk full", ALL, fill_disk, restarts=False),
    Fault("read-only run directory", ALL, read_only),
    Fault("kill forkserver", ALL, kill_forkserver),
    Fault("kill agent", ("local",), kill_supervisor, by_hand=True),
    Fault("kill agent of node 0", ("slurm",), kill_agent(of_node_0=True)),
    Fault("kill agent of node 1", ("slurm",), kill_agent(of_node_0=False)),
    Fault("scancel --signal=USR2", ("slurm",), user_signal),
    Fault("scontrol requeue", ("slurm",), requeue),
    Fault("preemption", ("slurm",), preempt),
    Fault("time limit", ("slurm",), time_limit, patience=300.0, weight=0),
    Fault("node down", ("slurm",), node_down),
    Fault("node loses power", ("slurm",), power_loss, patience=300.0, weight=0),
    Fault("drain", ("slurm",), drain, restarts=False),
    Fault("kill slurmd", ("slurm",), kill_slurmd, restarts=False),
    Fault("kill slurmstepd", ("slurm",), kill_slurmstepd, restarts=False),
    Fault("slurmctld stopped a minute", ("slurm",), controller_outage, restarts=False, weight=0),
    Fault("kill worker of Ray Train", ("ray",), kill_actor("ray::RayTrainWorker")),
    Fault("kill steward", ("ray",), kill_steward),
    Fault("kill raylet", ("ray",), kill_raylet),
    Fault("kill driver", ("ray",), kill_supervisor, by_hand=True),
    Fault("kill controller", ("ray",), kill_actor("ray::TrainController")),
    Fault("drain", ("ray",), drain_raylet),
)
