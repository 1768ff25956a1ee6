"""The programs that the benchmarks of recovery kill, and how their steps are found."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.launcher.engines import ranks_of

JOB_FOLDER = "JOB"  # in a command: the folder of this run
TOKEN = "RECOVERY_BENCHMARK"  # in the environment of all that a case starts

JOB = """
import os, sys, time
import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification


def main(folder, last=10**6, every=0.0):  # for ever, until somebody kills a rank
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
    saved_at = time.monotonic()
    with open(os.path.join(folder, f"{rank}-{os.getpid()}.steps"), "w", buffering=1) as log:
        for step in range(first + 1, last + 1):
            model(input_ids=ids, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            log.write(f"{step} {time.time()}\\n")
            due = time.monotonic() > saved_at + every if every else step % 5 == 0
            if rank == 0 and (due or step == last):
                saved_at = time.monotonic()
                state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, checkpoint + ".tmp")
                os.replace(checkpoint + ".tmp", checkpoint)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
    dist.destroy_process_group()
"""

FUNCTION = """
import os, sys, time
import torch
from training.context import Context
from transformers import BertConfig, BertForSequenceClassification


def main(ctx: Context, folder: str, max_steps: int | None = None, every: int = 5) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    model = ctx.setup(BertForSequenceClassification(config))
    optimizer = torch.optim.AdamW(model.parameters())
    steps = ctx.steps(list(torch.randint(1000, (1600, 32))), global_batch=16, epochs=10**6, max_steps=max_steps)
    state = ctx.state(model=model, optimizer=optimizer, steps=steps)
    state.restore()
    with open(os.path.join(folder, f"{ctx.world.rank}-{os.getpid()}.steps"), "w", buffering=1) as log:
        for step in steps:
            for ids in step:
                step.backward(model(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.long)).loss)
            optimizer.step()
            optimizer.zero_grad()
            log.write(f"{step.number} {time.time()}\\n")
            if ctx.should_stop(step, save=state, every=every):
                break
"""

REFERENCE = ("training.train:train", "--log-every", "1", "--log-with=")

Steps = dict[tuple[int, int], list[float]]
"""The times of the steps of each process, as (rank, pid), in seconds since 1970."""


def written_steps(job: Path) -> Steps:
    """The steps that the processes of a script or function have written to files in the folder `job`."""
    found = {}
    for path in job.glob("*.steps"):
        rank, pid = map(int, path.stem.split("-"))
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found[rank, pid] = [float(line.split()[1]) for line in lines]
    return found


def logged_steps(job: Path) -> Steps:
    """The steps of the run of the reference job that was started in the folder `job`, counted for each of its ranks."""
    found: Steps = {}
    for run in job.glob("runs/*/metrics.jsonl"):
        records = [json.loads(line) for line in run.read_text().splitlines(keepends=True) if line.endswith("\n")]
        newest = max((record["attempt"] for record in records), default=0)
        times = [record["time"] for record in records if "loss" in record and record["attempt"] == newest]
        for rank, pid in ranks_of(run.parent / "logs" / str(newest)).items():
            found[rank, pid] = times
    return found


def end_all(token: bytes) -> None:
    """Kill what is left of a case: torchrun's and Ray's processes are in sessions of their own."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and token in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
