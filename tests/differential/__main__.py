"""``python -m tests.differential [--engine local|slurm|ray] [--json FILE] [NAME ...]``: the whole suite, with a report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.differential.programs import PROGRAMS
from tests.differential.suite import under_launch, under_torchrun
from tests.differential.torchrun import Torchrun
from tests.launcher.engines import Project


@contextmanager
def engine(name: str) -> Iterator[tuple[str, ...]]:
    """Start the test cluster of an engine; the options of `launch` for two ranks there."""
    if name == "local":
        yield ()
        return
    if name == "slurm":
        from tests.testbed.slurm import SlurmCluster as Cluster
    else:
        from tests.testbed.ray import RayCluster as Cluster  # type: ignore[assignment]
    with Cluster() as cluster:
        os.environ.update(cluster.environment())
        yield ("--nodes", "2") if name == "slurm" else ()


def main() -> int:
    """Compare the programs and print a line for each; the exit status is 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="local", choices=["local", "slurm", "ray"])
    parser.add_argument("--json", type=Path, help="write both observations of each program to this file")
    parser.add_argument("names", nargs="*", help="default: all")
    options = parser.parse_args()
    report = []
    with engine(options.engine) as words, Torchrun() as torchrun, tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(options.names or PROGRAMS):
            folder = Path(scratch, str(number))
            (folder / "torchrun").mkdir(parents=True)
            (folder / "project").mkdir()
            expected = under_torchrun(PROGRAMS[name], folder / "torchrun", torchrun)
            found = under_launch(PROGRAMS[name], Project(folder / "project", options.engine), *words)
            differences = found.differences(expected)
            report.append({"program": name, "torchrun": expected.found, "launch": found.found, "differ": differences})
            print(f"{name:<32} {'; '.join(differences) or 'same'}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    wrong = sum(bool(each["differ"]) for each in report)
    print(f"{len(report)} programs on {options.engine}, {wrong} differ")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
