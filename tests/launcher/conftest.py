"""Fixtures: a user's project for each engine; the session shares the real clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.engines import Launch, Project, make_project

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


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str]) -> Launch:
    """Run the command in this process; returns exit status, stdout and stderr."""
    from launcher.cli.main import main

    def call(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(argv)
        out, err = capsys.readouterr()
        return int(exited.value.code or 0), out, err

    return call
