"""What a checkpoint costs training: ``python -m benchmarks.checkpoint_stall [ROUNDS] [--every S] [--total S] [--folder DIR]``.

The model is a BERT of 6 layers x 384 with random weights, its AdamW state filled by one step, on the CPU.

First table: seconds that training stands still for one checkpoint. Ours is `state.save` as the reference job calls it,
and the wait before the next update where the copy of the state, which is made beside the next forward and backward
pass, is not done by then. As that copy takes time of the cores, a row has what the whole next step took longer as well.
Another has the seconds until that checkpoint is committed, while training would go on. The peers write the same
tensors, into a new folder each time; as they come, they leave it to the kernel when that reaches the disk, and in one
row the files are fsynced, as ours are. Before each case the disk is quiet (earlier saves finished and synced), the files
of the case before are gone, and training takes a step.

Second table: samples per second of one training loop, with a checkpoint at the start of every stretch of `--every`
seconds and without, stretches in turn (A B B A ...) until each way has had `--total` seconds. `--total 0` leaves it out.
The machine's speed drifts by more than a checkpoint costs, so the loss is also added up from the stall and from what
the steps took longer while the checkpoint was written; that figure compares steps of the same stretch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.paired import Case, measure, table
from training.bert.tokens import quiet
from training.context import Context
from training.distributed.world import World
from training.reporting.trackers import make_accelerator

if TYPE_CHECKING:
    import torch

BATCH, TOKENS = 8, 64
OURS = "ours: until training goes on"


class Batches:
    """Made-up batches, each as one sample."""

    def __init__(self) -> None:
        import torch

        self._batches = [
            {
                "input_ids": torch.randint(30522, (BATCH, TOKENS)),
                "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.int64),
                "labels": torch.randint(2, (BATCH,)),
            }
            for _ in range(16)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return self._batches[number]


class Job:
    """The loop of the reference job with made-up batches."""

    def __init__(self, ctx: Context) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, BertConfig

        quiet()
        ctx.seed(42)
        shape = BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        self.model = ctx.setup(AutoModelForSequenceClassification.from_config(shape))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=5e-5, fused=True)
        self.accelerator = make_accelerator(ctx)  # for its way to save
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)
        self.accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        steps = ctx.steps(Batches(), lambda batches: batches[0], global_batch=1, epochs=1_000_000)
        self.state = ctx.state(model=self.model, optimizer=self.optimizer, steps=steps, overlap=True)
        self.checkpoints = ctx.checkpoints
        self.failures: list[str] = []
        self.checkpoints.on_failed = lambda step, error: self.failures.append(f"step {step}: {error}")
        self._number = 0
        self._steps = iter(steps)
        self.model.train()
        self.step()

    def step(self) -> None:
        """One optimizer step."""
        step = next(self._steps)
        for batch in step:
            step.backward(self.model(**batch).loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self) -> None:
        """A checkpoint, as the reference job makes it; every one has a number of its own."""
        self._number += 1
        self.state.save(self._number)

    def settle(self) -> None:
        """Return when nothing is left to write. RuntimeError where a save has failed: nothing measured would count."""
        self.checkpoints.wait()
        os.sync()
        if self.failures:
            raise RuntimeError(f"checkpoints could not be written: {self.failures}")

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of model and optimizer."""
        import torch

        states = self.optimizer.state_dict()["state"].values()
        moments = [value for fields in states for value in fields.values() if isinstance(value, torch.Tensor)]
        return [*(tensor.detach() for tensor in self.model.state_dict().values()), *moments]


def cases(job: Job, folder: Path) -> dict[str, Case]:
    """Each way to save once: the seconds until its call returns."""
    import torch

    peer = folder / "peer"
    kept = [torch.empty_like(tensor) for tensor in job.tensors()]

    saved: list[float] = []
    job.checkpoints.on_saved = lambda checkpoint: saved.append(checkpoint.stall_seconds)

    def blocked() -> float:
        job.settle()
        job.step()
        job.save()
        job.step()
        job.checkpoints.wait()
        return saved[-1]

    def longer() -> float:
        job.settle()
        job.step()
        moments = [time.perf_counter()]
        job.step()
        moments.append(time.perf_counter())
        job.save()
        job.step()
        moments.append(time.perf_counter())
        usual, beside = (after - before for before, after in pairwise(moments))
        return beside - usual

    def timed(work: Callable[[], object], then: Callable[[], object] = lambda: None) -> Case:
        def run() -> float:
            shutil.rmtree(peer, ignore_errors=True)
            peer.mkdir()
            job.settle()
            job.step()
            started = time.perf_counter()
            work()
            then()
            return time.perf_counter() - started

        return run

    def copy() -> None:
        for buffer, tensor in zip(kept, job.tensors(), strict=True):
            buffer.copy_(tensor)

    def save_state() -> None:
        job.accelerator.save_state(str(peer / "state"))

    def sync() -> None:
        for file in (peer / "state").iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    def plain() -> None:
        state = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}
        torch.save(state, peer / "state.pt")

    return {
        OURS: blocked,
        "ours: and what the next step took longer": longer,
        "ours: until committed": timed(job.save, job.checkpoints.wait),
        "Accelerator.save_state": timed(save_state),
        "Accelerator.save_state, fsynced": timed(save_state, sync),
        "torch.save": timed(plain),
        "copying the state, into kept memory": timed(copy),
        "copying the state, clone()": timed(lambda: [tensor.clone() for tensor in job.tensors()]),
    }


