"""The suite on this machine, and a part of it on the other engines; ``python -m tests.differential`` runs all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.differential.programs import PROGRAMS
from tests.differential.suite import under_launch, under_torchrun
from tests.differential.torchrun import Torchrun
from tests.launcher.engines import Project

pytestmark = pytest.mark.slow

EVERYWHERE = ("argv", "main names", "module", "id of a module", "own queue", "environment", "pool spawn", "accelerator")


@pytest.fixture(scope="module")
def torchrun() -> Iterator[Torchrun]:
    with Torchrun() as server:
        yield server


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_program_observes_the_same_on_each_engine(
    name: str, project: Project, tmp_path: Path, torchrun: Torchrun
) -> None:
    compare(name, project, tmp_path, torchrun)


@pytest.mark.parametrize("name", sorted(PROGRAMS.keys() - set(EVERYWHERE)))
def test_a_program_observes_the_same_on_this_machine(
    name: str, local_project: Project, tmp_path: Path, torchrun: Torchrun
) -> None:
    compare(name, local_project, tmp_path, torchrun)


def compare(name: str, project: Project, folder: Path, torchrun: Torchrun) -> None:
    program = PROGRAMS[name]
    (folder / "torchrun").mkdir()
    expected = under_torchrun(program, folder / "torchrun", torchrun)
    assert expected.succeeded is not program.fails
    assert under_launch(program, project).differences(expected) == []
