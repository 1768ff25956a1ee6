"""What whoever brings a run to its end leaves behind: the events of a failure, the result, and the patience to write them."""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from launcher.policy import Failure
from launcher.rundir import RunDir, tail
from launcher.spec import Plan, State
from training.files import read_json

MOUNT_SECONDS = 120.0
"""How long a run directory that takes nothing is waited for between two attempts: a mount that was lost may come back."""


async def until_writable(run_dir: RunDir) -> None:
    """Wait, for a bounded time, while the run directory cannot be written."""
    deadline = asyncio.get_running_loop().time() + MOUNT_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        with suppress(OSError):
            await asyncio.to_thread(run_dir.beat)  # a shared disk may take long to answer
            return
        await asyncio.sleep(1.0)


def note_failure(
    run_dir: RunDir, attempt: int, failure: Failure | None, restarts_left: int, step: int | None = None
) -> bool:
    """Leave the events of an attempt that failed, after `step`, and is followed by another; says whether that worked."""
    assert failure is not None, "only a failure is worth a restart"
    told = _told(attempt, failure, step)
    noted = run_dir.event("failed", **told)
    run_dir.event("restarted", **told, restarts_left=restarts_left)
    return noted


def _told(attempt: int, failure: Failure, step: int | None) -> dict[str, Any]:
    told = {"kind": failure.kind, "message": failure.message, "rank": failure.rank, "host": failure.host}
    return {"attempt": attempt, "step": step, **told}


def end_run(
    run_dir: RunDir,
    plan: Plan,
    state: State,
    attempt: int,
    started: float,
    failure: Failure | None = None,
    step: int | None = None,
) -> State:
    """Leave ``result.json`` and the last event; `started` is when this submission began, by `time.monotonic`."""
    metrics: Any = {}
    with suppress(ValueError):  # one of more than 16 MiB is left to the pickle beside it
        metrics = (read_json(run_dir.value_file) or {}) if state is State.SUCCEEDED else {}
    fields: dict[str, Any] = {
        "metrics": metrics,
        "steps": run_dir.newest_step() or 0,
        "world_size": plan.placement.world_size,
        "attempts": attempt,
        "seconds": round(time.monotonic() - started, 3),
    }
    if failure is not None:
        run_dir.event("failed", **_told(attempt, failure, step))
        rank = failure.rank if failure.rank is not None else 0
        fields["failure"] = asdict(failure) | {"log": tail(run_dir.log(attempt, rank))}
    try:
        run_dir.write_result(state, **fields)
    except OSError as error:  # then the exit status has to say it all
        print(f"launch: {run_dir.result_file}: {error.strerror}: {state.value} {fields}", file=sys.stderr)
    run_dir.event("finished", attempt=attempt, state=state.value)
    return state
