"""Record of a run's environment: packages, driver, devices, and variables that libraries read."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from launcher.rank.affinity import this_machine
from training.files import write_atomic

PACKAGES = ("torch", "transformers", "datasets", "evaluate", "accelerate", "ray", "submitit", "cloudpickle")
"""Packages that `launch` needs; a record holds all that are installed."""

PREFIXES = (
    "SLURM",
    "RAY_",
    "CUDA_",
    "NVIDIA_",
    "NCCL_",
    "GLOO_",
    "TORCH",
    "TPU_",
    "HF_",
    "OMP_",
    "MKL_",
    "FI_",
    "UCX_",
)
NAMES = ("HOSTNAME", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "TMPDIR", "http_proxy", "https_proxy", "no_proxy")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY|PRIVATE", re.IGNORECASE)


def record(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The environment of this process as plain data, without the values of secrets.

    Args:
        variables: used instead of the environment of this process.
    """
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.version,
        "executable": sys.executable,
        "packages": packages(),
        "driver": driver(),
        "gpus": list(this_machine().gpus),
        "cores": sorted(os.sched_getaffinity(0)),
        "variables": chosen(os.environ if variables is None else variables),
    }


def leave(folder: Path) -> None:
    """Write the record of this process to ``environment.json`` in the run directory `folder`."""
    write_atomic(folder / "environment.json", json.dumps(record(), indent=2) + "\n")


def packages() -> dict[str, str]:
    """Name -> version of all installed packages; of one installed twice, the version that would be imported."""
    found: dict[str, str] = {}
    for each in metadata.distributions():
        name = each.metadata["Name"]
        if name:
            found.setdefault(name.lower().replace("_", "-"), each.version)
    return dict(sorted(found.items()))


def driver() -> str:
    """The version of NVIDIA's driver; empty without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"Module.*?\s(\d[\d.]+)\s", text)
    return found[1] if found else text.splitlines()[0]


def chosen(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that affect a run, without secrets."""
    kept = {name: value for name, value in variables.items() if name.startswith(PREFIXES) or name in NAMES}
    # A proxy's address may hold a password.
    clean = {name: re.sub(r"//[^/@]*@", "//", value) for name, value in kept.items()}
    return {name: "<not recorded>" if SECRET.search(name) else clean[name] for name in sorted(clean)}
