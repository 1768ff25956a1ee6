"""Options of the command line: what all commands share of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from launcher.cli.foreign.accelerate import translate_line
from launcher.cli.foreign.launchers import launcher_in
from launcher.cli.foreign.options import CONFIG_FILE, DIRECT, Translation, take
from launcher.cli.version import Version
from launcher.errors import BadRequest, nearest
from launcher.request.spec import flag_of, options, refuse_empty

COMMANDS = {
    "list": "the runs of this folder",
    "status": "one run: state, progress, metrics, failure",
    "logs": "what a run's ranks printed",
    "cancel": "ask a run to stop, and kill it after its grace",
    "resume": "take a run up again, from its newest checkpoint if it has one",
    "clusters": "the cluster profiles that were found; `clusters new` writes one",
    "doctor": "whether this machine and its engines are in order",
    "completion": "print a completion script for bash, zsh or fish",
}
"""The commands besides launching, and what each is for."""


BOTH = ("--gpus", "--gpus-per-node")
"""Our options that also take what sbatch's of the same name do."""

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


def command(name: str, more: str = "", run: bool = True) -> Parser:
    """The parser of ``launch NAME``: a run (unless `run` is False), the folder of runs, and JSON."""
    parser = Parser(
        prog=f"launch {name}", description=f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}. {more}".rstrip()
    )
    if run:
        parser.add_argument("run", metavar="RUN", help="its name, or the path of its directory")
    parser.add_argument("--runs", action=Once, default="runs", metavar="DIR", help="the folder of runs (default: runs)")
    add_json(parser)
    return parser


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
    add_json(more)  # type: ignore[arg-type]
    more.add_argument("--version", action=Version, help="print the versions of launch, Python and the engines")
    more.add_argument("-m", dest="module", action=Once, metavar="MODULE", help="run a module as a script")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="TARGET [ARGS]", help=argparse.SUPPRESS)
    return parser


@dataclass
class Words:
    """A command line of ``launch``, split.

    Attributes:
        options: our options, with those of other programs translated.
        target: the target, ``-m MODULE`` included; None: left out.
        args: arguments of the target.
        notes: lines about options that are not used.
        separated: ``--`` stood between the options and the target, or between it and its arguments.
    """

    options: list[str]
    target: str | None
    args: list[str]
    notes: list[str]
    separated: bool = False


def split(parser: Parser, argv: Sequence[str]) -> Words:
    """Split a command line into our options, the target and its arguments.

    Options of torchrun, accelerate, sbatch and srun are translated, and their names in front of a program are taken for
    what they say.

    Raises:
        BadRequest: an option is unknown, or has no meaning here.
    """
    takes_value = {s: a.nargs != 0 for a in parser._actions for s in a.option_strings}
    done = Translation()
    index = 0
    while index < len(argv):
        word = argv[index]
        if word == "--":
            rest = list(argv[index + 1 :])
            if rest and rest[0] and not rest[0].startswith("-"):
                return Words(done.words, f"-- {rest[0]}", rest[1:], done.notes, separated=True)
            return Words(done.words, None, rest, done.notes, separated=True)
        if not word.startswith("-") or word == "-":
            break
        name = word.split("=", 1)[0]
        if name == "-m":
            break
        if name in takes_value and name not in BOTH:
            step = 2 if takes_value[name] and "=" not in word else 1
            done.words += argv[index : index + step]
            index += step
            continue
        after = take(argv, index, DIRECT, done)
        if after == index:
            raise BadRequest(
                f"unknown option {name}{nearest(name, takes_value)}. `launch --help` lists them; options of the target"
                " come after it (or after -- where the target is left out)."
            )
        index = after
    return _with_target(list(argv[index:]), done)


def _with_target(rest: list[str], done: Translation) -> Words:
    """`rest` begins with the target, or with a launcher of another kind and its options."""
    if CONFIG_FILE[-1] in done.words:
        place = done.words.index(CONFIG_FILE[-1])
        file = done.words[place : place + 2]
        del done.words[place : place + 2]
        rest = translate_line([*file, *rest], done)
    while rest and (launcher := launcher_in(rest)) is not None:
        rest = launcher.strip(rest, done)
    if not rest:
        return Words(done.words, None, [], done.notes)
    if rest[0] == "-m" or (rest[0].startswith("-m") and not rest[0].startswith("--")):
        module = rest[1:2] if rest[0] == "-m" else [rest[0][2:].removeprefix("=")]
        if not module:
            raise BadRequest("-m: the name of a module is needed.")
        rest = [f"-m {module[0]}", *rest[2 if rest[0] == "-m" else 1 :]]
    target, args = rest[0], rest[1:]
    separated = args[:1] == ["--"]
    return Words(done.words, target, args[1:] if separated else args, done.notes, separated)
