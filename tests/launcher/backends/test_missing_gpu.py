"""GPUs that torch cannot use: a default run uses CPUs, a run that requests GPUs fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.backends.local import LocalBackend
from launcher.client.plan import make_plan
from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.request.spec import RunSpec
from tests.launcher.engines import Project, make_project
from training.distributed.missing import driver

SCRIPT = "import torch\n\ntorch.zeros(1).cuda()\n"
FUNCTION = "def main(ctx):\n    return {'device': str(ctx.device)}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A user's folder; CUDA_VISIBLE_DEVICES lists a GPU, and torch is a build for CPUs."""
    import torch

    if torch.version.cuda is not None:
        pytest.skip("torch here is a build for CUDA, which may find a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = make_project(tmp_path, "local")
    (made.folder / "on_gpu.py").write_text(SCRIPT)
    (made.folder / "asks.py").write_text(FUNCTION)
    return made


@pytest.mark.slow
def test_the_default_run_does_without_and_says_why(project: Project) -> None:
    plan = make_plan(RunSpec("asks:main"), project.folder)
    assert (plan.placement.device, plan.placement.world_size, plan.cluster.node.gpus) == ("cpu", 1, 0)
    assert "no GPU is used: torch is a CPU build" in plan.placement.why
    assert "\n" not in plan.placement.why
    both = make_plan(RunSpec("asks:main", nodes=1), project.folder)
    assert both.placement.device == "cpu"


def test_whoever_asks_for_gpus_gets_no_other_device(project: Project) -> None:
    for asked in (RunSpec("asks:main", gpus=1), RunSpec("asks:main", accelerator="h100")):
        try:
            device = make_plan(asked, project.folder).placement.device
        except BadRequest:
            continue
        assert device == "cuda"
    plan = make_plan(RunSpec("asks:main", cpus=1), project.folder)
    assert "no GPU is used" not in plan.placement.why, "nobody looked"


def test_doctor_tries_the_gpus(project: Project) -> None:
    checks = {check.name: check for check in LocalBackend().diagnose(Cluster("local", "local"), project.folder)}
    assert not checks["gpu"].ok
    assert "CPU build" in checks["gpu"].found


def test_the_version_of_the_driver_is_that_of_its_kernel_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver(file) == "unknown"
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (root@x)  Tue Mar  5\n",
    ):
        file.write_text(line + "GCC version:  gcc version 12.2.0\n")
        assert driver(file) == "550.54.15"


@pytest.mark.slow
def test_a_default_run_ends_well_on_the_cpu(project: Project) -> None:
    done = project.call("--name", "r", "asks:main")
    assert next(line for line in done.stdout.splitlines() if "CPU build" in line).startswith(
        "  on     local: one CPU rank"
    )
    assert done.stdout.count("CPU build") == 1
    assert done.stderr == ""
    assert project.status("r")["metrics"] == {"device": "cpu"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["asks:main", "on_gpu.py", "training.train:train"])
def test_a_run_that_asks_fails_as_device_without_another_attempt(project: Project, target: str) -> None:
    done = project.call("--gpus", "1", "--name", "r", target, status=1)
    status = project.status("r")
    assert (status["failure"]["kind"], status["attempt"]) == ("device", 1)
    said = "not compiled with CUDA" if target.endswith(".py") else "torch is a CPU build"
    assert said in status["failure"]["message"]
    assert said in done.stdout
