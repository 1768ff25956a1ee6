"""``launch debug`` and ``launch profile``: a debugger and a profiler in ranks of a running run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.cli.parser import Once, command, ranks_of, whole
from launcher.errors import BadRequest


def run_debug(argv: Sequence[str]) -> int:
    """``launch debug RUN``."""
    parser = command(
        "debug",
        "It is Python's pdb: `w` shows the stack, `p x` a value, `c` goes on, `q` leaves and lets the rank go on.",
    )
    parser.add_argument("--rank", action=Once, type=whole, default=0, metavar="R", help="this rank (default: 0)")
    options = parser.parse_args(list(argv))
    if options.json:
        raise BadRequest(
            "launch debug --json: a debugger is for a person; `launch stacks --json` shows where ranks are."
        )
    from launcher.client.inside.debug import debug
    from launcher.client.inside.target import inside
    from launcher.client.run import find

    debug(inside(find(options.run, Path(options.runs))), options.rank)
    return 0


def run_profile(argv: Sequence[str]) -> int:
    """``launch profile RUN``."""
    parser = command("profile", "It leaves a Chrome trace in the run directory and prints the costliest operations.")
    parser.add_argument("--ranks", action=Once, default="0", metavar="R,R", help="these ranks, or all (default: 0)")
    parser.add_argument("--steps", action=Once, type=whole, default=5, metavar="N", help="steps (default: 5)")
    parser.add_argument(
        "--seconds", action=Once, type=float, default=5.0, metavar="S", help="for a program without steps (default: 5)"
    )
    options = parser.parse_args(list(argv))
    from launcher.client.inside.profile import profile
    from launcher.client.inside.target import inside
    from launcher.client.run import find
    from launcher.client.tail import printable

    run = find(options.run, Path(options.runs))
    ranks = ranks_of(options.ranks, "--ranks")
    found = profile(run, range(inside(run).world_size) if ranks is None else ranks, options.steps, options.seconds)
    if options.json:
        print(json.dumps(found))
    else:
        for each in found:
            if "error" in each:
                print(f"launch: rank {each['rank']}: {printable(each['error'], 1000)}", file=sys.stderr)
                continue
            for line in str(each["table"]).splitlines():
                print(printable(line, 1000))
            print(f"rank {each['rank']}: {printable(each['trace'])} (open it in https://ui.perfetto.dev)")
    return 1 if any("error" in each for each in found) else 0
