"""What only Ray can show, on a real cluster of three raylets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.network import reserve_port
from tests.launcher.engines import Project, make_project

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_a_request_that_this_cluster_can_never_meet(ray_project: Project) -> None:
    done = ray_project.launch("--cpus", "400", "--name", "big", "steps:main", status=2)
    assert "400 ranks need 400 CPU, but this Ray cluster has 12" in done.stderr
    assert "at most 12 ranks" in done.stderr
    assert not (ray_project.folder / "runs/big").exists()


def test_nobody_listens_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with reserve_port("127.0.0.1") as holder:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{holder.getsockname()[1]}")
        done = make_project(tmp_path, "ray").launch("--cpus", "2", "--name", "u", "steps:main", status=2)
    assert "cannot be reached" in done.stderr
    assert "GCS port" in done.stderr
    assert not (tmp_path / "runs/u").exists()


def test_without_a_cluster_a_ray_is_started_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More CPU ranks than cores are fine for debugging; nothing of the Ray is left afterwards (a fixture looks)."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(Path("/tmp") / f"r{os.getpid()}"))  # its sockets allow no long paths
    project = make_project(tmp_path, "ray")
    project.launch("--cpus", "3", "--name", "s", "torchrun_style.py", "--value", "1")
    assert [line.split(" master")[0] for line in project.logs("s")][2] == "[2] rank=2 local=2 world=3 sum=6"
