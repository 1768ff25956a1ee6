"""Time from ``kill -9`` of a rank to the next step of all ranks: ``python -m benchmarks.recovery [ROUNDS]``.

Two gloo ranks (on SLURM four, on two nodes) train a small BERT under DDP, with torch and transformers imported, and rank
0 saves a checkpoint every five steps. Round by round, each way of starting them runs the same script; one rank, the same
for all, is killed `AGE` seconds after its first steps, or at once (``, killed at once``: no standby interpreter is ready
then). The time ends when the last of the ranks has finished its first step after the kill. A way without a step within
two minutes counts with those two minutes, and is named below the table: with torchrun both of the new ranks were then
found inside gloo's connect, in `init_process_group`. SLURM is a real one that is started for this if its daemons are
installed; all nodes are this machine.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.paired import Case, measure, rounds, table
from tests.testbed.slurm import SlurmCluster, missing

LIMIT = 120.0  # seconds to the next step
START = 300.0  # seconds to the first one
RANKS = 2
AGE = 15.0  # seconds between the steps and the kill
TOKEN = "RECOVERY_BENCHMARK"  # in the environment of all that a case starts

JOB = """
import os, sys, time
import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification


def main(folder):
    if not dist.is_initialized():  # Ray has made it
        dist.init_process_group("gloo")
    rank, checkpoint = dist.get_rank(), os.path.join(folder, "checkpoint.pt")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    model = torch.nn.parallel.DistributedDataParallel(BertForSequenceClassification(config))
    optimizer = torch.optim.AdamW(model.parameters())
    first = 0
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint)
        first = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    ids = torch.randint(1000, (8, 32))
    steps = range(first + 1, first + 6 if first else 10**6)  # for ever, until somebody kills a rank
    with open(os.path.join(folder, f"{rank}-{os.getpid()}.steps"), "w", buffering=1) as log:
        for step in steps:
            model(input_ids=ids, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            log.write(f"{step} {time.monotonic()}\\n")
            if step % 5 == 0 and rank == 0:
                state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, checkpoint + ".tmp")
                os.replace(checkpoint + ".tmp", checkpoint)


if __name__ == "__main__":
    main(sys.argv[1])
    dist.destroy_process_group()
"""

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
        (folder / "job.py").write_text(JOB)
        (folder / "ray_job.py").write_text(RAY_JOB)
        cases = {
            "launch --cpus 2": [str(scripts / "launch"), "--cpus", str(RANKS), "job.py"],
            "torchrun --max-restarts 3": [
                *(str(scripts / "torchrun"), "--standalone", "--nproc-per-node", str(RANKS), "--max-restarts", "3"),
                "job.py",
            ],
            "Ray Train, FailureConfig(max_failures=3)": [sys.executable, "ray_job.py"],
        }
        runs = {name: killed(name, argv, folder, hung) for name, argv in cases.items()}
        runs["launch --cpus 2, killed at once"] = killed("at once", cases["launch --cpus 2"], folder, hung, age=0.0)
        if to_slurm:
            name, argv = "launch --backend slurm --nodes 2 --cpus 4", [str(scripts / "launch"), "--backend", "slurm"]
            runs[name] = killed(name, [*argv, "--nodes", "2", "--cpus", "4", "job.py"], folder, hung, 4, to_slurm)
        seconds = measure(runs, rounds(7))
    table("kill -9 of one of two ranks, to the next step of both", seconds, "launch --cpus 2")
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


def killed(
    name: str,
    argv: Sequence[str],
    folder: Path,
    hung: Counter[str],
    ranks: int = RANKS,
    variables: Mapping[str, str] | None = None,
    age: float = AGE,
) -> Case:
    """A case: start the job, kill a rank, return the seconds to the next step."""
    chance = random.Random(1)  # the same ranks and steps for every way of starting

    def run() -> float:
        victim, step = chance.randrange(ranks), chance.randint(7, 20)
        with tempfile.TemporaryDirectory(dir=folder) as job, open(Path(job) / "output", "wb") as output:
            environment = os.environ | {TOKEN: job, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
            environment |= variables or {}
            started = subprocess.Popen(
                [*argv, job], cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                seconds = _recover(Path(job), ranks, victim, step, age)
                print(f"{name}: rank {victim} killed at step {step}, {seconds:.2f} s", file=sys.stderr)
                with suppress(subprocess.TimeoutExpired):
                    started.wait(20)
                return seconds
            except TimeoutError as error:
                said = (Path(job) / "output").read_text(errors="replace").strip().splitlines()[-1:]
                print(f"{name}: rank {victim} killed at step {step}: {error} {said}", file=sys.stderr)
                hung[name] += 1
                return LIMIT
            finally:
                _end_all(f"{TOKEN}={job}".encode())
                started.wait()

    return run


def _recover(job: Path, ranks: int, victim: int, step: int, age: float) -> float:
    """Kill rank `victim` `age` seconds after all ranks have done `step`; return the seconds to the next step of all."""
    first = _wait(job, ranks, step, START)
    time.sleep(age)
    killed_at = time.monotonic()
    os.kill(next(pid for rank, pid in first if rank == victim), signal.SIGKILL)
    second = _wait(job, ranks, 1, LIMIT, set(first))
    return max(second.values()) - killed_at


def _wait(
    job: Path, ranks: int, count: int, seconds: float, before: Collection[tuple[int, int]] = ()
) -> dict[tuple[int, int], float]:
    """Wait until every rank has done `count` steps in a process that is not one of `before`.

    Returns the time at which each, as (rank, pid), did the first of its steps.

    Raises:
        TimeoutError: they have not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found: dict[tuple[int, int], float] = {}
        for path in job.glob("*.steps"):
            rank, pid = map(int, path.stem.split("-"))
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if (rank, pid) not in before and len(lines) >= count:
                found[rank, pid] = float(lines[0].split()[1])
        if {rank for rank, _ in found} == set(range(ranks)):
            return found
        time.sleep(0.01)
    raise TimeoutError(f"not {count} steps within {seconds:.0f} s {'after the kill' if before else 'of the start'}")


def _end_all(token: bytes) -> None:
    """Kill what is left of a case: torchrun's and Ray's processes are in sessions of their own."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and token in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)


if __name__ == "__main__":
    main()
