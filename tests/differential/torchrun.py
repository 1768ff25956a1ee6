"""torchrun without its start: one process imports it, and forks for each program.

``python -m tests.differential.torchrun`` reads requests from standard input, one JSON object a line, and answers with the
highest exit status. A request has one command line a node, and the nodes run at the same time. The ranks are started by
torchrun itself and are new interpreters.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

LIMIT = 120
"""Seconds of one program."""


class Torchrun:
    """A started server. Use it as a context manager."""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def run(self, nodes: Sequence[Sequence[str]], folder: Path, environment: dict[str, str]) -> bool:
        """Run a program with the words of torchrun's command line on each node; return whether it succeeded."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([[list(words) for words in nodes], str(folder), environment]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()) == 0


def serve() -> None:
    """Answer requests until standard input ends."""
    from torch.distributed import run

    for line in sys.stdin:
        nodes, folder, environment = json.loads(line)
        pids = []
        for words in nodes:
            pid = os.fork()
            if pid == 0:
                _become_torchrun(folder, environment)
                try:
                    run.main(words)
                except BaseException as error:
                    print(error, file=sys.stderr, flush=True)
                    os._exit(1)
                os._exit(0)
            pids.append(pid)
        print(max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids), flush=True)


def _become_torchrun(folder: str, environment: dict[str, str]) -> None:
    """Give this process the folder, the environment, the output and the time limit of a torchrun."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # which ends its ranks, too
    signal.alarm(LIMIT)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    null = os.open(os.devnull, os.O_RDWR)
    output = os.open("torchrun.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, target in enumerate((null, output, output)):
        os.dup2(target, descriptor)


if __name__ == "__main__":
    serve()
