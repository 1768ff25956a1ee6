"""The suite on this machine, and a part of it on the other engines; ``python -m tests.differential`` runs all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.agent.network.addresses import reserve_port
from tests.differential.frameworks import FRAMEWORKS
from tests.differential.programs import CHEAP, PROGRAMS, Program
from tests.differential.report import Compared, text
from tests.differential.suite import Observed, Shape, error_in, under_launch, under_torchrun
from tests.differential.torchrun import Torchrun
from tests.launcher.engines import Project

slow = pytest.mark.slow

SHAPES = {"local": Shape(1, 2), "slurm": Shape(2, 2), "ray": Shape(2, 1)}
"""On the shared Ray cluster a node has room for four ranks, and gets them."""

EVERYWHERE = (
    "module",
    "own queue",
    "environment",
    "variables of the shell",
    "pool spawn",
    "gather",
    *("jax", "hydra"),
)

LOCAL_FRAMEWORKS = ("torch fsdp2 and dcp", "hydra unknown override")
SOAK_FRAMEWORKS = ("accelerate test_ops", "lightning", "transformers trainer", "torch spawn", "hydra module")
"""The first has a race of its own: a rank may end while another one still connects to it, also under torchrun."""

ALL = {**PROGRAMS, **FRAMEWORKS}


@pytest.fixture(scope="module")
def torchrun() -> Iterator[Torchrun]:
    with Torchrun() as server:
        yield server


@slow
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_program_observes_the_same_on_each_engine(
    name: str, project: Project, tmp_path: Path, torchrun: Torchrun
) -> None:
    compare(ALL[name], project, tmp_path, torchrun)


@slow
def test_lightning_observes_the_same_on_two_nodes(slurm_project: Project, tmp_path: Path, torchrun: Torchrun) -> None:
    """Its Trainer takes minutes on the other engines, where ``python -m tests.differential`` runs it."""
    compare(ALL["lightning"], slurm_project, tmp_path, torchrun)


@slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in CHEAP else pytest.mark.soak)  # those take as long as all others together
        for name in sorted(PROGRAMS.keys() - set(EVERYWHERE))
    ]
    + [*LOCAL_FRAMEWORKS, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAK_FRAMEWORKS)],
)
def test_a_program_observes_the_same_on_this_machine(
    name: str, local_project: Project, tmp_path: Path, torchrun: Torchrun
) -> None:
    compare(ALL[name], local_project, tmp_path, torchrun)


def compare(program: Program, project: Project, folder: Path, torchrun: Torchrun) -> None:
    (folder / "torchrun").mkdir()
    shape = SHAPES[project.engine]
    expected = under_torchrun(program, folder / "torchrun", torchrun, shape)
    assert expected.succeeded is not program.fails
    assert under_launch(program, project, shape).differences(expected) == []


SPAWN = """
import os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing

def child(rank, port, folder):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    value = torch.tensor(rank + 1)
    dist.all_reduce(value)
    open(os.path.join(folder, f"sum-{rank}"), "w").write(str(value.item()))
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(child, (sys.argv[1], os.path.dirname(os.path.abspath(sys.argv[2]))), nprocs=2)
"""


@slow
def test_one_rank_spawns_a_process_group_of_its_own(project: Project) -> None:
    """The way of programs that are their own launcher; torchrun's agent store makes it wait for ever."""
    (project.folder / "spawns.py").write_text(SPAWN)
    with reserve_port() as port:
        number = str(port.getsockname()[1])
        project.launch("--cpus", "1", "spawns.py", number, str(project.folder / "sum"))
    assert [(project.folder / f"sum-{rank}").read_text() for rank in range(2)] == ["3", "3"]


# --- the suite itself


def test_differences_are_found() -> None:
    expected = Observed(True, {0: [1], 1: [2]}, {})
    assert Observed(True, {0: [1], 1: [2]}, {0: "a", 1: "b"}).differences(expected) == []
    assert Observed(True, {0: [1], 1: [3]}, {}).differences(expected) == ["rank 1: [3], not [2]"]
    assert Observed(True, {0: [1]}, {}).differences(expected) == ["no report of the ranks [1]"]
    assert Observed(True, {0: [1], 1: [2]}, {0: "a", 1: "a"}).differences(expected) == [
        "the same on several ranks: {0: 'a', 1: 'a'}"
    ]
    failed = Observed(False, {}, {}, "ValueError: no")
    assert failed.differences(Observed(True, {}, {})) == ["it failed"]
    assert failed.differences(Observed(False, {}, {}, "ValueError: never")) == []
    assert failed.differences(Observed(False, {}, {}, "KeyError: 1")) == [
        "it failed with ValueError: no, not KeyError: 1"
    ]


def test_the_exception_is_found_in_the_output_of_both() -> None:
    line = "AssertionError: The values do not match"
    assert error_in(f"launch: failed: {line} [rank 2 on node2]\nuser error: fix it") == line
    other = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert error_in(f"{other}[rank2]: Traceback (most recent call last):\n[rank2]: {line}\n") == line
    assert error_in("all is well") == ""


def test_the_report_has_both_observations(tmp_path: Path) -> None:
    folder = str(tmp_path / "runs")
    same = Observed(True, {0: ["x", folder], 1: ["x", folder]}, {})
    found = text([Compared("argv", same, same, [])], "slurm", Shape(2, 1), "2026-11-26", "python -m tests.differential")
    assert found.startswith("Differential suite on slurm, 2 nodes x 1 rank, 2026-11-26: 1 programs, 0 differ.\n")
    assert "\nargv: same\n" in found
    for launcher in ("torchrun", "launch"):
        assert f'  {launcher} succeeded; ranks 0, 1: ["x", "TMP"]\n' in found
    assert str(tmp_path) not in found


def test_enough_programs_are_cheap() -> None:
    assert len(CHEAP) >= 40
    assert not {"torch random", "accelerator", "pool spawn"} & {*CHEAP}
