"""The parts of the reference that are written from the code: options, exit statuses, kinds of failure."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from launcher.cli.foreign.options import ACCELERATE, CONFIG_FILE, SBATCH, TORCHRUN, Meaning
from launcher.cli.main import parsers
from launcher.cli.parser import COMMANDS
from launcher.lifecycle.policy import RULES, Retry
from launcher.request.spec import State
from training.bert.config import TrainConfig
from training.flags.fields import usage

RETRIED = {
    Retry.HERE: "yes",
    Retry.ELSEWHERE: "yes, on other nodes if possible",
    Retry.NEVER: "no",
}


def write_pages(folder: Path) -> None:
    """Write all generated pages into `folder`."""
    folder.mkdir(exist_ok=True)
    pages = {
        "foreign": foreign(),
        "commands": commands(),
        "failures": failures(),
        "statuses": statuses(),
        "reference-job": reference_job(),
    }
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)


def foreign() -> str:
    """Return what each option of other programs means to `launch`, as Markdown tables."""
    tables = {"torchrun": TORCHRUN, "accelerate launch": ACCELERATE, "sbatch and srun": SBATCH}
    return "\n".join(
        f"### {name}\n\n| option | here |\n|---|---|\n{_meanings(table)}" for name, table in tables.items()
    )


def _meanings(table: Mapping[str, Meaning]) -> str:
    names: dict[int, list[str]] = {}
    for name, meaning in table.items():
        names.setdefault(id(meaning), []).append(f"`{name}`")
    found = {id(meaning): meaning for meaning in table.values()}
    return "".join(f"| {', '.join(spelled)} | {_here(found[key], spelled[0])} |\n" for key, spelled in names.items())


def _here(meaning: Meaning, name: str) -> str:
    if meaning.options is None:
        return f"{'refused' if meaning.refused else 'not used'}: {meaning.why}"
    example = "gpu:8" if name == "`--gres`" else "8"
    if name.strip("`") in CONFIG_FILE:
        return "read by accelerate itself; so are all options behind `accelerate launch`"
    return f"`{' '.join(meaning.options(example)).replace('8', 'VALUE')}`"


def commands() -> str:
    """Return the options of ``launch`` and of each command as Markdown."""
    parts = []
    for name, parser in parsers().items():
        title = f"launch {name}".strip()
        about = f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}.\n\n" if name else ""
        parser_usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
        parts.append(f"## {title}\n\n{about}```text\n{parser_usage}\n```\n\n| option | |\n|---|---|\n{rows(parser)}")
    return "\n".join(parts)


def rows(parser: argparse.ArgumentParser) -> str:
    """Return one row of a Markdown table for each argument of `parser`."""
    found = ""
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS and "--help" not in action.option_strings:
            value = f" {action.metavar}" if action.metavar and action.nargs != 0 else ""
            spelled = ", ".join(f"`{flag}{value}`" for flag in action.option_strings) or f"`{action.metavar}`"
            text = (action.help or "").replace("|", "\\|")
            found += f"| {spelled.replace('|', chr(92) + '|')} | {text} |\n"
    return found


def failures() -> str:
    """Return the kinds of failure with what follows from each."""
    lines = [f"| `{kind}` | {RETRIED[rule.retry]} | {rule.advice} |\n" for kind, rule in RULES.items()]
    return "| kind | another attempt | advice |\n|---|---|---|\n" + "".join(lines)


def statuses() -> str:
    """Return the states in which a run can end, with the exit status of ``launch`` for each."""
    lines = [f"| `{state.value}` | {state.exit_status} |\n" for state in State if state.done]
    return (
        "| state | exit status |\n|---|---|\n" + "".join(lines) + "| (the request was wrong; nothing was sent) | 2 |\n"
    )


def reference_job() -> str:
    """Return the flags of the bundled job, which `launch` runs without a target."""
    return f"```text\n{usage(TrainConfig)}\n```\n"
