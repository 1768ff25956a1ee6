"""A cluster: its resources and submission options. A profile is one in TOML (`launcher.config.profiles`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.errors import BadRequest, nearest

BACKENDS = ["local", "slurm", "ray"]
"""Backends that a profile and ``--backend`` can name, the default first; `launcher.backends.register` adds to them."""


def no_such_backend(name: str) -> BadRequest:
    """The error for a `name` that no backend has."""
    return BadRequest(f"--backend {name!r}: no such backend{nearest(name, BACKENDS)}. Known: {', '.join(BACKENDS)}.")


@dataclass(frozen=True)
class Node:
    """One node of the cluster; all nodes that a run lands on are alike.

    Attributes:
        gpus: GPUs of a node; left out, the engine is asked.
        cpus: CPU cores of a node; 0 for unknown.
        memory_gb: memory of a node in GB; 0 leaves the scheduler's default.
        accelerator: the type of its GPUs (as in SLURM's gres or Ray's accelerator_type) or TPU generation.
    """

    gpus: int | None = None
    cpus: int = 0
    memory_gb: float = 0.0
    accelerator: str | None = None


@dataclass(frozen=True)
class NodeKind:
    """Nodes that are like each other, where a cluster has several kinds. SLURM is asked; a profile may say it too.

    Attributes:
        count: nodes that can be used; 0 for unknown, unless `down` is not 0.
        gpus: GPUs of a node; None for unknown.
        cpus: CPU cores of a node (their share, where a node has GPUs of several types); 0 for unknown.
        memory_gb: memory of a node in GB, shared likewise; 0 for unknown.
        accelerator: the type of the GPUs, as the scheduler spells it; None where it has no name for it.
        features: what ``--constraint`` can ask of these nodes.
        names: the nodes, in words.
        down: further nodes of this kind that are down or drained.
    """

    count: int = 0
    gpus: int | None = 0
    cpus: int = 0
    memory_gb: float = 0.0
    accelerator: str | None = None
    features: tuple[str, ...] = ()
    names: str = ""
    down: int = 0


@dataclass(frozen=True)
class Container:
    """The container that the node agents and their ranks run in; one a node.

    Attributes:
        image: a file, or a reference that the runtime can pull, as the nodes see it.
        runtime: ``pyxis`` (Enroot through srun), ``apptainer`` or ``singularity``.
        mounts: folders to mount, each ``/path`` or ``/on/the/node:/in/the/container``; the folder of runs is mounted
            in any case.
        options: further options of the runtime, such as ``--fakeroot`` or ``--container-writable``.
    """

    image: str
    runtime: Literal["pyxis", "apptainer", "singularity"] = "pyxis"
    mounts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slurm:
    """SLURM submission options. A field is the sbatch option of the same name unless it says otherwise.

    Attributes:
        partition: or several, with commas; left out, the cluster's default.
        account: whose hours are used; left out, your default.
        qos: quality of service.
        reservation: the name of a reservation.
        constraint: node features; ``&`` and ``|`` join them.
        exclude: nodes never to use.
        nodelist: nodes to use.
        exclusive: share nodes with nobody.
        mem: memory of each node, as in ``64G``, or ``0`` for all; left out, the ranks' share of it.
        modules: environment modules, loaded on the first node and inherited by all.
        setup: shell lines that run on the first node before anything else; what they export reaches all nodes.
        node_setup: shell lines that run on every node before its ranks; where one fails the node does not start.
        scratch: a folder on each node's own disk, made before its ranks, their ``TMPDIR``, and removed after them. Variables
            are those of the node, as in ``/local/$SLURM_JOB_ID``.
        container: the container to run in.
        srun_args: extra arguments of srun, such as Pyxis' ``--container-image=...``.
        sbatch: any further sbatch options, as ``name = value``.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodelist: str | None = None
    exclusive: bool = False
    mem: str | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    node_setup: tuple[str, ...] = ()
    scratch: str | None = None
    container: Container | None = None
    srun_args: tuple[str, ...] = ()
    sbatch: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ray:
    """How this Ray is reached.

    Attributes:
        address: ``host:port`` of the head, ``auto`` for the one of this machine, or None: ``RAY_ADDRESS`` where it is
            set, else a Ray started on this machine for the run.
        placement_strategy: Ray's PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        autoscales: the cluster grows on demand, so a request larger than what is up now is not refused.
        elastic: after a node is lost, go on with fewer ranks where the cluster cannot hold all of them any more.
        wait: seconds to wait for nodes when the cluster has become too small for the run, before giving up.
        inside: ``slurm``: there is no Ray; one is started for each run inside a job that the ``[slurm]`` section describes.
    """

    address: str | None = None
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    autoscales: bool = False
    elastic: bool = False
    wait: float = 300.0
    inside: Literal["slurm"] | None = None


