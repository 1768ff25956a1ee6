"""The test clusters schedule real jobs, and no process of them outlives the tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.testbed import keeper, slurm
from tests.testbed.keeper import Keeper, TestbedError, processes_with
from tests.testbed.ray import RayCluster, RayNode
from tests.testbed.slurm import Job, SlurmCluster
from tests.testbed.slurm_conf import Node


def eventually(condition: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.1)


def job_of(cluster: SlurmCluster, job_id: str) -> Job:
    return next(job for job in cluster.jobs() if job.id == job_id)


# --- the keeper


@contextlib.contextmanager
def owner(body: str) -> Iterator[subprocess.Popen[str]]:
    """A process that owns a keeper, like pytest; it prints the folder and sleeps."""
    script = (
        "import os, subprocess, time\n"
        "from tests.testbed.keeper import *\n"
        "os.environ[SESSION] = f'{os.getpid()}-inner'\n"
        f"{body}\n"
        "print(folder, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


DAEMONS = """
keeper = Keeper("test")
folder = keeper.folder
keeper.start("daemon", ["sh", "-c", f"setsid sleep 601 & exec sleep 602"], dict(os.environ))
subprocess.Popen(["sleep", "603"], env=os.environ | {"FOLDER_OF_TEST": f"{folder}/"})
"""
CLUSTER = """
from tests.testbed.slurm import SlurmCluster
cluster = SlurmCluster(accounting=False).__enter__()
folder = cluster.folder
cluster.run("sbatch", "--output=/dev/null", "--wrap", "setsid sleep 604")
while cluster.jobs()[0].state != "RUNNING":
    time.sleep(0.1)
