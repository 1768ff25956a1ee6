"""The scripts of "Bring your Trainer" under launch: stopped, killed, hung and continued as a function is."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, blocks
from tests.launcher.engines import Project, ranks_of, until
from training.files import read_lines

pytestmark = pytest.mark.slow

LONGER = {
    "finetune.py": ("num_train_epochs=3", "num_train_epochs=100000"),
    "lit.py": ("max_epochs=3", "max_epochs=100000"),
    "loop.py": ("run.epochs(3)", "run.epochs(100000)"),
}


def project(folder: Path, name: str) -> Project:
    page = ROOT / "docs/how-to/bring-your-trainer.md"
    (program,) = [block.text for block in blocks(page) if block.file == name]
    assert LONGER[name][0] in program
    (folder / name).write_text(program.replace(*LONGER[name]))
    (folder / "short.toml").write_text('backend = "local"\ngrace = 60\nhang_after = 5\n')
    return Project(folder, "local")


def begin(found: Project, name: str, *options: str) -> Path:
    found.call("--cluster", "./short.toml", "--cpus", "2", "--name", "r", "--detach", *options, name)
    return found.folder / "runs" / "r"


def newest(run_dir: Path) -> int:
    return max((line["step"] for line in read_lines(run_dir / "metrics.jsonl")), default=0)


def of_kind(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run_dir / "events.jsonl") if line["event"] == kind]


@pytest.mark.parametrize("name", sorted(LONGER))
def test_killed_stopped_and_resumed(tmp_path: Path, name: str) -> None:
    found = project(tmp_path, name)
    run_dir = begin(found, name)
    until(lambda: len(of_kind(run_dir, "saved")) > 1, "a checkpoint")
    os.kill(ranks_of(run_dir / "logs" / "1")[1], signal.SIGKILL)
    until(lambda: of_kind(run_dir, "resumed"), "a restart")
    at = of_kind(run_dir, "resumed")[0]["step"]
    assert at > 0
    until(lambda: newest(run_dir) > at + 40, "steps after the restart")
    assert found.call("cancel", "r").stdout == "r: stopped\n"
    stopped = of_kind(run_dir, "saved")[-1]["step"]
    assert stopped >= newest(run_dir), "the step at which it was stopped is in a checkpoint"
    found.call("resume", "r", "--detach")
    until(lambda: len(of_kind(run_dir, "resumed")) > 1, "the resumed run")
    assert of_kind(run_dir, "resumed")[-1]["step"] == stopped, "nothing is done again"
    until(lambda: newest(run_dir) > stopped + 20, "steps of the resumed run")
    found.call("cancel", "r")
    assert found.status("r")["state"] == "stopped"
    assert of_kind(run_dir, "save-failed") == []


def test_a_rank_that_hangs_is_restarted(tmp_path: Path) -> None:
    """Scripts with a Context report heartbeats."""
    found = project(tmp_path, "loop.py")
    path = tmp_path / "loop.py"
    hang = "        if run.step == 30 and run.ctx.world.attempt == 1 and run.ctx.world.rank:\n            time.sleep(1e6)\n"
    text = path.read_text().replace("        run.log(loss=loss)\n", f"        run.log(loss=loss)\n{hang}")
    path.write_text(text.replace("# loop.py\n", "import time\n"))
    run_dir = begin(found, "loop.py")
    until(lambda: of_kind(run_dir, "resumed"), "a restart")
    assert of_kind(run_dir, "resumed")[0]["step"] == 20
    (failed,) = of_kind(run_dir, "failed")
    assert failed["kind"] == "hung"
    assert re.search(r"rank 1 did not enter \w+ #.*, which rank 0 waits in; rank 1 is after step 30", failed["message"])
    found.call("cancel", "r")


@pytest.mark.parametrize("end", ["pass", "sys.exit(0)", "sys.exit(1)"])
def test_a_script_that_finds_the_request_before_the_launcher_is_stopped(tmp_path: Path, end: str) -> None:
    """Its Context looks for the file `stop` more often than the agent does."""
    program = f"""
import sys
from training.context import Context

ctx = Context.current()
(ctx.run_dir / "stop").touch()
step = 1
while not ctx.should_stop(step):
    step += 1
{end}
"""
    (tmp_path / "asks.py").write_text(program)
    found = Project(tmp_path, "local")
    found.launch("--cpus", "1", "--name", "r", "asks.py", status=3)
    assert found.status("r")["state"] == "stopped"
