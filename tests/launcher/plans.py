"""Runs that nothing has started: their directory and plan alone."""

from __future__ import annotations

from pathlib import Path

from launcher.config.cluster import Cluster
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, Target


def planned_run(path: Path, backend: str, ranks: int = 2) -> RunDir:
    """Make the run directory `path` with the plan of a script on CPU `ranks` of one node."""
    run = RunDir(path)
    run.create()
    run.write_plan(
        Plan(
            *(path.name, path, RunSpec("x.py"), backend, Cluster(backend, backend), Placement(1, ranks, "cpu")),
            *(Target("script", "x.py"), path.parent, 60),
        )
    )
    return run
