"""How long the command takes to say something: ``python -m benchmarks.command_start [ROUNDS]``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from benchmarks.paired import command, measure, rounds, table


def main() -> None:
    scripts = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            "launch --help": command([str(scripts / "launch"), "--help"]),
            "launch list": command([str(scripts / "launch"), "list"], cwd=folder),
            "python -c pass": command([sys.executable, "-c", "pass"]),
            "torchrun --help": command([str(scripts / "torchrun"), "--help"]),
            "accelerate launch --help": command([str(scripts / "accelerate"), "launch", "--help"]),
        }
        table("Start of the command", measure(cases, rounds(11)), "launch --help")


if __name__ == "__main__":
    main()
