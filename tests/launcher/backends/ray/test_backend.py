"""Tests that need Ray, on a real cluster of three raylets."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.agent.network.addresses import reserve_port
from tests.launcher.engines import Project, make_project, until
from tests.testbed.ray import RayCluster, RayNode

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_a_request_that_this_cluster_can_never_meet(ray_project: Project) -> None:
    done = ray_project.launch("--cpus", "400", "--name", "big", "steps:main", status=2)
    assert "400 ranks need 400 CPU, but this Ray cluster has 12" in done.stderr
    assert "at most 12 ranks" in done.stderr
    assert not (ray_project.folder / "runs/big").exists()


def test_a_run_leaves_the_node_of_a_sick_gpu(ray_project: Project) -> None:
    ray_project.launch("--cpus", "1", "--name", "s", "sick:main")
    events = ray_project.events("s")
    first, second = (e["hosts"][0] for e in events if e["event"] == "started")
    assert first != second
    assert [e["exclude"] for e in events if e["event"] == "excluded"] == [[first]]
    assert f"excluded: {first}" in ray_project.call("status", "s").stdout


def test_a_node_that_does_not_pass_the_preflight_is_left(ray_project: Project, ray_cluster: RayCluster) -> None:
    """All nodes are requested, so the unfit one is among them; there is no replacement."""
    profile = f'extends = "ray"\npreflight = true\n[ray]\naddress = "{ray_cluster.address}"\nwait = 0.0\n'
    (ray_project.folder / "strict.toml").write_text(profile)
    nodes = str(len(ray_cluster.node_ids()) + 1)
    unfit = ray_cluster.add_node(RayNode(env={"TMPDIR": "/not/there"}))
    try:
        request = ("--cluster", "./strict.toml", "--cpus", nodes, "--nodes", nodes, "--name", "p")
        ray_project.call(*request, "steps:main", status=1)
        node = ray_cluster.node_ids()[unfit][:8]
    finally:
        ray_cluster.remove_node(unfit, graceful=True)
    (excluded_nodes,) = [e["exclude"][0] for e in ray_project.events("p") if e["event"] == "excluded"]
    assert node in excluded_nodes
    fields = [(e["kind"], e["message"]) for e in ray_project.events("p") if e["event"] == "failed"]
    assert [kind for kind, _ in fields] == ["unfit node", "unfit node"]
    assert f"{excluded_nodes}: its TMPDIR fails: No such file or directory" in fields[0][1]
    assert f"the run excludes {excluded_nodes}, and the cluster is too small" in fields[1][1]
    assert not [e for e in ray_project.events("p") if e["event"] == "started"], "no rank has begun"


def test_nobody_listens_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reserve_port("127.0.0.1") as holder:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{holder.getsockname()[1]}")
        done = make_project(tmp_path, "ray").launch("--cpus", "2", "--name", "u", "steps:main", status=2)
    assert "cannot be reached" in done.stderr
    assert "GCS port" in done.stderr
    assert not (tmp_path / "runs/u").exists()


def test_without_a_cluster_a_ray_is_started_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More CPU ranks than cores are allowed, for debugging; a fixture checks that no process of Ray remains."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    long = tmp_path / ("temporary" * 8)  # in which the paths of Ray's sockets would be too long
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    folders = set(Path("/tmp").glob("ray-*"))
    project = make_project(tmp_path, "ray")
    project.launch("--cpus", "3", "--name", "s", "torchrun_style.py", "--value", "1")
    assert not (Path.home() / ".ray/auth_token").exists(), "its token is its own"
    until(lambda: set(Path("/tmp").glob("ray-*")) <= folders, "the end of Ray's temporary folder", 30)
    assert [line.split(" master")[0] for line in project.logs("s")][2] == "[2] rank=2 local=2 world=3 sum=6"
