"""Run a Lightning Trainer inside a run: heartbeats, metrics, the agreed stop, and checkpoints that are whole.

    run = RunCallback(every=500)
    trainer = Trainer(callbacks=[run], devices=run.devices, num_nodes=run.num_nodes, ...)
    trainer.fit(module, data, ckpt_path=run.newest_checkpoint())

    checkpoint-500/
      lightning.ckpt                 written by Lightning; a folder if the strategy shards the state

Train on `run.loader(data, batch_size=8)`, which keeps its position: with other loaders Lightning begins an epoch again at
its first sample. It pickles its checkpoints.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from training.context import Context
from training.errors import ConfigError
from training.integrations.sealed import Schedule, load_generators, newest, save

FILE = "lightning.ckpt"


class RunCallback(Callback):  # type: ignore[misc]  # the library has no types here
    """Report the steps of a Trainer, log its metrics, stop it when the run is asked to, and save whole checkpoints.

    A stop is agreed by all ranks; a checkpoint is saved before the Trainer ends. The metrics that the module logs, and the
    loss of rank 0, are written every `log_every_n_steps` of the Trainer; those of a validation are under "eval".

    Args:
        ctx: the Context of a function; by default that of this process (`Context.current`).
        every: steps between two checkpoints; the last step and a stop save, too.
        seconds: seconds between two checkpoints.
        keep: the newest checkpoints that stay.

    Attributes:
        output_dir: the folder of the checkpoints, `trainer` in the run directory.
        devices: ranks on this node, for the Trainer.
        num_nodes: for the Trainer.
    """

    def __init__(
        self, ctx: Context | None = None, *, every: int | None = None, seconds: float | None = None, keep: int = 2
    ) -> None:
        self.ctx = ctx if ctx is not None else Context.current()
        self._schedule = Schedule(self.ctx, "RunCallback", every=every, seconds=seconds, keep=keep)
        self.output_dir = self.ctx.run_dir / "trainer"
        self.devices, self.num_nodes = self.ctx.world.local_world_size, self.ctx.world.num_nodes
        self._folder: Path | None = None  # the checkpoint from which this run goes on
        self._step = self._saved = -1
        self._due = self._stop = False  # to do at the end of the epoch, if not before
        self._on_sigterm: Any = None
        self._before: dict[str, Any] = {}

    def newest_checkpoint(self) -> str | None:
        """Return the newest whole checkpoint, the same one on all ranks, for `ckpt_path`; None if there is none.

        A collective. Raises CheckpointError if there are sealed checkpoints and all are damaged.
        """
        self._folder = newest(self.ctx, self.output_dir)
        return str(self._folder / FILE) if self._folder else None

    def loader(self, data: Any, *, batch_size: int, shuffle: bool = True, seed: int = 0, **options: Any) -> Any:
        """Return a loader of this rank's share of `data`, which continues at the exact sample.

        Its order is a function of (`seed`, epoch). As with torch's DistributedSampler, samples of the beginning fill up an
        epoch that the ranks do not divide.

        Args:
            data: a dataset with a length and samples by number, the same on all ranks.
            batch_size: samples of a batch of one rank.
            options: those of `torchdata.stateful_dataloader.StatefulDataLoader`.
        """
        from torchdata.stateful_dataloader import StatefulDataLoader
        from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

        world = self.ctx.world
        sampler = StatefulDistributedSampler(data, world.world_size, world.rank, shuffle=shuffle, seed=seed)
        # Its own generator: it would draw from that of the training when an epoch begins, but not when a run goes on.
        options = {"generator": torch.Generator().manual_seed(seed), **options}
        return StatefulDataLoader(data, batch_size=batch_size, sampler=sampler, **options)

    # ---- hooks of Lightning ---------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check that the Trainer has the ranks of the run. Raises ConfigError."""
        if trainer.world_size != self.ctx.world.world_size:
            raise ConfigError(
                f"the Trainer has {trainer.world_size} ranks, and the run has {self.ctx.world.world_size}; start all of"
                " them with launch or torchrun, and give Trainer(devices=run.devices, num_nodes=run.num_nodes)"
            )
        self._on_sigterm = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the generators of this rank, and the handler of SIGTERM, which asks the run to stop."""
        if threading.current_thread() is threading.main_thread() and callable(self._on_sigterm):
            signal.signal(signal.SIGTERM, self._on_sigterm)  # that of Lightning ends the process without a checkpoint
        if self._folder is not None:
            load_generators(self.ctx, self._folder)
        self._step = self._saved = trainer.global_step
        self._schedule.restart()
        loader = trainer.train_dataloader
        kept = hasattr(loader, "state_dict")
        # It takes the order of another sampler, which each rank draws from its own generator.
        wrapped = (
            type(getattr(getattr(loader, "batch_sampler", None), "sampler", None)).__name__
            == "DistributedSamplerWrapper"
        )
        if (wrapped or not kept) and self.ctx.world.rank == 0:
            what = "has an order that depends on the generator of the rank" if kept else "does not keep its position"
            warnings.warn(
                f"{type(loader).__name__} {what}: a run that goes on inside of an epoch uses some samples twice and"
                " others not; use RunCallback.loader",
                stacklevel=2,
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report progress; after a step log it, save if that is due, and end the training if all ranks stop now."""
        step = trainer.global_step
        if step == self._step:  # gradients are accumulated
            self.ctx.heartbeat.beat()
            return
        self._step = step
        if step % trainer.log_every_n_steps == 0:
            loss = outputs if not isinstance(outputs, Mapping) else outputs.get("loss")
            self.ctx.log(step, **({} if loss is None else {"loss": loss}), **dict(trainer.callback_metrics))
        if _is_last(trainer):  # done: a run does not stop any more, and `on_train_end` saves
            self.ctx.heartbeat.beat(step)
            return
        self._stop = self.ctx.should_stop(step)
        self._due = self._schedule.due(step) or self._stop
        # After the last batch of an epoch the position of the loader is its end: the epoch has to be closed first.
        if self._due and not trainer.is_last_batch:
            self._save(trainer)
            if self._stop:
                trainer.limit_val_batches = 0  # Lightning would validate before it stops
                self._end(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save and stop, if that was decided after the last step of the epoch."""
        if self._due:
            self._save(trainer)
            if self._stop:
                self._end(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Note the metrics before the validation."""
        self._before = dict(trainer.callback_metrics)

    def on_validation_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Report progress inside of a validation."""
        self.ctx.heartbeat.beat()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the metrics of the validation under "eval"."""
        if trainer.sanity_checking:
            return
        found = {name: value for name, value in trainer.callback_metrics.items() if self._before.get(name) is not value}
        if found:
            self.ctx.log(trainer.global_step, eval=found)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step, and report that the training has ended; what follows has no time limit."""
        if not self.ctx.stopped and self._saved != trainer.global_step:
            self._save(trainer)
        self.ctx.heartbeat.idle()

    def _end(self, trainer: Any) -> None:
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None
        trainer.should_stop = True

    def _save(self, trainer: Any) -> None:
        self._due = False
        self._saved = trainer.global_step
        self._schedule.restart()
        write = lambda folder: trainer.save_checkpoint(folder / FILE)  # noqa: E731
        save(self.ctx, self.output_dir, trainer.global_step, write, keep=self._schedule.keep)


def _is_last(trainer: Any) -> bool:
    """Whether the present step is the last one of the training."""
    if trainer.global_step == trainer.max_steps:
        return True
    return bool(trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs)
