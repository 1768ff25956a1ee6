"""A run that asks for no device takes the GPU with the most free memory, unless somebody has chosen."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import launcher
from launcher.agent.health import gpus
from launcher.backends import local
from launcher.backends.base import FreeGpu
from launcher.cli.describe import describe
from launcher.client.plan import make_plan
from launcher.config.cluster import Cluster, Node
from launcher.request import own_packages
from launcher.request.spec import Plan, RunSpec
from tests.launcher.agent.health.test_gpus import fake
from tests.launcher.engines import make_project, until

SCRIPT = """\
import os, sys
print("device", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.exit(int(not os.path.exists(sys.argv[1])))
"""


def rows(*free: int | str, mig: str = "Disabled", mode: str = "Default") -> str:
    """The answer of nvidia-smi about GPUs of 80 GiB, with so much free memory each."""
    return "".join(f"{index}, GPU-{index}, {each}, 81920, {mig}, {mode}\n" for index, each in enumerate(free))


@pytest.mark.parametrize(
    ("listed", "index"),
    [
        (rows(1000, 81000, 500), 1),
        (rows(1000, 500), 0),
        (rows(81000, 81000, 81000), 0),
        (rows(9, 80000, 80000), 1),
        (rows(9999, 10000), 1),
        (rows(0, 0), 0),
        (rows("[N/A]", 5), 1),
        (rows("[N/A]", "[Not Supported]"), None),
        (rows(1, 2, mig="[N/A]"), 1),
        (rows(1) + rows(1, 2, mode="Prohibited").splitlines()[1], 0),
        (rows(1) + rows(1, 2, mode="Exclusive_Process").splitlines()[1], 1),
        (rows(1, 2, mode="Prohibited"), None),
        (rows(1) + rows(1, 2, mig="Enabled").splitlines()[1], None),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_the_freest_gpu(listed: str, index: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, f"cat <<'END'\n{listed}\nEND", monkeypatch)
    found = gpus.freest()
    assert (None if found is None else found.index) == index
    assert found is None or found.uuid == f"GPU-{index}"


def test_a_driver_that_fails_is_missing_or_hangs_chooses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, f"echo '{rows(1, 2).splitlines()[0]}'; exit 2", monkeypatch)
    assert gpus.freest() is None
    fake(tmp_path, "sleep 60", monkeypatch)
    began = time.monotonic()
    assert gpus.freest(0.5) is None
    assert time.monotonic() - began < 30
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpus.freest() is None


class Site:
    """A folder with a profile of `count` GPUs; torch can use every GPU, and `tried` has those it was asked about."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, count: int = 3) -> None:
        self.folder, self.patch = folder, monkeypatch
        self.tried: list[FreeGpu | None] = []
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        monkeypatch.setattr(local, "try_gpus", self.try_gpus)
        (folder / "site.toml").write_text(f'backend = "local"\n[node]\ngpus = {count}\ncpus = 6\n')
        (folder / "shows.py").write_text(SCRIPT)
        (folder / "bin").mkdir()
        self.free(1000, 500, 81000)

    def try_gpus(self, gpu: FreeGpu | None = None) -> tuple[bool, str]:
        self.tried.append(gpu)
        return True, ""

    def free(self, *free: int | str) -> None:
        (self.folder / "rows").write_text(rows(*free))
        ecc = "0, GPU-0, 7, No\\n1, GPU-1, 0, No\\n2, GPU-2, 0, No"  # GPU 0 has errors
        memory = f"echo asked >> '{self.folder}/asked'; cat '{self.folder}/rows'"
        fake(self.folder / "bin", f"case $1 in *memory.free*) {memory};; *) printf '{ecc}\\n';; esac", self.patch)

    def plan(self, **options: object) -> Plan:
        return make_plan(RunSpec("shows.py", ("go",), cluster="./site.toml", **options), self.folder)  # type: ignore[arg-type]

    @property
    def asked(self) -> bool:
        return (self.folder / "asked").exists()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)


