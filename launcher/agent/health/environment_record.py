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

NAMES = frozenset(
    (
        *(
            "CUDA_DEVICE_MAX_CONNECTIONS",
            "CUDA_DEVICE_ORDER",
            "CUDA_HOME",
            "CUDA_LAUNCH_BLOCKING",
            "CUDA_MODULE_LOADING",
        ),
        *(
            "CUDA_PATH",
            "CUDA_VISIBLE_DEVICES",
            "NVIDIA_DRIVER_CAPABILITIES",
            "NVIDIA_TF32_OVERRIDE",
            "NVIDIA_VISIBLE_DEVICES",
        ),
        *("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CPP_LOG_LEVEL"),
        *("TORCH_CUDA_ARCH_LIST", "TORCH_DISTRIBUTED_DEBUG", "TORCH_LOGS", "TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME"),
        *("TORCH_SHOW_CPP_STACKTRACES", "PJRT_DEVICE", "XLA_FLAGS", "USE_TORCH_XLA"),
        *("TPU_ACCELERATOR_TYPE", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_HOST_BOUNDS", "TPU_NAME", "TPU_PROCESS_BOUNDS"),
        *("TPU_TOPOLOGY", "TPU_VISIBLE_CHIPS", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"),
        *("HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE"),
        *("TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"),
        *("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_NAMESPACE", "RAY_TMPDIR"),
        *("SLURM_CLUSTER_NAME", "SLURM_CONF", "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND"),
        *(
            "SLURM_GPUS_ON_NODE",
            "SLURM_GPUS_PER_NODE",
            "SLURM_JOB_ACCOUNT",
            "SLURM_JOB_CPUS_PER_NODE",
            "SLURM_JOB_GPUS",
        ),
        *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION"),
        *("SLURM_JOB_QOS", "SLURM_JOB_RESERVATION", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME", "SLURM_JOB_UID"),
        *("SLURM_LAUNCH_NODE_IPADDR", "SLURM_LOCALID", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_NODE", "SLURM_NNODES"),
        *(
            "SLURM_NODEID",
            "SLURM_NTASKS",
            "SLURM_NTASKS_PER_NODE",
            "SLURM_PROCID",
            "SLURM_RESTART_COUNT",
            "SLURM_STEP_ID",
        ),
        *("SLURM_STEP_NODELIST", "SLURM_SUBMIT_DIR", "SLURM_SUBMIT_HOST", "SLURM_TASKS_PER_NODE", "SLURMD_NODENAME"),
        *("HOSTNAME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHASHSEED", "PYTHONPATH", "TMPDIR"),
    )
)
"""Variables whose values are recorded."""

SETTINGS = re.compile(r"(?:FI|GLOO|GOMP|KMP|MKL|NCCL|OMP|OPENBLAS|TORCH_NCCL|UCX)_[A-Z0-9_]{1,60}")
"""Settings of threads and networks, of which libraries have hundreds; also recorded, unless the name is that of a secret."""

SECRET = re.compile(r"TOKEN|SECRET|PASS|PW|CRED|AUTH|KEY|PRIVATE|CERT|SIGN|LOGIN|USER|JWT|COOKIE|SESSION")

PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
"""Variables of which only the host and the port are recorded."""


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
    """The variables that affect a run, by an allow list; of addresses, without passwords and queries."""
    kept = {
        name: re.sub(r"(://[^\s?]*)\?\S*", r"\1", re.sub(r"://\S*@", "://", value))
        for name, value in variables.items()
        if name in NAMES or (SETTINGS.fullmatch(name) and not SECRET.search(name))
    }
    for name in PROXIES:
        if value := variables.get(name):
            scheme, separator, rest = value.rpartition("://")
            kept[name] = f"{scheme}{separator}" * scheme.isalnum() + rest.rpartition("@")[2].partition("/")[0]
    return dict(sorted(kept.items()))
