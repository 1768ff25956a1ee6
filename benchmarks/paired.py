"""Time whole commands in turn, A B C A B C ..., so that a drift of the machine's speed falls on all of them."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date

Case = Callable[[], float]
"""Does the work once and returns its seconds."""


def command(argv: Sequence[str], cwd: str | None = None, status: int = 0, words: str = "") -> Case:
    """A case: the wall time of a whole command, which must end with `status` and say `words`."""

    def run() -> float:
        started = time.perf_counter()
        done = subprocess.run(argv, cwd=cwd, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode != status or words not in done.stdout + done.stderr:
            raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return seconds

    return run


def measure(cases: Mapping[str, Case], rounds: int) -> dict[str, list[float]]:
    """Run every case once to warm up, then `rounds` times in turn; returns the seconds of each."""
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(case())
    return seconds


def table(title: str, seconds: Mapping[str, Sequence[float]], ours: str) -> None:
    """Print medians with their range, and ours as a ratio of each peer's, round by round."""
    versions = (
        f"Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {date.today()}"
    )
    print(f"\n{title}\n{len(seconds[ours])} rounds, interleaved; {versions}\n")
    print(f"{'':<44} {'median s':>9} {'min':>8} {'max':>8}   ours / this")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds[ours], values, strict=True)]
        ratio = "" if name == ours else f"{statistics.median(ratios):.2f}"
        print(f"{name:<44} {statistics.median(values):>9.3f} {min(values):>8.3f} {max(values):>8.3f}   {ratio}")


def rounds(default: int) -> int:
    """The number of rounds: the first argument of the script, or `default`."""
    return int(sys.argv[1]) if len(sys.argv) > 1 else default
