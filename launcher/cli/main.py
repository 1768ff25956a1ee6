"""The entry point of the command line: run the named command and exit with its status."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from launcher.cli.parser import COMMANDS, SHOW_PARSER, Parser, ShownParser, add_json, launch_parser
from launcher.errors import OURS, BadRequest, exit_status, nearest, shortened

SYNONYMS: dict[str, list[str]] = {
    "ls": ["list"],
    "ps": ["list"],
    "squeue": ["list"],
    "stop": ["cancel"],
    "kill": ["cancel"],
    "scancel": ["cancel"],
    "log": ["logs"],
    "remove": ["rm"],
    "delete": ["rm"],
    "compare": ["diff"],
    "run": [],
    "submit": ["--detach"],
    "sbatch": ["--detach"],
    "help": ["--help"],
    "version": ["--version"],
}
"""Other names of commands, as other tools have them."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command. Exits with the status that `launch --help` documents."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr; a terminal need not have every character
    try:
        argv = _named(argv)
        status = _command(argv[0])(argv[1:]) if argv and argv[0] in COMMANDS else _command("launch")(argv)
    except OURS as error:
        status = _complain(error, exit_status(error), argv)
    except BrokenPipeError:
        # `launch logs | head`: nobody reads any more. Point stdout elsewhere, or its last flush would complain too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 0
    sys.exit(status)


def _named(argv: list[str]) -> list[str]:
    """`argv` with the command that its first word is another name of; a file of that name is a target.

    Raises:
        BadRequest: the first word is nearly a command.
    """
    if not argv or argv[0] in COMMANDS or argv[0].startswith("-") or os.path.exists(argv[0]):
        return argv
    word, rest = argv[0], argv[1:]
    if word in SYNONYMS:
        return [*SYNONYMS[word], *rest]
    if (near := nearest(word, (*COMMANDS, *SYNONYMS))) and not any(sign in word for sign in ".:/"):
        raise BadRequest(
            f"there is no command {word!r}{near}, and no file of that name. `launch --help` lists the commands."
        )
    return argv


def _complain(error: Exception, status: int, argv: Sequence[str]) -> int:
    kind = {1: "failed", 2: "bad request", 3: "stopped"}[status]
    if argv[:1] and argv[0] not in COMMANDS:
        from launcher.cli.foreign.command_line import split

        with suppress(BadRequest):  # --json after the target is the target's own
            argv = split(launch_parser(), argv).options
    # An argument may hold bytes that are no UTF-8, and a file of a run anything.
    text = shortened(str(error)).encode(errors="backslashreplace").decode()
    if "--json" in argv:
        print(json.dumps({"error": text, "kind": kind}))
    else:
        from launcher.client.tail import printable

        print(f"launch: {printable(text)}", file=sys.stderr)
    return status


def run_completion(argv: Sequence[str]) -> int:
    """``launch completion SHELL``."""
    from launcher.cli.completion import SHELLS

    how = "`source <(launch completion bash)` in ~/.bashrc turns it on; `launch completion fish | source` in fish."
    parser = Parser(prog="launch completion", description=f"Print a completion script. {how}")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    add_json(parser)
    options = parser.parse_args(list(argv))
    text = SHELLS[options.shell](parsers(), COMMANDS)
    print(json.dumps({"shell": options.shell, "script": text}) if options.json else text, end="\n" * options.json)
    return 0


def parsers() -> dict[str, Parser]:
    """Return the parser of each command, none of which is run; the empty name stands for ``launch`` itself."""
    found = {"": launch_parser()}
    for name in COMMANDS:
        try:
            _command(name)([SHOW_PARSER])
        except ShownParser as shown:
            found[name] = shown.parser
    return found


_MODULES = {
    "launch": "launch",
    "list": "sent.listing",
    "status": "sent.showing",
    "logs": "sent.showing",
    "wait": "sent.ending",
    "cancel": "sent.ending",
    "stacks": "inside.stacks",
    "exec": "inside.enter",
    "shell": "inside.enter",
    "code": "inside.enter",
    "debug": "inside.debug",
    "profile": "inside.debug",
    "resume": "launch",
    "diff": "sent.comparing",
    "rm": "sent.removing",
    "prune": "sent.removing",
    "clusters": "clusters",
    "doctor": "doctor",
    "completion": "main",
}


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """Return the function of a command. Only its own module is loaded: a command has to begin at once."""
    module = importlib.import_module(f"launcher.cli.{_MODULES[name]}")
    found: Callable[[Sequence[str]], int] = getattr(module, f"run_{name}")
    return found
