"""Time from the command to the first optimizer step of two local ranks: ``python -m benchmarks.first_step [ROUNDS]``.

The script imports torch, transformers, accelerate and datasets, builds a small BERT and takes one step under DDP. Every
way of starting it runs the same file; the time ends when rank 0 has taken its step.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.paired import Case, measure, rounds, table
from launcher.agent.network import reserve_port

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


def main() -> None:
    scripts = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "job.py").write_text(SCRIPT)
        stamp = folder / "stamp"
        job = [str(folder / "job.py"), str(stamp)]

        def timed(start: list[str]) -> Case:
            def run() -> float:
                return _until_step(
                    stamp, lambda: subprocess.run([*start, *job], cwd=folder, check=True, capture_output=True)
                )

            return run

        def bare() -> float:
            return _until_step(stamp, lambda: _bare(job, folder))

        env = [str(scripts / "accelerate"), "launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
        cases: dict[str, Case] = {
            "launch --cpus 2": timed([str(scripts / "launch"), "--cpus", "2"]),
            "bare processes, environment preset": bare,
            "torchrun --nproc-per-node 2": timed([str(scripts / "torchrun"), "--nproc-per-node", "2"]),
            # `--cpu --num_processes 2` starts one process, so it has half of the work; there is no flag for two.
            "accelerate launch --cpu (one process)": timed([*env, "--mixed_precision", "no", "--dynamo_backend", "no"]),
        }
        table("Time to the first step, 2 ranks on this machine", measure(cases, rounds(7)), "launch --cpus 2")


def _until_step(stamp: Path, start: object) -> float:
    """Seconds from the start of `start` to the step; the job is awaited to its end, which is not counted."""
    stamp.unlink(missing_ok=True)
    started = time.time()
    assert callable(start)
    start()
    return float(stamp.read_text()) - started


def _bare(job: list[str], folder: Path) -> None:
    """The least that starts two ranks: two processes with torchrun's variables."""
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
                [sys.executable, *job],
                cwd=folder,
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        assert [rank.wait() for rank in ranks] == [0, 0]


if __name__ == "__main__":
    main()
