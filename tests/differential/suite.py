"""Run a program under torchrun and under `launch`, and compare what it observes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.agent.network import reserve_port
from tests.differential.programs import Program
from tests.differential.torchrun import Torchrun
from tests.launcher.engines import Project

RANKS = 2


@dataclass(frozen=True)
class Observed:
    """What a program observed: whether it succeeded, and by rank what it found and what has to be distinct."""

    succeeded: bool
    found: Mapping[int, Any]
    distinct: Mapping[int, Any]

    def differences(self, other: Observed) -> list[str]:
        """What this program observed unlike `other`, the same program elsewhere; for the ranks that both have."""
        found = [
            f"rank {rank}: {self.found[rank]!r}, not {other.found[rank]!r}"
            for rank in sorted(self.found.keys() & other.found.keys())
            if self.found[rank] != other.found[rank]
        ]
        if self.succeeded != other.succeeded:
            found.append(f"it {'succeeded' if self.succeeded else 'failed'}")
        if missing := other.found.keys() - self.found.keys():
            found.append(f"no report of the ranks {sorted(missing)}")
        if len(set(map(str, self.distinct.values()))) != len(self.distinct):
            found.append(f"the same on several ranks: {self.distinct}")
        return found


def write(program: Program, folder: Path) -> None:
    """Write the files of a program."""
    for name, text in {**program.files, program.script: program.source}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def words(program: Program) -> list[str]:
    """How the program is named after the options of a launcher."""
    return [*(["-m", program.module] if program.module else [program.script]), *program.args]


def read(folder: Path, succeeded: bool) -> Observed:
    """Read the reports of the ranks."""
    reports = {int(path.name): json.loads(path.read_text()) for path in folder.iterdir() if path.name.isdigit()}
    distinct = {rank: report[1] for rank, report in reports.items() if report[1] is not None}
    return Observed(succeeded, {rank: report[0] for rank, report in sorted(reports.items())}, distinct)


def under_torchrun(program: Program, folder: Path, torchrun: Torchrun) -> Observed:
    """Run the program with two ranks under torchrun."""
    write(program, folder)
    reports = folder / "observed-by-torchrun"
    reports.mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **program.environment, "OBSERVED": str(reports)}
    with reserve_port() as port:  # for the process group; a listener may share it
        options = ["--nproc-per-node", str(RANKS), "--master-port", str(port.getsockname()[1])]
        return read(reports, torchrun.run([*options, *words(program)], folder, environment))


def under_launch(program: Program, project: Project, *options: str) -> Observed:
    """Run the program with two ranks under launch, on the engine of the project."""
    write(program, project.folder)
    reports = project.folder / "observed-by-launch"
    reports.mkdir()
    (project.folder / "observed.toml").write_text(
        f'extends = "{project.engine}"\n[environment]\nOBSERVED = "{reports}"\n'
    )
    command = [project.python, "-P", "-m", "launcher", "--cluster", "./observed.toml", "--max-restarts", "0"]
    done = subprocess.run(
        [*command, "--cpus", str(RANKS), "--name", "run", *options, *words(program)], cwd=project.folder,
        env={**os.environ, **program.environment}, stdin=subprocess.DEVNULL, check=False, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if (done.returncode == 0) == program.fails or done.returncode == 2:
        print(done.stdout)  # pytest shows it with a failure
    return read(reports, done.returncode == 0)
