"""Odd sites: what fails before the ranks, and clusters that hide, bind, hold or account otherwise than most."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.lifecycle.run_dir import RunDir
from tests.launcher.engines import Project, make_project, until
from tests.testbed.slurm import SlurmCluster
from tests.testbed.slurm_conf import Node

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

BEFORE_THE_RANKS = {
    # profile: [slurm] section and more, nodes, what failed, on which hosts
    "module": ('[slurm]\nmodules = ["nosuch/1.0"]', 1, "slurm.setup: module load nosuch/1.0 failed with status 127 on node"),
    "setup": ('[slurm]\nsetup = ["cd /no/such/folder"]', 2, "slurm.setup: cd /no/such/folder failed with status 1 on node"),
    "python": ('python = "/no/such/python"', 1, "Python could not be started on node"),
    "packages": (f'python = "{sys.executable} -I -S"', 1, "Python could not be started on node"),
    "pythons": ('python = "/no/such/python"', 2, "Python could not be started on node"),
    "all": ('[slurm]\nnode_setup = ["test -d /no/disk"]', 2, "before the ranks: test -d /no/disk failed with status 1"),
    "first": ('[slurm]\nnode_setup = ["[ $SLURM_NODEID != 0 ]"]', 2, "before the ranks: [ $SLURM_NODEID != 0 ] failed"),
    "second": ('[slurm]\nnode_setup = ["[ $SLURM_NODEID = 0 ]"]', 2, "before the ranks: [ $SLURM_NODEID = 0 ] failed"),
    "ray": ('[ray]\ninside = "slurm"\n[slurm]\nnode_setup = ["[ $SLURM_NODEID = 0 ]"]', 2, "before the ranks: [ $SLURM_NODEID"),
    "scratch": ('[slurm]\nscratch = "/proc/none/$SLURM_JOB_ID"', 1, "before the ranks: mkdir /proc/none/"),
}  # fmt: skip


def test_what_fails_before_the_ranks_is_named(slurm_project: Project) -> None:
    """And nothing is run without it. A `queue.py` beside the program does not keep the others from starting."""
    folder = slurm_project.folder
    (folder / "queue.py").write_text("raise SystemExit('the program hides the standard library')\n")
    (folder / "prints.py").write_text("open('ran', 'w')\n")
    for name, (profile, nodes, _) in BEFORE_THE_RANKS.items():
        base = 'backend = "ray"' if name == "ray" else 'extends = "slurm"'
        (folder / f"{name}.toml").write_text(f"{base}\n{profile}\n")
        request = ("--cluster", f"{name}.toml", "--cpus", str(nodes), "--nodes", str(nodes), "--max-restarts", "0")
        slurm_project.call(*request, "--name", name, "--detach", "prints.py")
    for name, (_, _, text) in BEFORE_THE_RANKS.items():
        until(lambda name=name: slurm_project.status(name)["state"] == "failed", f"the end of {name}", 60)  # type: ignore[misc]
        failure = slurm_project.status(name)["failure"]
        assert text in failure["message"], (name, failure)
        shown = slurm_project.call("status", name).stdout
        assert ("lost" in shown, "supervisor" in shown) == (False, False), shown
        assert failure["kind"] == "unfit node"
    assert not (folder / "ran").exists()
    (folder / "good.py").write_text("print('good')\n")
    slurm_project.launch("--cpus", "1", "--name", "good", "good.py")
    assert slurm_project.logs("good") == ["good"]


AS_NOBODY = """
import os, sys
from pathlib import Path
from launcher.backends.slurm import doctor, limits, node_command, query, shell
from launcher.backends.slurm.backend import SlurmBackend
from launcher.config.cluster import Cluster
from launcher.request.placement.place import Devices, place
os.setgroups([]); os.setgid(65534); os.setuid(65534)
slurm = SlurmBackend()
site = slurm.survey(Cluster("site", "slurm"))
print(site.kinds, place(Devices("gpu", 4), site).why)
for check in slurm.diagnose(Cluster("site", "slurm"), Path("/")):
    print(check.ok, check.name, check.found)
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SlurmCluster, Project]]:
    """A cluster of two nodes of two cores that hides, binds and checks."""
    prolog = tmp_path / "prolog"
    prolog.write_text(f"#!/bin/sh\n[ ! -e {tmp_path}/sick ]\n")
    prolog.chmod(0o755)
    extra = (
        "PartitionName=secret Nodes=ALL Hidden=YES MaxTime=INFINITE State=UP\nPrivateData=nodes,partitions\n"
        f"TaskPlugin=task/affinity\nTaskPluginParam=autobind=cores\nProlog={prolog}\n"
    )
    nodes = (Node("node1", gpus=0, cpus=2), Node("node2", gpus=0, cpus=2))
    with SlurmCluster(nodes, accounting=False, extra=extra) as cluster:
        for name, value in cluster.environment().items():
            monkeypatch.setenv(name, value)
        yield cluster, make_project(tmp_path, "slurm")


