"""How long a person waits for the verdict on a request: ``python -m benchmarks.verdict [ROUNDS]``.

On the real SLURM of four nodes with 8 GPUs each that the tests use: a request that the nodes cannot hold, one that is over
the limit of its partition, and one that is planned with its estimated start; besides them what sbatch says of the same ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.paired import command, measure, rounds, table
from tests.testbed.slurm import SlurmCluster

PLANNED = "launch --dry-run --gpus 16: its start"


def main() -> None:
    launch = [str(Path(sys.executable).parent / "launch"), "--backend", "slurm", "--dry-run"]
    job = ["--time", "30m", "job:main"]
    sbatch = ["sbatch", "--test-only", "--wrap", "true"]
    with SlurmCluster() as cluster, tempfile.TemporaryDirectory() as folder:
        os.environ.update(cluster.environment())
        cluster.run("scontrol", "update", "partitionname=debug", "maxtime=60")
        Path(folder, "job.py").write_text("def main(): ...\n")
        cases = {
            PLANNED: command([*launch, "--gpus", "16", *job], folder, 0, "start  20"),
            "launch --gpus 12: no such shape": command([*launch, "--gpus", "12", *job], folder, 2, "Try --gpus 8"),
            "launch --gpus 64: more than there is": command(
                [*launch, "--gpus", "64", *job], folder, 2, "Try --gpus 32"
            ),
            "launch --time 2h: over the limit": command(
                [*launch, "--gpus", "8", "--time", "2h", "job:main"], folder, 2, "Try --time 60m"
            ),
            "sbatch --test-only, 16 GPUs": command(
                [*sbatch, "--nodes=2", "--gpus-per-node=8"], folder, 0, "to start at"
            ),
            "sbatch --test-only, 64 GPUs": command(
                [*sbatch, "--nodes=8", "--gpus-per-node=8"], folder, 1, "allocation failure"
            ),
        }
        table("The verdict on a request", measure(cases, rounds(7)), PLANNED)


if __name__ == "__main__":
    main()
