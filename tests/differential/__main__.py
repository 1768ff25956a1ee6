"""``python -m tests.differential [--engine local|slurm|ray] [--random N] [--report FILE] [NAME ...]``: the suite, by hand."""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.differential.frameworks import FRAMEWORKS
from tests.differential.programs import CHEAP, PROGRAMS
from tests.differential.report import Compared, text
from tests.differential.suite import Shape, under_launch, under_torchrun
from tests.differential.torchrun import Torchrun
from tests.launcher.engines import Project
from tests.testbed.ray import RayCluster, RayNode
from tests.testbed.slurm import SlurmCluster

SHAPES = {"local": Shape(1, 2), "slurm": Shape(2, 2), "ray": Shape(2, 2)}


@contextmanager
def started(engine: str, shape: Shape) -> Iterator[None]:
    """Start the test cluster of an engine, on which programs of `shape` fit."""
    if engine == "local":
        yield
        return
    # Ray packs ranks on as few nodes as it can, so its nodes have room for no more than the shape says.
    nodes = [RayNode(num_cpus=shape.ranks_per_node)] * shape.nodes
    cluster = SlurmCluster() if engine == "slurm" else RayCluster(nodes)
    with cluster:
        os.environ.update(cluster.environment())
        yield


def chosen(options: argparse.Namespace) -> list[str]:
    """The names of the programs to run; prints how to repeat a random choice."""
    programs = FRAMEWORKS if options.frameworks else PROGRAMS
    if unknown := [name for name in options.names if name not in programs]:
        raise SystemExit(f"no such program: {', '.join(unknown)}. There are: {', '.join(programs)}")
    if not options.random:
        return options.names or list(programs)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(
        f"{options.random} programs by chance; to repeat: python -m tests.differential --random {options.random} --seed {seed}"
    )
    return random.Random(seed).sample(CHEAP, options.random)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=main.__doc__)
    parser.add_argument("--engine", default="local", choices=list(SHAPES))
    parser.add_argument("--nodes", type=int, help="default: 1 on local, else 2")
    parser.add_argument("--ranks", type=int, default=2, help="of each node (default: 2)")
    parser.add_argument(
        "--frameworks", action="store_true", help="the programs of frameworks instead of the small ones"
    )
    parser.add_argument("--ignored", action="store_true", help="run them in a folder that git ignores")
    parser.add_argument("--random", type=int, metavar="N", help="run N cheap programs, chosen by chance")
    parser.add_argument("--seed", type=int, help="of that choice (default: another one each time)")
    parser.add_argument("--json", type=Path, help="write both observations of each program to this file")
    parser.add_argument("--report", type=Path, help="the same, as text")
    parser.add_argument("names", nargs="*", help="default: all")
    return parser.parse_args()


def main() -> int:
    """Compare the programs and print a line for each; the exit status is 1 if one differs."""
    options = parse()
    shape = SHAPES[options.engine]
    shape = Shape(options.nodes or shape.nodes, options.ranks)
    programs, compared = {**PROGRAMS, **FRAMEWORKS}, []
    names = chosen(options)
    with started(options.engine, shape), Torchrun() as torchrun, tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            folder = Path(scratch, str(number))
            (folder / "torchrun").mkdir(parents=True)
            project = project_folder(folder, options.ignored)
            expected = under_torchrun(programs[name], folder / "torchrun", torchrun, shape)
            found = under_launch(programs[name], Project(project, options.engine), shape)
            compared.append(Compared(name, expected, found, found.differences(expected)))
            print(f"{name:<32} {'; '.join(compared[-1].differences) or 'same'}", flush=True)
            shutil.rmtree(folder)
            write(options, compared, shape)
    wrong = sum(bool(each.differences) for each in compared)
    print(f"{len(compared)} programs on {options.engine}, {shape}: {wrong} differ")
    return min(wrong, 1)


def write(options: argparse.Namespace, compared: list[Compared], shape: Shape) -> None:
    """Write the reports that were asked for, of the programs until now."""
    if options.json:
        options.json.write_text(json.dumps([each.data() for each in compared], indent=1))
    if options.report:
        command = shlex.join(["python", "-m", "tests.differential", *sys.argv[1:]])
        options.report.write_text(text(compared, options.engine, shape, time.strftime("%Y-%m-%d"), command))


def project_folder(folder: Path, ignored: bool) -> Path:
    """Make the folder of a project; with `ignored`, one that the git checkout around it ignores."""
    project = folder / "project" / "ignored" if ignored else folder / "project"
    project.mkdir(parents=True)
    if ignored:
        (folder / "project" / ".gitignore").write_text("/ignored/\n")
        subprocess.run(["git", "init", "-q", folder / "project"], check=True)
    return project


if __name__ == "__main__":
    sys.exit(main())