@dataclass(frozen=True)
class Cluster:
    """A cluster, as its profile describes it.

    Attributes:
        backend: the engine that schedules it: ``local``, ``slurm`` or ``ray``.
        runs: folder of run directories; every node must see it under this path. Relative to where `launch` is called.
        shared: folders that all nodes share; when given, ``runs`` must lie in one of them.
        nodes: number of nodes; 0 for unknown.
        node: one node, where all are alike.
        kinds: the kinds of nodes, where they are not; written as ``[[kinds]]``.
        tpu_runtime: what drives TPUs: the package ``torch_tpu``, or ``torch_xla``, which needs torch 2.9.
        oversubscribe: CPU ranks may outnumber the cores; for debugging on one machine.
        time: default time limit of a run, as in ``--time``.
        grace: seconds between the request to stop and the end, for the last checkpoint.
        requeues_without_progress: how often in a row a preempted program is requeued that has neither a SIGTERM handler nor a
            Context and logs no step, so that it is taken to start over each time; raise it for one that saves by itself.
        hang_after: seconds without a step, or three times the longest step so far where that is more, after which a run
            counts as hung; ten times that while it evaluates or saves; 0 never looks.
        preflight: before each attempt every node looks at its run folder, disks, clock, versions and GPUs, and one that is
            unfit is left for another; not for a Ray inside a job.
        start_method: ``auto`` (ranks of the reference job are forked from a process that has imported its libraries; all
            others are fresh interpreters, and one for the next attempt imports the same libraries ahead) or ``spawn`` (all
            are fresh interpreters, started when they are needed).
        python: the Python command on the nodes; default: the one that submits.
        proxy: ``http://host:port`` through which the nodes reach the internet.
        hub_cache: folder of models and data sets of the Hugging Face Hub (``HF_HOME``) that all nodes see.
        offline: the nodes have no internet: the Hub's libraries use what is in ``hub_cache``.
        environment: variables set in every rank; they win over those that other fields stand for.
        slurm: for the backend ``slurm``.
        ray: for the backend ``ray``.
        name: of the profile; default: its file's.
        description: one line for `launch clusters`.
    """

    name: str
    backend: str
    description: str = ""
    runs: str = "runs"
    shared: tuple[str, ...] = ()
    nodes: int = 0
    node: Node = Node()
    kinds: tuple[NodeKind, ...] = ()
    tpu_runtime: Literal["torch_tpu", "torch_xla"] = "torch_tpu"
    oversubscribe: bool = False
    time: str | None = None
    grace: float = 60.0
    requeues_without_progress: int = 2
    hang_after: float = 300.0
    preflight: bool = False
    start_method: Literal["auto", "spawn"] = "auto"
    python: str | None = None
    proxy: str | None = None
    hub_cache: str | None = None
    offline: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    slurm: Slurm = Slurm()
    ray: Ray = Ray()

    @property
    def engine(self) -> str:
        """The name of the backend that runs it: one that is started inside another is a backend of its own."""
        inside = getattr(getattr(self, self.backend, None), "inside", None)
        return f"{self.backend}_on_{inside}" if inside else self.backend

    def variables(self) -> dict[str, str]:
        """What every rank gets in its environment."""
        variables: dict[str, str] = {}
        if self.proxy:
            # Programs read one spelling or the other; addresses of the cluster itself are not for the proxy.
            near = "localhost,127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16"
            for name, value in (("http_proxy", self.proxy), ("https_proxy", self.proxy), ("no_proxy", near)):
                variables |= {name: value, name.upper(): value}
        if self.hub_cache:
            variables["HF_HOME"] = self.hub_cache
        if self.offline:
            variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        return variables | self.environment

    def node_kinds(self) -> tuple[NodeKind, ...]:
        """The kinds of nodes; one where all are alike."""
        node = self.node
        return self.kinds or (NodeKind(self.nodes, node.gpus, node.cpus, node.memory_gb, node.accelerator),)