def test_the_plan_names_the_gpu_and_torch_tries_that_one(site: Site) -> None:
    plan = site.plan()
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "GPU-2"
    assert [gpu and gpu.name for gpu in site.tried] == ["GPU-2"]
    assert "\n  gpu    GPU 2 has the most free memory (79.1 of 80.0 GiB)\n" in describe(plan)
    assert local.LocalBackend().render(plan).count("CUDA_VISIBLE_DEVICES=GPU-2\n") == 1


@pytest.mark.parametrize("options", [{"gpus": 1}, {"gpus": 2}, {"cpus": 1}, {"nodes": 1}])
def test_a_run_that_asks_gets_what_it_asked_for(site: Site, options: dict[str, int]) -> None:
    plan = site.plan(**options)
    assert (plan.gpu, "CUDA_VISIBLE_DEVICES" in plan.environment, site.asked) == ("", False, False)


@pytest.mark.parametrize("chosen", ["0", "1,0", "GPU-1", "MIG-a"])
def test_what_the_user_has_chosen_stays(site: Site, chosen: str) -> None:
    site.patch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    plan = site.plan()
    assert (plan.gpu, "CUDA_VISIBLE_DEVICES" in plan.environment, site.asked) == ("", False, False)
    assert site.tried == [None]


def test_what_the_profile_has_chosen_stays(site: Site) -> None:
    with (site.folder / "site.toml").open("a") as file:
        file.write('[environment]\nCUDA_VISIBLE_DEVICES = "1"\n')
    plan = site.plan()
    assert (plan.gpu, plan.environment["CUDA_VISIBLE_DEVICES"], site.asked) == ("", "1", False)


def test_one_gpu_is_no_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path, monkeypatch, count=1)
    assert site.plan().gpu == ""
    assert not site.asked


def test_without_an_answer_it_is_the_first_gpu(site: Site) -> None:
    site.free("[N/A]", "[N/A]", "[N/A]")
    plan = site.plan()
    assert (plan.gpu, plan.placement.device, "CUDA_VISIBLE_DEVICES" in plan.environment) == ("", "cuda", False)


def test_a_gpu_that_torch_cannot_use_is_not_named(site: Site) -> None:
    site.patch.setattr(local, "try_gpus", lambda gpu=None: (False, "CUDA error: out of memory"))
    plan = site.plan()
    assert (plan.placement.device, plan.gpu, "CUDA_VISIBLE_DEVICES" in plan.environment) == ("cpu", "", False)


def test_torch_tries_the_chosen_gpu_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is a process of its own, which sees that GPU only."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shows = ["sh", "-c", "echo sees ${CUDA_VISIBLE_DEVICES-all}"]
    monkeypatch.setattr(own_packages, "command", lambda module: shows)
    assert local.try_gpus(FreeGpu("GPU-2", "")) == (True, "sees GPU-2")
    assert local.try_gpus() == (True, "sees all")


def test_doctor_tries_the_gpu_of_a_default_run(site: Site) -> None:
    cluster = Cluster("local", "local", node=Node(gpus=3, cpus=6))
    found = {check.name: check for check in local.LocalBackend().diagnose(cluster, site.folder)}
    assert found["gpu"].found.endswith("; tried: GPU 2 has the most free memory (79.1 of 80.0 GiB)")


@pytest.mark.slow
def test_a_run_that_is_resumed_takes_the_gpu_that_is_free_by_then(site: Site) -> None:
    """The preflight looks at that GPU, and not at one that has errors."""
    profile = site.folder / "site.toml"
    profile.write_text(f"preflight = true\n{profile.read_text()}")
    site.patch.chdir(site.folder)
    go = site.folder / "go"
    run = launcher.launch("shows.py", str(go), cluster="./site.toml", name="r", wait=False)
    until(lambda: run.state().done, "the end of the run")
    assert "device GPU-2" in (run.dir.log(1, 0)).read_text()
    site.free(500, 80000, 1000)
    go.touch()
    run = launcher.resume("r", wait=False)
    until(lambda: run.state().done, "the end of the run")
    assert "device GPU-1" in (run.dir.log(run.dir.last_attempt(), 0)).read_text()
    assert "GPU 1" in run.dir.plan().gpu
    assert make_project(site.folder, "local").status("r")["state"] == "succeeded"
