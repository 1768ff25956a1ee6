"""Time from the command to the first optimizer step of two local ranks: ``python -m benchmarks.first_step [ROUNDS]``.

Three programs: a script that imports torch, transformers, accelerate and datasets and takes one step of a small BERT under
DDP; the same model in a function with a Context; and the reference job, of which the time includes the tokenised data.
Every way of starting a program runs the same file; the time ends when rank 0 has taken its step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paired import Case, measure, rounds, table
from launcher.agent.network.addresses import reserve_port

SCRIPT = """
import os, sys, time
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig

state = PartialState(cpu=True)
config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
model = AutoModelForSequenceClassification.from_config(config)
if state.num_processes > 1:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.randint(1000, (8, 32))
model(input_ids=ids, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
optimizer.step()
if state.is_main_process:
    with open(sys.argv[1], "w") as file:
        file.write(str(time.time()))
state.destroy_process_group()
"""


FUNCTION = """
import sys, time
import torch
from datasets import Dataset
from training.context import Context
from transformers import AutoModelForSequenceClassification, BertConfig


def main(ctx: Context, stamp: str) -> None:
    config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    model = ctx.setup(AutoModelForSequenceClassification.from_config(config))
    optimizer = torch.optim.AdamW(model.parameters())
    steps = ctx.steps(list(torch.randint(1000, (16, 32))), global_batch=16, epochs=1)
    state = ctx.state(model=model, optimizer=optimizer, steps=steps)
    state.restore()
    for step in steps:
        for ids in step:
            step.backward(model(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.long)).loss)
        optimizer.step()
        if ctx.world.rank == 0:
            with open(stamp, "w") as file:
                file.write(str(time.time()))


if __name__ == "__main__":
    main(Context.current(), sys.argv[1])
"""

REFERENCE = ("--max-steps", "1", "--log-every", "1", "--log-with=")


@dataclass(frozen=True)
class Program:
    """How a program is named for each way of starting it, and where the time of its first step is found."""

    launch: Sequence[str]
    python: Sequence[str]
    stepped: Callable[[], float]
    """The time of the step, in seconds since 1970."""


def main() -> None:
    scripts = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (title, program) in enumerate(_programs(folder).items()):
            ours = f"launch --cpus 2, {title}"
            cases: dict[str, Case] = {
                ours: _timed([str(scripts / "launch"), "--cpus", "2", *program.launch], folder, program),
                f"bare processes, {title}": _bare(program, folder),
                f"torchrun, {title}": _timed(
                    [str(scripts / "torchrun"), "--nproc-per-node", "2", *program.python], folder, program
                ),
            }
            if number == 0:
                # `--cpu --num_processes 2` starts one process, so it has half of the work; there is no flag for two.
                env = [str(scripts / "accelerate"), "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
                env += ["--mixed_precision", "no", "--dynamo_backend", "no"]
                cases["accelerate launch --cpu (one process)"] = _timed([*env, *program.python], folder, program)
            table(f"Time to the first step, {title}, 2 ranks on this machine", measure(cases, rounds(7)), ours)


def _programs(folder: Path) -> Mapping[str, Program]:
    for name, text in (("job.py", SCRIPT), ("fit.py", FUNCTION)):
        (folder / name).write_text(text)
    stamp = folder / "stamp"

    def stamped() -> float:
        try:
            return float(stamp.read_text())
        finally:
            stamp.unlink(missing_ok=True)

    def logged() -> float:
        """Of the newest run of the reference job."""
        logs = [*folder.glob("runs/*/metrics.jsonl"), *folder.glob("bare-run/metrics.jsonl")]
        newest = max(logs, key=lambda path: path.stat().st_mtime_ns)
        return float(json.loads(newest.read_text().splitlines()[0])["time"])

    bare = str(folder / "bare-run")
    return {
        "a script": Program(["job.py", str(stamp)], ["job.py", str(stamp)], stamped),
        "a function": Program(["fit:main", "--stamp", str(stamp)], ["fit.py", str(stamp)], stamped),
        "the reference job": Program(
            ["training.train:train", *REFERENCE], ["-m", "training", bare, *REFERENCE], logged
        ),
    }


def _timed(argv: Sequence[str], folder: Path, program: Program) -> Case:
    def start() -> None:
        subprocess.run(argv, cwd=folder, check=True, capture_output=True)

    return _until_step(start, folder, program)


def _until_step(start: Callable[[], None], folder: Path, program: Program) -> Case:
    """Seconds from `start` to the step; the job is awaited to its end, which is not counted."""

    def run() -> float:
        for old in ("bare-run", "runs"):  # else the reference job or the function would resume
            shutil.rmtree(folder / old, ignore_errors=True)
        started = time.time()
        start()
        return program.stepped() - started

    return run


def _bare(program: Program, folder: Path) -> Case:
    """The least that starts two ranks: two processes with torchrun's variables."""

    def start() -> None:
        with reserve_port("127.0.0.1") as holder:
            port = str(holder.getsockname()[1])
            common = os.environ | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "WORLD_SIZE": "2",
                "OMP_NUM_THREADS": "1",
            }
            ranks = [
                subprocess.Popen(
                    [sys.executable, *program.python],
                    cwd=folder,
                    env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for rank in range(2)
            ]
            if [rank.wait() for rank in ranks] != [0, 0]:
                raise RuntimeError(f"{program.python} failed")

    return _until_step(start, folder, program)


if __name__ == "__main__":
    main()
