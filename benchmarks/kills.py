"""Wall time of a run of which a rank is killed again and again: ``python -m benchmarks.kills [ROUNDS]``.

Two ranks take a fixed number of steps, undisturbed, with a rank (a random one, the same for all ways) killed by SIGKILL every
60 s, and every 10 s, counted from the first step. Shown is the wall time of the whole command over that of the same
command undisturbed. The reference job and the function save every `SAVE_STEPS` steps, without holding up the training; the
script saves with torch.save every two seconds. A run that takes more than `LIMIT` times as long is ended there, and marked.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paired import rounds
from benchmarks.programs import FUNCTION, JOB, JOB_FOLDER, REFERENCE, TOKEN, Steps, end_all, logged_steps, written_steps

SCRIPT_STEPS = 15_000
REFERENCE_STEPS = 3_000
SAVE_STEPS = 50
PERIODS = (60.0, 10.0)
LIMIT = 4.0


@dataclass(frozen=True)
class Way:
    """A command, and how the steps of its ranks are found."""

    argv: Sequence[str]
    steps: Callable[[Path], Steps] = written_steps


@dataclass(frozen=True)
class Measured:
    """The wall time of a command in seconds, how often a rank was killed, and whether it came to its end."""

    seconds: float
    kills: int
    ended: bool


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started ends, too
    scripts = Path(sys.executable).parent
    launch = [str(scripts / "launch"), "--cpus", "2", "--max-restarts", "1000"]
    torchrun = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node", "2", "--max-restarts", "1000"]
    script = ["job.py", JOB_FOLDER, str(SCRIPT_STEPS), "2"]
    steps = ["--epochs", "100000", "--max-steps", str(REFERENCE_STEPS), "--save-every", str(SAVE_STEPS)]
    function = ["fit:main", "--folder", JOB_FOLDER, "--max-steps", str(SCRIPT_STEPS), "--every", str(SAVE_STEPS)]
    ways = {
        "launch, the reference job": Way([*launch, *REFERENCE, *steps], logged_steps),
        "launch, a function": Way([*launch, *function]),
        "launch, a script": Way([*launch, *script]),
        "torchrun, a script": Way([*torchrun, *script]),
    }
    print("Wall time of two ranks over the undisturbed run; kills in brackets\n", flush=True)
    print(f"{'':<28} {'undisturbed s':>14}" + "".join(f" {f'every {period:.0f} s':>18}" for period in PERIODS))
    measured: dict[str, list[list[Measured]]] = {name: [] for name in ways}
    for number in range(rounds(1)):
        for name, way in ways.items():
            whole = measure(way, None, 3600.0, number)
            if not whole.ended:
                raise RuntimeError(f"{way.argv} failed")
            disturbed = [measure(way, period, LIMIT * whole.seconds, number) for period in PERIODS]
            measured[name].append([whole, *disturbed])
            print(f"  round {number + 1}, {name}: {measured[name][-1]}", file=sys.stderr)
    for name, found in measured.items():
        whole_s = statistics.median(each[0].seconds for each in found)
        cells = [_cell(found, 1 + column) for column in range(len(PERIODS))]
        print(f"{name:<28} {whole_s:>14.1f}" + "".join(f" {cell:>18}" for cell in cells))


def _cell(found: Sequence[Sequence[Measured]], column: int) -> str:
    ratio = statistics.median(each[column].seconds / each[0].seconds for each in found)
    kills = "+".join(str(each[column].kills) for each in found)
    return f"{'' if all(each[column].ended for each in found) else 'over '}{ratio:.2f}x ({kills})"


def measure(way: Way, period: float | None, limit: float, seed: int) -> Measured:
    """Run the command of `way` with a rank killed every `period` seconds (None: never)."""
    chance = random.Random(seed)
    kills = 0
    with tempfile.TemporaryDirectory() as job, open(Path(job) / "output", "wb") as output:
        for file, text in (("job.py", JOB), ("fit.py", FUNCTION)):
            (Path(job) / file).write_text(text)
        environment = os.environ | {TOKEN: job, "OMP_NUM_THREADS": "1"}
        argv = [job if word == JOB_FOLDER else word for word in way.argv]
        began = time.monotonic()
        started = subprocess.Popen(argv, cwd=job, env=environment, stdout=output, stderr=output, start_new_session=True)
        due: float | None = None
        try:
            while started.poll() is None and time.monotonic() - began < limit:
                if period is not None and due is None and way.steps(Path(job)):
                    due = time.monotonic() + period
                if due is not None and period is not None and time.monotonic() >= due:
                    kills += _kill(way.steps(Path(job)), chance)
                    due += period
                with suppress(subprocess.TimeoutExpired):
                    started.wait(0.2)
            seconds = time.monotonic() - began
            return Measured(round(seconds, 2), kills, started.returncode == 0)
        finally:
            end_all(f"{TOKEN}={job}".encode())
            started.wait()
            shutil.rmtree(Path(job) / "runs", ignore_errors=True)


def _kill(steps: Steps, chance: random.Random) -> int:
    """Kill a random rank that is there; returns 1, or 0 if there is none, as between two attempts."""
    alive = sorted(process for process in steps if Path(f"/proc/{process[1]}").exists())
    if not alive:
        return 0
    os.kill(chance.choice(alive)[1], signal.SIGKILL)
    return 1


if __name__ == "__main__":
    main()
