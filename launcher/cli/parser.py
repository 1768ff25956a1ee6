"""Options of the command line: what all commands share of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection
from typing import Any, Literal, NoReturn

from launcher.cli.version import Version
from launcher.errors import BadRequest
from launcher.request.spec import flag_of, options, refuse_empty

COMMANDS = {
    "list": "your runs, in this folder and in others",
    "status": "one run: state, progress, metrics, failure",
    "logs": "what a run's ranks printed",
    "wait": "wait for runs to end",
    "cancel": "ask a run to stop, and kill it after its grace",
    "stacks": "where a run's ranks stand: their Python stacks",
    "exec": "run a command on a run's nodes, beside its ranks",
    "shell": "a shell on a node of a run, with the environment of a rank",
    "code": "how to open a node of a run in an editor",
    "debug": "stop a rank of a run in a debugger, at this terminal",
    "profile": "profile some steps of a run's ranks",
    "resume": "take a run up again, from its newest checkpoint if it has one",
    "diff": "in what two runs differ: code, arguments, profile, environment, result",
    "rm": "remove runs that have ended",
    "prune": "remove runs that ended long ago",
    "clusters": "the cluster profiles that were found; `clusters new` writes one",
    "doctor": "whether this machine and its engines are in order",
    "completion": "print a completion script for bash, zsh or fish",
}
"""The commands besides launching, and what each is for."""


SHOW_PARSER = "\0parser"
"""As the whole argument list of a command: raise its parser as `ShownParser` instead of running the command.

No command line holds it, since an argument cannot contain a null byte.
"""


class ShownParser(Exception):
    """Carries the parser of a command to `launcher.cli.main.parsers`."""

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
        if any(action.nargs == "+" for action in self._get_positional_actions()):
            return super().parse_intermixed_args(args, namespace)  # options may stand between the runs
        return super().parse_args(args, namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if arg_strings == ["--"] and action.option_strings:  # argparse would drop it and store an empty list
            self.error(f"argument {'/'.join(action.option_strings)}: '--' is not a value.")
        return super()._get_values(action, arg_strings)

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
    if len(text) > 30:
        raise argparse.ArgumentTypeError(f"a whole number is needed, not {len(text)} characters")
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # int() also accepts the digits of every script, 1_000, and spaces
        raise ValueError
    return int(text)


def ranks_of(text: str, option: str) -> list[int] | None:
    """Return the ranks that an option names, ``0,3-5``; None for ``all``.

    Raises:
        BadRequest: it names none.
    """
    if text == "all":
        return None
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise BadRequest(f"{option} {text}: write ranks, such as 0, 0,3 or 0-7, or all.")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def add_options(parser: Parser, without: Collection[str] = ()) -> dict[str, argparse._ArgumentGroup]:
    """Add the options that are fields of RunSpec to `parser`; return their groups by heading."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, option in options(without).items():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        groups[option.group].add_argument(
            flag_of(name),
            dest=name,
            action="append" if option.many else Once,
            type=str if option.least is None else whole,
            metavar=option.metavar,
            help=option.help,
        )
    return groups


def given(parsed: argparse.Namespace) -> dict[str, Any]:
    """The options of RunSpec that the command line has, by field.

    Raises:
        BadRequest: one is empty.
    """
    found = {name: value for name in options() if (value := getattr(parsed, name, None)) is not None}
    refuse_empty(found)
    return found


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_debug(parser: argparse._ActionsContainer) -> None:
    """Add the options of debuggers in ranks that are sent now."""
    text = "breakpoint() in these ranks opens a debugger here: 0, 0,3, 0-7 or all; other ranks pass over it"
    parser.add_argument("--debug", action=Once, metavar="RANKS", help=text)
    text = "for --debug: an editor that speaks to debugpy connects to PORT (plus the local rank) instead"
    parser.add_argument("--debug-port", action=Once, type=whole, metavar="PORT", help=text)


def command(
    name: str, more: str = "", run: bool = True, nargs: Literal["?", "+"] | None = None, left_out: str = ""
) -> Parser:
    """The parser of ``launch NAME``: a run (unless `run` is False), the folder of runs, and JSON.

    `nargs` is how many runs there are, by default one; `left_out` says what is done without a run, if none is needed.
    """
    parser = Parser(
        prog=f"launch {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}. {more}".rstrip()
    )
    if run:
        text = "its name, or the path of its directory" + (f" (left out: {left_out})" if left_out else "")
        parser.add_argument("run", metavar="RUN", nargs=nargs, help=text)
    parser.add_argument("--runs", action=Once, default="runs", metavar="DIR", help="the folder of runs (default: runs)")
    add_json(parser)
    return parser


def add_states(parser: Parser, states: Collection[str]) -> None:
    """Add ``--state``, which `launcher.client.sent.choose.states_called` reads."""
    text = f"only runs in this state: {', '.join(states)}; several with commas"
    parser.add_argument("--state", dest="states", action="append", default=[], metavar="STATE", help=text)


DESCRIPTION = """\
Send one train/eval function, or a script, to where the accelerators are.

  launch                                             a small BERT on bundled data, here and offline, in a minute
  launch --backend slurm --gpus 8                    the same on SLURM
  launch --backend ray --gpus 8                      the same on Ray
  launch --gpus 2 train.py --lr 3e-5                 a script written for torchrun or accelerate, unchanged
  launch mypackage.train:main --epochs 5             a function; the fields of its config dataclass are flags
  launch -- --model bert-base-uncased --dataset glue/mrpc      arguments of the default target follow --
  launch --ranks-per-node 1 -- nvidia-smi -L         any command, on every rank
"""

EPILOG = (
    """\
commands (launch COMMAND --help shows the options):
"""
    + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    + """

exit status: 0 succeeded; 1 the run failed; 2 the request was wrong and nothing was sent; 3 stopped before the end,
and `launch resume` goes on
"""
)


def launch_parser() -> Parser:
    """The options of ``launch`` itself; the target and what follows it are split off before."""
    parser = Parser(
        prog="launch",
        usage="launch [OPTIONS] [TARGET] [ARGS]...",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    more = add_options(parser)["how"]
    more.add_argument("--dry-run", action="store_true", help="print all that would be sent, and send nothing")
    more.add_argument("--detach", action="store_true", help="return once it is submitted")
    add_debug(more)
    add_json(more)  # type: ignore[arg-type]
    more.add_argument("--version", action=Version, help="print the versions of launch, Python and the engines")
    more.add_argument("-m", dest="module", action=Once, metavar="MODULE", help="run a module as a script")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="TARGET [ARGS]", help=argparse.SUPPRESS)
    return parser
