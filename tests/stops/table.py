"""One row of the table for each program: it is run, stopped, and run again until it has ended."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.client.run import Run
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import State
from tests.launcher.engines import Project, make_project, until

PROGRAMS = Path(__file__).parent / "programs"

SCRIPTS = (
    *("no handler", "0", "1", "130", "143", "raises", "interrupts", "hard exit 1", "ignores"),
    *("one ended", "one ended, no handler", "one saves", "finished"),
)
"""What a script does at SIGTERM; a number: it saves and exits with this status."""

FUNCTIONS = (
    *("function, saves", "function, saves nothing", "function, exits 0", "function, exits 143", "function, raises"),
    *("function, never asks", "function, silent", "function, one ended", "script with a Context"),
)
"""What a program with a Context does when `ctx.should_stop` is true."""

UNHANDLED = {"no handler", "ignores", "one ended, no handler"}
"""Scripts that keep nothing."""

VAIN = UNHANDLED | {"function, saves nothing", "function, never asks", "function, silent", "function, one ended"}
"""Programs that begin again at step 1."""

STEPS = 60
"""Steps that a program has done when it is stopped."""

SECONDS = 120.0
"""Limit of each wait; a cluster that a dozen programs start on at once is slow."""


@dataclass(frozen=True)
class Source:
    """One kind of stop.

    Attributes:
        stop: stops the programs of a table.
        requeues: a scheduler starts the programs again.
        unasked: the stop comes by itself, and may be there before the program has done its steps.
        foreground: each program has a command that follows it.
        goes_on: the stop concerns the command alone.
        ends: what each program is called then, if not what `expected` returns.
        options: of `launch`.
    """

    name: str
    stop: Callable[[Table, Sequence[Row]], None]
    requeues: bool = False
    unasked: bool = False
    foreground: bool = False
    goes_on: bool = False
    ends: str = ""
    options: tuple[str, ...] = ()


@dataclass
class Row:
    """What became of one program.

    Attributes:
        stops: how often it was stopped.
        called: what the run was called after each stop: a state with the kind of failure, or ``requeued``.
        printed: what the command printed that followed it.
        end: the state after a resume, which lets the program finish.
    """

    source: Source
    program: str
    run: Run
    folder: Path
    command: subprocess.Popen[str] | None = None
    stops: int = 0
    called: list[str] = field(default_factory=list)
    printed: str = ""
    end: str = ""

    # ---- what the program wrote

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that run until the stop."""
        return (1,) if "one ended" in self.program else (0, 1)

    def number(self, rank: int, kind: str) -> int:
        file = self.folder / f"{rank}.{kind}"
        return int(file.read_text() or 0) if file.exists() else 0

    def lines(self, rank: int, kind: str) -> list[str]:
        file = self.folder / f"{rank}.{kind}"
        return file.read_text().split() if file.exists() else []

    @property
    def starts(self) -> int:
        return min(len(self.lines(rank, "first")) for rank in self.ranks)

    def running(self) -> bool:
        """Whether the program has started once more than it was stopped, and has done some steps since."""
        if self.source.unasked and (self.run.state().done or len(self.events("requeued")) > self.stops):
            return True
        if self.starts <= self.stops:
            assert not self.run.dir.result(), f"{self.program} ended before its stop: {self.run.explain()}"
            return False
        return all(self.number(rank, "step") >= int(self.lines(rank, "first")[-1]) + STEPS for rank in self.ranks)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.dir.events() if event["event"] == kind]

    def settled(self) -> bool:
        """Whether the run has ended, or is requeued or restarted once for each stop."""
        kind = "restarted" if self.source.ends == "restarted" else "requeued"
        return self.run.state().done or len(self.events(kind)) >= self.stops

    # ---- the table

    def outcome(self) -> str:
        """State of the run and, if it ended with a failure, its kind."""
        failure = (self.run.dir.result() or {}).get("failure")
        return self.run.state().value + (f", {failure['kind']}" if failure else "")

    def did(self) -> str:
        signals = "/".join(str(len(self.lines(rank, "handled"))) for rank in (0, 1))
        kept = max(self.number(rank, "saved") for rank in (0, 1))
        return (f"SIGTERM {signals}; " if signals != "0/0" else "") + (f"saved at {kept}" if kept else "saved nothing")

    def text(self) -> str:
        """The row as a line of the table."""
        firsts = " ".join(self.lines(self.ranks[0], "first"))
        return f"{self.source.name:<26} {self.program:<24} {self.did():<28} {', '.join(self.called):<44} {firsts:<12} {self.end}"

    def problems(self) -> list[str]:
        """What must not be so, whatever the engine."""
        found = []
        if any(call.startswith("succeeded") for call in self.called) and self.program != "finished":
            found.append("half done, and called succeeded")
        if self.stops > 3:
            found.append("requeued without end")
        if self.called[-1] != (wanted := expected(self.program, self.source)):
            found.append(f"called {self.called[-1]}, not {wanted}")
        if self.program not in VAIN:
            for rank in self.ranks:
                received = len(self.lines(rank, "handled"))
                if received > self.stops:
                    found.append(f"rank {rank} received SIGTERM {received} times for {self.stops} stops")
                kept, (first, *again) = self.number(rank, "saved"), self.lines(rank, "first") or ["1"]
                if (kept and again and int(again[0]) not in (kept + 1, 1)) or first != "1":
                    found.append(f"rank {rank} began at {first} {again}, and had saved {kept}")
        if self.end not in ("", "succeeded"):
            found.append(f"resumed and allowed to finish, it ended as {self.end}: {self.run.explain()}")
        return found


