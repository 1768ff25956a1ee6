"""The faults, one small function each: it strikes a running subject and returns what undoes the damage afterwards."""

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
    """Where a fault strikes. `chance` decides on the victim, so that a seed says all."""

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
        """The engine's id of the job."""
        job = self.subject.run.dir.job()
        assert job is not None
        return str(job["job_id"])

    def node(self) -> str:
        """One of the nodes that the run is on."""
        return self.chance.choice(self.subject.hosts())

    def rank(self) -> int:
        """The pid of one of the ranks."""
        return self.chance.choice(sorted(self.subject.ranks().items()))[1]


Undo = Callable[[], object]
Strike = Callable[[Scene], Undo | None]


@dataclass(frozen=True)
class Fault:
    """A fault, the engines it exists on, and whether training has to start again after it.

    Attributes:
        patience: seconds until the run counts as stuck; the machine may be busy with other tests.
        weight: how often it is drawn beside those times that every fault has; one that takes minutes, not at all.
        by_hand: it kills the one process that could do anything about it, so that a person has to resume the run.
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
    """Let one of the ranks stand still in its own code (`loader`), or wait for what the others never send (`collective`)."""

    def strike(scene: Scene) -> None:
        rank = scene.chance.choice(sorted(scene.subject.ranks()))
        write_atomic(scene.subject.path / "hang", f"{rank} {how}")

    return strike


def kill_supervisor(scene: Scene) -> None:
    """The process that stands behind the run: the local agent, or the driver on Ray."""
    os.kill(int(scene.job.rsplit(":", 2)[1]), signal.SIGKILL)


def kill_forkserver(scene: Scene) -> None:
    ranks = set(scene.subject.ranks().values())
    servers = [pid for pid in scene.subject.commands("launcher.rank.forkserver") if pid not in ranks]
    os.kill(scene.chance.choice(sorted(servers)), signal.SIGKILL)


def truncate_newest_checkpoint(scene: Scene) -> None:
    """Half of the newest checkpoint's weights are gone, and then a rank is killed; there is an older checkpoint."""
    folder = scene.subject.path / "checkpoints"
    scene.subject.wait(lambda: len(list(folder.glob("step-*"))) > 1, 60)
    newest = max(folder.glob("step-*"))
    file = newest / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    os.kill(scene.rank(), signal.SIGKILL)


def fill_disk(scene: Scene) -> Undo:
    """Not a byte is left for ten seconds where the runs are; only where that is a file system of its own."""
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
    """For ten seconds nothing can be written where the runs are, as on a mount that the kernel gave up for a while."""
    runs = str(scene.subject.path.parent)
    subprocess.run(["mount", "--bind", runs, runs], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", runs], check=True)
        time.sleep(10)
    finally:
        subprocess.run(["umount", "--lazy", runs], check=True)


# --- SLURM


def kill_agent(of_node_0: bool) -> Strike:
    """The agent of node 0, which coordinates, or that of another node."""

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
    """A job of the partition `urgent` wants all nodes for three seconds."""
    nodes = str(len(scene.slurm.nodes))
    where = ("--partition=urgent", "--nodes", nodes, "--exclusive", "--output=/dev/null")
    scene.slurm.run("sbatch", *where, "--wrap", "sleep 3")


def time_limit(scene: Scene) -> Undo:
    """The job's time is over within two minutes, which its steps outlast; the warning comes `grace` seconds before."""
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
    """The node takes no new jobs; the one that runs may stay."""
    node = scene.node()
    scene.slurm.set_node(node, "drain")
    return lambda: scene.slurm.set_node(node, "resume")


def kill_slurmd(scene: Scene) -> None:
    """The daemon dies and comes back; its jobs do not notice."""
    node = scene.node()
    scene.slurm.kill_slurmd(node)
    time.sleep(3)
    scene.slurm.restart_slurmd(node)


def power_loss(scene: Scene) -> Undo:
    """The daemon and all of the node's processes are gone at once."""
    node = scene.node()
    scene.slurm.kill_slurmd(node, jobs=True)
    return lambda: scene.slurm.restart_slurmd(node)


def kill_slurmstepd(scene: Scene) -> None:
    """The step's daemon on one node dies, and its tasks go on without it."""
    scene.slurm.kill_step_daemon(scene.node())


def controller_outage(scene: Scene) -> None:
    """slurmctld answers nobody for a minute, in which training goes on, if slowly: it should not come to its end."""
    scene.subject.set_pace(OUTAGE_SECONDS / 30)
    scene.slurm.signal_daemon("slurmctld", signal.SIGSTOP)
    time.sleep(OUTAGE_SECONDS)
    scene.slurm.signal_daemon("slurmctld", signal.SIGCONT)


# --- Ray


def raylet_of_a_rank(scene: Scene) -> str:
    """The node of one of the ranks; not the first, which is the head and holds the cluster."""
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
    """A process of Ray's own in which one of the run's actors is; there may be several."""

    def strike(scene: Scene) -> None:
        os.kill(scene.chance.choice(sorted(scene.ray.processes(words))), signal.SIGKILL)

    return strike


def kill_steward(scene: Scene) -> None:
    """The actor on the node of a rank that starts the ranks there."""
    ranks = set(scene.subject.ranks().values())
    node_actors = [pid for pid in scene.ray.processes("ray::NodeActor") if ranks & descendants(pid)]
    os.kill(scene.chance.choice(sorted(node_actors)), signal.SIGKILL)


def drain_raylet(scene: Scene) -> Undo:
    """Ray is told that the node will be taken away in ten seconds, as cloud providers do, and then it is."""
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
