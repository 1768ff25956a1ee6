"""``launch job.sh``: the command that a batch script for SLURM means."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.cli.foreign.launchers import PYTHON
from launcher.cli.foreign.options import SBATCH, Translation, meaning_of, take
from launcher.config.profile_checks import OWN_VARIABLES
from launcher.config.variables import is_secret
from launcher.errors import BadRequest

SUFFIXES = (".sh", ".bash", ".sbatch", ".slurm", ".job")
MOST_BYTES = 1 << 20

MEETING = re.compile(r"MASTER_(ADDR|PORT)|.*(HEAD|RDZV|MASTER|NODES_ARRAY|NODELIST|HOSTNAMES).*", re.IGNORECASE)
"""Variables in which scripts compute where the ranks meet."""

COUNTS = ("--ranks", "--ranks-per-node", "--cpus-per-rank")
"""Options that divide a node among ranks."""

VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
HARMLESS = re.compile(
    r"(set\s|echo\b|date\b|hostname\b|nvidia-smi\b|pwd\b|sleep\s|wait\b|ulimit\b|unset\s|trap\s|true\b|mkdir\s+-p\s+logs?\b)"
)
SETUP = re.compile(r"(source\s|\.\s|conda\s|micromamba\s|mamba\s|eval\s|module\s|ml\s|spack\s)")
WORDS_OF_SHELL = re.compile(r"(if|for|while|until|case|function|select)\b|.*\(\)\s*\{")


@dataclass
class Script:
    """What a batch script says.

    Attributes:
        options: words of `launch` in place of its options.
        program: the line that starts ranks, as words; empty without one.
        notes: lines on what is not needed here.
        left: lines that could not be translated, with their numbers.
    """

    options: list[str] = field(default_factory=list)
    program: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def meaning(target: str, args: Sequence[str], typed: Sequence[str], cwd: Path) -> str:
    """Return the text that `launch job.sh` prints: the command of `launch`, and what could not be translated.

    Args:
        args: what follows the script, for ``$1`` and ``"$@"``.
        typed: our options that stand before it.

    Raises:
        BadRequest: it has an option without a meaning here, or starts no Python program.
    """
    path = cwd / target
    text = _read(path)
    if path.suffix not in SUFFIXES and not text.startswith("#!"):
        raise BadRequest(f"target {target!r}: write package.module:function, path/to/script.py or -m module.")
    script = read(text, args)
    if not script.program:
        raise BadRequest(
            f"{target}: no line of it starts a Python program (python, torchrun, accelerate launch or srun)."
            f" Write: launch [OPTIONS] train.py [ARGS]... Or run it as it stands: launch --ranks-per-node 1 -- bash {target}"
        )
    typed = list(typed) if "--backend" in typed or "--cluster" in typed else [*typed, "--backend", "slurm"]
    lines = [f"launch: {target} means", "", f"  launch {shlex.join([*typed, *script.options, *script.program])}", ""]
    if not any(os.path.basename(word) == "srun" for word in script.program):  # which starts a process on each node
        once = _without(script.options, COUNTS)
        as_it_stands = shlex.join([*typed, *once, "--ranks-per-node", "1", "--", "bash", target, *args])
        lines += ["and, as it stands, with one process on each node", "", f"  launch {as_it_stands}", ""]
    if script.left:
        lines += ["not translated:", *(f"  {text}" for text in script.left), ""]
    if script.notes:
        lines += ["not needed:", *(f"  {text}" for text in dict.fromkeys(script.notes)), ""]
    return "\n".join([*lines, "Nothing was sent."])


def read(text: str, args: Sequence[str] = ()) -> Script:
    """Read a batch script.

    Raises:
        BadRequest: an option of sbatch has no meaning here.
    """
    header, body = _parts(text)
    done = Translation()
    for number, line in header:
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise BadRequest(f"line {number}: {error}.") from None
        index = 0
        while index < len(words):
            words[index] = re.sub(r"^--nodes(?==|$)", "-N", words[index])
            words[index] = re.sub(r"^--time(?==|$)", "-t", words[index])
            after = take(words, index, SBATCH, done) if meaning_of(words[index], SBATCH) else index
            if after == index:
                raise BadRequest(f"line {number}: {words[index]}: this option of sbatch has no counterpart.")
            index = after
    script = Script(options=done.words, notes=done.notes)
    _read_body(body, script, args)
    _settle_tasks(script)
    return script


def _read(path: Path) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read(MOST_BYTES)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror or error}.") from None


def _parts(text: str) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """The options of sbatch, and the commands, each with the number of its line; sbatch reads no options after a command."""
    header: list[tuple[int, str]] = []
    body: list[tuple[int, str]] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.startswith("#SBATCH") and not body:
            header.append((number, line.removeprefix("#SBATCH")))
            continue
        line = line.strip()
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(lines, (0, ""))[1].strip()
        if line and not line.startswith("#"):
            body.append((number, line))
    return header, body


def _read_body(body: Sequence[tuple[int, str]], script: Script, args: Sequence[str]) -> None:
    values = {str(place): value for place, value in enumerate(args, 1)} | _of_slurm(script.options)
    modules: list[str] = []
    setup: list[str] = []
    for number, line in body:
        if WORDS_OF_SHELL.match(line) or line in ("fi", "done", "esac", "}", "{", "then", "else", "do"):
            script.left.append(f"line {number}: {line}")
        elif (loaded := re.fullmatch(r"(?:module\s+load|ml)\s+([^;&|$]+)", line)) is not None:
            modules += loaded[1].split()
        elif SETUP.match(line):
            setup.append(line)
        elif (assigned := ASSIGNMENT.fullmatch(line)) is not None and not _command_after(line):
            _assign(number, line, assigned[1], assigned[2], values, script, setup)
        elif HARMLESS.match(line):
            continue
        elif (words := _program(line, values, args, script)) is not None:
            if script.program:
                script.left.append(f"line {number}: {line} (another program: write another command)")
            else:
                script.program = words
        elif line.startswith("cd "):
            script.left.append(f"line {number}: {line} (start the command there)")
        else:
            script.left.append(f"line {number}: {line}")
    for key, found in (("slurm.modules", modules), ("slurm.setup", setup)):
        if found:
            script.options += ["--set", f"{key}={_toml(found)}"]


def _assign(
    number: int, line: str, name: str, raw: str, values: dict[str, str], script: Script, setup: list[str]
) -> None:
    """A line that sets a variable: of the script, for its program, or to find out where the ranks meet."""
    computed = "$(" in raw or "`" in raw
    try:
        words = [] if computed else shlex.split(_filled(raw, values), comments=True)
    except ValueError:
        script.left.append(f"line {number}: {line}")
        return
    if not computed:
        values[name] = words[0] if words else ""
    if (
        MEETING.fullmatch(name)
        or name in OWN_VARIABLES
        or re.search(r"scontrol\s+show\s+hostname|hostname\s+--?[iI]", raw)
    ):
        script.notes.append(f"{line}: the ranks meet at an address that launch chooses")
    elif not line.startswith("export"):
        if computed:
            script.left.append(f"line {number}: {line}")
    elif computed or "$" in values[name]:
        setup.append(line)
    else:
        script.options += _variable(name, values[name], script)


def _command_after(line: str) -> bool:
    """Whether variables are set for one command only, as in ``OMP_NUM_THREADS=1 python train.py``."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return True
    value = line.partition("=")[2]
    return not line.startswith("export") and not value.startswith(("(", "$(", "`", '"$(')) and len(words) > 1


