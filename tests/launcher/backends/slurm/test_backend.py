"""Tests that need SLURM, on a real cluster of four nodes with eight GPUs each."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from launcher.backends.slurm.backend import SlurmBackend
from launcher.client.api import submit
from launcher.client.plan import make_plan
from launcher.request.spec import RunSpec, State
from tests.launcher.engines import Project, until
from tests.testbed.slurm import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

SHOW = """
import os
names = ("RANK", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME")
print(*(os.environ[name] for name in names), flush=True)
"""


def test_sixteen_gpus_are_two_whole_nodes(slurm_project: Project) -> None:
    """Ranks see all devices of the node, indexed by the local rank, as torchrun scripts expect."""
    (slurm_project.folder / "show.py").write_text(SHOW)
    slurm_project.launch("--gpus", "16", "--name", "g", "show.py")
    rows = [line.split("] ")[1].split() for line in slurm_project.logs("g")]
    assert sorted(int(rank) for rank, *_ in rows) == list(range(16))
    owned = {(node, devices.split(",")[int(local)]) for _, local, devices, node in rows}
    assert owned == {(node, str(n)) for node in {r[3] for r in rows} for n in range(8)}
    assert len({node for _, _, _, node in rows}) == 2


def test_what_is_rendered_is_what_sbatch_gets(slurm_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(slurm_project.folder)
    plan = make_plan(
        RunSpec("torchrun_style.py", ("--value", "1"), backend="slurm", cpus=4, nodes=2, name="w"), Path.cwd()
    )
    run = submit(plan)
    assert SlurmBackend().render(plan).endswith((run.path / "script.sh").read_text())
    assert run.wait(120).state() is State.SUCCEEDED


def test_the_job_ends_as_the_run_does(slurm_project: Project) -> None:
    slurm_project.launch("--cpus", "2", "--nodes", "2", "--name", "good", "steps:main", "--steps", "2")
    slurm_project.launch("--cpus", "2", "--nodes", "2", "--name", "bad", "steps:main", "--fail-at", "1", status=1)

    def states() -> dict[str, str]:
        jobs = [slurm_project.status(run)["job_id"] for run in ("good", "bad")]
        found = subprocess.run(
            ["sacct", "-nXP", "-j", ",".join(jobs), "-o", "JobName,State,ExitCode"],
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(line.split("|", 1) for line in found.stdout.splitlines())

    until(lambda: states() == {"good": "COMPLETED|0:0", "bad": "FAILED|1:0"}, "the job's states to be the runs'", 30)


def test_two_jobs_share_a_node(slurm_project: Project) -> None:
    """Their process groups use different ports, which do not depend on the job id."""
    runs = [f"j{n}" for n in range(3)]
    for run in runs:
        slurm_project.launch("--detach", "--cpus", "2", "--name", run, "steps:main", "--steps", "60")
    until(lambda: all(slurm_project.status(run)["state"] == "succeeded" for run in runs), "all three to succeed")
    hosts = {e["hosts"][0] for run in runs for e in slurm_project.events(run) if e["event"] == "started"}
    assert len(hosts) == 1, "all on one node"


def test_a_queued_run_says_what_it_waits_for_and_can_be_cancelled(
    slurm_project: Project, on_slurm: SlurmCluster
) -> None:
    (slurm_project.folder / "waits.py").write_text("import time\ntime.sleep(600)\n")  # the GPUs have no driver
    before = os.umask(0o002)  # of many sites; what submitit and SLURM make may then be written by the group
    try:
        slurm_project.launch("--detach", "--gpus", "32", "--name", "all", "waits.py")
    finally:
        os.umask(before)
    until(lambda: slurm_project.status("all")["state"] == "running", "the first to run")
    slurm_project.launch("--detach", "--gpus", "8", "--name", "next", "steps:main")
    assert slurm_project.status("next")["state"] == "queued"
    until(lambda: slurm_project.status("next")["waits_for"] in ("Resources", "Priority"), "the scheduler to look at it")
    on_slurm.run("scontrol", "hold", slurm_project.status("next")["job_id"])
    line = "waits for   JobHeldAdmin: SLURM holds the job; an administrator has to release it"  # root has held it
    until(lambda: line in slurm_project.call("status", "next").stdout, "the hold to be shown")
    assert slurm_project.call("cancel", "next").stdout == "next: stopped\n"
    assert slurm_project.call("cancel", "all", "--now").stdout == "all: stopped\n"


def test_more_than_the_cluster_has_is_refused(slurm_project: Project) -> None:
    done = slurm_project.launch("--gpus", "64", "steps:main", status=2)
    assert "has 4 nodes and 32 GPUs" in done.stderr
    assert "Try --gpus 32" in done.stderr
    (slurm_project.folder / "cluster_configs").mkdir()
    (slurm_project.folder / "cluster_configs/odd.toml").write_text(
        'backend = "slurm"\n[slurm]\npartition = "nightly"\n'
    )
    done = slurm_project.call("--cluster", "odd", "--cpus", "2", "steps:main", status=2)
    assert "this cluster has no such partition. It has debug, urgent." in done.stderr


def test_works_on_a_plain_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sacct, the end is known from the run's files; if all agents are killed, the batch script reports it.

    If preemption sends SIGTERM only, as on most sites, the run is requeued, too.
    """
    from tests.launcher.engines import make_project

    with SlurmCluster(accounting=False) as cluster:
        for name, value in cluster.environment().items():
            monkeypatch.setenv(name, value)
        assert subprocess.run(["sacct"], capture_output=True, check=False).returncode != 0
        project = make_project(tmp_path, "slurm")
        project.launch("--cpus", "2", "--nodes", "2", "--name", "n", "torchrun_style.py", "--value", "1")
        arguments = (
            "--cpus",
            "2",
            "--nodes",
            "2",
            "--max-restarts",
            "0",
            "--name",
            "gone",
            "steps:main",
            "--steps",
            "4000",
        )
        project.launch("--detach", *arguments)
        until(lambda: project.status("gone")["progress"], "a first step")
        subprocess.run(["pkill", "-KILL", "-f", f"submitit.core._submit {project.folder}/runs/gone"], check=True)
        until(lambda: project.status("gone")["state"] == "failed", "the end to be known")
        assert "node lost: " in project.call("status", "gone").stdout

        settings = cluster.folder / "slurm.conf"
        lines = settings.read_text().splitlines(keepends=True)
        settings.write_text("".join(line for line in lines if "preempt_send_user_signal" not in line))
        cluster.run("scontrol", "reconfigure")
        arguments = (
            "--cpus",
            "2",
            "--nodes",
            "2",
            "--name",
            "pre",
            "steps:main",
            "--steps",
            "100",
            "--seconds",
            "0.05",
        )
        project.launch("--detach", *arguments)
        until(lambda: project.status("pre")["progress"], "a first step")
        cluster.run("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o", os.devnull, "--wrap", "sleep 1")
        until(lambda: project.status("pre")["state"] == "succeeded", "the end")
        stops = [e for e in project.events("pre") if e["event"] in ("stopping", "requeued")]
        assert [e["reason"] for e in stops] == ["SIGTERM", "preempted"]


def test_the_ranks_follow_the_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launcher.engines import make_project

    switches = "SwitchName=s1 Nodes=node[1,3]\nSwitchName=s2 Nodes=node[2,4]\nSwitchName=s0 Switches=s[1-2]\n"
    with SlurmCluster(accounting=False, topology=switches) as cluster:
        for name, value in cluster.environment().items():
            monkeypatch.setenv(name, value)
        project = make_project(tmp_path, "slurm")
        arguments = ("--cpus", "4", "--nodes", "4", "--name", "t", "torchrun_style.py", "--value", "1")
        assert "on node1, node3, node2, node4 in the order of their 2 switches" in project.launch(*arguments).stdout
        started = next(event for event in project.events("t") if event["event"] == "started")
        assert started["hosts"] == ["node1", "node3", "node2", "node4"]
        assert started["switches"] == ["s0.s1", "s0.s1", "s0.s2", "s0.s2"]


def test_slurm_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_slurm: object) -> None:
    from tests.launcher.engines import make_project

    monkeypatch.setenv("SLURM_CONF", os.devnull)
    project = make_project(tmp_path, "slurm")
    done = project.launch("--cpus", "2", "--name", "u", "steps:main", status=2)
    assert "SLURM cannot be reached" in done.stderr
    assert not (tmp_path / "runs/u").exists()


