"""The stops that each engine has, and a cluster for them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.stops.table import FUNCTIONS, SCRIPTS, SECONDS, Row, Source, Table


def cancel(table: Table, rows: Sequence[Row]) -> None:
    """``launch cancel`` for all at once."""
    for command in [table.project.start("cancel", row.run.name) for row in rows]:
        command.communicate(timeout=SECONDS)


def to_the_command(number: signal.Signals) -> Callable[[Table, Sequence[Row]], None]:
    """A signal to the command that follows each run."""

    def stop(table: Table, rows: Sequence[Row]) -> None:
        for row in rows:
            assert row.command is not None
            row.command.send_signal(number)

    return stop


def scancel(*words: str) -> Callable[[Table, Sequence[Row]], None]:
    """``scancel`` with `words` for the jobs of all runs."""

    def stop(table: Table, rows: Sequence[Row]) -> None:
        jobs = [str(json.loads((row.run.path / "job.json").read_text())["job_id"]) for row in rows]
        table.cluster.run("scancel", *words, *jobs)

    return stop


def preempt(table: Table, rows: Sequence[Row]) -> None:
    """A job of higher priority takes all nodes."""
    table.cluster.run("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o", os.devnull, "--wrap", "sleep 1")


def wait(table: Table, rows: Sequence[Row]) -> None:
    """The time limit comes by itself."""


def drain(table: Table, rows: Sequence[Row]) -> None:
    """Ray takes away a node of each run; another node takes its place."""
    for row in rows:
        gone = table.cluster.node_ids()
        host = row.events("started")[-1]["hosts"][0]
        name = next((name for name, node in gone.items() if node[:8] in host), None)
        if name is not None and not row.events("preempted")[row.stops - 1 :]:
            table.cluster.add_node()
            table.cluster.drain_node(name)


SOURCES: dict[str, tuple[Source, ...]] = {
    "local": (
        Source("cancel", cancel),
        Source("Ctrl-C", to_the_command(signal.SIGINT), foreground=True),
        Source("SIGTERM", to_the_command(signal.SIGTERM), foreground=True),
    ),
    "slurm": (
        Source("preemption", preempt, requeues=True),
        Source("time limit", wait, requeues=True, unasked=True, options=("--time", "1m")),
        Source("cancel", cancel),
        Source("scancel", scancel()),
        Source("scancel TERM", scancel("--signal=TERM")),
        Source("scancel TERM batch", scancel("--signal=TERM", "--batch")),
        Source("scancel TERM full", scancel("--signal=TERM", "--full"), ends="lost"),  # srun kills the step
        Source("scancel USR2", scancel("--signal=USR2"), requeues=True),
        Source("scancel USR2 batch", scancel("--signal=USR2", "--batch"), goes_on=True),
        Source("scancel USR2 full", scancel("--signal=USR2", "--full"), requeues=True),
        Source("scancel USR1", scancel("--signal=USR1"), ends="restarted"),
        Source("Ctrl-C", to_the_command(signal.SIGINT), foreground=True, goes_on=True),
        Source("SIGTERM", to_the_command(signal.SIGTERM), foreground=True, goes_on=True),
    ),
    "ray": (
        Source("cancel", cancel),
        Source("drain", drain, requeues=True),
        Source("Ctrl-C", to_the_command(signal.SIGINT), foreground=True, goes_on=True),
        Source("SIGTERM", to_the_command(signal.SIGTERM), foreground=True, goes_on=True),
    ),
}

TOGETHER = {"local": 12, "slurm": 11, "ray": 4}
"""How many programs an engine runs at once; Ray has twelve CPUs, and its workers import torch."""


@contextmanager
def started(engine: str) -> Iterator[Any]:
    """Start the test cluster of an engine; None for this machine."""
    if engine == "local":
        yield None
        return
    with _cluster(engine) as cluster:
        os.environ.update(cluster.environment())
        yield cluster


def _cluster(engine: str) -> Any:
    if engine == "slurm":
        from tests.testbed.slurm import SlurmCluster

        return SlurmCluster()
    from tests.testbed.ray import THREE_NODES, RayCluster, RayNode

    return RayCluster((RayNode(num_cpus=0), *THREE_NODES))  # the drivers are on the first node, which is not drained


def rows_of(
    engine: str, sources: Sequence[Source], folder: Path, cluster: Any, programs: Sequence[str] = ()
) -> Iterator[Row]:
    """Play kinds of stops with programs (default: all), so many at once as the engine holds."""
    plays = [(source, program) for source in sources for program in programs or (*SCRIPTS, *FUNCTIONS)]
    for number in range(0, len(plays), TOGETHER[engine]):
        (part := folder / str(number)).mkdir(parents=True)
        yield from Table(part, engine, cluster).run(plays[number : number + TOGETHER[engine]])
