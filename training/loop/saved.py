"""The state of a user's function that checkpoints hold: everything with a state_dict, and the generators of every rank.

step-000000500/
  model.safetensors  optimizer.safetensors   tensors of each item, by path
  loader@00001.safetensors                   those of one rank, if its state differs from the states of the others
  rng.safetensors                            generators, as <rank>.<name>
  state.json                                 step, number of ranks, and the rest of each item
"""

from __future__ import annotations

import operator
import time
from typing import TYPE_CHECKING, Any, SupportsIndex

from training.checkpoints.tree import decode, encode
from training.distributed.random_state import mixed_seed
from training.errors import CheckpointError, ConfigError
from training.loop.agreed import newest_parts
from training.loop.items import digest, is_replicated, on_cpu, put_back, state_of
from training.loop.steps import Steps

if TYPE_CHECKING:
    import torch

    from training.loop.items import Encoded
    from training.loop.rank import Rank

RESERVED = ("rng", "state")


class SavedState:
    """What a run saves and restores, as `Context.state` returns it.

    Attributes:
        step: the step of the newest save or restore, or the number of steps done if there are `Steps` among the items.
    """

    def __init__(self, rank: Rank, items: dict[str, Any], *, keep: int = 2) -> None:
        if keep < 1:
            raise ConfigError(f"ctx.state: keep={keep} must be 1 or more")
        for name, item in items.items():
            if name in RESERVED:
                raise ConfigError(f"ctx.state: an item cannot have the name {name!r}; use another one")
            if not all(callable(getattr(item, method, None)) for method in ("state_dict", "load_state_dict")):
                raise ConfigError(f"ctx.state: {name} ({type(item).__name__}) has no state_dict and load_state_dict")
        self._rank, self._items = rank, items
        self._step = 0
        self._saved: int | None = None
        self._saved_at = time.monotonic()
        rank.checkpoints.keep = keep

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
            ConfigError: the data, seed or global batch of the run have changed.
        """
        import torch

        rank = self._rank
        with rank.phase("restoring"):
            parts = newest_parts(rank)
            if parts is None:
                if rank.world.rank:
                    rank.runtime.seed(mixed_seed(torch.initial_seed(), rank.world.rank))
                return 0
            saved = parts["state.json"]
            if (strange := sorted(saved["items"].keys() ^ self._items.keys())) != []:
                raise CheckpointError(
                    f"the checkpoint of step {saved['step']} holds {', '.join(sorted(saved['items']))}, and ctx.state was"
                    f" given {', '.join(sorted(self._items))}; {strange[0]} is in one of them only. Use the same names, or"
                    " start a new run"
                )
            for name, item in self._items.items():
                self._restore_item(name, item, parts)
            self._restore_generators(parts)
        self._step = self._saved = saved["step"]
        if rank.world.rank == 0:
            rank.note_resumed(self._step)
        return self._step

    def _restore_item(self, name: str, item: Any, parts: dict[str, Any]) -> None:
        rank, saved = self._rank, parts["state.json"]
        file, tree = name, saved["items"][name]
        if len(tree) > 1:
            if len(tree) != rank.world.world_size:
                raise CheckpointError(
                    f"the state of {name} differs from rank to rank, and it was saved by {len(tree)} ranks; resume with"
                    f" that number of ranks, and not {rank.world.world_size}"
                )
            file, tree = f"{name}@{rank.world.rank:05d}", [tree[rank.world.rank]]
        state = decode(tree[0], parts.get(f"{file}.safetensors", {}), rank.device)
        try:
            put_back(item, state)
        except ConfigError:
            raise
        except Exception as error:
            raise CheckpointError(f"{name} does not take the state of step {saved['step']}: {error}") from error

    def _restore_generators(self, parts: dict[str, Any]) -> None:
        rank, saved = self._rank, parts["state.json"]
        states: dict[str, dict[str, torch.Tensor]] = {}
        for full, tensor in parts["rng.safetensors"].items():
            owner, _, name = full.partition(".")
            states.setdefault(owner, {})[name] = tensor
        if len(states) == rank.world.world_size:
            rank.runtime.set_rng_state(states[str(rank.world.rank)])
        else:
            words = states["0"]["torch"].numpy().tobytes()
            rank.runtime.seed(mixed_seed(words, saved["step"], rank.world.rank))

    # ---- save -----------------------------------------------------------------------------------------------------

    def save(self, step: SupportsIndex | None = None, *, score: float | None = None, wait: bool = False) -> None:
        """Save a checkpoint of the present state, to call after the update of a step. A collective.

        Returns when the state is copied to host memory; the files are written while training goes on. With `wait`, it
        returns when the checkpoint is committed, or has failed. A save that fails does not raise: it is the event
        `save-failed`, a line on stderr, and an entry of `ctx.failed_saves`; earlier checkpoints stay. Of checkpoints with
        a `score` (higher is better) the best one is kept.
        """
        rank = self._rank
        number = self._step = self.step if step is None else operator.index(step)
        started_at = self._saved_at = time.monotonic()
        self._saved = number
        with rank.phase("saving"):
            try:
                parts, problem = self._gather(number), None
            except CheckpointError as error:
                parts, problem = None, error
            if rank.world.rank == 0:
                try:
                    if problem is not None:
                        raise problem
                    assert parts is not None
                    rank.checkpoints.save(number, parts, score=score, wait=wait, started_at=started_at)
                except Exception as error:
                    rank.note_failed_save(number, error)
            if wait:
                rank.group.barrier()

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

    def _gather(self, step: int) -> dict[str, Any]:
        """The files of a checkpoint, complete on rank 0. Raises CheckpointError, on all ranks, if one rank cannot."""
        rank = self._rank
        encoded: dict[str, Encoded] = {}
        problem = ""
        try:
            for name, item in self._items.items():
                if rank.world.rank == 0 or not is_replicated(item):
                    encoded[name] = encode(state_of(item), name)
            generators = rank.runtime.rng_state()
        except Exception as error:
            problem, generators = f"{type(error).__name__}: {error}", {}
        own = {name: digest(each) for name, each in encoded.items() if not is_replicated(self._items[name])}
        ranks = rank.group.gather((problem, generators, own))
        for number, (text, _, _) in enumerate(ranks):
            if text:
                raise CheckpointError(f"rank {number}: {text}" if len(ranks) > 1 else text)
        parts: dict[str, Any] = {
            "rng.safetensors": {
                f"{number}.{name}": tensor for number, each in enumerate(ranks) for name, tensor in each[1].items()
            }
        }
        trees: dict[str, list[Any]] = {}
        for name in self._items:
            if any(each[2].get(name) != ranks[0][2].get(name) for each in ranks):
                of_ranks = rank.group.gather(on_cpu(encoded[name]))
                trees[name] = [tree for tree, _ in of_ranks]
                for number, (_, tensors) in enumerate(of_ranks):
                    if tensors:
                        parts[f"{name}@{number:05d}.safetensors"] = tensors
            elif name in encoded:
                tree, tensors = encoded[name]
                trees[name] = [tree]
                if tensors:
                    parts[f"{name}.safetensors"] = tensors
        parts["state.json"] = {"format": 1, "step": step, "ranks": len(ranks), "items": trees}
        return parts
