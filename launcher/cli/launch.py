"""``launch`` and ``launch resume``: parse the request, submit it and follow the run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from launcher.cli.parser import add_debug, add_options, command, given, launch_parser, ranks_of
from launcher.errors import OURS, BadRequest
from launcher.request.spec import NOT_RESUMED, RunSpec, State

if TYPE_CHECKING:
    from launcher.rank.inside.debugger import DebugRequest


def parse_request(argv: Sequence[str]) -> tuple[RunSpec, argparse.Namespace]:
    """Return what is asked, and our options; their `notes` are lines on options of other programs that are not used,
    and `words` what was typed of them.

    Raises:
        BadRequest: an unknown option, an option given twice, or a value of the wrong kind.
    """
    from launcher.cli.foreign.command_line import split
    from launcher.cli.foreign.misplaced import refuse_misplaced

    parser = launch_parser()
    words = split(parser, argv)
    parsed = parser.parse_args(words.options)
    if not words.separated and words.target is not None:
        refuse_misplaced(words.target, words.args, Path.cwd(), parser)
    parsed.notes, parsed.words = words.notes, words.options
    spec = RunSpec(RunSpec.target if words.target is None else words.target, tuple(words.args), **given(parsed))
    return spec, parsed


def run_launch(argv: Sequence[str]) -> int:
    """``launch [OPTIONS] [TARGET] [ARGS]...``."""
    if argv and argv[0] in ("-h", "--help"):
        launch_parser().print_help()
        return 0
    spec, options = parse_request(argv)
    for note in options.notes:
        print(f"launch: {note}", file=sys.stderr)
    if ":" not in spec.target and not spec.target.endswith(".py") and os.path.isfile(spec.target):
        from launcher.cli.foreign.batch_script import meaning

        text = meaning(spec.target, spec.args, options.words, Path.cwd())
        print(json.dumps({"meaning": text}) if options.json else text)
        return 0
    if spec.args and spec.args[0] in ("-h", "--help") and ":" in spec.target:
        return target_help(spec)
    from launcher import backends
    from launcher.cli.describe import describe, describe_ranks, not_copied, what_travels
    from launcher.client.api import submit
    from launcher.client.plan import make_plan
    from launcher.client.terminal import attach
    from launcher.config.codec import to_data

    plan = make_plan(spec, Path.cwd())
    debug = debug_request(options.debug, options.debug_port, plan.placement.world_size)
    if options.dry_run:
        plan = plan.masked()
        sent = backends.of(plan.cluster).render(plan)
        if options.json:
            print(json.dumps({"plan": to_data(plan), "code": what_travels(plan), "sent": sent}, indent=2))
        else:
            print(describe(plan) + describe_ranks(plan) + "\n" + sent, end="")
        return 0
    if not (options.json or options.detach):
        print(describe(plan), flush=True)
    attachment = None if options.detach else attach(plan, _shown_on(options))
    run = submit(plan, attachment=attachment, debug=_needed(debug, attachment))
    if not options.json:
        print("".join(f"launch: {line}\n" for line in not_copied(run)), end="", flush=True)
    return _attend(run, options, attachment, debug)


def run_resume(argv: Sequence[str]) -> int:
    """``launch resume [RUN]``."""
    about = "With the code and arguments it was sent with; what is given here replaces its placement."
    parser = command("resume", about, nargs="?", left_out="shows those that can be resumed")
    add_options(parser, NOT_RESUMED)
    parser.add_argument("--detach", action="store_true", help="return once it is submitted")
    add_debug(parser)
    options = parser.parse_args(list(argv))
    from launcher.client.api import resubmit
    from launcher.client.run import find
    from launcher.client.terminal import attach

    name = options.run
    if name is None:
        from launcher.cli.sent.unnamed import choose_resumed

        name = choose_resumed(options, argv)
    attachments: list[Any] = [None]

    def attached(plan: Any) -> Any:
        attachments.append(None if options.detach else attach(plan, _shown_on(options)))
        return attachments[-1]

    debug = debug_request(options.debug, options.debug_port, None)
    run = resubmit(find(name, Path(options.runs)), attached, debug, **given(options))
    return _attend(run, options, attachments[-1], debug)


def _shown_on(options: argparse.Namespace) -> TextIO:
    return sys.stderr if options.json else sys.stdout


def debug_request(ranks: str | None, port: int | None, world_size: int | None) -> DebugRequest | None:
    """Return what ``--debug`` and ``--debug-port`` ask of a run of `world_size` ranks (None: not known); None without them.

    Raises:
        BadRequest: there is no such rank or port, or debugpy is not installed.
    """
    if ranks is None and port is None:
        return None
    from launcher.rank.inside.debugger import DebugRequest

    if port is not None and not 1024 <= port <= 65000:
        raise BadRequest(f"--debug-port {port}: a port from 1024 to 65000 is needed, such as 5678.")
    if port is not None and importlib.util.find_spec("debugpy") is None:
        raise BadRequest(f"--debug-port {port}: debugpy is not installed. Write: pip install debugpy")
    found = ranks_of(ranks or "0", "--debug")
    if found is not None and world_size is not None and found[-1] >= world_size:
        raise BadRequest(f"--debug {ranks}: the ranks of this run are 0 to {world_size - 1}.")
    return DebugRequest(found, port)


def _needed(debug: DebugRequest | None, attachment: Any) -> DebugRequest | None:
    """`debug`, unless the only rank has this terminal itself."""
    return None if debug is not None and debug.port is None and attachment is not None else debug


def _attend(run: Any, options: argparse.Namespace, attachment: Any = None, debug: DebugRequest | None = None) -> int:
    """Follow a run to its end, unless asked not to; report it; return the exit status."""
    from launcher.client.api import drop_refused

    if options.detach:
        print(json.dumps(run.status()) if options.json else f"{run.name}\nlaunch status {run.name} shows how it goes")
        return 0
    from launcher.client.follow import attend

    at_breakpoints = None
    if debug is not None and debug.port is None and run.dir.debug_file.exists():
        from launcher.client.inside.debug import AtBreakpoints

        at_breakpoints = AtBreakpoints(run, debug.ranks)
    terminal = attachment.terminal if attachment is not None else None
    try:
        wait = at_breakpoints.wait if at_breakpoints is not None else None
        state = attend(run, _shown_on(options), terminal, wait)
    finally:
        if at_breakpoints is not None:
            at_breakpoints.close()
    if state is None:
        return State.STOPPED.exit_status
    drop_refused(run)
    if options.json:
        print(json.dumps(run.status()))
    else:
        from launcher.cli.describe import summary

        print(summary(run))
    return state.exit_status


def target_help(spec: RunSpec) -> int:
    """``launch module:function --help``: the flags of the function."""
    from launcher.request.binding import describe_flags
    from launcher.request.parameters import Parameters
    from launcher.request.resolve import resolve
    from launcher.request.target import load, short_traceback

    resolve(spec.target, (), Path.cwd())
    sys.path.insert(0, str(Path.cwd()))
    function = load(spec.target)
    try:
        print(describe_flags(spec.target, Parameters.of(function)))
    except OURS:
        raise
    except Exception as error:  # of the target's own code, such as the factory of a default
        raise BadRequest(f"the flags of {spec.target} cannot be listed:\n{short_traceback(error)}") from None
    return 0
