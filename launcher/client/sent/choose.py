"""Choose among the user's runs: by folder, state and time; those that can be resumed, and what names one in a command."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from launcher import backends
from launcher.client.run import Run, polled_states, submitted_at
from launcher.errors import BadRequest, LaunchError, nearest
from launcher.lifecycle import run_dir
from launcher.lifecycle.records import registry
from launcher.lifecycle.run_dir import DEFAULT_FOLDER, RunDir, reading
from launcher.request.spec import State, as_path


def runs(
    folder: str | Path | None = DEFAULT_FOLDER, *, states: Iterable[State | str] = (), sent_after: float = 0.0
) -> list[Run]:
    """Return the runs in `folder`, newest first.

    Args:
        folder: None for the default folder and all others to which the user has sent a run.
        states: only runs in one of these, such as ``["failed", "stopped"]``.
        sent_after: only runs that were sent after this time, in seconds since 1970.

    Raises:
        BadRequest: the folder cannot be read, or there is no such state.
    """
    asked = states_called(states)
    found = _everywhere() if folder is None else run_dir.all_runs(as_path("folder", folder))
    chosen = [Run(run) for run in found if not sent_after or registry.sent_at(run.path) > sent_after]
    return [run for run, _ in in_states(chosen, asked)] if asked else chosen


def _everywhere() -> list[RunDir]:
    """The runs in the default folder, and the user's in all others, newest first."""
    own = list(run_dir.all_runs(DEFAULT_FOLDER))
    parents: dict[Path, str] = {}

    def place(path: Path) -> str:
        if path.is_symlink():
            return os.path.realpath(path)
        if path.parent not in parents:
            parents[path.parent] = os.path.realpath(path.parent)
        return f"{parents[path.parent]}/{path.name}"

    known = {place(run.path) for run in own}
    others = [RunDir(path) for path in registry.known() if place(path) not in known]
    return sorted((*own, *others), key=lambda run: registry.sent_at(run.path), reverse=True) if others else own


def states_called(names: Iterable[State | str], allowed: Collection[State] = tuple(State)) -> tuple[State, ...]:
    """Return the states with these names, of which each may be several with commas.

    Raises:
        BadRequest: one is no state, or none that is allowed.
    """
    words = [names] if isinstance(names, str) else names
    spelled = [word.strip() for text in words for word in str(text).split(",")]
    for word in spelled:
        if word not in allowed:
            known = [state.value for state in allowed]
            raise BadRequest(f"--state {word!r}: no such state{nearest(word, known)}. Allowed: {', '.join(known)}.")
    return tuple(dict.fromkeys(State(word) for word in spelled))


def in_states(found: Sequence[Run], states: Collection[State]) -> list[tuple[Run, State]]:
    """Return the runs that are in one of `states`, each with its state; one that cannot be read is UNKNOWN."""
    ask_at_once(found)
    return [(run, state) for run in found if (state := readable_state(run)) in states]


def readable_state(run: Run) -> State:
    """Return the state of a run; UNKNOWN also if it cannot be read."""
    try:
        return run.state()
    except LaunchError:
        return State.UNKNOWN


def ask_at_once(found: Iterable[Run]) -> None:
    """Ask each scheduler once for the jobs of all runs without a result, so that their `state` needs no question."""
    jobs: dict[str, dict[str, float]] = {}
    for run in found:
        with suppress(BadRequest), reading(run.path):
            if not os.path.lexists(run.dir.result_file) and (job := run.job()) is not None:
                jobs.setdefault(job["backend"], {})[job["job_id"]] = submitted_at(job)
    for backend, ids in jobs.items():
        if backends.get(backend).capabilities.poll_seconds:
            polled_states(backend, ids)


def newest(folder: Path | None) -> Run:
    """Return the newest run in `folder`, or of all (None).

    Raises:
        BadRequest: there is none.
    """
    found = runs(folder)
    if found:
        return found[0]
    where = "in this folder or elsewhere" if folder is None else f"in {folder.resolve()}"
    raise BadRequest(f"there is no run {where} yet. `launch TARGET` sends one.")


def resumable(found: Sequence[Run]) -> list[tuple[Run, State]]:
    """Return this user's runs that `resume` can bring further: stopped, lost, or failed by no fault of their program."""
    from launcher.lifecycle.policy import RULES

    own = [run for run in found if _is_own(run)]
    ended = in_states(own, (State.STOPPED, State.LOST, State.FAILED))
    return [
        (run, state)
        for run, state in ended
        if state is not State.FAILED or ((rule := RULES.get(failure_kind(run))) and rule.resumable)
    ]


def _is_own(run: Run) -> bool:
    with suppress(OSError):
        return run.path.stat().st_uid == os.geteuid()
    return False


def failure_kind(run: Run) -> str:
    """Return the kind of failure that ended a run; empty if there is none, or if it cannot be read."""
    with suppress(LaunchError, OSError):
        return str(((run.dir.result() or {}).get("failure") or {}).get("kind", ""))
    return ""


def words_for(chosen: Iterable[Run], known: Iterable[Run]) -> dict[Path, str]:
    """Return what names each run in a command that is typed in the working directory: its name, or its path.

    `known` are all runs that a name may stand for.
    """
    count = Counter(run.name for run in known)
    default = DEFAULT_FOLDER.resolve()

    def word(run: Run) -> str:
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run.name) is not None
        alone = count[run.name] == 1 and not os.path.lexists(Path(run.name, "plan.json"))
        return run.name if plain and (run.path.parent == default or alone) else shlex.quote(str(run.path))

    return {run.path: word(run) for run in chosen}
