"""``launch list``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.parser import Once, add_states, command
from launcher.cli.sent.lines import started
from launcher.cli.sent.unnamed import folder_of
from launcher.errors import LaunchError
from launcher.request.spec import State

if TYPE_CHECKING:
    from launcher.client.run import Run

MOST = 20
"""Runs that are listed without ``--all``."""


def run_list(argv: Sequence[str]) -> int:
    """``launch list``."""
    parser = command("list", f"The newest come first; of more than {MOST}, the older ones are counted.", run=False)
    parser.add_argument(
        "--here", dest="this_folder", action="store_true", help="only those in the folder of runs, not in other folders"
    )
    parser.add_argument("--all", dest="every", action="store_true", help=f"more than the newest {MOST}")
    add_states(parser, list(State))
    text = "only runs that were sent in this time, or after a date: 2h, 3d, 2026-11-20, 2026-11-20T18:30"
    parser.add_argument("--since", action=Once, metavar="TIME", help=text)
    options = parser.parse_args(list(argv))
    from launcher.client.sent.choose import ask_at_once, runs

    folder = Path(options.runs) if options.this_folder else folder_of(options)
    sent_after = 0.0
    if options.since is not None:
        from launcher.config.durations import parse_moment

        sent_after = parse_moment("--since", options.since)
    found = runs(folder, states=options.states, sent_after=sent_after)
    shown = found if options.json or options.every else found[:MOST]
    ask_at_once(shown)
    if options.json:
        print(json.dumps([_listed(run, run.status) for run in found]))
        return 0
    if not found:
        such = " of these" if options.states or options.since else ""
        print(f"no runs{such} in {options.runs}" + " or elsewhere" * (folder is None))
    for run in shown:
        print(_line(run, elsewhere=folder is None))
    if more := len(found) - len(shown):
        sys.stdout.flush()
        narrow = "" if options.states or options.since else ", and --state and --since choose among them"
        print(f"launch: {more} older runs are not shown; `--all` shows them{narrow}.", file=sys.stderr)
    return 0


def _line(run: Run, elsewhere: bool) -> str:
    from launcher.client.tail import printable
    from launcher.lifecycle.run_dir import DEFAULT_FOLDER

    status = _listed(run, run.brief)
    if "error" in status:
        return f"{printable(run.name):<32} unreadable: {printable(status['error'], 1000)}"
    line = f"{run.name:<32} {status['state']:<10} {status['backend']:<6} {started(run)}  {_step(status):<12}"
    shown = "  ".join(f"{k} {v:.4f}" for k, v in status["evaluation"].items() if isinstance(v, float))
    folder = f"  in {run.path.parent}" if elsewhere and run.path.parent != DEFAULT_FOLDER.resolve() else ""
    return printable(f"{line} {shown}".rstrip() + folder, 1000)


def _step(status: Mapping[str, Any]) -> str:
    progress = status["progress"]
    return f"{progress.get('step')}/{progress['total_steps']}"[:40] if "total_steps" in progress else ""


def _listed(run: Run, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` finds; a run that cannot be read does not hide the others."""
    try:
        return read()
    except LaunchError as error:
        return {"name": run.name, "state": State.UNKNOWN.value, "error": str(error)}