AGREED = """
import json, os
names = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_JOB_ID")
shown = {k: v for k, v in os.environ.items() if k in names or k.startswith(("TPU_", "TORCH_TPU_", "MEGASCALE_"))}
print(json.dumps(shown), flush=True)
"""


def test_the_ranks_of_tpu_hosts_agree(slurm_project: Project) -> None:
    """Two slices of two hosts with a rank per chip, without real chips."""
    (slurm_project.folder / "show.py").write_text(AGREED)
    request = ("--tpus", "16", "--accelerator", "v4", "--topology", "2x2x2", "--name", "t", "show.py")
    slurm_project.launch(*request)
    rows = [json.loads(line.split("] ", 1)[1]) for line in slurm_project.logs("t")]
    rows.sort(key=lambda row: int(row["RANK"]))
    assert [(row["MEGASCALE_SLICE_ID"], row["TPU_WORKER_ID"], row["LOCAL_RANK"]) for row in rows] == [
        (number, host, chip) for number in "01" for host in "01" for chip in "0123"
    ]
    assert {row["TORCH_TPU_TOPOLOGY"] for row in rows} == {"2,2,2"}
    assert {row["TORCH_TPU_SLICEBUILDER_ADDRESSES"].count(",") for row in rows} == {7}, "the chips of a slice"
    assert {row["TORCH_TPU_XPROF_SESSION_ID"] for row in rows} == {"t-1"}
    assert {row["MEGASCALE_COORDINATOR_ADDRESS"] for row in rows} == {"127.0.0.1:8081"}
    assert "#SBATCH --exclusive" in (slurm_project.folder / "runs/t/script.sh").read_text()
