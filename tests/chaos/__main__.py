"""``python -m tests.chaos``: throw faults at real runs, and print what became of them."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
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
from tests.chaos.play import Player, schedule
from tests.chaos.report import Record, table
from tests.testbed.ray import RayCluster
from tests.testbed.slurm import SlurmCluster

SHARES = {"local": 5, "slurm": 5, "ray": 4}
"""How the faults are shared out among the engines: on each all of its faults come three times in 200."""


def main() -> int:
    """Play the schedule that the seed decides, on all engines side by side; the exit status is 1 where a run did not end
    well."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=main.__doc__)
    parser.add_argument("--backend", default=",".join(SHARES), help="local, slurm, ray, or several with commas between")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=60, help="on all backends together")
    parser.add_argument("--per-run", type=int, default=6, help="faults in each run")
    parser.add_argument("--only", action="append", default=[], help="a fault of the table, by name; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no fault after so many")
    parser.add_argument(
        "--record", type=Path, help="a file to add each finding to as it comes; the table is of all in it"
    )
    args = parser.parse_args()
    engines = args.backend.split(",")
    if unknown := [name for name in engines if name not in SHARES]:
        parser.error(f"--backend {unknown[0]}: the backends are {', '.join(SHARES)}")
    if wrong := [name for name in args.only if name not in {fault.name for fault in FAULTS}]:
        parser.error(f"--only {wrong[0]!r}: the faults are {', '.join(sorted({fault.name for fault in FAULTS}))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-record-") as name:
        record = Record((args.record or Path(name) / "record.jsonl").absolute())
        whole = sum(SHARES[engine] for engine in engines)
        context = multiprocessing.get_context("spawn")  # each engine has an environment of its own
        players = [
            context.Process(
                target=play, args=(engine, round(args.faults * SHARES[engine] / whole), args, record, began)
            )
            for engine in engines
        ]
        try:
            for player in players:
                player.start()
            for player in players:
                player.join()
        finally:
            for player in players:
                player.terminate()
            for player in players:
                player.join()
            print(f"\npython -m tests.chaos {' '.join(sys.argv[1:])}\n{date.today()}, {os.cpu_count()} cores,", end=" ")
            print(f"load {os.getloadavg()[0]:.1f}, {(time.monotonic() - began) / 60:.0f} min\n\n{table(record)}")
        return 0 if record.well() and not any(player.exitcode for player in players) else 1


def play(engine: str, count: int, args: argparse.Namespace, record: Record, began: float) -> None:
    """Play `count` faults on one engine, until so many minutes after `began` (by `time.monotonic`)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, cluster_of(engine) as cluster, disk(Path(name)):
        player = Player(Path(name), engine, args.seed, cluster, lambda text: print(text, flush=True), record.note)
        expected = player.undisturbed()
        record.note_undisturbed(engine, expected)
        player.play(schedule(engine, args.seed, count, args.only), expected, args.per_run, began + 60 * args.minutes)


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
