from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from launcher.client.follow import attend, follow, status_line
from launcher.client.run import Run
from launcher.config.cluster import Cluster
from launcher.lifecycle.run_dir import FORMAT, RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target
from training.files import append_line


@pytest.mark.parametrize(
    ("loss", "shown"), [(0.12345, "loss 0.1235"), (2, "loss 2.0000"), ("NaN", "loss NaN"), (None, "loss None")]
)
def test_a_loss_of_any_kind_is_shown(loss: Any, shown: str) -> None:
    line = status_line("r", "running", [{"step": 3, "time": 1.0, "total_steps": 9, "loss": loss}])
    assert line.split("  ")[1:] == ["step 3/9", shown]


def ended_run(folder: Path, attempts: int) -> Run:
    """A run that has ended, submitted again after its first attempt."""
    made = RunDir(folder / "runs" / "n")
    made.create()
    target, site, placement = Target("script", "s.py"), Cluster("local", "local"), Placement(1, 1, "cpu", why="1")
    made.write_plan(Plan("n", made.path, RunSpec("s.py"), "local", site, placement, target, folder, 60))
    for attempt in range(1, attempts + 1):
        if attempt < 3:
            append_line(made.events_file, {"time": 0.0, "event": "submitted", "format": FORMAT})
        append_line(
            made.events_file, {"time": 0.0, "event": "started", "attempt": attempt, "world_size": 1, "hosts": ["h"]}
        )
        made.log(attempt, 0).parent.mkdir(parents=True)
        made.log(attempt, 0).write_text(f"attempt {attempt}\n")
    made.write_result(State.SUCCEEDED, attempts=attempts)
    return Run(made)


def test_the_output_of_an_attempt_that_was_over_before_the_first_look_is_shown(tmp_path: Path) -> None:
    run, out = ended_run(tmp_path, 4), io.StringIO()
    assert attend(run, out) is State.SUCCEEDED
    shown = [line for line in out.getvalue().splitlines() if line.startswith("attempt")]
    assert shown == ["attempt 2", "attempt 3", "attempt 4"], "not of the submission before"
    out = io.StringIO()
    follow(run, out)
    shown = [line for line in out.getvalue().splitlines() if line.startswith("attempt")]
    assert shown == ["attempt 4"], "one who joins later sees the newest"
