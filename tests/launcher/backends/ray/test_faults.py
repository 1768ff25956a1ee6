"""Loss of workers, nodes and drivers on Ray; drained nodes; a cluster that becomes too small."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.engines import Project, make_project, ranks_of, until
from tests.testbed.ray import RayCluster, RayNode

pytestmark = [pytest.mark.soak, pytest.mark.slow, pytest.mark.ray]

STEPS = 400
JOB = ("--max-steps", str(STEPS), "--save-every", "20", "--log-every", "1", "--log-with=", "--lr", "1e-4")
HEAD = "node1"
PATIENCE = 240.0  # seconds; a worker group takes 10 s on an idle machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head without CPUs, hence without ranks, and three nodes for one rank each."""
    with RayCluster([RayNode(num_cpus=0), RayNode(num_cpus=1)]) as cluster:
        for _ in range(2):  # one by one: Ray limits the start of a node to 30 s, also on a busy machine
            cluster.add_node(RayNode(num_cpus=1))
        yield cluster


def attempts(project: Project, run: str) -> list[dict[str, Any]]:
    return [e for e in project.events(run) if e["event"] == "started"]


def newest(project: Project, run: str) -> dict[str, Any]:
    path = project.folder / "runs" / run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last: dict[str, Any] = json.loads(lines[-1]) if lines else {"attempt": 0, "step": 0}
    return last


def steps_of(project: Project, run: str, attempt: int, more: int = 25) -> None:
    """Wait until an attempt has done `more` steps, and so has saved a checkpoint."""
    until(lambda: newest(project, run)["attempt"] >= attempt, f"a step of attempt {attempt}", PATIENCE)
    first = newest(project, run)["step"]
    until(lambda: newest(project, run)["step"] >= first + more, f"steps of attempt {attempt}", PATIENCE)


def rank_process(project: Project, run: str) -> int:
    """The process of a rank of the run."""
    attempt = attempts(project, run)[-1]["attempt"]
    return next(iter(ranks_of(project.folder / "runs" / run / f"logs/{attempt}").values()))


def in_use(cluster: RayCluster, project: Project, run: str) -> list[str]:
    """The nodes of the newest attempt."""
    hosts = attempts(project, run)[-1]["hosts"]
    return [name for name, node in cluster.node_ids().items() if any(node[:8] in host for host in hosts)]


def ray_project(folder: Path, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, ray: str) -> Project:
    """A user's folder with a profile `site` of the cluster; `ray` holds more keys of its section."""
    for name, value in cluster.environment().items():
        monkeypatch.setenv(name, value)
    project = make_project(folder, "ray")
    (folder / "cluster_configs").mkdir()
    profile = f'backend = "ray"\nhang_after = 5.0\n[ray]\naddress = "{cluster.address}"\n{ray}'
    (folder / "cluster_configs/site.toml").write_text(profile)
    return project


def weights(project: Project, run: str) -> str:
    return hashlib.sha256((project.folder / "runs" / run / "model/model.safetensors").read_bytes()).hexdigest()


def nothing_left(cluster: RayCluster, project: Project, run: str) -> bool:
    named = (
        f"launcher.rank.forkserver {project.folder}/runs/{run}",
        "ray::RayTrainWorker",
        "TrainController",
        "NodeActor",
    )
    return not any(cluster.processes(words) for words in named)


@pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated")  # as Ray itself reads its record
@pytest.mark.timeout(1500)
def test_a_run_outlives_its_ranks_workers_and_nodes(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank, a Ray Train worker and a node are killed, a node is drained; the weights are those of an uninterrupted run."""
    peace = make_project(tmp_path / "peace", "local")
    project = ray_project(tmp_path / "war", cluster, monkeypatch, "wait = 5.0\n")
    with peace.start("--cpus", "2", "--name", "p", "--", *JOB) as undisturbed:
        project.call("--cluster", "site", "--cpus", "2", "--detach", "--name", "r", "--", *JOB)
        steps_of(project, "r", 1)
        workers = set(cluster.processes("ray::RayTrainWorker"))
        os.kill(rank_process(project, "r"), signal.SIGKILL)
        steps_of(project, "r", 2)
        assert set(cluster.processes("ray::RayTrainWorker")) == workers, "Ray did not notice"

        os.kill(min(workers), signal.SIGKILL)
        steps_of(project, "r", 3)
        drained = in_use(cluster, project, "r")[0]
        cluster.drain_node(drained)
        steps_of(project, "r", 4)
        assert drained not in in_use(cluster, project, "r")

        gone = in_use(cluster, project, "r")[0]
        dead = cluster.node_ids()[gone][:8]
        cluster.remove_node(gone)
        until(lambda: project.status("r")["state"] == "failed", "the end of patience", PATIENCE)
        undisturbed.communicate()
    failure = project.status("r")["failure"]
    assert failure["kind"] == "node lost"
    assert dead in failure["message"]
    assert "2 ranks need 2 CPU, but this Ray cluster has 1" in failure["message"]
    fields = [(e["event"], e.get("kind")) for e in project.events("r")]
    assert [kind for event, kind in fields if event == "restarted"] == ["killed", "killed", "node lost"]
    assert [event for event, _ in fields if event in ("preempted", "requeued")] == ["preempted", "requeued"]
    refused = project.call("resume", "r", status=2)
    assert "2 ranks need 2 CPU" in refused.stderr

    cluster.add_node(RayNode(num_cpus=1))
    project.call("resume", "r")
    assert project.status("r")["progress"]["step"] == STEPS
    assert weights(project, "r") == weights(peace, "p")
    until(lambda: nothing_left(cluster, project, "r"), "a clean cluster", 20)


@pytest.mark.timeout(900)
def test_hung_then_left_by_its_driver_then_on_fewer_nodes(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All nodes are lost while there is no driver; the resumed run uses the one node that exists by then."""
    project = ray_project(tmp_path, cluster, monkeypatch, "elastic = true\n")
    project.call("--cluster", "site", "--cpus", "2", "--detach", "--name", "e", "steps:main", "--steps", "4000")
    steps_of(project, "e", 1)
    os.kill(rank_process(project, "e"), signal.SIGSTOP)
    steps_of(project, "e", 2)
    restarted = next(e for e in project.events("e") if e["event"] == "restarted")
    assert restarted["kind"] == "hung"
    assert "is stopped (SIGSTOP" in restarted["message"]

    _, pid, _ = project.status("e")["job_id"].rsplit(":", 2)
    os.kill(int(pid), signal.SIGKILL)
    until(lambda: project.status("e")["state"] == "lost", "the driver's end to be known", 20)
    until(lambda: nothing_left(cluster, project, "e"), "a clean cluster", 60)

    (project.folder / "runs/e/state.json").write_text("3990")
    for name in cluster.node_ids().keys() - {HEAD}:
        cluster.remove_node(name)
    cluster.add_node(RayNode(num_cpus=1))
    status = json.loads(project.call("resume", "e", "--json").stdout)
    assert status["metrics"] == {"first": 3990, "ranks": [0], "steps": 4000}
    result = json.loads((project.folder / "runs/e/result.json").read_text())
    assert (result["state"], result["world_size"]) == ("succeeded", 1)
