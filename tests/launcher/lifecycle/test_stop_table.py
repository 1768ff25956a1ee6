"""A part of the stop table; ``python -m tests.stops`` plays all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.stops.engines import SOURCES
from tests.stops.table import HEADER, Table
from tests.testbed.slurm import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def play(table: Table, engine: str, plan: Mapping[str, Sequence[str]]) -> None:
    sources = {source.name: source for source in SOURCES[engine]}
    rows = table.run([(sources[name], program) for name, programs in plan.items() for program in programs])
    print(HEADER, *(row.text() for row in rows), sep="\n")
    assert {(row.source.name, row.program): row.problems() for row in rows if row.problems()} == {}
    for row in rows:
        if row.source.foreground and not row.source.goes_on:
            assert "stopping" in row.printed
            assert "with a checkpoint" not in row.printed, "none has saved before it is stopped"


def test_stops_on_this_machine(tmp_path: Path) -> None:
    scripts = ("130", "one saves", "one ended, no handler", "finished")
    functions = ("function, one ended", "script with a Context")
    plan = {
        "cancel": (*scripts, *functions),
        "Ctrl-C": ("143",),
        "SIGTERM": ("function, saves",),
    }
    play(Table(tmp_path, "local"), "local", plan)


@pytest.mark.slurm
def test_stops_of_a_scheduler(tmp_path: Path, on_slurm: SlurmCluster) -> None:
    plan = {
        "scancel USR2": ("one ended, no handler", "function, silent"),
        "scancel TERM": ("143", "function, saves"),
        "scancel": ("0",),
        "scancel USR2 batch": ("0",),
        "scancel USR2 full": ("0",),
        "cancel": ("script with a Context",),
    }
    play(Table(tmp_path, "slurm", on_slurm), "slurm", plan)


@pytest.mark.slurm
def test_a_job_of_higher_priority(tmp_path: Path, on_slurm: SlurmCluster) -> None:
    programs = ("1", "raises", "no handler", "finished", "function, saves")
    play(Table(tmp_path, "slurm", on_slurm), "slurm", {"preemption": programs})
