"""Run a loop with an `Accelerator` inside a run: heartbeats, metrics, the agreed stop, whole checkpoints, exact order.

model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
run = attach(accelerator, every=500)
run.restore()
for epoch in run.epochs(3):
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            ...
        run.log(loss=loss)
        if run.should_stop():
            break

checkpoint-500/
  model.safetensors  optimizer.bin ...   written by `Accelerator.save_state`, in part with pickle
  position.json                          step, epoch, samples used in it, number of ranks
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import BatchSampler, RandomSampler

from training.context import Context
from training.distributed.random_state import mixed_seed
from training.errors import ConfigError
from training.files import parse_json, read_plain
from training.integrations.sealed import Schedule, load_generators, newest, save

if TYPE_CHECKING:
    from accelerate import Accelerator

POSITION = "position.json"


def attach(
    accelerator: Accelerator,
    ctx: Context | None = None,
    *,
    every: int | None = None,
    seconds: float | None = None,
    keep: int = 2,
    seed: int = 0,
) -> AcceleratedRun:
    """Return the run of this process, for a loop with `accelerator`.

    Args:
        accelerator: what it has prepared is saved and restored.
        ctx: the Context of a function; by default that of this process (`Context.current`).
        every: steps between two checkpoints; the last step and a stop save, too.
        seconds: seconds between two checkpoints.
        keep: the newest checkpoints that stay.
        seed: the order of the samples in an epoch is a function of (`seed`, epoch).

    Raises:
        ConfigError: the accelerator has another number of processes, or keeps positions or names of checkpoints itself.
    """
    ctx = ctx if ctx is not None else Context.current()
    schedule = Schedule(ctx, "attach", every=every, seconds=seconds, keep=keep)
    if accelerator.num_processes != ctx.world.world_size:
        raise ConfigError(
            f"the Accelerator has {accelerator.num_processes} processes, and the run {ctx.world.world_size}"
        )
    if accelerator.use_stateful_dataloader:
        raise ConfigError("attach keeps the position in the data; leave use_stateful_dataloader out of the Accelerator")
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise ConfigError("attach names checkpoints; leave automatic_checkpoint_naming out of the Accelerator")
    return AcceleratedRun(accelerator, ctx, schedule, seed)


class AcceleratedRun:
    """A loop with an `Accelerator`, as `attach` returns it.

    Attributes:
        step: optimizer steps done since the beginning of the run.
        output_dir: the folder of the checkpoints, `accelerate` in the run directory.
    """

    def __init__(self, accelerator: Accelerator, ctx: Context, schedule: Schedule, seed: int) -> None:
        self.accelerator, self.ctx = accelerator, ctx
        self.output_dir = ctx.run_dir / "accelerate"
        self.step = 0
        self._schedule, self._seed = schedule, seed
        self._epoch = self._epochs = 0
        self._used = 0  # samples of the epoch, over all ranks
        self._size = 0  # samples of the data; 0 if not known
        self._counted: bool | None = None  # whether `should_stop` was called for the present batch
        self._folder: Path | None = None  # the checkpoint whose generators are still to be restored

    def restore(self) -> int:
        """Restore the newest whole checkpoint, the same on all ranks, and return its step; 0 if there is none.

        A collective, to call after `accelerator.prepare`. Raises CheckpointError if all checkpoints are damaged, and
        ConfigError if the seed has changed.
        """
        self._folder = newest(self.ctx, self.output_dir)
        if self._folder is None:
            return 0
        with self.ctx.phase("restoring"):
            position = parse_json(read_plain(self._folder / POSITION))
            if position["seed"] != self._seed:
                raise ConfigError(f"this run began with seed={position['seed']}; use that one, or start a new run")
            self.accelerator.load_state(str(self._folder))
        self.step, self._epoch, self._used = position["step"], position["epoch"], position["used"]
        self._size = position["size"]
        if self.ctx.world.rank == 0:
            print(f"continuing after step {self.step} of {self.ctx.run_dir}", file=sys.stderr)
        return self.step

    def epochs(self, count: int) -> Iterator[int]:
        """The numbers of the epochs that are left of `count`, from 0; ends early if the run stops."""
        self._epochs = count
        while self._epoch < count and not self.ctx.stopped:
            yield self._epoch
            if not self.ctx.stopped:
                self._epoch, self._used = self._epoch + 1, 0
        self.ctx.heartbeat.idle()

    def batches(self, loader: Any) -> Iterator[Any]:
        """The batches of a prepared loader that are left of the present epoch.

        Raises ConfigError if the data has another size than before, or the position lies inside a batch, because the
        number of ranks has changed; `split_batches=True` keeps the global batch.
        """
        size = len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0
        if self._used and size != self._size:
            raise ConfigError(
                f"the data has {size} samples, and this run began with {self._size}; use those, or a new run"
            )
        self._size = size
        done, inside = divmod(self._used, loader.total_batch_size)
        over = bool(size) and self._used >= size
        if inside and not over:
            raise ConfigError(
                f"{self._used} samples of the epoch are used, and a batch of all ranks has {loader.total_batch_size}; go on"
                " with the number of ranks that the run had, or begin it with Accelerator(split_batches=True)"
            )
        self._fix_order(loader)
        left = iter(()) if over else iter(self.accelerator.skip_first_batches(loader, done) if done else loader)
        for batch in self._as_before(left):
            self._used += loader.total_batch_size
            self._counted = False
            yield batch
        self._counted = None

    def log(self, **values: Any) -> None:
        """Add a line to `metrics.jsonl` with the number of the present step; other ranks than 0 write nothing."""
        self.ctx.log(self.step + (self._counted is False), **values)

    def should_stop(self) -> bool:
        """Return whether all ranks stop now, the same answer on every rank. A collective, to call after each batch.

        Counts a step if the optimizer has made one (`accelerator.sync_gradients`), and saves if that is due.
        Raises ConfigError outside of `batches`.
        """
        ctx = self.ctx
        if self._counted is None:
            raise ConfigError("call run.should_stop() inside `for batch in run.batches(loader)`")
        if self._counted or not self.accelerator.sync_gradients:
            ctx.heartbeat.beat()
            return ctx.stopped
        self.step, self._counted = self.step + 1, True
        last = self._epoch + 1 == self._epochs and bool(self.accelerator.gradient_state.end_of_dataloader)
        if last:  # done: a run does not stop any more
            ctx.heartbeat.beat(self.step)
        stop = ctx.stopped if last else ctx.should_stop(self.step)
        if last or self._schedule.due(self.step) or stop:
            self.save()
        return stop

    def save(self) -> None:
        """Save a checkpoint now, after a step. A collective; a failure is recorded and does not raise."""
        self._schedule.restart()
        save(self.ctx, self.output_dir, self.step, self._write, keep=self._schedule.keep)

    def _write(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if self.ctx.world.rank == 0:
            position = {
                "step": self.step,
                "epoch": self._epoch,
                "used": self._used,
                "size": self._size,
                "seed": self._seed,
            }
            (folder / POSITION).write_text(json.dumps(position))

    def _fix_order(self, loader: Any) -> None:
        """Make the order of the samples a function of seed and epoch, the same on all ranks."""
        import torch

        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self._epoch)
        batches = loader.sampler if isinstance(loader.sampler, BatchSampler) else loader.batch_sampler
        while hasattr(batches, "batch_sampler"):  # around that of the user
            batches = batches.batch_sampler
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, RandomSampler) and not hasattr(sampler, "set_epoch"):
            if sampler.generator is None:
                sampler.generator = torch.Generator()
            sampler.generator.manual_seed(mixed_seed(self._seed, self._epoch))

    def _as_before(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`; the generators of a checkpoint are restored after the loader, which draws from them, has begun."""
        folder, self._folder = self._folder, None
        if folder is None:
            yield from batches
            return
        first = list(islice(batches, 1))
        load_generators(self.ctx, folder)
        yield from first
        yield from batches