@dataclass
class Stretch:
    """What one stretch of the loop has done. `during` and `after`: seconds of steps while a save was written, and not."""

    samples: int = 0
    seconds: float = 0.0
    stall: float = 0.0
    during: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.samples / self.seconds

    @property
    def lost(self) -> float:
        """The share of the time that the save took: its stall, and what the steps beside it took longer."""
        usual = statistics.median(self.after or self.during)
        return (self.stall + sum(self.during) - usual * len(self.during)) / self.seconds


def train_for(job: Job, seconds: float, *, save: bool) -> Stretch:
    """Train for so many seconds (the last step is finished), after a checkpoint if `save`."""
    job.settle()
    job.step()  # what the settling has cooled down
    stretch = Stretch()
    number = job._number + 1
    target = job.checkpoints.folder / f"step-{number:09d}"
    began = now = time.perf_counter()
    if save:
        job.save()
        now = time.perf_counter()
        stretch.stall = now - began
    writing = save
    while now - began < seconds:
        job.step()
        before, now = now, time.perf_counter()
        (stretch.during if writing else stretch.after).append(now - before)
        writing = writing and not target.exists()
        stretch.samples += BATCH
    stretch.seconds = now - began
    return stretch


def throughput(job: Job, every: float, total: float, versions: str) -> None:
    """The second table."""
    rounds = max(1, round(total / every))
    found: dict[bool, list[Stretch]] = {True: [], False: []}
    for number in range(rounds):
        for save in (False, True) if number % 2 == 0 else (True, False):
            found[save].append(train_for(job, every, save=save))
    job.settle()
    print(
        f"\nThroughput with one checkpoint every {every:g} s ({versions})\n"
        f"{rounds} stretches each way, in turn; batch {BATCH} x {TOKENS} tokens; {conditions()}\n"
    )
    print(f"{'':<44} {'samples/s':>9} {'min':>8} {'max':>8}   with / without")
    ratios = [one.rate / other.rate for one, other in zip(found[True], found[False], strict=True)]
    for save, name in ((True, "with checkpoints"), (False, "without")):
        rates = [stretch.rate for stretch in found[save]]
        ratio = f"{statistics.median(ratios):.4f}" if save else ""
        print(f"{name:<44} {statistics.median(rates):>9.2f} {min(rates):>8.2f} {max(rates):>8.2f}   {ratio}")
    saves = found[True]
    spread = _percent([ratio - 1 for ratio in ratios])
    print(f"\nchange of throughput, stretch by stretch: {spread}")
    print(f"lost by stall and slower steps while writing: {_percent([stretch.lost for stretch in saves])}")
    print(
        f"stall {statistics.median(stretch.stall for stretch in saves):.3f} s; steps beside the writer "
        f"{statistics.median(len(stretch.during) for stretch in saves):g} a checkpoint"
    )


def _percent(shares: Sequence[float]) -> str:
    return f"median {statistics.median(shares):.2%}, from {min(shares):.2%} to {max(shares):.2%}"


def conditions() -> str:
    """The machine and the day."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=7, help="rounds of the first table")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two checkpoints")
    parser.add_argument("--total", type=float, default=120.0, help="seconds of training each way")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of an operation")
    parser.add_argument("--folder", type=Path, help="where to write; by default the system's temporary folder")
    args = parser.parse_args()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "accelerate", "transformers"))

    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        with Context(folder, World(threads=args.threads)) as ctx:
            job = Job(ctx)
            ways = cases(job, folder)
            first = ways[OURS]()
            size = sum(tensor.nbytes for tensor in job.tensors()) / 1e6
            seconds = measure(ways, args.rounds)
            title = f"Training blocked by one checkpoint of {size:.0f} MB, {args.threads} threads ({versions})"
            table(title, seconds, OURS)
            print(f"\nthe first save of a run, which has no memory for the copy yet: {first:.3f} s")
            shutil.rmtree(folder / "peer")
            if args.total:
                throughput(job, args.every, args.total, versions)
            job.settle()


if __name__ == "__main__":
    main()