"""


@pytest.mark.parametrize("body", [DAEMONS, pytest.param(CLUSTER, marks=[pytest.mark.slurm, pytest.mark.slow])])
def test_a_killed_owner_leaves_nothing(body: str) -> None:
    with owner(body) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        eventually(lambda: len(processes_with(str(folder))) >= 3)
        process.kill()
    eventually(lambda: not folder.exists())
    assert processes_with(str(folder)) == {}


def test_the_next_keeper_finishes_the_work_of_a_killed_one() -> None:
    with owner(DAEMONS) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        (keeper_pid,) = [
            pid for pid, command in processes_with(f"={process.pid}-inner\0").items() if keeper.__file__ in command
        ]
        keeper.kill({keeper_pid})
        process.kill()
    Keeper("test").stop()
    assert not folder.exists()
    assert processes_with(f"{keeper.FOLDER}={folder}\0") == {}
    keeper.kill(set(processes_with(f"{folder}/")))  # the owner's own child, which has lost its parent


def test_a_daemon_that_fails_is_named_with_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Keeper("test")
    try:
        pid = holder.start("sh", ["sh", "-c", "echo no such luck; exit 3"], dict(os.environ))
        eventually(lambda: holder.poll(pid) is not None)
        assert holder.poll(pid) == 3
        assert keeper.tail(holder.folder / "sh.out") == "no such luck"
        with pytest.raises(TestbedError, match="cannot start /nowhere"):
            holder.start("x", ["/nowhere/at/all"], dict(os.environ))
    finally:
        holder.stop()
    with pytest.raises(TestbedError, match="is gone"):
        holder.poll(pid)


def test_what_is_missing_is_listed_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "PATH", "/nowhere")
    assert "slurmctld (Debian package slurm-wlm)" in slurm.missing()
    with pytest.raises(TestbedError, match="munged"), SlurmCluster():
        pass


# --- fixtures of conftest.py


@pytest.mark.parametrize(("ci", "uid", "outcome"), [("true", 1000, "Failed"), ("", 1000, "Skipped")])
def test_missing_packages_fail_in_ci_and_skip_elsewhere(
    ci: str, uid: int, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    with pytest.raises(BaseException, match="missing: munged") as raised:
        require("SLURM", ["munged"])
    assert type(raised.value).__name__ == outcome
    require("SLURM", [])


@pytest.mark.slow
def test_a_test_that_leaves_a_process_behind_fails(tmp_path: Path) -> None:
    leaky = tmp_path / "test_leaky.py"
    leaky.write_text(
        "import subprocess, time\n"
        "from pathlib import Path\n"
        "def test_leaks():\n"
        "    pid = subprocess.Popen(['sleep', '605'], start_new_session=True).pid\n"
        "    while b'605' not in Path(f'/proc/{pid}/cmdline').read_bytes():  # empty while it starts, as is its environment\n"
        "        time.sleep(0.01)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-q", str(leaky)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "left behind" in done.stdout
    assert "sleep 605" in done.stdout
    assert done.returncode == 1
    assert not any("sleep 605" in command for command in processes_with("LAUNCH_TEST_SESSION=").values())


def test_the_users_settings_are_out_of_reach() -> None:
    assert Path.home().name.startswith(keeper.PREFIX)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not any(name.startswith(("SLURM_", "RAY_ADDRESS")) for name in os.environ)


# --- SLURM


def test_four_nodes_are_idle(on_slurm: SlurmCluster) -> None:
    assert on_slurm.node_states() == {f"node{i}": "idle" for i in range(1, 5)}


def test_every_node_of_a_step_sees_its_eight_gpus(on_slurm: SlurmCluster) -> None:
    out = on_slurm.run("srun", "-N2", "--gpus-per-node=8", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
    assert sorted(out.splitlines()) == ["node1 0,1,2,3,4,5,6,7", "node2 0,1,2,3,4,5,6,7"]


@pytest.mark.slow
def test_accounting_remembers_a_finished_job(on_slurm: SlurmCluster) -> None:
    job_id = on_slurm.run("sbatch", "--parsable", "--output=/dev/null", "--wrap", "exit 7").strip()
    sacct = ("sacct", "--noheader", "--parsable2", "--allocations", "--format=State,ExitCode", "-j", job_id)
    eventually(lambda: on_slurm.run(*sacct).strip() == "FAILED|7:0")


@pytest.mark.slow
def test_urgent_preempts_debug_which_is_requeued_and_told_first(on_slurm: SlurmCluster, tmp_path: Path) -> None:
    # The job handles the signal and continues: a job that exits within GraceTime is not requeued.
    told = tmp_path / "told"
    script = f"trap 'touch {told}' USR2; touch {tmp_path}/started; while :; do sleep 0.1; done"
    batch = ("sbatch", "--parsable", f"--output={tmp_path}/%j.out", "-N4", "--exclusive")
    on_slurm.set_grace_time(3)
    low = on_slurm.run(*batch, "--requeue", "--signal=B:USR2@30", "--wrap", script).strip()
    eventually((tmp_path / "started").exists)
    high = on_slurm.run(*batch, "--partition=urgent", "--wrap", "sleep 1").strip()
    eventually(told.exists)
    eventually(lambda: job_of(on_slurm, high).state in ("RUNNING", "COMPLETED"), timeout=40)
    eventually(lambda: "Restarts=1" in on_slurm.run("scontrol", "show", "job", low))
    eventually(lambda: job_of(on_slurm, low).state == "RUNNING", timeout=40)


def where() -> tuple[str, str]:
    return os.environ["SLURMD_NODENAME"], os.environ["SLURM_PROCID"]


@pytest.mark.slow
def test_submitit_runs_on_two_nodes(on_slurm: SlurmCluster, tmp_path: Path) -> None:
    import submitit

    executor = submitit.AutoExecutor(folder=tmp_path, cluster="slurm")
    executor.update_parameters(nodes=2, tasks_per_node=1, timeout_min=20, slurm_partition="debug")
    assert executor.submit(where).results() == [("node1", "0"), ("node2", "1")]


def test_a_node_can_be_lost_and_come_back(on_slurm: SlurmCluster) -> None:
    on_slurm.set_node("node2", "down", "power")
    assert on_slurm.node_states()["node2"].startswith("down")
    on_slurm.kill_slurmd("node3", jobs=True)
    on_slurm.reset()
    assert set(on_slurm.node_states().values()) == {"idle"}


@pytest.mark.slurm
@pytest.mark.slow
def test_a_second_cluster_of_other_nodes_runs_beside_the_first(on_slurm: SlurmCluster) -> None:
    nodes = [Node("a1", gpus=4, gpu_type="a100"), Node("h1", gpus=8, gpu_type="h100"), Node("c1", gpus=0)]
    with SlurmCluster(nodes, accounting=False) as other:
        out = other.run("srun", "--gpus-per-node=h100:2", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES")
        assert out == "h1 0,1\n"
        with pytest.raises(TestbedError, match="accounting storage is disabled"):
            other.run("sacct")
        folder = other.folder
    assert not folder.exists()
    assert processes_with(f"{keeper.FOLDER}={folder}\0") == {}
    assert "node1" in on_slurm.node_states()


# --- Ray

SPREAD = """
import ray

ray.init(log_to_driver=False)

@ray.remote(num_cpus=4, scheduling_strategy="SPREAD")
def node():
    import time
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id()

print(*set(ray.get([node.remote() for _ in range(3)])))
"""


@pytest.mark.slow
def test_ray_runs_tasks_on_every_raylet(on_ray: RayCluster) -> None:
    done = subprocess.run([sys.executable, "-c", SPREAD], capture_output=True, text=True, check=True, timeout=120)
    assert set(done.stdout.split()) == set(on_ray.node_ids().values())
    assert len(done.stdout.split()) == 3


@pytest.mark.ray
@pytest.mark.slow
def test_ray_nodes_come_and_go_and_leave_nothing() -> None:
    with RayCluster([RayNode(num_cpus=1)]) as cluster:
        name = cluster.add_node(RayNode(num_gpus=8, resources={"TPU": 4}, labels={"ray.io/tpu-slice-name": "s0"}))
        assert name == "node2"
        assert list(cluster.node_ids()) == ["node1", "node2"]
        cluster.remove_node(name)
        assert list(cluster.node_ids()) == ["node1"]
        folder = cluster.folder
    assert not folder.exists()
    assert processes_with(f"{keeper.FOLDER}={folder}\0") == {}