HEADER = f"{'stop':<26} {'program':<24} {'what it did':<28} {'what the run was called':<44} {'began at':<12} resumed to"


class Table:
    """Runs programs together on one engine, in one folder, each with a stop of its own."""

    def __init__(self, folder: Path, engine: str, cluster: Any = None, grace: float = 6.0) -> None:
        self.project: Project = make_project(folder, engine, PROGRAMS)
        self.cluster = cluster
        nodes = ("--nodes", "2") if engine == "slurm" else ()
        self.options = ("--cluster", "./stops.toml", "--cpus", "2", *nodes)
        (folder / "stops.toml").write_text(f'extends = "{engine}"\ngrace = {grace}\n')

    def run(self, plays: Sequence[tuple[Source, str]]) -> list[Row]:
        """Start all programs, stop each by its source, and follow each to its end."""
        rows = [self.start(source, program) for source, program in plays]
        going = rows
        while going:
            until(lambda: all(row.running() for row in going), lambda: self.waiting(going), SECONDS)  # noqa: B023
            for row in going:
                row.stops += 1
            for source in dict.fromkeys(row.source for row in going):
                source.stop(self, [row for row in going if row.source is source])
            for row in going:
                self.settle(row)
            going = [row for row in going if row.called[-1] == "requeued"]
        for row in rows:
            self.finish(row)
        return rows

    def start(self, source: Source, program: str) -> Row:
        """Send one program."""
        name = re.sub("[^A-Za-z0-9]+", "-", f"{source.name} {program}")
        path = self.project.folder / "runs" / name
        row = Row(source, program, Run(RunDir(path)), self.project.folder / f"of-{name}")
        options = (*self.options, *source.options, "--name", name, *([] if source.foreground else ["--detach"]))
        if program.startswith("function"):
            target = ["stopped_function:main", "--way", program, "--folder", row.folder.name]
        else:
            script = "stopped_function.py" if "Context" in program else "stopped_script.py"
            target = [script, program, row.folder.name]
        if source.foreground:
            row.command = self.project.start(*options, *target)
        else:
            self.project.call(*options, *target)
        return row

    def waiting(self, rows: Sequence[Row]) -> str:
        """The programs that do not run yet."""
        return f"steps of {[(row.source.name, row.program, row.outcome()) for row in rows if not row.running()]}"

    def settle(self, row: Row) -> None:
        """Wait until the run has ended or is requeued; let a program that kept its steps finish."""
        if row.command is not None:
            row.printed = "".join(row.command.communicate(timeout=SECONDS))
        if row.source.ends == "restarted":
            until(row.settled, f"the restart of {row.program}", SECONDS)
            row.called.append("restarted" if row.events("restarted") else row.outcome())
            return
        if row.source.goes_on:
            before = row.number(1, "step")
            until(lambda: row.number(1, "step") > before + STEPS, f"steps of {row.program}", SECONDS)
            row.called.append(row.run.state().value)
            return
        until(row.settled, f"the end of {row.program}", SECONDS)
        requeued = len(row.events("requeued")) >= row.stops
        row.called.append("requeued" if requeued else row.outcome())
        if requeued and row.program not in VAIN:
            (row.folder / "enough").touch()
            until(lambda: row.run.state().done, f"the end of {row.program}", SECONDS)
            row.called.append(row.outcome().replace("succeeded", "then succeeded"))

    def finish(self, row: Row) -> None:
        """Let the program finish; resume its run first if it has stopped."""
        (row.folder / "enough").touch()
        if row.run.state() in (State.STOPPED, State.FAILED, State.LOST):
            self.project.call("resume", row.run.name, "--detach", status=None)
        until(lambda: row.run.state().done, f"the end of {row.program}", SECONDS)
        row.end = row.run.state().value


def expected(program: str, source: Source) -> str:
    """What a run is called after its last stop."""
    if source.goes_on or source.ends:
        return source.ends or "running"
    if program == "finished":
        return "succeeded"
    if program == "function, raises":
        return "failed, user error"
    if not source.requeues:
        return "stopped"
    return "stopped, no progress" if program in VAIN else "then succeeded"
