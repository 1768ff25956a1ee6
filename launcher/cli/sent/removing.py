"""``launch rm`` and ``launch prune``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.parser import Once, Parser, add_states, command, whole
from launcher.cli.sent.lines import asked, at_terminal, in_bytes, started
from launcher.cli.sent.unnamed import folder_of
from launcher.errors import BadRequest, LaunchError
from launcher.request.spec import State

if TYPE_CHECKING:
    from launcher.client.sent.remove import Removable

ENDED = [state for state in State if state.done]
LINKED = "Data that is linked from the code of a run stays."


def run_rm(argv: Sequence[str]) -> int:
    """``launch rm RUN...``."""
    parser = command("rm", LINKED, nargs="+")
    _add_consent(parser)
    options = parser.parse_args(list(argv))
    from launcher.client.run import find
    from launcher.client.sent.remove import removable

    found = {run.path: run for run in (find(name, Path(options.runs)) for name in options.run)}
    return _remove([removable(run) for run in found.values()], options)


def run_prune(argv: Sequence[str]) -> int:
    """``launch prune --older DURATION``."""
    parser = command("prune", f"They are listed first. {LINKED}", run=False)
    text = "only runs to which nothing has happened for so long, or after a date: 30d, 12h, 2026-11-20"
    parser.add_argument("--older", action=Once, metavar="TIME", help=text)
    text = "leave the newest N runs in any case; without --older, remove all others that have ended"
    parser.add_argument("--keep", action=Once, type=whole, metavar="N", help=text)
    add_states(parser, ENDED)
    parser.add_argument(
        "--here", dest="this_folder", action="store_true", help="only those in the folder of runs, not in other folders"
    )
    _add_consent(parser)
    options = parser.parse_args(list(argv))
    from launcher.client.sent.choose import runs, states_called
    from launcher.client.sent.remove import old
    from launcher.config.durations import parse_moment

    if options.older is None and options.keep is None:
        raise BadRequest(
            "prune: which runs? --older 30d: those that ended 30 days ago; --keep 20: all but the newest 20."
        )
    if options.keep is not None and options.keep < 0:
        raise BadRequest(f"--keep {options.keep}: 0 or more is needed.")
    states = states_called(options.states, ENDED) or ENDED
    before = None if options.older is None else parse_moment("--older", options.older)
    known = runs(Path(options.runs) if options.this_folder else folder_of(options))
    found, refused = old(known, before, states, options.keep or 0)
    for error in refused:
        print(f"launch: left: {_printable(str(error))}", file=sys.stderr)
    return _remove(found, options)


def _add_consent(parser: Parser) -> None:
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="show what would be removed, and remove nothing")


def _remove(found: Sequence[Removable], options: argparse.Namespace) -> int:
    """Remove runs, after the question whether to; return the exit status."""
    if not found and not options.json:
        print("no runs to remove")
    if not found or options.dry_run:
        _report(found, [], options)
        return 0
    if not options.yes:
        if not at_terminal(options):
            raise BadRequest(
                "nothing was removed: there is no terminal to ask on. --dry-run shows the runs, --yes removes them."
            )
        _report(found, [], options)
        if asked("Remove them? [y/N] " if len(found) > 1 else "Remove it? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return State.STOPPED.exit_status
    return _removed(found, options)


def _removed(found: Sequence[Removable], options: argparse.Namespace) -> int:
    from launcher.client.sent.remove import remove

    gone: list[Removable] = []
    try:
        for each in found:
            remove(each.run)
            gone.append(each)
            if not options.json:
                print(_printable(f"removed {each.run.name}, {in_bytes(each.bytes)}"), flush=True)
    except LaunchError as error:
        left = f" {len(gone)} of {len(found)} runs were removed." if len(found) > 1 else ""
        raise BadRequest(f"{error}{left}") from None
    if options.json:
        _report(found, gone, options)
    elif len(gone) > 1:
        print(f"{len(gone)} runs, {in_bytes(sum(each.bytes for each in gone))}")
    return 0


def _report(found: Sequence[Removable], gone: Sequence[Removable], options: argparse.Namespace) -> None:
    """Print what is to be removed, or as JSON also what was."""
    if options.json:
        fields = [
            {
                "name": each.run.name,
                "state": each.state.value,
                "run_dir": str(each.run.path),
                "bytes": each.bytes,
                "removed": each in gone,
            }
            for each in found
        ]
        print(json.dumps(fields))
        return
    for each in found:
        size = in_bytes(each.bytes)
        print(
            _printable(
                f"{each.run.name:<32} {each.state.value:<10} {started(each.run)} {size:>9}  {each.run.path.parent}"
            )
        )
    if len(found) > 1:
        print(f"{len(found)} runs, {in_bytes(sum(each.bytes for each in found))}")


def _printable(text: str) -> str:
    from launcher.client.tail import printable

    return printable(text, 1000)
