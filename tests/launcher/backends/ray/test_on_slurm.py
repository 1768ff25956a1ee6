"""Ray inside SLURM jobs: two jobs at once, on shared nodes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.backends.ray.on_slurm import TOKEN
from tests.launcher.engines import Project, make_project, until
from tests.testbed import keeper
from tests.testbed.slurm import SlurmCluster

PROFILE = """
backend = "ray"
grace = 10.0
[ray]
inside = "slurm"
[slurm]
nodelist = "node1,node2"
"""
JOB = ("--max-steps", "300", "--save-every", "50", "--log-every", "1", "--log-with=", "--lr", "1e-4")


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [("first",), pytest.param(("first", "second"), marks=pytest.mark.soak)])
def test_two_at_once_share_their_nodes(
    names: Sequence[str], tmp_path: Path, on_slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is preempted, resumes, and ends with the weights of the other; alone, it does no less.

    Each has its own token, also if an earlier Ray has left one in the user's home.
    """
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    long = tmp_path / ("temporary" * 8)  # in which the paths of Ray's sockets would be too long
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    project = make_project(tmp_path, "ray")
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs/both.toml").write_text(PROFILE)
    request = ("--backend", "ray", "--cluster", "both", "--cpus", "2", "--nodes", "2", "--detach")
    for name in names:
        project.call(*request, "--name", name, "--", *JOB)
    runs = {name: tmp_path / "runs" / name for name in names}
    until(lambda: all(started(project, name) for name in names), "all at once", 120)
    tokens = [run / ".ray-token" for run in runs.values()]
    assert {token.stat().st_mode & 0o777 for token in tokens} == {0o600}
    assert len({token.read_text() for token in tokens}) == len(names)
    folders = folders_of_ray()
    assert len(folders) == 2 * len(names), "two nodes of each job"
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    assert not [c for c in keeper.processes_with(f"{TOKEN}=").values() if "ray.util.client.server" in c]
    job = json.loads((runs["first"] / "job.json").read_text())["job_id"]
    until(lambda: (runs["first"] / "metrics.jsonl").exists(), "a step")
    on_slurm.run("scancel", "--signal=USR2", job)
    for name in runs:
        until(lambda name=name: project.status(name)["state"] in ("succeeded", "failed", "lost"), name, 240)  # type: ignore[misc]
        assert project.status(name)["state"] == "succeeded", (runs[name] / "logs/agent-0.log").read_text()[-3000:]
    assert len({weights(run) for run in runs.values()}) == 1
    fields = [event["reason"] for event in project.events("first") if event["event"] == "requeued"]
    assert fields == ["preempted"]
    hosts = [event["hosts"] for event in project.events(names[-1]) if event["event"] == "started"]
    assert {len(each) for each in hosts} == {2}, "a rank on each raylet"
    until(lambda: not keeper.processes_with(f"{TOKEN}="), "the end of all that they started", 20)
    assert not [token for token in tokens if token.exists()]
    assert not [folder for folder in folders if folder.exists()]


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("host", ["node1", "node2"])
def test_a_killed_step_daemon_does_not_hold_the_nodes_for_ever(
    host: str, tmp_path: Path, on_slurm: SlurmCluster
) -> None:
    """srun does not notice the exit of either task; the run ends nevertheless."""
    project = make_project(tmp_path, "ray")
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs/both.toml").write_text(PROFILE)
    request = ("--cluster", "both", "--cpus", "2", "--nodes", "2", "--name", "d", "--detach")
    project.call(*request, "steps:main", "--steps", "100", "--seconds", "0.1")
    until((tmp_path / "runs/d/metrics.jsonl").exists, "a step", 120)
    on_slurm.kill_step_daemon(host)
    until(lambda: project.status("d")["state"] == "succeeded", "the end")
    on_slurm.wait_idle(60)
    until(lambda: not keeper.processes_with(f"{TOKEN}="), "the end of all that was started", 20)


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_ray_that_exits_on_a_node_is_started_again(tmp_path: Path, on_slurm: SlurmCluster) -> None:
    """As one whose start takes longer than Ray allows: else the run would wait 300 s for the node, and then fail."""
    project = make_project(tmp_path, "ray")
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs/both.toml").write_text(PROFILE)
    request = ("--cluster", "both", "--cpus", "2", "--nodes", "2", "--name", "g", "--detach")
    project.call(*request, "steps:main", "--steps", "100", "--seconds", "0.05")
    until(lambda: keeper.processes_with(f"{TOKEN}=", "SLURMD_NODENAME=node2"), "Ray on the second node", 120)
    until(lambda: [pid for pid, command in node2().items() if "ray.scripts.scripts start" in command], "its start", 120)
    for pid, command in node2().items():
        if "ray.scripts.scripts start" in command:
            os.kill(pid, signal.SIGKILL)
    until(lambda: project.status("g")["state"] == "succeeded", "the end", 200)


def folders_of_ray() -> set[Path]:
    """The temporary folders of the Rays inside jobs."""
    found = [Path(f"/proc/{pid}/environ").read_bytes() for pid in keeper.processes_with(f"{TOKEN}=")]
    return {Path(m[1].decode()) for text in found if (m := re.search(rf"{TOKEN}=([^\0]+)".encode(), text))}


def node2() -> dict[int, str]:
    return keeper.processes_with(f"{TOKEN}=", "SLURMD_NODENAME=node2")


def started(project: Project, run: str) -> bool:
    return any(event["event"] == "started" for event in project.events(run))


def test_a_ray_inside_a_job_has_no_address(tmp_path: Path) -> None:
    project = make_project(tmp_path, "ray")
    (tmp_path / "cluster_configs").mkdir()
    wrong = PROFILE.replace("[ray]", '[ray]\naddress = "10.0.0.1:6379"')
    (tmp_path / "cluster_configs/wrong.toml").write_text(wrong)
    refused = project.call("--cluster", "wrong", "--cpus", "2", "steps:main", status=2)
    assert "Remove one of them from the profile" in refused.stderr
