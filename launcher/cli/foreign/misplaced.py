"""Options of ours that stand after the target, where they would go to a program that does not know them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

from launcher.errors import BadRequest

MOST_FOLDERS, MOST_FILES, MOST_BYTES = 200, 500, 1 << 20
"""Folders and files of a project, and bytes of each, whose text is looked at."""

PARSERS_ELSEWHERE = re.compile(
    r"HfArgumentParser|TrainingArguments|jsonargparse|LightningCLI|hydra|absl|simple_parsing|tyro|deepspeed|add_config_arguments"
    r"|fire\.Fire|from_cli|ml_collections|draccus|pydantic_settings"
)
"""A program that uses one of these has options that its text does not spell."""


def refuse_misplaced(target: str, args: Sequence[str], cwd: Path, parser: argparse.ArgumentParser) -> None:
    """Refuse arguments of a script or module that are options of ours, unless its text or its project's has them.

    Raises:
        BadRequest: with the order in which they are obeyed.
    """
    known = {
        string: action for action in parser._actions for string in action.option_strings if string.startswith("--")
    }
    names = [word.partition("=")[0] for word in args]
    taken = [name for name in names if name in known and name != "--help"]
    if not taken or not (target.endswith(".py") or target.startswith("-m ")):
        return
    texts = list(_texts(target, cwd))
    if not texts or any(PARSERS_ELSEWHERE.search(text) for text in texts):
        return
    strange = [name for name in taken if not any(_has(text, name) for text in texts)]
    if not strange:
        return
    moved, left = _sorted(args, set(strange), known)
    words = shlex.join([*moved, *target.split(" ", 1), *left])
    raise BadRequest(
        f"{strange[0]} stands after {target}, so it would go to the program, whose text does not have it. Options of launch"
        f" come first: launch {words}. If the program knows it: launch {target} -- {shlex.join(args)}"
    )


def _sorted(args: Sequence[str], strange: set[str], known: dict[str, argparse.Action]) -> tuple[list[str], list[str]]:
    """The options of ours with their values, and the other arguments."""
    moved: list[str] = []
    left: list[str] = []
    index = 0
    while index < len(args):
        name, equals, _ = args[index].partition("=")
        step = 2 if name in strange and known[name].nargs != 0 and not equals else 1
        (moved if name in strange else left).extend(args[index : index + step])
        index += step
    return moved, left


def _has(text: str, name: str) -> bool:
    """Whether a program with this text may take the option: as a word of the command line, a string, a field or a parameter."""
    word = name.removeprefix("--").replace("-", "[-_]")
    return re.search(rf"--{word}(?![\w-])|[\"']{word}[\"']|(?<![\w.]){word}\s*[:=]", text) is not None


def _texts(target: str, cwd: Path) -> Iterable[str]:
    """The text of the target, and of the files of its project; nothing if the target is not found there."""
    if target.startswith("-m "):
        module = cwd.joinpath(*target[3:].split("."))
        candidates = [module.with_suffix(".py"), module / "__main__.py"]
    else:
        candidates = [cwd / target]
    main = next((path for path in candidates if os.path.isfile(path)), None)
    if main is None:
        return
    roots = dict.fromkeys((main.parent, cwd)) if main.is_relative_to(cwd) else (main.parent,)
    walk = islice(chain.from_iterable(map(os.walk, roots)), MOST_FOLDERS)
    paths = (Path(folder, name) for folder, _, names in walk for name in names if name.endswith(".py"))
    others = filter(os.path.isfile, paths)  # to open a pipe of that name would wait for its writer
    for path in (main, *islice(others, MOST_FILES)):
        try:
            with open(path, errors="replace") as file:
                yield file.read(MOST_BYTES)
        except OSError:
            continue
