"""Wait for runs to end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from launcher.client.run import Run, find
from launcher.client.sent.choose import ask_at_once
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import DEFAULT_FOLDER, WatchedDir
from launcher.request.spec import State


def wait(
    runs: Iterable[Run | str | Path],
    *,
    first: bool = False,
    timeout: float | None = None,
    runs_folder: str | Path = DEFAULT_FOLDER,
) -> list[Run]:
    """Wait until all `runs` have ended; return them in the order of their ends.

    Args:
        runs: runs, or their names or directories.
        first: return as soon as one or more have ended.
        timeout: the most seconds to wait (default: no limit).
        runs_folder: the folder in which a name is looked up.

    Raises:
        BadRequest: there is no such run, or its directory was removed meanwhile.
        TimeoutError: not all have ended within `timeout` seconds; with `first`, none has.
    """
    given = [run if isinstance(run, Run) else find(run, runs_folder) for run in runs]
    found = []
    for ended in ends(given, timeout):
        found += [run for run, _ in ended]
        if first:
            break
    return found


def ends(
    runs: Sequence[Run], timeout: float | None = None, on_unknown: Callable[[Run], None] = lambda _: None
) -> Iterator[list[tuple[Run, State]]]:
    """Yield the runs that have ended, with their states, whenever there are new ones; each run once.

    `on_unknown` is called once for a run whose state is UNKNOWN when it is first read. Raises as `wait` does.
    """
    pending = {run.path: Run(WatchedDir(run.path)) for run in runs}
    begun, unknown = time.monotonic(), set[Path]()
    while pending:
        looked = time.monotonic()
        ask_at_once(pending.values())
        states = {path: _state(run) for path, run in pending.items()}
        for path, state in states.items():
            if state is State.UNKNOWN and path not in unknown:
                unknown.add(path)
                on_unknown(pending[path])
        if ended := [(pending.pop(path), state) for path, state in states.items() if state.done]:
            yield ended
            continue
        now = time.monotonic()
        if timeout is not None and now - begun >= timeout:
            left = ", ".join(f"{path.name} is {state.value}" for path, state in list(states.items())[:5])
            raise TimeoutError(f"not ended after {timeout:g} s: {left}{', ...' * (len(states) > 5)}")
        pause = max(TIMEOUTS.follow, min((now - begun) / 20, TIMEOUTS.follow_silent), 20 * (now - looked))
        time.sleep(pause if timeout is None else min(pause, max(0.0, begun + timeout - now)))


def _state(run: Run) -> State:
    state = run.state()
    if state is State.UNKNOWN and not os.path.lexists(run.dir.plan_file):
        raise BadRequest(f"the run directory {run.path} is gone; its run cannot be waited for.")
    return state


SEVERITY = (State.SUCCEEDED.exit_status, State.STOPPED.exit_status, State.FAILED.exit_status)
"""Exit statuses, the best first."""


def worst(states: Iterable[State]) -> State:
    """Return the state of the run that ended worst: one that failed, else one that was stopped."""
    return max(states, key=lambda state: SEVERITY.index(state.exit_status))
