"""``launch doctor``: is this machine, and the engine of a profile, in order? One line a check, with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from launcher import backends
from launcher.agent.health.environment_record import PACKAGES
from launcher.config.check import Check
from launcher.config.cluster import Cluster


def examine(site: Cluster, cwd: Path) -> Iterator[Check]:
    """Run the checks for the cluster `site`, one after the other."""
    yield Check("python", sys.version_info >= (3, 11), sys.version.split()[0], "use Python 3.11 or newer")
    yield _packages()
    yield _hostname()
    yield _runs_folder(cwd / site.runs)
    yield from backends.of(site).diagnose(site, cwd)


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
