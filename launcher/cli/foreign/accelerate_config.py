"""Settings of accelerate's configuration file, which only its own launch command reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.files import read_plain

LIMIT = 1 << 20
"""Bytes of the file that are read at most."""

OF_THE_LAUNCHER = frozenset(
    (
        *("compute_environment", "num_processes", "num_machines", "machine_rank", "gpu_ids", "same_network", "rdzv_backend"),
        *("main_process_ip", "main_process_port", "main_training_function", "mpirun_config", "commands", "command_file"),
        *("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env", "debug"),
        *("use_cpu", "enable_cpu_affinity"),
    )
)  # fmt: skip
"""Keys that say where and how to launch; the options and profiles of ``launch`` take their place."""

DEFAULT_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "XLA")
"""Values of ``distributed_type`` that follow from the number and kind of the devices."""


def settings_without_effect(environment: Mapping[str, str] = os.environ) -> tuple[Path, dict[str, Any]]:
    """Return accelerate's default configuration file and the settings in it that no run of ``launch`` uses.

    They are those that differ from accelerate's defaults and are not about the launcher; empty for a file that is absent
    or cannot be read. The location is that of ``accelerate.commands.config``.
    """
    file = default_file(environment)
    if not file.is_file():
        return file, {}
    import yaml

    try:
        read = yaml.safe_load(read_plain(file.resolve(), LIMIT))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return file, {}
    if not isinstance(read, dict):
        return file, {}
    return file, {str(key): value for key, value in read.items() if _matters(str(key), value)}


def default_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the path of accelerate's default configuration file, which need not exist."""
    cache = environment.get("XDG_CACHE_HOME", "~/.cache")
    home = os.path.expanduser(environment.get("HF_HOME", os.path.join(cache, "huggingface")))
    return Path(home, "accelerate", "default_config.yaml")


def _matters(key: str, value: Any) -> bool:
    if key in OF_THE_LAUNCHER or not value or (isinstance(value, str) and value.lower() in ("no", "none", "false")):
        return False
    return not (key == "distributed_type" and value in DEFAULT_TYPES)


def note() -> str:
    """Return one line about the settings without effect; empty if there are none."""
    file, settings = settings_without_effect()
    if not settings:
        return ""
    shown = ", ".join(key if isinstance(value, dict) else f"{key} {value}" for key, value in sorted(settings.items()))
    return f"{file} has no effect here ({shown}); `launch accelerate launch PROGRAM` uses it"
