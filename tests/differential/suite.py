"""Run a program under torchrun and under `launch`, and compare what it observes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.agent.network.addresses import reserve_port
from tests.differential.programs import Program
from tests.differential.torchrun import Torchrun
from tests.launcher.engines import Project


@dataclass(frozen=True)
class Shape:
    """How many ranks a program has, and on how many nodes."""

    nodes: int = 1
    ranks_per_node: int = 2

    def __str__(self) -> str:
        return (
            f"{self.nodes} node{'s' * (self.nodes > 1)} x {self.ranks_per_node} rank{'s' * (self.ranks_per_node > 1)}"
        )

    @property
    def options(self) -> list[str]:
        """The options of `launch` for it."""
        nodes = ["--nodes", str(self.nodes)] if self.nodes > 1 else []
        return ["--cpus", str(self.nodes * self.ranks_per_node), *nodes]

    def torchrun(self, port: int) -> list[list[str]]:
        """The options of the torchrun of each node, for a process group at `port` of this machine."""
        common = ["--nproc-per-node", str(self.ranks_per_node), "--master-port", str(port)]
        if self.nodes == 1:
            return [common]
        common += ["--nnodes", str(self.nodes), "--master-addr", "127.0.0.1"]
        return [[*common, "--node-rank", str(node)] for node in range(self.nodes)]


TWO_RANKS = Shape()


@dataclass(frozen=True)
class Observed:
    """What a program observed: whether it succeeded, and by rank what it found and what has to be distinct.

    Attributes:
        error: the exception that ended it, as the launcher names it; empty if it is not known.
    """

    succeeded: bool
    found: Mapping[int, Any]
    distinct: Mapping[int, Any]
    error: str = ""

    def differences(self, other: Observed) -> list[str]:
        """What this program observed unlike `other`, the same program elsewhere; for the ranks that both have."""
        found = [
            f"rank {rank}: {self.found[rank]!r}, not {other.found[rank]!r}"
            for rank in sorted(self.found.keys() & other.found.keys())
            if self.found[rank] != other.found[rank]
        ]
        if self.succeeded != other.succeeded:
            found.append(f"it {'succeeded' if self.succeeded else 'failed'}")
        elif self.error and other.error and _kind(self.error) != _kind(other.error):
            found.append(f"it failed with {self.error}, not {other.error}")
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


_ERROR = re.compile(
    r"^(?:\[rank\d+\]: )?(?:launch: failed: )?((?:\w+\.)*\w*(?:Error|Exception)\b.*?)(?: \[rank.*\])?$", re.M
)
# Of a line that two ranks have written at once under torchrun, the first of the two names.
_KIND = re.compile(r"(?:\w+\.)*\w*?(?:Error|Exception)")
_OF_TORCHRUN = ("ChildFailedError", "torch.distributed.elastic")


def error_in(output: str) -> str:
    """The first exception that a launcher's output names."""
    found = (match.group(1) for match in _ERROR.finditer(output))
    return next((line for line in found if not line.startswith(_OF_TORCHRUN)), "")


def _kind(error: str) -> str:
    found = _KIND.match(error)
    return found[0] if found else error


def read(folder: Path, succeeded: bool, output: str) -> Observed:
    """Read the reports of the ranks; `output` is the launcher's."""
    reports = {int(path.name): json.loads(path.read_text()) for path in folder.iterdir() if path.name.isdigit()}
    distinct = {rank: report[1] for rank, report in reports.items() if report[1] is not None}
    return Observed(
        succeeded,
        {rank: report[0] for rank, report in sorted(reports.items())},
        distinct,
        "" if succeeded else error_in(output),
    )


def under_torchrun(program: Program, folder: Path, torchrun: Torchrun, shape: Shape = TWO_RANKS) -> Observed:
    """Run the program under torchrun; its nodes are processes of this machine."""
    write(program, folder)
    reports = folder / "observed-by-torchrun"
    reports.mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **program.environment, "OBSERVED": str(reports)}
    with reserve_port() as port:  # for the process group; a listener may share it
        nodes = [[*options, *words(program)] for options in shape.torchrun(port.getsockname()[1])]
        succeeded = torchrun.run(nodes, folder, environment)
    return read(reports, succeeded, (folder / "torchrun.log").read_text(errors="replace"))


def under_launch(program: Program, project: Project, shape: Shape = TWO_RANKS) -> Observed:
    """Run the program under launch, on the engine of the project."""
    write(program, project.folder)
    reports = project.folder / "observed-by-launch"
    reports.mkdir()
    (project.folder / "observed.toml").write_text(
        f'extends = "{project.engine}"\n[environment]\nOBSERVED = "{reports}"\n'
    )
    command = [project.python, "-P", "-m", "launcher", "--cluster", "./observed.toml", "--max-restarts", "0"]
    done = subprocess.run(
        [*command, "--name", "run", *shape.options, *words(program)], cwd=project.folder,
        env={**os.environ, **program.environment}, stdin=subprocess.DEVNULL, check=False, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if (done.returncode == 0) == program.fails:
        print(done.stdout)  # pytest shows it with a failure
    return read(reports, done.returncode == 0, done.stdout)
