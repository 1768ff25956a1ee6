"""What a checkpoint of thousands of small tensors costs training: ``python -m benchmarks.many_tensors [ROUNDS]``.

A model of `PARAMETERS` parameters of 64 elements with its AdamW state, about 13,000 tensors on the CPU. Shown are the seconds that
training stands still: for ours with and without `overlap` as each save reports them (the wait before the next update included), for
the peers until their call returns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.paired import Case, measure, rounds, table
from training.context import Context
from training.distributed.world import World

PARAMETERS = 3333
OURS = "ours: state.save beside the next step"


class Job:
    """A model, its optimizer, and a step of training."""

    def __init__(self, ctx: Context, *, overlap: bool) -> None:
        self.model = torch.nn.Module()
        self.model.weights = torch.nn.ParameterList(torch.randn(64) for _ in range(PARAMETERS))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state = ctx.state(model=self.model, optimizer=self.optimizer, overlap=overlap)
        self.checkpoints = ctx.checkpoints
        self._number = 0
        self.step()

    def step(self) -> None:
        for each in self.model.parameters():
            each.grad = torch.ones_like(each)
        self.optimizer.step()

    def saved(self) -> float:
        """Save and take a step; the seconds for which the save held it up."""
        found: list[float] = []
        self.checkpoints.on_saved = lambda checkpoint: found.append(checkpoint.stall_seconds)
        self._number += 1
        self.state.save(self._number)
        self.step()
        self.checkpoints.wait()
        return found[-1]

    def tensors(self) -> list[torch.Tensor]:
        states = self.optimizer.state_dict()["state"].values()
        return [*self.model.state_dict().values(), *(value for fields in states for value in fields.values())]


def main() -> None:
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            Context(folder / "overlap", World(threads=threads)) as beside,
            Context(folder / "wait", World(threads=threads)) as first,
        ):
            jobs = Job(beside, overlap=True), Job(first, overlap=False)
            peer = folder / "peer.pt"

            def timed(work: Callable[[], object]) -> Case:
                def run() -> float:
                    jobs[0].step()
                    started = time.perf_counter()
                    work()
                    return time.perf_counter() - started

                return run

            def plain() -> None:
                state = {"model": jobs[0].model.state_dict(), "optimizer": jobs[0].optimizer.state_dict()}
                torch.save(state, peer)

            ways = {
                OURS: jobs[0].saved,
                "ours: state.save, copied first": jobs[1].saved,
                "torch.save": timed(plain),
                "copying the state, clone()": timed(lambda: [tensor.clone() for tensor in jobs[0].tensors()]),
            }
            seconds = measure(ways, rounds(15))
            count = len(jobs[0].tensors())
            table(f"Training blocked by one checkpoint of {count:,} tensors (torch {version('torch')})", seconds, OURS)
        shutil.rmtree(folder / "overlap")


if __name__ == "__main__":
    main()
