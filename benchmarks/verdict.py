"""How long a person waits for the verdict on a request: ``python -m benchmarks.verdict [ROUNDS]``.

On the real SLURM of four nodes with 8 GPUs each that the tests use: a request that the nodes cannot hold, one that is over
the limit of its partition, and one that is planned with its estimated start; besides them what sbatch says of the same ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paired import Case, measure, rounds, table
from tests.testbed.slurm import SlurmCluster

PLANNED = "launch --dry-run --gpus 16: its start"


def says(argv: Sequence[str], status: int, words: str, folder: str) -> Case:
    """A case: the wall time of a command that must end with `status` and say `words`."""

    def run() -> float:
        started = time.perf_counter()
        done = subprocess.run(argv, cwd=folder, check=False, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode != status or words not in done.stdout + done.stderr:
            raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return seconds

    return run


def main() -> None:
    launch = [str(Path(sys.executable).parent / "launch"), "--backend", "slurm", "--dry-run"]
    job = ["--time", "30m", "job:main"]
    sbatch = ["sbatch", "--test-only", "--wrap", "true"]
    with SlurmCluster() as cluster, tempfile.TemporaryDirectory() as folder:
        os.environ.update(cluster.environment())
        cluster.run("scontrol", "update", "partitionname=debug", "maxtime=60")
        Path(folder, "job.py").write_text("def main(): ...\n")
        cases = {
            PLANNED: says([*launch, "--gpus", "16", *job], 0, "start  20", folder),
            "launch --gpus 12: no such shape": says([*launch, "--gpus", "12", *job], 2, "Try --gpus 8", folder),
            "launch --gpus 64: more than there is": says([*launch, "--gpus", "64", *job], 2, "Try --gpus 32", folder),
            "launch --time 2h: over the limit": says(
                [*launch, "--gpus", "8", "--time", "2h", "job:main"], 2, "Try --time 60m", folder
            ),
            "sbatch --test-only, 16 GPUs": says([*sbatch, "--nodes=2", "--gpus-per-node=8"], 0, "to start at", folder),
            "sbatch --test-only, 64 GPUs": says(
                [*sbatch, "--nodes=8", "--gpus-per-node=8"], 1, "allocation failure", folder
            ),
        }
        table("The verdict on a request", measure(cases, rounds(7)), PLANNED)


if __name__ == "__main__":
    main()
