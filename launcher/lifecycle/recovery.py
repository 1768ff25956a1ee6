"""The recovery loop: what follows from the end of an attempt, the same on every engine, and what a run leaves at its end."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle import history
from launcher.lifecycle.exit_status import ABORTS, TAIL_LINES, cause_in
from launcher.lifecycle.history import JobFate
from launcher.lifecycle.policy import (
    Action,
    Failure,
    Outcome,
    backoff_seconds,
    decide,
    describe_interruption,
    no_progress,
    unfit,
)
from launcher.lifecycle.run_dir import RunDir, tail
from launcher.request.spec import Plan, State
from training.files import read_json

STAGING = re.compile(r"\.step-([0-9]{1,18})\.staging")
"""Names of the folders of saves in progress (`training.checkpoints.store`)."""

UNFINISHED = re.compile(r"\.(value\.json|value\.pkl|[0-9]+\.json)\.[0-9a-f]+\.tmp")
"""Names of the temporary files of what ranks write: the value of the target, and errors."""


NCCL_WARNING = re.compile(r"\bNCCL WARN (.+)")
"""What NCCL logs if NCCL_DEBUG is WARN or more (src/debug.cc)."""

MOST_WARNED = 256
"""Ranks whose logs are searched for warnings of NCCL."""


class Elsewhere(StrEnum):
    """Whether and how a run goes on away from its present nodes."""

    NOW = "now"  # in this process, at its next attempt
    LATER = "later"  # the scheduler starts the job again; this process ends
    NOWHERE = "nowhere"


class Relocation(Protocol):
    """How a run can leave its nodes; what differs between the schedulers."""

    @property
    def movable(self) -> bool:
        """Whether the run can go on away from some of its nodes."""

    def spare(self, outcome: Outcome) -> bool:
        """Return whether enough nodes are available to go on without the lost and the unfit ones."""

    def fate(self) -> JobFate:
        """Return what the scheduler does with this job; empty if a person asked for the stop."""

    def start_elsewhere(self, attempt: int, hosts: tuple[str, ...]) -> Elsewhere:
        """Have the run started again away from `hosts`."""


class Engine(Relocation, Protocol):
    """What runs attempts; what else differs between the engines."""

    async def attempt(self) -> tuple[int, Outcome] | End:
        """Run the next attempt and return its number and outcome, or the end of a run that has no further attempt."""

    def exclude(self, attempt: int, hosts: tuple[str, ...]) -> None:
        """Keep the next attempts away from `hosts`."""

    async def pause(self, seconds: float) -> None:
        """Wait before the next attempt, unless a stop is requested."""

    @property
    def stopping(self) -> bool:
        """Whether a stop has been requested."""


@dataclass(frozen=True)
class End:
    """How a submission ended.

    Attributes:
        requeued: the scheduler starts the job again, so the run has no result yet.
    """

    state: State
    failure: Failure | None = None
    step: int | None = None
    requeued: bool = False


@dataclass(frozen=True)
class Again:
    """Another attempt follows: after a pause of `seconds`, away from the hosts `exclude`."""

    seconds: float = 0.0
    exclude: tuple[str, ...] = ()


class Recovery:
    """Runs attempts until the run succeeds, fails, is stopped or is requeued."""

    def __init__(self, run_dir: RunDir, plan: Plan) -> None:
        self.run_dir, self.plan = run_dir, plan
        self.started = time.monotonic()

    async def run(self, engine: Engine) -> End:
        """Repeat attempts until the end of this submission."""
        while True:
            done = await engine.attempt()
            if isinstance(done, End):
                return done
            await wait_until_writable(self.run_dir, engine)
            match self.after(engine, *done):
                case End() as end:
                    return end
                case Again(exclude=hosts) if hosts:
                    engine.exclude(done[0], hosts)
                case Again(seconds=seconds):
                    await engine.pause(seconds)

    def after(self, relocation: Relocation, attempt: int, outcome: Outcome, *, may_restart: bool = True) -> End | Again:
        """Decide what follows from `outcome`, and record it."""
        record_unfinished_saves(self.run_dir, attempt)
        past, step = history.read(self.run_dir.events(history.LINES)), outcome.step
        left = self.plan.spec.max_restarts - len(past.failed_attempts) if may_restart else 0
        action, failure = decide(outcome, left, past, relocation.movable, relocation.spare(outcome))
        match action:
            case Action.FINISH:
                return End(State.SUCCEEDED)
            case Action.FAIL:
                return End(State.FAILED, failure, step)
            case Action.STOP:
                record_interruption(self.run_dir, attempt, outcome)
                return self.stopped(relocation, attempt, step)
        assert failure is not None, "attempts are repeated after failures only"
        recorded = record_failure(self.run_dir, attempt, failure, left - 1, step)
        if action is Action.RESTART:
            return Again(backoff_seconds(past, step), tuple(outcome.unfit))
        hosts = tuple(outcome.unfit) or unfit(failure, past, step)
        # A failure that is not recorded would not be counted, and the run would be requeued without end.
        match relocation.start_elsewhere(attempt, hosts) if recorded else Elsewhere.NOWHERE:
            case Elsewhere.NOW:
                return Again(backoff_seconds(past, step))
            case Elsewhere.LATER:
                self._record_requeue(attempt, failure.kind, step, hosts)
                return End(State.STOPPED, requeued=True)
        return End(State.FAILED, failure, step)

    def stopped(self, relocation: Relocation, attempt: int, step: int | None) -> End | Again:
        """Decide what follows once the ranks have stopped on request: the end, or another attempt elsewhere."""
        fate = relocation.fate()
        if fate == "requeued":
            self._record_requeue(attempt, "scheduler", step)
            return End(State.STOPPED, requeued=True)
        if fate == "preempting":
            step = step or self.run_dir.newest_step()
            past, allowed = (
                history.read(self.run_dir.events(history.LINES)),
                self.plan.cluster.requeues_without_progress,
            )
            first = self.run_dir.first_step(attempt)
            if failure := no_progress(past, step, allowed, first):
                return End(State.STOPPED, failure, step)
            where = relocation.start_elsewhere(attempt, ())
            if where is not Elsewhere.NOWHERE:
                self._record_requeue(attempt, "preempted", step, first=first)
                return Again() if where is Elsewhere.NOW else End(State.STOPPED, requeued=True)
        return End(State.STOPPED)

    def _record_requeue(
        self, attempt: int, reason: str, step: int | None, hosts: tuple[str, ...] = (), **more: int | None
    ) -> None:
        self.run_dir.event("requeued", attempt=attempt, reason=reason, step=step, exclude=list(hosts), **more)

    def finish(self, end: End, plan: Plan | None = None) -> State:
        """Write the result of a run that has ended; `plan` is given if it ended with other ranks than it began with."""
        if end.requeued:
            return end.state
        attempt = self.run_dir.last_attempt()
        return end_run(self.run_dir, plan or self.plan, end.state, attempt, self.started, end.failure, end.step)


async def wait_until_writable(run_dir: RunDir, engine: Engine) -> None:
    """Wait, at most `Timeouts.mount`, while the run directory cannot be written.

    A request to stop ends the wait if the directory is not there: it may have been removed.
    """
    deadline = asyncio.get_running_loop().time() + TIMEOUTS.mount
    while asyncio.get_running_loop().time() < deadline:
        missing = False
        try:
            await asyncio.to_thread(run_dir.beat)  # a shared disk may take long to answer
            return
        except OSError as error:
            missing = error.errno == errno.ENOENT
        looked = asyncio.get_running_loop().time()
        await engine.pause(1.0)
        if missing and engine.stopping:
            return
        await asyncio.sleep(looked + 1.0 - asyncio.get_running_loop().time())


def record_failure(
    run_dir: RunDir, attempt: int, failure: Failure, restarts_left: int, step: int | None = None
) -> bool:
    """Write the events of a failed attempt that is followed by another; return whether they could be written."""
    fields = _failure_fields(attempt, failure, step)
    recorded = history.record_failed(run_dir, fields)
    run_dir.event("restarted", **fields, restarts_left=restarts_left)
    return recorded


def record_unfinished_saves(run_dir: RunDir, attempt: int) -> None:
    """Record each save that was in progress when the ranks ended, such as one that took longer than the grace.

    The next attempt removes what is left of it; an event is written for each attempt that finds it.
    """
    with suppress(OSError):
        for path in sorted((run_dir.path / "checkpoints").iterdir()):
            if found := STAGING.fullmatch(path.name):
                text = "interrupted: the rank was killed before the checkpoint was complete"
                run_dir.event("save-interrupted", attempt=attempt, step=int(found[1]), error=text)


def record_interruption(run_dir: RunDir, attempt: int, outcome: Outcome) -> None:
    """Write the event of what the ranks did when they were asked to stop; none if all of them agreed to stop at a step."""
    if not (outcome.interrupted or outcome.killed):
        return
    lines = tail(run_dir.log(attempt, 0), 1)
    fields = {"message": describe_interruption(outcome), "last_line": lines[0] if lines else ""}
    run_dir.event("interrupted", attempt=attempt, **fields, lost_everything=outcome.lost_everything)


def _failure_fields(attempt: int, failure: Failure, step: int | None) -> dict[str, Any]:
    fields = {"kind": failure.kind, "message": failure.message, "rank": failure.rank, "host": failure.host}
    return {"attempt": attempt, "step": step, **fields}


def end_run(
    run_dir: RunDir,
    plan: Plan,
    state: State,
    attempt: int,
    started: float,
    failure: Failure | None = None,
    step: int | None = None,
) -> State:
    """Write ``result.json`` and the last event; `started` is when this submission began, by `time.monotonic`."""
    metrics: Any = {}
    with suppress(ValueError):  # one of more than 16 MiB is left to the pickle beside it
        metrics = (read_json(run_dir.value_file) or {}) if state is State.SUCCEEDED else {}
    fields: dict[str, Any] = {
        "metrics": metrics,
        "steps": run_dir.newest_step(),  # None: the program logged none
        "world_size": plan.placement.world_size,
        "attempts": attempt,
        "seconds": round(time.monotonic() - started, 3),
        "newest": run_dir.newest_lines(),
    }
    if failed := history.read(run_dir.events(history.LINES)).saves_that_failed():
        fields["failed_saves"] = failed
    if failure is not None:
        history.record_failed(run_dir, _failure_fields(attempt, failure, step))
        rank = failure.rank if failure.rank is not None else 0
        fields["failure"] = asdict(failure) | {"log": tail(run_dir.log(attempt, rank))}
        if plan.placement.device == "cuda" and (lines := nccl_warnings(run_dir, attempt, plan.placement.world_size)):
            fields["failure"]["nccl_warnings"] = lines
    try:
        run_dir.write_result(state, **fields)
    except OSError as error:  # then the exit status is all that says it
        print(f"launch: {run_dir.result_file}: {error.strerror}: {state.value} {fields}", file=sys.stderr)
    remove_unfinished(run_dir)
    history.record_finished(run_dir, state.value, attempt=attempt)
    return state


def nccl_warnings(run_dir: RunDir, attempt: int, ranks: int) -> list[str]:
    """Return a line for each rank that logged warnings of NCCL: their number and the last one.

    The last 64 KiB of the logs of the first `MOST_WARNED` ranks are read, and a line has 300 characters at most.
    """
    found = []
    for rank in range(min(ranks, MOST_WARNED)):
        with suppress(OSError):
            lines = tail(run_dir.log(attempt, rank), 1 << 16)
            if warnings := [said[1].strip() for line in lines if (said := NCCL_WARNING.search(line))]:
                number = f"{len(warnings)} warning{'s' * (len(warnings) > 1)} of NCCL"
                found.append(f"rank {rank}: {number}, the last: {warnings[-1]}"[:300])
    return found


def remove_unfinished(run_dir: RunDir) -> None:
    """Remove the temporary files that ranks had not renamed yet when they were killed; all ranks have ended."""
    for folder in (run_dir.path, *(run_dir.path / "errors").glob("*")):
        with suppress(OSError):
            for entry in list(os.scandir(folder)):
                if UNFINISHED.fullmatch(entry.name):
                    os.unlink(entry)


def abort_causes(run_dir: RunDir, attempt: int, exits: Mapping[int, int]) -> dict[int, tuple[str, str]]:
    """Return the kind and the message of what made ranks abort, by rank, as far as their logs say it.

    `exits` are exit codes by rank; negative: ended by that signal.
    """
    found = {}
    for rank in (rank for rank, code in exits.items() if -code in ABORTS):
        try:
            cause = cause_in(tail(run_dir.log(attempt, rank), TAIL_LINES))
        except OSError:
            continue
        if cause is not None:
            found[rank] = cause
    return found
