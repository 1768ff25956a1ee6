"""The process of one engine in a chaos run: its cluster, disk and player."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.play import Player, schedule
from tests.chaos.report import Record
from tests.testbed.ray import RayCluster
from tests.testbed.slurm import SlurmCluster


def stop_politely() -> None:
    """Raise an exception on SIGTERM, so that this process cleans up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def play(engine: str, count: int, args: argparse.Namespace, record: Record, began: float) -> None:
    """Play `count` faults on one engine, until `args.minutes` after `began` (`time.monotonic`)."""
    stop_politely()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name, cluster_of(engine) as cluster, disk(Path(name)):
        player = Player(Path(name), engine, args.seed, cluster, lambda text: print(text, flush=True), record.note)
        expected = player.undisturbed()
        record.note_undisturbed(engine, expected)
        player.play(schedule(engine, args.seed, count, args.only), expected, args.per_run, began + 60 * args.minutes)


@contextlib.contextmanager
def cluster_of(engine: str) -> Iterator[SlurmCluster | RayCluster | None]:
    """The test cluster of the engine, with the variables of its clients in this environment."""
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
    """A small file system for the runs, which can be filled."""
    runs = folder / "runs"
    runs.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "chaos", str(runs)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(runs)], check=True)
