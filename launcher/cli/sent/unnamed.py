"""Commands without a run: which one is meant, or which ones may be."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.sent.lines import asked, at_terminal, started
from launcher.errors import BadRequest
from launcher.request.spec import State

if TYPE_CHECKING:
    from launcher.client.run import Run

MOST = 10
"""Runs that a message lists."""


def folder_of(options: argparse.Namespace) -> Path | None:
    """Return the folder of ``--runs``; None, all of the user's, if another than the default one is not given."""
    from launcher.lifecycle.run_dir import DEFAULT_FOLDER

    folder = Path(options.runs)
    return None if folder == DEFAULT_FOLDER else folder


def named_or_newest(options: argparse.Namespace) -> Run:
    """Return the run that is named; without a name the newest.

    Raises:
        BadRequest: there is none.
    """
    from launcher.client.run import find
    from launcher.client.sent.choose import newest

    return newest(folder_of(options)) if options.run is None else find(options.run, Path(options.runs))


def refuse_cancel(options: argparse.Namespace) -> BadRequest:
    """Return the error for ``launch cancel`` without a run, which lists those that can be cancelled."""
    from launcher.client.sent.choose import in_states, runs

    known = runs(folder_of(options))
    going = in_states(known, (State.QUEUED, State.RUNNING))
    if not going:
        return BadRequest("cancel: no run is queued or running.")
    words = ["cancel", *["--now"] * options.now]
    return BadRequest(f"cancel: name the run. These are queued or running:\n{_listed(words, going, known)}")


def choose_resumed(options: argparse.Namespace, argv: Sequence[str]) -> str | Path:
    """Return the run that the user chooses on the terminal for ``launch resume ARGV``.

    Raises:
        BadRequest: there is none, or none is chosen; with the command for each run that can be resumed.
    """
    from launcher.client.sent.choose import resumable, runs

    known = runs(folder_of(options))
    found = resumable(known)
    if not found:
        raise BadRequest(
            "resume: no run was stopped, was lost, or failed by no fault of its program. `launch list --state failed` shows"
            " the other failures; each can be resumed by its name."
        )
    text = f"resume: name the run. These can be resumed:\n{_listed(['resume', *argv], found, known)}"
    if not at_terminal(options):
        raise BadRequest(text)
    shown = found[:MOST]
    print(f"launch: {text}", file=sys.stderr)
    one = f"Resume {shown[0][0].name}? [y/N] "
    answer = asked(one if len(shown) == 1 else f"Resume which one? [1-{len(shown)}, or nothing] ").strip()
    if len(shown) == 1:
        answer = "1" if answer.lower() in ("y", "yes") else ""
    if not answer:
        raise BadRequest("resume: nothing was resumed.")
    numbered = {str(number): run.path for number, (run, _) in enumerate(shown, 1)}
    return numbered.get(answer, answer)


def _listed(words: Sequence[str], found: Sequence[tuple[Run, State]], known: Sequence[Run]) -> str:
    """A line for each run with the command for it, and how many more there are."""
    from launcher.client.sent.choose import words_for
    from launcher.client.tail import printable

    shown = found[:MOST]
    names = words_for((run for run, _ in shown), known)
    commands = [f"launch {words[0]} {names[run.path]} {shlex.join(words[1:])}".rstrip() for run, _ in shown]
    width = min(80, max(map(len, commands)))
    lines = [
        f"  {command:<{width}}  {state.value:<8} {started(run)}".rstrip()
        for command, (run, state) in zip(commands, shown, strict=True)
    ]
    more = len(found) - len(shown)
    return printable("\n".join([*lines, *[f"  and {more} more; `launch list` shows them"] * (more > 0)]))
