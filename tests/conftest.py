"""Fixtures of all tests: an own home, no network, real clusters on request, and a check for remains."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.testbed import keeper

if TYPE_CHECKING:
    from tests.testbed.ray import RayCluster
    from tests.testbed.slurm import SlurmCluster

# Variables of a scheduler, a launcher or a user's profile; tests start without them.
FOREIGN = (
    *("SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SINFO_", "SCONTROL_", "SCANCEL_"),
    *("SUBMITIT_", "RAY_", "HF_", "TRANSFORMERS_", "DATASETS_", "LAUNCH_"),
    *("MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC", "ACCELERATE_", "XDG_", "GIT_"),
)

home = pytest.StashKey[tuple[Path, int]]()


def pytest_configure(config: pytest.Config) -> None:
    """Isolate the session before a test module imports a library that reads its settings only once.

    Not at import: a job that unpickles a test's function may also import this module.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{keeper.PREFIX}home-"))
    # if this session is killed, the next cluster that starts finds the folder unlocked and removes it
    config.stash[home] = folder, keeper.lock_folder(folder)
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ |= {
        keeper.SESSION: f"{os.getpid()}-{secrets.token_hex(4)}",
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder / ".config"),
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "XDG_DATA_HOME": str(folder / ".local" / "share"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    (folder / ".gitconfig").write_text(
        "[user]\n\tname = Test\n\temail = test@example.invalid\n[init]\n\tdefaultBranch = main\n[safe]\n\tdirectory = *\n"
    )


@pytest.fixture(autouse=True)
def own_registry(request: pytest.FixtureRequest) -> None:
    """Each test has a registry of runs of its own; the folder is made only if a run is sent."""
    os.environ["XDG_STATE_HOME"] = str(request.config.stash[home][0] / "state" / secrets.token_hex(8))


def pytest_unconfigure(config: pytest.Config) -> None:
    folder, lock = config.stash[home]
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the marker of a cluster to the tests that request it."""
    for item in items:
        for name in ("slurm", "ray"):
            if f"{name}_cluster" in getattr(item, "fixturenames", ()):
                item.add_marker(name)


def pytest_sessionfinish(session: pytest.Session) -> None:
    left = strays(testbeds=True)
    if left:
        keeper.kill(set(left))
        print(f"\nERROR: this test session left processes behind (killed now): {left}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# --- clusters


def require(what: str, lacks: Sequence[str]) -> None:
    """Skip if something is missing; fail as root on Debian and in CI, where it has to be installed."""
    if not lacks:
        return
    text = (
        f"the {what} test cluster cannot start; missing: {'; '.join(lacks)}. `make test` as root installs it on Debian."
    )
    if os.environ.get("CI") == "true" or (os.geteuid() == 0 and Path("/etc/debian_version").exists()):
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """The SLURM cluster of the session; most tests use `on_slurm`."""
    from tests.testbed import slurm

    require("SLURM", slurm.missing())
    with slurm.SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def on_slurm(slurm_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The shared SLURM cluster with idle nodes and SLURM_CONF set; jobs are cancelled afterwards."""
    slurm_cluster.reset()
    for name, value in slurm_cluster.environment().items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    slurm_cluster.reset()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """The Ray cluster of the session; most tests use `on_ray`."""
    from tests.testbed import ray

    require("Ray", ray.missing())
    with ray.RayCluster() as cluster:
        yield cluster


@pytest.fixture
def on_ray(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    """The shared Ray cluster with RAY_ADDRESS set. A test that calls ray.init also calls ray.shutdown."""
    for name, value in ray_cluster.environment().items():
        monkeypatch.setenv(name, value)
    return ray_cluster


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a file system of a known size cannot be mounted here ({done.stderr.strip()}); root can")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


# --- remains


def strays(*, testbeds: bool = False) -> dict[int, str]:
    """The running processes of this session; those of the shared clusters only with `testbeds`."""
    found = keeper.processes_with(f"{keeper.SESSION}={os.environ[keeper.SESSION]}\0")
    if found and not testbeds:
        # Also by descent: the titles of Ray's daemons overwrite a part of the environment in /proc.
        keepers = [pid for pid, command in found.items() if keeper.__file__ in command]
        owned = set(keeper.processes_with(f"{keeper.FOLDER}=")).union(*map(keeper.descendants, keepers))
        for pid in owned:
            found.pop(pid, None)
    helpers = (keeper.__file__, "multiprocessing.resource_tracker")  # these exit with their owner
    return {pid: command for pid, command in found.items() if not any(helper in command for helper in helpers)}


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail a test that leaves a process behind for more than 5 s, and kill the process."""
    pids = set(os.listdir("/proc"))  # reading all environments before each test would take longer than most tests
    yield
    if pids.issuperset(os.listdir("/proc")):
        return
    before = {int(pid) for pid in pids if pid.isdigit()}
    deadline = time.monotonic() + 5
    while (left := {pid: command for pid, command in strays().items() if pid not in before}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.05)
    if left:
        keeper.kill(set(left))
        pytest.fail(f"left behind: {left}", pytrace=False)
