"""``python -m tests.chaos``: throw faults at real runs, and print what became of them."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.play import Ending, Finding, Player, schedule
from tests.chaos.report import table
from tests.testbed.ray import RayCluster
from tests.testbed.slurm import SlurmCluster

ENGINES = ("local", "slurm", "ray")


def main() -> int:
    """Play the schedule that the seed decides; the exit status is 1 where a run did not end well."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=main.__doc__)
    parser.add_argument(
        "--backend", default=",".join(ENGINES), help="local, slurm, ray, or several with commas between"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=20, help="on each backend")
    parser.add_argument("--per-run", type=int, default=5, help="faults in each run")
    parser.add_argument("--only", action="append", default=[], help="a fault of the table, by name; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many")
    args = parser.parse_args()
    engines = args.backend.split(",")
    if unknown := [name for name in engines if name not in ENGINES]:
        parser.error(f"--backend {unknown[0]}: the backends are {', '.join(ENGINES)}")
    if wrong := [name for name in args.only if name not in {fault.name for fault in FAULTS}]:
        parser.error(f"--only {wrong[0]!r}: the faults are {', '.join(sorted({fault.name for fault in FAULTS}))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    findings: list[Finding] = []
    endings: list[Ending] = []
    expected = ""
    try:
        for engine in engines:
            with tempfile.TemporaryDirectory(prefix="chaos-") as name, cluster_of(engine) as cluster, disk(Path(name)):
                player = Player(Path(name), engine, args.seed, cluster, say=lambda text: print(text, flush=True))
                player.findings, player.endings = findings, endings
                expected = expected or player.undisturbed()
                faults = schedule(engine, args.seed, args.faults, args.only)
                player.play(faults, expected, args.per_run, began + 60 * args.minutes)
    finally:
        command = " ".join(sys.argv[1:])
        print(
            f"\npython -m tests.chaos {command}\n{date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f},"
        )
        print(f"{(time.monotonic() - began) / 60:.0f} min\n\n{table(findings, endings)}")
    return 0 if all(e.state == "succeeded" and e.equal and not e.left for e in endings) else 1


@contextlib.contextmanager
def cluster_of(engine: str) -> Iterator[SlurmCluster | RayCluster | None]:
    """The engine's test cluster, with what leads clients to it in the environment of this process."""
    if engine == "local":
        yield None
        return
    with SlurmCluster(grace_time=20) if engine == "slurm" else RayCluster() as cluster:
        before = dict(os.environ)
        os.environ.update(cluster.environment())
        try:
            yield cluster
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A small file system of its own for the runs, so that it can be filled."""
    runs = folder / "runs"
    runs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "chaos", str(runs)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(runs)], check=True)


if __name__ == "__main__":
    sys.exit(main())
