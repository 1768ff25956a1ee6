"""The state of a user's function that checkpoints hold: everything with a state_dict, and the generators of every rank.

step-000000500/
  model.safetensors  optimizer.safetensors   tensors of each item, by path
  loader@00001.safetensors                   those of one rank, if its state differs from the states of the others
  rng.safetensors                            generators, as <rank>.<name>
  config.json                                the content of each of `files`
  state.json                                 step, number of ranks, and the rest of each item
"""

from __future__ import annotations

import operator
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex

from training.checkpoints.manifest import is_plain_name
from training.distributed.random_state import mixed_seed
from training.errors import CheckpointError, ConfigError
from training.loop.agreed import Finder
from training.loop.capture import capture, restore
from training.loop.items import is_sharded
from training.loop.steps import Steps

if TYPE_CHECKING:
    from training.checkpoints.mirror import Mirror
    from training.loop.rank import Rank

RESERVED = ("rng", "state")


class SavedState:
    """What a run saves and restores, as `Context.state` returns it.

    Args:
        items: anything with `state_dict` and `load_state_dict`, by name; restored in this order.
        keep: newest checkpoints that stay, besides the best.
        mirror: a store to which checkpoints are copied, and from which a run without them continues: any URI of fsspec, such
            as s3://bucket/folder. Nodes that share no disk need one.
        overlap: training goes on while the state is copied to host memory, and the next update waits for the copy.
            Parameters and the state of optimizers must then be changed by the `step` of a saved optimizer only.
        files: JSON values by file name, such as the config.json of the model, that each checkpoint holds besides.

    Attributes:
        step: the step of the newest save or restore, or the number of steps done if there are `Steps` among the items.
    """

    def __init__(
        self,
        rank: Rank,
        items: dict[str, Any],
        *,
        keep: int = 2,
        mirror: str = "",
        overlap: bool = False,
        files: Mapping[str, Any] | None = None,
    ) -> None:
        import torch

        if keep < 1:
            raise ConfigError(f"ctx.state: keep={keep} must be 1 or more")
        for name, item in items.items():
            if name in RESERVED:
                raise ConfigError(f"ctx.state: an item cannot have the name {name!r}; use another one")
            if not all(callable(getattr(item, method, None)) for method in ("state_dict", "load_state_dict")):
                raise ConfigError(f"ctx.state: {name} ({type(item).__name__}) has no state_dict and load_state_dict")
        self._files = dict(files or {})
        for name in self._files:
            if not name.endswith(".json") or not is_plain_name(name) or name.removesuffix(".json") in RESERVED:
                raise ConfigError(f"ctx.state: {name!r} cannot be one of `files`; give the name of a .json file")
        optimizers = [item for item in items.values() if isinstance(item, torch.optim.Optimizer)]
        if overlap and not optimizers:
            raise ConfigError(
                "ctx.state: overlap=True needs an optimizer among the items, whose updates wait for the copy"
            )
        self._rank, self._items, self._overlap = rank, items, overlap
        self._sharded = any(is_sharded(item) for item in items.values())
        self._step = 0
        self._saved: int | None = None
        self._saved_at = time.monotonic()
        rank.checkpoints.keep = keep
        self._finder = Finder(rank, _open_mirror(rank, mirror, keep) if mirror else None)
        for optimizer in optimizers if overlap else ():
            optimizer.register_step_pre_hook(lambda *_: rank.checkpoints.wait_for_copy())

    @property
    def step(self) -> int:
        """Steps done since the beginning of the run."""
        return max([self._step, *(item.number for item in self._items.values() if isinstance(item, Steps))])

    # ---- restore --------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Restore the newest intact checkpoint, the same on all ranks, and return its step; 0 if there is none.

        The generators of each rank are restored, too. If there is no checkpoint, or one of another number of ranks, the
        ranks get generators that differ from rank to rank, so that dropout does; without a checkpoint rank 0 keeps its own.
        A collective.

        Raises:
            CheckpointError: all checkpoints are damaged, a node does not see the checkpoint, or it is of other items.
            ConfigError: the data, seed or global batch of the run have changed, or the mirror cannot be read.
        """
        import torch

        rank = self._rank
        with rank.phase("restoring"):
            parts = self._finder.newest()
            if parts is None:
                if rank.world.rank:
                    rank.runtime.seed(mixed_seed(torch.initial_seed(), rank.world.rank))
                return 0
            restore(rank, self._items, parts)
        self._step = self._saved = parts["state.json"]["step"]
        if rank.world.rank == 0:
            rank.note_resumed(self._step)
            print(f"continuing after step {self._step} of {rank.run_dir}", file=sys.stderr)
        return self._step

    # ---- save -----------------------------------------------------------------------------------------------------

    def save(self, step: SupportsIndex | None = None, *, score: float | None = None, wait: bool = False) -> None:
        """Save a checkpoint of the present state, to call after the update of a step. A collective.

        Returns when the state is copied to host memory; the files are written while training goes on. With `wait`, it
        returns when the checkpoint is committed, or has failed. A save that fails does not raise: it is the event
        `save-failed`, a line on stderr, and an entry of `ctx.failed_saves`; earlier checkpoints stay. Of checkpoints with
        a `score` (higher is better) the best one is kept. Raises ReplicaError, on all ranks, if `ctx.steps` is among the items
        and the models of the ranks differ after the first update.
        """
        rank = self._rank
        number = self._step = self.step if step is None else operator.index(step)
        started_at = self._saved_at = time.monotonic()
        self._saved = number
        for item in self._items.values():
            if isinstance(item, Steps):
                item.check_ranks()  # what differs from rank to rank is not saved
        in_parts = self._sharded and self._finder.one_disk
        with rank.phase("saving"):
            try:
                parts, problem = capture(rank, self._items, number, in_parts=in_parts, overlap=self._overlap), None
            except CheckpointError as error:
                parts, problem = None, error
            try:
                if problem is not None and rank.world.rank == 0:
                    raise problem
                if parts:
                    part = (rank.world.rank, rank.world.world_size if in_parts else 1)
                    rank.checkpoints.save(
                        number, parts if rank.world.rank else parts | self._files, score=score, wait=wait, part=part,
                        started_at=started_at, later=self._overlap,
                    )  # fmt: skip
            except Exception as error:
                rank.note_failed_save(number, error)
            if wait:
                self.wait()

    def wait(self) -> None:
        """Return when the newest save is committed or has failed, on all ranks. A collective."""
        self._rank.checkpoints.wait()
        self._rank.group.barrier()

    def save_if_due(self, step: int, *, must: bool, every: int | None, seconds: float | None) -> None:
        """Save if the state `must` be saved, or `every` so many steps or `seconds`; once for each step. A collective."""
        due = must or (every is not None and step % every == 0)
        single = self._rank.world.world_size == 1
        if seconds is not None:  # by the clock of rank 0; other ranks read it at the next step
            due = (self._late(seconds) if single else self._rank.read_vote("save")) or due
        if due and self._saved != step:
            self.save(step)
        if seconds is not None and not single:
            self._rank.post_vote("save", self._rank.world.rank == 0 and self._late(seconds))

    def _late(self, seconds: float) -> bool:
        return time.monotonic() - self._saved_at >= seconds


def _open_mirror(rank: Rank, uri: str, keep: int) -> Mirror:
    from training.checkpoints.mirror import Mirror

    mirror = rank.mirror = Mirror(uri, rank.run_dir.name, keep=keep)
    mirror.on_damaged = rank.checkpoints.on_damaged
    mirror.on_mirrored = lambda step: rank.event("mirrored", step=step)
    mirror.on_failed = lambda step, error: rank.event("mirror-failed", step=step, error=str(error))
    return mirror
