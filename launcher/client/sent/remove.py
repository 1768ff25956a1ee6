"""Remove runs that have ended, one by one or by their age."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.client.run import Run, find
from launcher.client.sent.choose import in_states
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.records import removal
from launcher.lifecycle.run_dir import DEFAULT_FOLDER, acting, reading
from launcher.request.spec import State

ENDED = tuple(state for state in State if state.done)


@dataclass(frozen=True)
class Removable:
    """A run that may be removed: its state, and the bytes of disk space that become free."""

    run: Run
    state: State
    bytes: int


def remove(run: Run | str | Path, *, runs_folder: str | Path = DEFAULT_FOLDER) -> None:
    """Remove the directory of a run that has ended, with its checkpoints; nothing to which a link in it leads.

    Args:
        run: a run, or its name or directory.
        runs_folder: the folder in which a name is looked up.

    Raises:
        BadRequest: see `removable`; or a part of the directory cannot be removed.
    """
    found = run if isinstance(run, Run) else find(run, runs_folder)
    removable(found)
    with acting(found.path):
        removal.remove(found.path)
        removal.remove_remains(found.path.parent)


def removable(run: Run) -> Removable:
    """Return what the removal of a run frees. Changes nothing.

    Raises:
        BadRequest: the run has not ended, or its supervisor is alive; its directory belongs to another user or can be changed by others; something is
            mounted in it; or it holds the working directory or the user's home.
    """
    with reading(run.path):
        run.dir.check_own()
        state = run.state()
        if not state.done:
            raise BadRequest(f"run {run.name!r} is {state.value}; `launch cancel {run.name}` ends it first.")
        age = run.dir.heartbeat_age()
        if state is State.LOST and age is not None and abs(age) < TIMEOUTS.run_heartbeat_age:
            raise BadRequest(
                f"run {run.name!r} is lost by what its engine says here, but its supervisor was alive {age:.0f} s ago. Look at it"
                " from the machine that sent it."
            )
        for place in _own_places():
            if place.is_relative_to(run.path):
                raise BadRequest(f"{run.path} is not removed: {place} is in it. Change to another folder first.")
        return Removable(run, state, removal.disk_bytes(run.path))


def _own_places() -> list[Path]:
    found = []
    for place in (".", os.path.expanduser("~")):
        with suppress(OSError):  # the working directory is gone
            found.append(Path(place).resolve(strict=True))
    return found


def old(
    found: Sequence[Run], ended_before: float | None, states: Collection[State] = ENDED, keep: int = 0
) -> tuple[list[Removable], list[BadRequest]]:
    """Return the runs that `launch prune` removes, and why others are left that are as old.

    Args:
        found: runs, the newest first.
        ended_before: only runs to which nothing has happened after this time, in seconds since 1970; None: of any age.
        states: only runs that ended in one of these.
        keep: how many of the newest of `found` are left in any case.
    """
    chosen, refused = [], []
    for run, _ in in_states(found[keep:], states):
        if ended_before is None or last_change(run) < ended_before:
            try:
                chosen.append(removable(run))
            except BadRequest as error:
                refused.append(error)
    return chosen, refused


def last_change(run: Run) -> float:
    """Return when something last happened to a run, in seconds since 1970."""
    times = [0.0]
    for file in (run.dir.result_file, run.dir.events_file, run.dir.heartbeat_file, run.dir.plan_file):
        with suppress(OSError):
            times.append(file.lstat().st_mtime)
    return max(times)
