"""A command line of ``launch``, split into our options, the target and its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.cli.foreign.accelerate import translate_line
from launcher.cli.foreign.launchers import launcher_in
from launcher.cli.foreign.options import CONFIG_FILE, DIRECT, Translation, take
from launcher.cli.parser import Parser
from launcher.errors import BadRequest, nearest

BOTH = ("--gpus", "--gpus-per-node")
"""Our options that also take what sbatch's of the same name do."""


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
