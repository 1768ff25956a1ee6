from __future__ import annotations

import io
import json
import os
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from launcher.client.follow import attend, follow, status_line
from launcher.client.run import Run
from launcher.config.cluster import Cluster
from launcher.lifecycle.run_dir import FORMAT, RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target
from tests.launcher.client.test_tail import LINES, SHOWN
from tests.launcher.engines import COMMAND, make_project
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


def test_the_logs_of_a_run_have_whole_lines_whatever_ends_them(tmp_path: Path) -> None:
    run = ended_run(tmp_path, 1)
    run.dir.log(1, 0).write_bytes(LINES)
    assert list(run.logs()) == SHOWN
    out = io.StringIO()
    follow(run, out)
    assert [line for line in out.getvalue().split("\n") if "%" in line or "last" in line] == ["100%", "last"]


def test_a_log_of_one_endless_line_takes_little_memory(tmp_path: Path) -> None:
    run = ended_run(tmp_path, 1)
    follow(run, io.StringIO())  # imports what it needs
    run.dir.log(1, 0).write_bytes(b"\r" * 60_000_000)
    tracemalloc.start()
    try:
        assert len(list(run.logs())) <= 1
        follow(run, io.StringIO())
        assert tracemalloc.get_traced_memory()[1] < 24 << 20, "16 MiB of it is the limit of plan.json"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8:strict"])
def test_output_that_the_terminal_cannot_show_is_no_failure(tmp_path: Path, encoding: str) -> None:
    project = make_project(tmp_path, "local")
    script = f"import sys\nsys.stdout.buffer.write({LINES!r})\n"
    (project.folder / "talks.py").write_text(script)
    environment = {
        **os.environ,
        "PYTHONIOENCODING": encoding,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    command = [*COMMAND, "--cpus", "1", "--name", "r", "talks.py"]
    done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert {b"one", b"100%", b"last"} <= set(done.stdout.split(b"\n"))
    files = [path for path in (project.folder / "runs" / "r").rglob("*") if path.is_file() and "code" not in path.parts]
    assert [path.name for path in files if path.stat().st_mode & 0o077] == []
    for more in (["logs", "r"], ["logs", "-f", "r"], ["status", "r"], ["list"]):
        done = subprocess.run([*COMMAND, *more], cwd=project.folder, env=environment, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), more
    done = subprocess.run(
        [*COMMAND, "logs", "r", "--json"], cwd=project.folder, env=environment, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == SHOWN
