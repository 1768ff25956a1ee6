"""``launch wait`` and ``launch cancel``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.parser import Once, command
from launcher.cli.sent.unnamed import refuse_cancel

if TYPE_CHECKING:
    from launcher.client.run import Run
    from launcher.request.spec import State

TIMED_OUT = 124
"""Exit status of ``launch wait`` after ``--timeout``, as of timeout(1)."""

INTERRUPTED = 130
"""Exit status of ``launch wait`` after Ctrl-C, as shells report SIGINT."""


def run_wait(argv: Sequence[str]) -> int:
    """``launch wait RUN...``."""
    about = (
        "The exit status is that of the run that ended worst: 1 if one failed, else 3 if one was stopped, else 0;"
        f" {TIMED_OUT} after --timeout, {INTERRUPTED} after Ctrl-C, which ends the waiting only."
    )
    parser = command("wait", about, nargs="+")
    parser.add_argument("--any", dest="first", action="store_true", help="until one has ended (default: all)")
    parser.add_argument(
        "--timeout", action=Once, metavar="DURATION", help="wait no longer than 90s, 30m, 2h, ... (default: no limit)"
    )
    options = parser.parse_args(list(argv))
    from launcher.client.run import find
    from launcher.client.sent.waiting import ends, worst
    from launcher.client.tail import printable
    from launcher.config.durations import parse_seconds

    timeout = None if options.timeout is None else parse_seconds("--timeout", options.timeout)
    found = {run.path: run for run in (find(name, Path(options.runs)) for name in options.run)}
    done: dict[Path, State] = {}
    status = None

    def on_unknown(run: Run) -> None:
        text = "its cluster does not answer, or its submission was interrupted"
        print(f"launch: the state of {printable(run.name)} is unknown: {text}; waiting", file=sys.stderr)

    try:
        for ended in ends(list(found.values()), timeout, on_unknown):
            done |= {run.path: state for run, state in ended}
            if not options.json:
                for run, state in ended:
                    print(printable(f"{run.name}: {state.value}{_why(run)}"), flush=True)
            if options.first:
                break
    except TimeoutError as error:
        print(printable(f"launch: {error}"), file=sys.stderr)
        status = TIMED_OUT
    except KeyboardInterrupt:
        going = ", ".join(run.name for path, run in found.items() if path not in done)
        print(printable(f"\nlaunch: no longer waiting; not ended: {going}"), file=sys.stderr)
        status = INTERRUPTED
    if options.json:
        print(json.dumps(_states(found, done)))
    return worst(done.values()).exit_status if status is None else status


def _why(run: Run) -> str:
    from launcher.client.sent.choose import failure_kind

    kind = failure_kind(run)
    return f" ({kind})" if kind else ""


def _states(found: Mapping[Path, Run], done: Mapping[Path, State]) -> list[dict[str, object]]:
    from launcher.client.sent.choose import readable_state

    return [
        {"name": run.name, "state": state.value, "run_dir": str(path), "done": state.done}
        for path, run in found.items()
        for state in [done.get(path) or readable_state(run)]
    ]


def run_cancel(argv: Sequence[str]) -> int:
    """``launch cancel RUN``."""
    about = "It ends by itself within the cluster's grace, or is killed."
    parser = command("cancel", about, nargs="?", left_out="shows those that can be cancelled")
    parser.add_argument("--now", action="store_true", help="kill it without a checkpoint")
    options = parser.parse_args(list(argv))
    if options.run is None:
        raise refuse_cancel(options)
    from launcher.client.run import find
    from launcher.client.tail import printable

    run = find(options.run, Path(options.runs))
    state = run.kill() if options.now else run.cancel()
    text = json.dumps({"name": run.name, "state": state.value}) if options.json else f"{run.name}: {state.value}"
    print(printable(text))
    return 0
