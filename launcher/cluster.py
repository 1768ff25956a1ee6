"""Cluster profiles: one TOML file says what exists and how this site wants to be asked for it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from launcher.errors import BadRequest, nearest
from launcher.records import from_data

BACKENDS = ("local", "slurm", "ray")


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
class Slurm:
    """How this SLURM wants to be asked. Each field is the sbatch option of the same name unless it says otherwise.

    Attributes:
        setup: shell lines that run on the first node before anything else, such as ``module load cuda``.
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
    setup: tuple[str, ...] = ()
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
    """

    address: str | None = None
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    autoscales: bool = False
    elastic: bool = False
    wait: float = 300.0


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
        oversubscribe: CPU ranks may outnumber the cores; for debugging on one machine.
        time: default time limit of a run, as in ``--time``.
        grace: seconds between the request to stop and the end, for the last checkpoint.
        hang_after: seconds without a step, or three times the longest step so far where that is more, after which a run
            counts as hung; ten times that while it evaluates or saves; 0 never looks.
        start_method: ``forkserver`` (imports once a node) or ``spawn`` (for code that cannot fork).
        python: the Python command on the nodes; default: the one that submits.
        environment: variables set in every rank.
    """

    name: str
    backend: Literal["local", "slurm", "ray"]
    description: str = ""
    runs: str = "runs"
    shared: tuple[str, ...] = ()
    nodes: int = 0
    node: Node = Node()
    kinds: tuple[NodeKind, ...] = ()
    oversubscribe: bool = False
    time: str | None = None
    grace: float = 60.0
    hang_after: float = 300.0
    start_method: Literal["forkserver", "spawn"] = "forkserver"
    python: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    slurm: Slurm = Slurm()
    ray: Ray = Ray()

    def node_kinds(self) -> tuple[NodeKind, ...]:
        """The kinds of nodes; one where all are alike."""
        node = self.node
        return self.kinds or (NodeKind(self.nodes, node.gpus, node.cpus, node.memory_gb, node.accelerator),)


@dataclass(frozen=True)
class Profile:
    """A profile that was found: its name, its file, and where that kind of place is."""

    name: str
    path: Path
    where: str


def folders(cwd: Path) -> list[tuple[str, Path]]:
    """The folders in which profiles are looked up, first match wins."""
    config_home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    found = [("project", cwd / "cluster_configs"), ("user", Path(config_home) / "launch" / "cluster_configs")]
    shipped = find_spec("cluster_configs")
    if shipped and shipped.submodule_search_locations:
        found += [("shipped", Path(p)) for p in shipped.submodule_search_locations]
    return found


def profiles(cwd: Path) -> list[Profile]:
    """All profiles that can be named with ``--cluster``, in look-up order, without those that an earlier one hides."""
    seen: dict[str, Profile] = {}
    for profile in _all_profiles(cwd):
        seen.setdefault(profile.name, profile)
    return list(seen.values())


def _all_profiles(cwd: Path) -> list[Profile]:
    return [
        Profile(path.relative_to(folder).with_suffix("").as_posix(), path, where)
        for where, folder in folders(cwd)
        for path in sorted(folder.glob("*.toml")) + sorted(folder.glob("examples/*.toml"))
    ]


def load(name: str, cwd: Path) -> Cluster:
    """Read the profile called `name`, or the file at that path.

    Raises:
        BadRequest: no such profile, not TOML, an unknown key or an unusable value.
    """
    path = cwd / name
    if path.suffix != ".toml":
        found = {p.name: p.path for p in profiles(cwd)}
        if name not in found:
            raise BadRequest(
                f"--cluster {name!r}: no such profile{nearest(name, found)}. Known: {', '.join(sorted(found))}."
                " A path to a .toml file works too."
            )
        path = found[name]
    return parse(_read(path), path, cwd)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise BadRequest(f"cluster profile {path}: {error.strerror or error}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"cluster profile {path}: not valid TOML: {error}.") from None


def parse(data: Mapping[str, Any], path: Path, cwd: Path) -> Cluster:
    """Turn the content of the profile at `path` into a `Cluster`; ``extends`` names the profile it builds on."""
    data = dict(data)
    where = f"cluster profile {path}"
    if "extends" in data:
        base = str(data.pop("extends"))
        parent = _read(_base(base, path, cwd, where))
        if "extends" in parent:
            raise BadRequest(f"{where}: extends {base!r}, which itself extends another; one level is allowed.")
        data = _merge(parent, data)
    _refuse_control_characters(data, where)
    cluster = from_data(Cluster, {"name": path.stem, **data}, where)
    if (cluster.node.gpus or 0) < 0 or cluster.node.cpus < 0 or cluster.nodes < 0 or cluster.grace <= 0:
        raise BadRequest(f"{where}: node.gpus, node.cpus and nodes are 0 or more, and grace is more than 0 seconds.")
    for name, value in cluster.slurm.sbatch.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not isinstance(value, str | int | float):
            raise BadRequest(f"{where}: slurm.sbatch: {name!r} = {value!r} is not an option of sbatch and its value.")
    for name in cluster.environment:
        if not name or "=" in name:
            raise BadRequest(f"{where}: environment: {name!r} cannot be the name of a variable.")
    runs = os.path.expanduser(os.path.expandvars(cluster.runs))
    if "$" in runs:
        raise BadRequest(f"{where}: runs = {cluster.runs!r} names a variable that is not set here.")
    return replace(cluster, runs=runs)


def _base(name: str, path: Path, cwd: Path, where: str) -> Path:
    """The profile `name`, looked up like any other; one that bears its own base's name builds on the one it hides."""
    found = {p.name: p.path for p in reversed(_all_profiles(cwd)) if not (p.path.exists() and p.path.samefile(path))}
    if name not in found:
        raise BadRequest(
            f"{where}: extends {name!r}: no such profile{nearest(name, found)}. Known: {', '.join(found)}."
        )
    return found[name]


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _refuse_control_characters(value: Any, where: str) -> None:
    """Profile values end up in one-line places (#SBATCH lines, arguments): a line break there would begin another."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_control_characters(key, where)
            _refuse_control_characters(item, f"{where}: {key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_control_characters(item, where)
    elif isinstance(value, str) and any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise BadRequest(f"{where}: line breaks and control characters are not allowed in {value!r}; use a list.")
