"""Group: the collectives of all ranks; for a single process they are the identity."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from training.distributed.devices import RUNTIMES
from training.distributed.world import World
from training.errors import ConfigError

if TYPE_CHECKING:
    import torch

TIMEOUT = timedelta(minutes=30)  # of a collective; then it raises an error
SETTLE = timedelta(seconds=5)


class Group:
    """The group of a single process: each collective is the identity."""

    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Wait until all ranks have called this."""

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the `value` of rank `src` on every rank. Objects are pickled."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank. Objects are pickled."""
        return [value]

    def collect(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on rank 0; an empty list elsewhere. Objects are pickled."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on at least one rank."""
        return flag

    def post_any(self, flag: bool) -> Vote:
        """Start `any` and return at once; the Vote holds the result. All ranks call this in the same order."""
        return Vote(flag)

    def close(self) -> None:
        """Destroy the process groups that this group created, and no others."""


class Vote:
    """The result of `post_any`, which may still be in progress."""

    def __init__(self, flag: bool) -> None:
        self._flag = flag

    def result(self) -> bool:
        """Wait for the votes of all ranks and return the result, the same on every rank."""
        return self._flag

    def settle(self) -> None:
        """Wait up to SETTLE (5 s) for the end of the collective. Raises RuntimeError if it does not end."""


class TorchGroup(Group):
    """The group of all ranks, over torch.distributed. Control messages use gloo, and so do not wait for a GPU."""

    def __init__(self, world: World, timeout: timedelta | None = None) -> None:
        import torch.distributed as dist

        timeout = timeout or TIMEOUT

        self.rank, self.size = world.rank, world.world_size
        self._owned = not dist.is_initialized()
        if self._owned:
            runtime = RUNTIMES[world.device]
            dist.init_process_group(
                runtime.backend,
                init_method=runtime.init_method(world),
                rank=world.rank,
                world_size=world.world_size,
                timeout=timeout,
            )
            if dist.get_rank() != world.rank:  # torch_xla numbers ranks by the order of the chips
                raise ConfigError(
                    f"rank {world.rank} of the run has number {dist.get_rank()} in its TPU runtime; "
                    "have the nodes in the order of the slice's hosts (TPU_WORKER_ID)"
                )
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        RUNTIMES[world.device].connect()

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        import torch.distributed as dist

        dist.barrier(group=self._control)

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the `value` of rank `src` on every rank. Objects are pickled."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=src, group=self._control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on every rank. Objects are pickled."""
        import torch.distributed as dist

        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self._control)
        return box

    def collect(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order, on rank 0; an empty list elsewhere. Objects are pickled."""
        import torch.distributed as dist

        box: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self._control)
        return box or []

    def any(self, flag: bool) -> bool:
        return self.post_any(flag).result()

    def post_any(self, flag: bool) -> Vote:
        """Start `any` and return at once; the Vote holds the result."""
        import torch
        import torch.distributed as dist

        tensor = torch.tensor([int(flag)], dtype=torch.uint8)
        return _TorchVote(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True))

    def close(self) -> None:
        """Destroy the process groups that this group created, and no others."""
        import torch.distributed as dist

        if not dist.is_initialized():
            return
        if self._owned:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self._control)


class _TorchVote(Vote):
    def __init__(self, tensor: torch.Tensor, work: Any) -> None:
        super().__init__(False)
        self._tensor, self._work = tensor, work

    def result(self) -> bool:
        self._work.wait()
        return bool(self._tensor.item())

    def settle(self) -> None:
        self._work.wait(SETTLE)


def make_group(world: World) -> Group:
    """Return the group of all ranks of `world`. A single rank opens no socket."""
    return TorchGroup(world) if world.world_size > 1 else Group()


@contextlib.contextmanager
def environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Set (or, for None, unset) environment variables inside the block, and restore them after it."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
