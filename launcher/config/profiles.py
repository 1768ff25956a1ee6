"""Cluster profiles: TOML files, found in the project, the user's folder and the ones shipped; read, and checked."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.config.cluster import BACKENDS, Cluster, Slurm, no_such_backend
from launcher.config.codec import from_data
from launcher.errors import BadRequest, nearest


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


def choose(cluster: str | None, backend: str | None, cwd: Path) -> Cluster:
    """Return the cluster that ``--cluster`` and ``--backend`` ask for; without either, this machine.

    Raises:
        BadRequest: there is no such backend or profile, or the two contradict each other.
    """
    if backend is not None and backend not in BACKENDS:
        raise no_such_backend(backend)
    name = cluster or backend or BACKENDS[0]
    if cluster is None and name not in {profile.name for profile in profiles(cwd)}:
        return Cluster(name, name)  # a registered backend comes without a profile
    site = load(name, cwd)
    if backend is not None and backend != site.backend:
        raise BadRequest(f"--backend {backend} --cluster {cluster}: that cluster's backend is {site.backend}.")
    return site


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
        return read_text(path.read_text(), path)
    except OSError as error:
        raise BadRequest(f"cluster profile {path}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"cluster profile {path}: not valid TOML: {error}.") from None


def read_text(text: str, path: Path) -> dict[str, Any]:
    """The content of the profile `text`, which is or will be the file at `path`.

    Raises:
        BadRequest: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits; lists thousands deep
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
    _check(cluster, where)
    paths = {"runs": cluster.runs} | ({"hub_cache": cluster.hub_cache} if cluster.hub_cache else {})
    for key, value in paths.items():
        paths[key] = os.path.expanduser(os.path.expandvars(value))
        if "$" in paths[key]:
            raise BadRequest(f"{where}: {key} = {value!r} names a variable that is not set here.")
    return replace(cluster, runs=paths["runs"], hub_cache=paths.get("hub_cache"))


def _check(cluster: Cluster, where: str) -> None:
    """Refuse values that no engine could do anything with."""
    if cluster.backend not in BACKENDS:
        raise BadRequest(f"{where}: backend: {cluster.backend!r} is not one of {', '.join(BACKENDS)}.")
    numbers = [cluster.nodes, cluster.node.gpus or 0, cluster.node.cpus, cluster.node.memory_gb]
    numbers += [n for kind in cluster.kinds for n in (kind.count, kind.gpus or 0, kind.cpus, kind.memory_gb, kind.down)]
    if min(numbers) < 0 or cluster.grace <= 0:
        raise BadRequest(
            f"{where}: numbers of nodes, GPUs and cores and memory are 0 or more, and grace is more than 0 seconds."
        )
    if cluster.ray.wait < 0:
        raise BadRequest(f"{where}: ray.wait = {cluster.ray.wait:g}: seconds are needed, 0 or more.")
    if cluster.preflight and cluster.ray.inside:
        raise BadRequest(
            f"{where}: preflight = true: a Ray inside a job has no other nodes than the job's, which SLURM chose. Leave it"
            " out; `launch doctor --on-nodes` looks at the nodes."
        )
    for name in cluster.environment:
        if not name or "=" in name:
            raise BadRequest(f"{where}: environment: {name!r} cannot be the name of a variable.")
    if cluster.proxy is not None and not re.fullmatch(r"(https?|socks5h?)://[^\s/]+", cluster.proxy):
        raise BadRequest(f"{where}: proxy = {cluster.proxy!r}: write http://host:port.")
    _check_slurm(cluster.slurm, where)


TAKEN = {
    "nodes": "--nodes",
    "ntasks": "--gpus or --cpus; a job has one task a node, and the task starts the ranks",
    "ntasks-per-node": "--gpus or --cpus; a job has one task a node, and the task starts the ranks",
    "gpus": "--gpus",
    "gpus-per-node": "--gpus",
    "gpus-per-task": "--gpus; a job has one task a node, which needs all GPUs of the node",
    "cpus-per-task": "node.cpus: a rank gets its share of the node's cores",
    "cpus-per-gpu": "node.cpus: a rank gets its share of the node's cores",
    "mem": "node.memory_gb: a job gets its share of the node's memory",
    "time": "--time, or `time` in the profile",
    "job-name": "--name",
    "signal": "grace",
    **{
        name: f"slurm.{name}"
        for name in ("partition", "account", "qos", "reservation", "constraint", "exclude", "nodelist")
    },
    "clusters": "SLURM_CONF: a job is sent to, and asked of, the cluster of this host",
    **dict.fromkeys(
        ("output", "error", "open-mode", "array", "wrap", "wait"), "nothing: the run directory holds the logs"
    ),
}
"""Options of sbatch that are decided elsewhere, and where."""


def _check_slurm(slurm: Slurm, where: str) -> None:
    for name, value in slurm.sbatch.items():
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or not isinstance(value, str | int | float):
            raise BadRequest(f"{where}: slurm.sbatch: {name!r} = {value!r} is not an option of sbatch and its value.")
        if (option := name.replace("_", "-")) in TAKEN:
            raise BadRequest(f"{where}: slurm.sbatch: {name!r} is decided elsewhere; use {TAKEN[option]}.")
    if slurm.scratch is not None and not re.fullmatch(r"/([\w./-]|\$\w+|\$\{\w+\})+", slurm.scratch):
        raise BadRequest(
            f"{where}: slurm.scratch = {slurm.scratch!r}: write an absolute path of letters, digits and the node's variables,"
            " such as /local/$SLURM_JOB_ID."
        )
    if slurm.scratch is not None and "$SLURM_JOB_ID" not in slurm.scratch.replace("{", "").replace("}", ""):
        raise BadRequest(f"{where}: slurm.scratch is removed after the job, so it needs $SLURM_JOB_ID in its name.")
    container = slurm.container
    if container is None:
        return
    if not container.image.strip():
        raise BadRequest(f"{where}: slurm.container.image is empty.")
    for mount in container.mounts:
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*)?(:(ro|rw))?", mount):
            raise BadRequest(
                f"{where}: slurm.container.mounts: {mount!r}: write /path or /on/the/node:/in/the/container."
            )
    clash = [a for a in slurm.srun_args if a.startswith("--container-image")]
    if clash:
        raise BadRequest(f"{where}: slurm.srun_args: {clash[0]!r} beside slurm.container: write it in one place.")


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
