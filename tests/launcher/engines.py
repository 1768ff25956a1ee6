"""Run the command on each engine, in a user's folder and in its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
COMMAND = [sys.executable, "-P", "-m", "launcher"]

Launch = Callable[..., tuple[int, str, str]]
"""The fixture `launch`: the command with its arguments -> exit status, stdout and stderr."""


@dataclass(frozen=True)
class Project:
    """A user's folder with the test programs, and the engine of its runs."""

    folder: Path
    engine: str
    python: str = sys.executable

    def start(self, *argv: str) -> subprocess.Popen[str]:
        """Start the command without waiting; its output goes to pipes."""
        return subprocess.Popen(
            [self.python, *COMMAND[1:], *argv],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *argv: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run the command and check its exit status (None: any)."""
        done = subprocess.run(
            [self.python, *COMMAND[1:], *argv],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if status is not None and done.returncode != status:
            logs = [f"== {p}\n{p.read_text(errors='replace')[-3000:]}" for p in self.folder.glob("runs/*/logs/*.log")]
            raise AssertionError(
                f"launch {' '.join(argv)} ended with {done.returncode}, not {status}\n{done.stdout}\n{done.stderr}\n"
                + "\n".join(logs)
            )
        return done

    def launch(self, *argv: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        """``launch --backend ENGINE ...``."""
        return self.call("--backend", self.engine, *argv, status=status)

    def status(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call("status", run, "--json").stdout)
        return found

    def logs(self, run: str) -> list[str]:
        return sorted(self.call("logs", run).stdout.splitlines())

    def events(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "events.jsonl").read_text().splitlines()]


def make_project(folder: Path, engine: str, programs: Path = PROGRAMS) -> Project:
    shutil.copytree(programs, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return Project(folder, engine)


def ranks_of(logs: Path) -> dict[int, int]:
    """Rank -> pid of the attempt with the folder `logs`, found by the output files of processes."""
    found: dict[int, int] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(OSError):
            output = Path(os.readlink(f"/proc/{pid}/fd/1"))
            if output.parent == logs:
                found.setdefault(int(output.stem), pid)
    return found


def until(condition: Callable[[], object], what: str | Callable[[], str], seconds: float = 90.0) -> None:
    """Wait until `condition` holds; `what` names it.

    Raises:
        AssertionError: it does not hold within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds} s still not: {what if isinstance(what, str) else what()}")
        time.sleep(0.1)
