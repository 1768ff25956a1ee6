"""Golden files of `launch --dry-run`; ``python -m tests.golden`` rewrites them. Review the diff."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from launcher.cli.main import main

FOLDER = Path(__file__).parent
NODE = "[node]\ngpus = 8\ncpus = 96\nmemory_gb = 1000\n"


@dataclass(frozen=True)
class Case:
    """A request to the profile `base`, with `over` for values that depend on the machine."""

    base: str
    over: str
    argv: tuple[str, ...]


CASES = {
    "local-1-rank": Case("local", "node = {gpus = 0, cpus = 4}", ()),
    "local-2-cpus": Case("local", "node = {gpus = 0, cpus = 4}", ("--cpus", "2")),
    "local-4-gpus": Case("local", NODE, ("--gpus", "4", "-m", "script")),
    "slurm-16-gpus": Case("slurm", f"nodes = 16\n{NODE}", ("--gpus", "16", "--accelerator", "a100", "script.py", "a 'b'")),
    "slurm-4-cpus": Case("slurm", f"nodes = 16\n{NODE}", ("--cpus", "4", "--nodes", "2", "--time", "90m", "script:main")),
    "ray-8-gpus": Case("ray", f"{NODE}[ray]\naddress = '10.0.0.1:6379'", ("--gpus", "8", "script.py", "--lr", "3e-5")),
    "ray-2-cpus": Case("ray", f"{NODE}[ray]\naddress = '10.0.0.1:6379'", ("--cpus", "2", "--nodes", "2")),
    "slurm-h100": Case("examples/slurm-h100", "", ("--gpus", "16")),
    "slurm-apptainer": Case("examples/slurm-apptainer", "", ("--gpus", "4", "script.py")),
    "slurm-apptainer-8": Case("examples/slurm-apptainer", "", ("--gpus", "8", "--accelerator", "L40S", "script.py")),
    "network-efa": Case("examples/network-efa", "", ("--gpus", "16", "script.py")),
    "network-infiniband": Case("examples/network-infiniband", "", ("--gpus", "4", "script.py")),
    "network-roce": Case("examples/network-roce", "", ("--gpus", "16", "script.py")),
    "network-ethernet": Case("examples/network-ethernet", "", ("--gpus", "16", "script.py")),
    "ray-kubernetes": Case("examples/ray-kubernetes", "", ("--gpus", "8")),
    "ray-on-slurm": Case("examples/ray-on-slurm", "", ("--gpus", "8", "script.py")),
    "tpu-vm": Case("examples/tpu-vm", "node = {cpus = 224, accelerator = 'v5e'}", ("--tpus", "4")),
    "tpu-v5e": Case("examples/tpu-v5e", "", ("--tpus", "16", "--topology", "4x4")),
}  # fmt: skip


def render(case: Case, folder: Path) -> str:
    """The output of the command in a project in `folder`, without this machine's paths."""
    project = folder / "project"
    (project / "cluster_configs").mkdir(parents=True)
    (project / "script.py").write_text("import torch\ndef main(): ...\n")
    profile = f"extends = '{case.base}'\nruns = 'runs'\nshared = []\n{case.over}"
    (project / "cluster_configs" / "site.toml").write_text(profile)
    argv = ("--cluster", "site", "--name", "golden", "--dry-run", *case.argv)
    environment = {
        "XDG_CONFIG_HOME": str(folder),
        "USER": "me",
        "CUDA_VISIBLE_DEVICES": "",
        "RAY_ADDRESS": "",
        "SLURM_CONF": os.devnull,
    }
    out = io.StringIO()
    with mock.patch.dict(os.environ, environment), contextlib.chdir(project), contextlib.redirect_stdout(out):
        try:
            main(argv)
        except SystemExit as ended:
            if ended.code:
                raise AssertionError(f"{case} was refused") from None
    checkout = Path(__file__).parents[2]
    text = out.getvalue().replace(str(project), "PROJECT").replace(sys.executable, "PYTHON")
    text = re.sub(r"  (links|left) .*\n( {9}.*\n)+", "", text)  # caches and environments in the checkout
    return text.replace(str(checkout), "CHECKOUT")
