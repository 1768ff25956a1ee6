"""The stops that each engine has, and a cluster for them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.stops.table import FUNCTIONS, SCRIPTS, Row, Table, cancel, to_the_command

Stop = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class Source:
    """One kind of stop.

    Attributes:
        requeues: a scheduler starts the programs again.
        foreground: each program has a command that follows it.
        goes_on: the stop concerns the command alone.
        options: of `launch`.
    """

    stop: Callable[[Table, Any], Stop]
    requeues: bool = False
    foreground: bool = False
    goes_on: bool = False
    options: tuple[str, ...] = ()


def _cancel(table: Table, _: Any) -> Stop:
    return cancel(table.project)


def _command(number: signal.Signals) -> Callable[[Table, Any], Stop]:
    return lambda table, cluster: to_the_command(number)


def _scancel(*words: str) -> Callable[[Table, Any], Stop]:
    """``scancel`` with `words` for the jobs of all runs."""

    def make(table: Table, cluster: Any) -> Stop:
        return lambda rows: cluster.run("scancel", *words, *map(job_of, rows))

    return make


def _preempt(table: Table, cluster: Any) -> Stop:
    """A job of higher priority takes all nodes."""
    words = ("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o", os.devnull, "--wrap", "sleep 1")
    return lambda rows: cluster.run(*words)


def _wait(table: Table, cluster: Any) -> Stop:
    """The time limit, which comes by itself."""
    return lambda rows: None


def _drain(table: Table, cluster: Any) -> Stop:
    """Ray takes a node away on which a rank of each run is; another one takes its place."""

    def stop(rows: Sequence[Row]) -> None:
        hosts = [host for row in rows for host in row.events("started")[-1]["hosts"]]
        ids = cluster.node_ids()
        counts = {name: sum(node[:8] in host for host in hosts) for name, node in ids.items()}
        cluster.add_node()
        for name in sorted(counts, key=lambda name: counts[name]):
            if counts[name] and any(
                any(ids[name][:8] in h for h in row.events("started")[-1]["hosts"]) for row in rows
            ):
                cluster.drain_node(name)

    return stop


def job_of(row: Row) -> str:
    """The id of the run's job."""
    return str(json.loads((row.run.path / "job.json").read_text())["job_id"])


SOURCES: dict[str, dict[str, Source]] = {
    "local": {
        "cancel": Source(_cancel),
        "Ctrl-C": Source(_command(signal.SIGINT), foreground=True),
        "SIGTERM": Source(_command(signal.SIGTERM), foreground=True),
    },
    "slurm": {
        "cancel": Source(_cancel),
        "preemption": Source(_preempt, requeues=True),
        "time limit": Source(_wait, requeues=True, options=("--time", "1m")),
        "scancel": Source(_scancel()),
        "scancel TERM": Source(_scancel("--signal=TERM")),
        "scancel TERM batch": Source(_scancel("--signal=TERM", "--batch")),
        "scancel TERM full": Source(_scancel("--signal=TERM", "--full")),
        "scancel USR2": Source(_scancel("--signal=USR2"), requeues=True),
        "scancel USR2 batch": Source(_scancel("--signal=USR2", "--batch")),
        "scancel USR2 full": Source(_scancel("--signal=USR2", "--full"), requeues=True),
        "scancel USR1": Source(_scancel("--signal=USR1")),
        "Ctrl-C": Source(_command(signal.SIGINT), foreground=True, goes_on=True),
        "SIGTERM": Source(_command(signal.SIGTERM), foreground=True, goes_on=True),
    },
    "ray": {
        "cancel": Source(_cancel),
        "drain": Source(_drain, requeues=True),
        "Ctrl-C": Source(_command(signal.SIGINT), foreground=True, goes_on=True),
    },
}

TOGETHER = {"local": 12, "slurm": 22, "ray": 4}
"""How many programs an engine runs at once; Ray has twelve CPUs, and its workers import torch."""


@contextmanager
def started(engine: str) -> Iterator[Any]:
    """Start the test cluster of an engine; None for this machine."""
    if engine == "local":
        yield None
        return
    if engine == "slurm":
        from tests.testbed.slurm import SlurmCluster as Cluster
    else:
        from tests.testbed.ray import RayCluster as Cluster  # type: ignore[assignment]
    with Cluster() as cluster:
        os.environ.update(cluster.environment())
        yield cluster


def rows_of(engine: str, name: str, folder: Path, cluster: Any, programs: Sequence[str] = ()) -> Iterator[Row]:
    """Play one kind of stop with all programs, so many at once as the engine holds."""
    source = SOURCES[engine][name]
    nodes = ("--nodes", "2") if engine == "slurm" else ()
    programs = programs or (*SCRIPTS, *FUNCTIONS)
    each = TOGETHER[engine]
    for number in range(0, len(programs), each):
        (part := folder / str(number)).mkdir(parents=True)
        table = Table(part, engine, 6.0, *nodes, *source.options)
        yield from table.run(
            name, programs[number : number + each], source.stop(table, cluster),
            requeues=source.requeues, foreground=source.foreground, goes_on=source.goes_on,
        )  # fmt: skip