@pytest.mark.soak
def test_a_site_that_hides_binds_and_holds(odd: tuple[SlurmCluster, Project], tmp_path: Path) -> None:
    cluster, project = odd
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    seen = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], env=environment, capture_output=True, text=True, check=True
    )
    assert seen.stdout.splitlines()[0].startswith("() 4 GPUs = 1 node x 4 ranks"), seen.stdout
    assert "True nodes none that you can see (PrivateData)" in seen.stdout
    assert "True accounting accounting is off" in seen.stdout

    (tmp_path / "cores.py").write_text("import os\nprint(sorted(os.sched_getaffinity(0)))\n")
    (tmp_path / "secret.toml").write_text('extends = "slurm"\n[slurm]\npartition = "secret"\n')
    project.call("--cluster", "secret.toml", "--cpus", "2", "--name", "bound", "cores.py")
    cores = [line.partition("] ")[2] for line in project.logs("bound")]
    assert cores == ["[0, 1]"] * 2, "the two cores of the job, and not the first of them alone"

    (tmp_path / "sick").touch()
    project.launch("--cpus", "1", "--name", "held", "--detach", "cores.py")
    until(lambda: "held" in project.status("held")["waits_for"].replace("Held", "held"), "the prolog to fail", 60)
    assert "a node failed to start it" in project.call("status", "held").stdout
    (tmp_path / "sick").unlink()
    for node, state in cluster.node_states().items():
        if "drain" in state:
            cluster.set_node(node, "resume")
    cluster.run("scontrol", "release", project.status("held")["job_id"])
    until(lambda: project.status("held")["state"] == "succeeded", "the end", 60)


def test_an_agent_without_scontrol_has_its_job_requeued(slurm_project: Project, on_slurm: SlurmCluster) -> None:
    """As in a container: the batch script, which has it, asks for the requeue."""
    folder = slurm_project.folder
    (folder / "bin").mkdir()
    for name in ("sh", "sleep", "uname"):
        (folder / "bin" / name).symlink_to(f"/usr/bin/{name}")
    profile = f'extends = "slurm"\n[slurm]\nnode_setup = ["export PATH={folder}/bin"]\n'
    (folder / "contained.toml").write_text(profile)
    arguments = ("--cluster", "contained.toml", "--cpus", "2", "--nodes", "2", "--name", "c", "--detach")
    slurm_project.call(*arguments, "steps:main", "--steps", "60", "--seconds", "0.1")
    metrics = folder / "runs/c/metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, "some steps")
    job = slurm_project.status("c")["job_id"]
    on_slurm.run("scancel", "--signal=USR2", job)
    until(lambda: slurm_project.status("c")["state"] == "succeeded", "the end")
    assert slurm_project.status("c")["job_id"] == job
    assert [e["reason"] for e in slurm_project.events("c") if e["event"] == "requeued"] == ["preempted"]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 61)), "each step once"
    assert RunDir(folder / "runs/c").path.joinpath(f"submitit/{job}.0.requeue").exists()
