"""The Context of a train/eval function: its rank, and the parts of a training loop that keep the promises of a run."""

from __future__ import annotations

import atexit
import operator
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex, TypeVar

from training.distributed.heartbeat import Heartbeat
from training.distributed.world import World
from training.loop.rank import Rank

if TYPE_CHECKING:
    import torch

    from training.loop.saved import SavedState
    from training.loop.setup import Models
    from training.loop.steps import Steps

M = TypeVar("M", bound="torch.nn.Module")


class Context(Rank):
    """One rank of a run. Use it as a context manager, or call `close`, which ends its process group and threads."""

    _current: ClassVar[Context | None] = None
    latest: ClassVar[Context | None] = None
    """The newest Context of this process, also after it was closed."""

    def __init__(
        self, run_dir: Path, world: World, *, args: tuple[str, ...] = (), heartbeat: Heartbeat | None = None
    ) -> None:
        super().__init__(run_dir, world, args=args, heartbeat=heartbeat)
        Context._current = Context.latest = self

    @classmethod
    def single_process(cls, run_dir: str | Path) -> Context:
        """Return a Context of one process, on its GPU if it has one, for notebooks and plain Python."""
        import torch

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        return cls(run_dir, World(device="cuda" if torch.cuda.is_available() else "cpu", run_id=run_dir.name))

    @classmethod
    def current(cls, run_dir: str | Path | None = None) -> Context:
        """Return the Context of this process, and make it if there is none, from the environment.

        The same program so runs under ``launch``, ``torchrun`` and plain Python. A Context that is made here stops at
        SIGTERM, and is closed when the process exits. Its run directory is `run_dir`, that of ``launch`` if it runs the
        script, or else ``runs/<name of the script>``; started again with the same one, a run continues.
        """
        if cls._current is not None:
            return cls._current
        from training.loop.environment import describe

        folder, world = describe(os.environ, run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        ctx = cls(folder, world)
        atexit.register(ctx.close)
        on_main_thread = threading.current_thread() is threading.main_thread()
        if on_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, _: ctx.request_stop(signal.Signals(number).name))
        return ctx

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _models(self) -> Models:
        from training.loop.setup import Models

        return Models(self)

    def setup(
        self,
        model: M,
        *,
        precision: str = "fp32",
        compile: bool | Mapping[str, Any] = False,  # noqa: A002 - torch's own name
        shard: bool = False,
        find_unused_parameters: bool = False,
    ) -> M | torch.nn.Module:
        """Return `model` ready for training on this rank's device, the same on all ranks. A collective.

        With several ranks it is replicated (DDP), or with `shard` sharded in place (FSDP2); pass the parameters of what is
        returned to the optimizer. All ranks begin with the weights of rank 0.

        Args:
            model: a module, on any device.
            precision: "fp32", or "bf16" or "fp16": the forward pass runs under autocast, and its outputs are float32.
            compile: compile the forward pass; a mapping has options of torch.compile, such as {"dynamic": False}.
            shard: shard the parameters over the ranks in place of replicating them.
            find_unused_parameters: the loss does not depend on all parameters; as in DDP.

        Raises:
            ConfigError: the device does not support the precision or sharding.
            DeviceError: the device is missing or cannot be used.
        """
        return self._models.prepare(
            model,
            precision=precision,
            compile_model=compile,
            shard=shard,
            find_unused_parameters=find_unused_parameters,
        )

    def steps(self, data: Any, collate: Callable[[list[Any]], Any] | None = None, **options: Any) -> Steps:
        """Return the optimizer steps over `data`; `options` are those of `training.loop.steps.Steps`. A collective."""
        from training.loop.steps import Steps

        return Steps(self, self._models, data, collate, **options)

    def state(
        self,
        *,
        keep: int = 2,
        mirror: str = "",
        overlap: bool = False,
        files: Mapping[str, Any] | None = None,
        **items: Any,
    ) -> SavedState:
        """Return the state of this run, to restore and to save: `items` by name, and the generators of every rank.

        An item is anything with `state_dict` and `load_state_dict`. The states of models, optimizers, learning-rate
        schedulers and `ctx.steps` are those of rank 0; of other items, such as loaders, each rank saves its own. For the
        options see `training.loop.saved.SavedState`.
        """
        from training.loop.saved import SavedState

        return SavedState(self, items, keep=keep, mirror=mirror, overlap=overlap, files=files)

    def should_stop(
        self,
        step: SupportsIndex,
        *,
        save: SavedState | None = None,
        every: int | None = None,
        seconds: float | None = None,
    ) -> bool:
        """Return whether all ranks stop now, the same answer on every rank. A collective, to call after each step.

        With `save` the state is saved every so many steps (`every`) or `seconds`, before the run stops, and at the last
        step of `ctx.steps`, at which a run does not stop any more. The request of one step is agreed at the next.
        """
        number = operator.index(step)
        last = bool(getattr(step, "is_last", False))
        if last:
            self.heartbeat.beat(number)
        stop = self.vote_to_stop(number) if not last else self.stopped
        if save is not None:
            save.save_if_due(number, must=stop or last, every=every, seconds=seconds)
        return stop

    def evaluate(
        self, predict: Callable[[Any], Any], data: Any, metric: Callable[..., Any], *,
        collate: Callable[[list[Any]], Any] | None = None, batch_size: int = 32, lengths: Sequence[int] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the metric over every sample of `data` once, and their number as "samples". A collective.

        The result is the same on every rank, and for every number of ranks. Models of `ctx.setup` are in evaluation mode.

        Args:
            predict: takes a batch on the device of the rank, and returns a row for each sample: a tensor, an array, a
                list, or a tuple of these.
            data: a dataset with a length and samples by number, the same on all ranks.
            metric: takes an array for each item of what `predict` returns, of shape (samples, ...) in the order of the
                data; returns a number, or numbers by name. Runs on rank 0.
            collate: makes a batch of a list of samples; that of torch by default.
            batch_size: samples of one call of `predict`.
            lengths: length of each sample; samples of similar length are then evaluated together, which saves padding.

        Raises:
            ConfigError: the dataset is a stream, or `predict` returns another number of rows.
        """
        from training.loop.evaluation import evaluate

        return evaluate(
            self, self._models, predict, data, metric, collate=collate, batch_size=batch_size, lengths=lengths
        )

    def close(self) -> None:
        """Finish the save, the votes and the lines in progress and leave the group. May be called twice.

        Raises OSError if lines cannot be written because the disk is full.
        """
        if Context._current is self:
            Context._current = None
        super().close()
