"""``launch doctor``: is this machine, and the engine of a profile, in order? One line a check, with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.backends import local, slurm_site
from launcher.backends.ray import address as ray_address
from launcher.cluster import Cluster
from launcher.environment import PACKAGES
from launcher.errors import BadRequest


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is in order, what was found, and what to do if it is not (or where it is a `note`).

    `table` holds the single measurements behind what was found, for ``--json``.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""
    note: bool = False  # in order, but worth knowing
    table: tuple[Mapping[str, Any], ...] = ()


def examine(site: Cluster, cwd: Path) -> Iterator[Check]:
    """Run the checks for the cluster `site`, one after the other."""
    yield Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "use Python 3.11 or newer")
    yield _packages()
    yield _hostname()
    yield _runs_folder(cwd / site.runs)
    yield from _ENGINES[site.engine](site)


def _packages() -> Check:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    return Check("packages", not missing, ", ".join(found), f"pip install {' '.join(missing)}" if missing else "")


def _hostname() -> Check:
    name = socket.gethostname()
    try:
        return Check("own name", True, f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        remedy = "nothing: addresses are used instead. Other tools may hang; add it to /etc/hosts"
        return Check("own name", True, f"{name} does not resolve", remedy)


def _runs_folder(folder: Path) -> Check:
    """Write, rename and delete a file where runs will lie."""
    above = next(p for p in (folder, *folder.parents) if p.exists())
    probe = above / f".launch-doctor-{os.getpid()}"
    started = time.perf_counter()
    try:
        probe.write_bytes(b"x")
        probe.rename(probe.with_suffix(".renamed"))
        probe.with_suffix(".renamed").unlink()
    except OSError as error:
        return Check(
            "runs folder", False, f"{folder}: {error.strerror}", "set `runs` in the profile to a writable folder"
        )
    free = shutil.disk_usage(above).free / 2**30
    milliseconds = (time.perf_counter() - started) * 1000
    found = f"{folder}: {free:.0f} GiB free, write and rename {milliseconds:.1f} ms"
    return Check("runs folder", free > 1, found, "less than 1 GiB is free: checkpoints will not fit")


def _local(site: Cluster) -> Iterator[Check]:
    node = local.survey(site).node
    yield Check("devices", True, f"{node.gpus or 'no'} GPUs, {node.cpus} cores")


def _slurm(site: Cluster) -> Iterator[Check]:
    for command in ("sbatch", "srun", "squeue", "scancel", "sinfo"):
        if shutil.which(command) is None:
            yield Check("slurm", False, f"{command} is missing", "log in to a submission host of the cluster")
            return
    try:
        found = {p.name: p for p in slurm_site.partitions()}
        kinds = slurm_site.kinds(site)
    except BadRequest as error:
        yield Check("slurm", False, str(error), "is slurmctld up, and is this host part of the cluster?")
        return
    limits = {name: "no limit" if p.max_minutes is None else f"{p.max_minutes} min" for name, p in found.items()}
    yield Check("slurm", True, ", ".join(f"partition {name} {p.state} ({limits[name]})" for name, p in found.items()))
    for kind in kinds:
        what = f"{kind.count} nodes of {kind.cpus} cores, {kind.gpus or 'no'} {kind.accelerator or ''} GPUs".replace(
            "  ", " "
        )
        remedy = "`sinfo -R` says why; they take no job until an administrator resumes them"
        yield Check("nodes", kind.count > 0, what + (f", {kind.down} down or drained" if kind.down else ""), remedy)
    wanted = site.slurm.partition
    if wanted is not None:
        yield Check("partition", wanted in found, wanted, f"set slurm.partition to one of {', '.join(found)}")
    accounting = shutil.which("sacct") is not None
    yield Check("accounting", True, "sacct is here" if accounting else "no sacct: not needed")


def _ray(site: Cluster) -> Iterator[Check]:
    where = ray_address(site)
    if where is None:
        yield Check("ray", True, "no address: a Ray is started on this machine for each run")
        return
    host, _, port = where.rpartition(":")
    try:
        if where != "auto" and "://" not in where:
            socket.create_connection((host, int(port)), timeout=5).close()
        yield Check("ray", True, f"{where} answers")
    except (OSError, ValueError) as error:
        yield Check("ray", False, f"{where}: {error}", "is the head running, and is this its GCS port?")


_ENGINES: dict[str, Callable[[Cluster], Iterator[Check]]] = {
    "local": _local,
    "slurm": _slurm,
    "ray": _ray,
    "ray_on_slurm": _slurm,
}