def _variable(name: str, value: str, script: Script) -> list[str]:
    """The option for a variable that the script sets; the value of a secret is not shown."""
    if not is_secret(name, value):
        return ["--env", f"{name}={value}"]
    script.notes.append(f"the value of {name}, a secret: export it first, and --env takes it from the shell")
    return ["--env", name]


def _program(line: str, values: dict[str, str], args: Sequence[str], script: Script) -> list[str] | None:
    """The words of a line that starts Python programs, with the variables filled in; None for another line."""
    line = re.sub(r"\s*(\d?>&?\d?|&>|\|\s*tee)\s*(\S+)?.*$|\s*&$", "", line)
    line = line.replace('"$@"', shlex.join(args)).replace("$@", shlex.join(args)).replace("$*", shlex.join(args))
    try:
        words = shlex.split(_filled(line, values), comments=True)
    except ValueError:
        return None
    settings: list[str] = []
    while words and (set_here := ASSIGNMENT.fullmatch(words[0])) is not None:
        settings += _variable(set_here[1], set_here[2], script)
        words = words[1:]
    if words[:1] == ["exec"] or words[:1] == ["time"]:
        words = words[1:]
    name = os.path.basename(words[0]) if words else ""
    return [*settings, *words] if PYTHON.fullmatch(name) or name in ("torchrun", "accelerate", "srun") else None


def _filled(text: str, values: dict[str, str]) -> str:
    """`text` with the variables whose value is known."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return values.get(name, match[2] if match[2] is not None else match[0])

    return VARIABLE.sub(value, text)


def _of_slurm(options: Sequence[str]) -> dict[str, str]:
    """SLURM's variables in a job with these options, as far as they follow from them."""
    found = dict(zip(options[::2], options[1::2], strict=False))
    nodes, each = found.get("--nodes", "1"), found.get("--gpus-per-node")
    values = {"SLURM_NNODES": nodes, "SLURM_JOB_NUM_NODES": nodes}
    if each:
        values |= dict.fromkeys(("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"), each)
    if cores := found.get("--cpus-per-rank"):
        values["SLURM_CPUS_PER_TASK"] = cores
    return values


def _settle_tasks(script: Script) -> None:
    """A task of SLURM is a rank, unless the program starts ranks by itself or has more GPUs than tasks."""
    found = dict(zip(script.options[::2], script.options[1::2], strict=False))
    starts = any(
        os.path.basename(word) in ("torchrun", "accelerate") or word == "torch.distributed.run"
        for word in script.program
    )
    gpus, tasks = found.get("--gpus-per-node"), found.get("--ranks-per-node")
    several = gpus is not None and tasks == "1" and gpus != "1"
    if not starts and not several:
        return
    dropped = ["--ranks", "--ranks-per-node"] + (["--cpus-per-rank"] if starts else [])
    script.options = _without(script.options, dropped)
    if several and not starts:
        script.notes.append(f"--ntasks-per-node {tasks}: launch starts one rank for each GPU")


def _without(options: Sequence[str], names: Collection[str]) -> list[str]:
    """`options`, each with its value, without those of `names`."""
    pairs = zip(options[::2], options[1::2], strict=False)
    return [word for pair in pairs if pair[0] not in names for word in pair]


def _toml(values: Sequence[str]) -> str:
    return "[" + ", ".join('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values) + "]"
