"""``launch exec``, ``launch shell`` and ``launch code``: work on the nodes of a running run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli.parser import Once, Parser, command, whole
from launcher.errors import BadRequest

if TYPE_CHECKING:
    from launcher.client.inside.commands import Ended, Kept
    from launcher.client.inside.target import Target


def _add_place(parser: Parser) -> argparse._MutuallyExclusiveGroup:
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--rank", action=Once, type=whole, metavar="R", help="as this rank (default: 0)")
    place.add_argument("--node", action=Once, metavar="N", help="on this node, by its number or host, as no rank")
    return place


def _target(options: argparse.Namespace) -> Target:
    from launcher.client.inside.target import inside
    from launcher.client.run import find

    target = inside(find(options.run, Path(options.runs)))
    if options.node is not None:
        return target.of_node(options.node)
    return target.of_rank(options.rank or 0)


def run_exec(argv: Sequence[str]) -> int:
    """``launch exec RUN -- COMMAND``."""
    more = "Its exit status is that of the command, the highest of several nodes; 255: a node did not answer."
    parser = command("exec", more)
    place = _add_place(parser)
    place.add_argument("--all", action="store_true", help="once on every node")
    # "+", since argparse would give "*" what precedes the options, which is nothing.
    parser.add_argument("program", nargs="+", metavar="COMMAND", help="the command and its arguments, after --")
    parser.usage = "launch exec RUN [OPTIONS] -- COMMAND [ARGS]..."
    options = parser.parse_args(list(argv))
    from launcher.agent.inside.line import OUTPUT
    from launcher.client.inside.commands import Kept, Printed, execute
    from launcher.client.tail import printable, safe_line

    target = _target(options).everywhere() if options.all else _target(options)
    kept = Kept()
    streams = {OUTPUT: sys.stdout}
    printed = Printed(
        lambda kind, line: print(safe_line(line), file=streams.get(kind, sys.stderr), flush=True), target.expected > 1
    )
    try:
        ends = execute(target, options.program, kept if options.json else printed)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps([_as_json(end, kept) for end in ends]))
    for end in ends:
        if end.reason and not options.json:
            print(printable(f"launch: {end.host}: {end.reason}", 1000), file=sys.stderr)
    return max(end.status for end in ends)


def _as_json(end: Ended, kept: Kept) -> dict[str, object]:
    from launcher.agent.inside.line import ERROR, OUTPUT

    output = {"stdout": kept.text(end.node, OUTPUT), "stderr": kept.text(end.node, ERROR)}
    return {"node": end.node, "host": end.host, "status": end.status, "reason": end.reason, **output}


def run_shell(argv: Sequence[str]) -> int:
    """``launch shell RUN``."""
    parser = command("shell", "The shell has the environment and the folder of the rank; the run goes on meanwhile.")
    _add_place(parser)
    options = parser.parse_args(list(argv))
    if options.json:
        raise BadRequest("a shell has no JSON. `launch exec RUN --json -- COMMAND` has.")
    from launcher.client.inside.shell import shell
    from launcher.client.tail import printable

    try:
        status, reason = shell(_target(options))
    except KeyboardInterrupt:  # before the node has answered; later it is for the shell
        print(file=sys.stderr)
        return 130
    if reason:
        print(printable(f"launch: {reason}", 1000), file=sys.stderr)
    return status


def run_code(argv: Sequence[str]) -> int:
    """``launch code RUN``."""
    parser = command("code", "Nothing is opened and nothing is asked of the network.")
    _add_place(parser)
    options = parser.parse_args(list(argv))
    from dataclasses import asdict

    from launcher.client.inside.editor import editor_access
    from launcher.client.tail import printable

    found = editor_access(_target(options))
    if options.json:
        print(json.dumps(asdict(found)))
        return 0
    lines = [f"node      {found.host}", f"folder    {found.folder}"]
    if found.ssh_config:
        lines += ["in ~/.ssh/config of your own machine:", *(f"    {line}" for line in found.ssh_config.splitlines())]
    lines += [f"editor    {found.command}", f"link      {found.link}"]
    lines += [f"note      {found.note}"] if found.note else []
    lines += [f"or        {found.shell}"]
    for line in lines:
        print(printable(line, 1000))
    return 0
