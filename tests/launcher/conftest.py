"""Fixtures: a user's project for each engine; the session shares the real clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.engines import Project, make_project

ENGINES = ["local", pytest.param("slurm", marks=pytest.mark.slurm), pytest.param("ray", marks=pytest.mark.ray)]


@pytest.fixture(params=ENGINES)
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    """A folder with the test programs, for each engine."""
    if request.param != "local":
        request.getfixturevalue(f"on_{request.param}")
    return make_project(tmp_path, request.param)


@pytest.fixture
def local_project(tmp_path: Path) -> Project:
    return make_project(tmp_path, "local")


@pytest.fixture
def slurm_project(tmp_path: Path, on_slurm: object) -> Project:
    return make_project(tmp_path, "slurm")


@pytest.fixture
def ray_project(tmp_path: Path, on_ray: object) -> Project:
    return make_project(tmp_path, "ray")
