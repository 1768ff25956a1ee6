"""Time from ``kill -9`` of a rank to the next step: ``python -m benchmarks.recovery [ROUNDS]``.

Two gloo ranks (on SLURM four, on two nodes) train a small BERT under DDP, with torch and transformers imported, and save a
checkpoint every five steps: in a script of its own, in a function with a Context, and in the reference job. Round by round,
each way of starting runs the same program; one rank, the same for all, is killed `AGE` seconds after its first steps, or at
once (``, killed at once``: no standby interpreter is ready then). The time ends when the last of the ranks has finished its
first step after the kill; for the reference job, when rank 0 has recorded it. A way without a step within a minute counts
with that minute, and is named below the table: with torchrun both of the new ranks were then found inside gloo's connect,
in `init_process_group`. SLURM is a real one that is started for this if its daemons are installed; all nodes are this
machine.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.paired import Case, measure, rounds, table
from benchmarks.programs import FUNCTION, JOB, JOB_FOLDER, REFERENCE, TOKEN, Steps, end_all, logged_steps, written_steps
from tests.testbed.slurm import SlurmCluster, missing

LIMIT = 60.0  # seconds to the next step
START = 300.0  # seconds to the first one
RANKS = 2
AGE = 15.0  # seconds between the steps and the kill


RAY_JOB = """
import sys
import job
import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
TorchTrainer(
    job.main,
    train_loop_config=sys.argv[1],
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(name="job", storage_path=sys.argv[1], failure_config=FailureConfig(max_failures=3)),
).fit()
"""


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started ends, too
    scripts = Path(sys.executable).parent
    hung: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, slurm() as to_slurm:
        folder = Path(name)
        for file, text in (("job.py", JOB), ("fit.py", FUNCTION), ("ray_job.py", RAY_JOB)):
            (folder / file).write_text(text)
        launch = [str(scripts / "launch"), "--cpus", str(RANKS)]
        torchrun = [str(scripts / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "3"]
        on_slurm = [str(scripts / "launch"), "--backend", "slurm", "--nodes", "2", "--cpus", "4"]
        ours = "launch --cpus 2, a script"
        cases = {
            ours: Killed([*launch, "job.py", JOB_FOLDER]),
            "launch --cpus 2, a function": Killed([*launch, "fit:main", "--folder", JOB_FOLDER]),
            "launch --cpus 2, the reference job": Killed(
                [*launch, *REFERENCE, "--epochs", "1000", "--save-every", "5"], steps=logged_steps
            ),
            "launch --cpus 2, a script, killed at once": Killed([*launch, "job.py", JOB_FOLDER], age=0.0),
            "torchrun --max-restarts 3, a script": Killed([*torchrun, "job.py", JOB_FOLDER]),
            "Ray Train, FailureConfig(max_failures=3)": Killed([sys.executable, "ray_job.py", JOB_FOLDER]),
        }
        if to_slurm:
            cases["launch --backend slurm --nodes 2 --cpus 4"] = Killed([*on_slurm, "job.py", JOB_FOLDER], 4, to_slurm)
        runs = {name: killed(name, case, folder, hung) for name, case in cases.items()}
        seconds = measure(runs, rounds(5))
    table("kill -9 of one of two ranks, to the next step", seconds, ours)
    for name, times in hung.items():
        print(f"{name}: {times} time(s), the warm-up included, no step within {LIMIT:.0f} s")


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """A SLURM cluster, as what leads its clients to it; nothing where it cannot be started."""
    if missing():
        yield {}
        return
    with SlurmCluster() as cluster:
        yield cluster.environment()


@dataclass(frozen=True)
class Killed:
    """A command of which one rank is killed `age` seconds after its first steps."""

    argv: Sequence[str]
    ranks: int = RANKS
    variables: Mapping[str, str] = field(default_factory=dict)
    age: float = AGE
    steps: Callable[[Path], Steps] = written_steps


def killed(name: str, case: Killed, folder: Path, hung: Counter[str]) -> Case:
    """A case: start the job, kill a rank, return the seconds to the next step."""
    chance = random.Random(1)  # the same ranks and steps for every way of starting

    def run() -> float:
        victim, step = chance.randrange(case.ranks), chance.randint(7, 20)
        with tempfile.TemporaryDirectory(dir=folder) as job, open(Path(job) / "output", "wb") as output:
            for program in folder.glob("*.py"):
                shutil.copy(program, job)
            environment = os.environ | {TOKEN: job, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
            argv = [job if word == JOB_FOLDER else word for word in case.argv]
            started = subprocess.Popen(
                argv,
                cwd=job,
                env={**environment, **case.variables},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            try:
                seconds = _recover(Path(job), case, victim, step, started)
                print(f"{name}: rank {victim} killed at step {step}, {seconds:.2f} s", file=sys.stderr)
                return seconds
            except TimeoutError as error:
                said = (Path(job) / "output").read_text(errors="replace").strip().splitlines()[-1:]
                print(f"{name}: rank {victim} killed at step {step}: {error} {said}", file=sys.stderr)
                hung[name] += 1
                return LIMIT
            finally:
                end_all(f"{TOKEN}={job}".encode())
                started.wait()

    return run


def _recover(job: Path, case: Killed, victim: int, step: int, command: subprocess.Popen[bytes]) -> float:
    """Kill rank `victim` after all ranks have done `step`; return the seconds to the next step of all."""
    first = _wait(job, case, command, step, START)
    time.sleep(case.age)
    killed_at = time.time()
    os.kill(next(pid for rank, pid in first if rank == victim), signal.SIGKILL)
    second = _wait(job, case, command, 1, LIMIT, set(first))
    return max(second.values()) - killed_at


def _wait(
    job: Path,
    case: Killed,
    command: subprocess.Popen[bytes],
    count: int,
    seconds: float,
    before: Collection[tuple[int, int]] = (),
) -> dict[tuple[int, int], float]:
    """Wait until every rank has done `count` steps in a process that is not one of `before`.

    Returns the time at which each, as (rank, pid), did the first of its steps.

    Raises:
        RuntimeError: `command` has ended before a rank was killed.
        TimeoutError: they have not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        steps = case.steps(job).items()
        found = {process: times[0] for process, times in steps if process not in before and len(times) >= count}
        if {rank for rank, _ in found} == set(range(case.ranks)):
            return found
        if not before and command.poll() is not None:
            raise RuntimeError(f"it ended before a rank was killed:\n{(job / 'output').read_text(errors='replace')}")
        time.sleep(0.01)
    raise TimeoutError(f"not {count} steps within {seconds:.0f} s {'after the kill' if before else 'of the start'}")


if __name__ == "__main__":
    main()
