"""Options of the command line: what all commands share of them."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from launcher.errors import BadRequest

COMMANDS = {
    "list": "the runs of this folder",
    "status": "one run: state, progress, metrics, failure",
    "logs": "what a run's ranks printed",
    "cancel": "stop a run at its next step, with a checkpoint",
    "resume": "take a run up again, from its newest checkpoint if it has one",
    "clusters": "the cluster profiles that were found; `clusters new` writes one",
    "doctor": "whether this machine and its engines are in order",
    "completion": "print a completion script for bash, zsh or fish",
}
"""The commands besides launching, and what each is for."""


SHOW_PARSER = "--show-parser"
"""As the whole argument list of a command: raise its parser as `ShownParser` instead of running the command."""


class ShownParser(Exception):
    """Carries the parser of a command to `launcher.cli.parsers`."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are BadRequests, and which refuses an option that is given twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise BadRequest(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse `args`; see `SHOW_PARSER` for the exception to that."""
        if args == [SHOW_PARSER]:
            raise ShownParser(self)
        return super().parse_args(args, namespace)

    def option(self, name: str, **settings: Any) -> None:
        self.add_argument(name, action=Once if "action" not in settings else settings.pop("action"), **settings)


class Once(argparse.Action):
    """Store a value; a second one is an error rather than a silent correction."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = namespace.__dict__.setdefault("_given", set())
        if self.dest in given:
            parser.error(f"{option_string} is given twice.")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def whole(text: str) -> int:
    """A whole number; argparse quotes this function's name in its complaint."""
    return int(text)


def add_placement(parser: Parser) -> None:
    """The options that say where and how much: fields of RunSpec."""
    where = parser.add_argument_group("where")
    once: dict[str, Any] = {"action": Once}
    where.add_argument("--backend", **once, metavar="NAME", help="local (default), slurm or ray")
    where.add_argument("--cluster", **once, metavar="NAME|PATH", help="a profile (see `launch clusters`)")
    where.add_argument("--gpus", **once, type=whole, metavar="N", help="GPUs in all, one rank each")
    where.add_argument("--tpus", **once, type=whole, metavar="N", help="TPU chips in all, one rank each")
    where.add_argument("--cpus", **once, type=whole, metavar="N", help="CPU ranks in all, one core each, to debug")
    where.add_argument("--nodes", **once, type=whole, metavar="N", help="spread them evenly over N nodes")
    where.add_argument(
        "--spare-nodes", **once, type=whole, metavar="N", help="N nodes more (SLURM), to take the place of lost ones"
    )
    where.add_argument(
        "--accelerator", **once, metavar="TYPE", help="h100, a100, ..., or a TPU generation: v5e, v5p, ..."
    )
    where.add_argument("--topology", **once, metavar="4x4", help="the shape of a TPU slice")
    run = parser.add_argument_group("the run")
    run.add_argument("--time", **once, metavar="2h", help="time limit")
    run.add_argument("--max-restarts", **once, type=whole, metavar="N", help="restarts after crashes (default 3)")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def command(name: str, more: str = "", run: bool = True) -> Parser:
    """The parser of ``launch NAME``: a run (unless `run` is False), the folder of runs, and JSON."""
    parser = Parser(
        prog=f"launch {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}. {more}".rstrip()
    )
    if run:
        parser.add_argument("run", metavar="RUN", help="its name, or the path of its directory")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="the folder of runs (default: runs)")
    add_json(parser)
    return parser
