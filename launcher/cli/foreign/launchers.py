"""Launchers in front of a program, as in ``launch torchrun --nproc-per-node 8 train.py``: what they say, and what is left."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.cli.foreign.accelerate import needs_accelerate, translate_line
from launcher.cli.foreign.options import ACCELERATE, SBATCH, TORCHRUN, Meaning, Translation, take
from launcher.errors import BadRequest

PYTHON = re.compile(r"python[0-9.]*")
PLAIN = ("-u", "-B", "-s", "-E", "-q")
"""Options of Python that change nothing here, or that ranks have anyway."""

PLAIN_ACCELERATE = {name: meaning for name, meaning in ACCELERATE.items() if not meaning.refused}
"""What can be translated without accelerate; it is asked about the rest."""


@dataclass(frozen=True)
class Launcher:
    """A launcher: its name, how many words of the command line are its own, and its options."""

    name: str
    words: int
    table: Mapping[str, Meaning]

    def strip(self, words: Sequence[str], done: Translation) -> list[str]:
        """Translate its options; return the program with its arguments.

        Raises:
            BadRequest: an option is unknown or has no meaning here, or no program follows.
        """
        if self.table is PLAIN_ACCELERATE and needs_accelerate(words[self.words :]):
            return translate_line(words[self.words :], done)
        index, own = self.words, Translation()
        while index < len(words) and words[index].startswith("-") and words[index] not in ("-", "--", "-m"):
            if words[index] == "--module":
                words = [*words[:index], "-m", *words[index + 1 :]]
                break
            after = take(words, index, self.table, own)
            if after == index:
                if words[index] in PLAIN and self.name == "python":
                    index += 1
                    continue
                if self.table is PLAIN_ACCELERATE:
                    return translate_line(words[self.words :], done)
                raise BadRequest(
                    f"{words[index]}: this option of {self.name} has no counterpart. `launch --help` lists those of launch."
                )
            index = after
        done.notes += own.notes
        for option, value in zip(own.words[::2], own.words[1::2], strict=True):
            # What stands in front of the launcher may say the same, as a job's nodes and torchrun's do.
            if (option, value) not in zip(done.words, done.words[1:], strict=False):
                done.words += [option, value]
        rest = list(words[index:])
        if rest[:1] == ["--"]:
            rest = rest[1:]
        if not rest:
            raise BadRequest(
                f"{' '.join(words[: self.words])}: no program follows. Write: launch [OPTIONS] train.py [ARGS]..."
            )
        return rest


def launcher_in(words: Sequence[str]) -> Launcher | None:
    """The launcher that `words` begin with; None if they begin with a target.

    Raises:
        BadRequest: it is one whose meaning is not known.
    """
    name = os.path.basename(words[0])
    if os.path.exists(words[0]) and os.sep not in words[0]:
        return None  # a file or folder of this name lies here
    two = list(words[1:3])
    if PYTHON.fullmatch(name):
        if two in (["-m", "torch.distributed.run"], ["-m", "torch.distributed.launch"]):
            return Launcher("torchrun", 3, TORCHRUN)
        if two[:1] == ["-m"] and two[1:] in (["accelerate.commands.launch"], ["accelerate"]):
            return Launcher("accelerate launch", 3 + (list(words[3:4]) == ["launch"]), PLAIN_ACCELERATE)
        return Launcher("python", 1, {})
    if name == "torchrun":
        return Launcher("torchrun", 1, TORCHRUN)
    if name == "accelerate":
        if two[:1] != ["launch"]:
            raise BadRequest(f"{' '.join(words[:2])}: only `accelerate launch` starts a program.")
        return Launcher("accelerate launch", 2, PLAIN_ACCELERATE)
    if name == "srun":
        return Launcher(name="srun", words=1, table=SBATCH)
    if name in ("mpirun", "mpiexec", "deepspeed", "horovodrun"):
        raise BadRequest(f"{name}: its options are not known here. Write: launch --ranks N train.py [ARGS]...")
    return None
