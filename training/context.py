"""The Context of a train/eval function: its world, run directory, device, process group and checkpoints."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.distributed.devices import RUNTIMES, Runtime
from training.distributed.group import Group, Vote, make_group
from training.distributed.heartbeat import Heartbeat
from training.distributed.world import World
from training.files import Lines

if TYPE_CHECKING:
    import torch

    from training.checkpoints.store import Checkpoints

STAT_SECONDS = 0.25  # between two checks of rank 0 for the file `stop`, because a shared file system may be slow


class Context:
    """One rank of a run. Use it as a context manager, or call `close`, which ends its process group and threads."""

    def __init__(
        self, run_dir: Path, world: World, *, args: tuple[str, ...] = (), heartbeat: Heartbeat | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        self.world = world
        self.args = args
        self.heartbeat = heartbeat or Heartbeat()
        self.heartbeat.beat()
        self.stopped = False  # set by should_stop
        self.stop_reason = ""  # the reason given to this rank; empty if another rank was asked to stop
        self._vote: Vote | None = None
        self._next_stat = 0.0
        self._lines = Lines()

    @classmethod
    def single_process(cls, run_dir: str | Path) -> Context:
        """Return a Context of one process, on its GPU if it has one, for notebooks and plain Python."""
        import torch

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        return cls(run_dir, World(device="cuda" if torch.cuda.is_available() else "cpu", run_id=run_dir.name))

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def runtime(self) -> Runtime:
        """The runtime of this rank's device."""
        return RUNTIMES[self.world.device]

    @cached_property
    def device(self) -> torch.device:
        """The device of this rank. Raises DeviceError if it is missing or cannot be used."""
        if self.runtime.group_first:
            _ = self.group
        return self.runtime.device(self.world)

    @cached_property
    def group(self) -> Group:
        """The process group of all ranks. The first use creates it and is a collective."""
        if not self.runtime.group_first:
            _ = self.device  # NCCL needs the device
        return make_group(self.world)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run, in `run_dir/checkpoints`."""
        from training.checkpoints.store import Checkpoints

        return Checkpoints(self.run_dir / "checkpoints")

    def log(self, step: int, **values: Any) -> None:
        """Append {"time", "attempt", "step", **values} to `metrics.jsonl`; other ranks than 0 write nothing.

        A full disk does not end training: lines are kept until the disk has free space, at the latest until `close`.
        """
        self.heartbeat.note(step)
        if self.world.rank == 0:
            record = {"time": time.time(), "attempt": self.world.attempt, "step": step, **values}
            self._lines.append(self.run_dir / "metrics.jsonl", record)

    def event(self, kind: str, **fields: Any) -> None:
        """Append {"time", "attempt", "rank", "event": kind, **fields} to `events.jsonl`, as `log` does."""
        record = {"time": time.time(), "attempt": self.world.attempt, "rank": self.world.rank, "event": kind, **fields}
        self._lines.append(self.run_dir / "events.jsonl", record)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Report that this rank is in a phase other than training, such as ``evaluating``, inside the block.

        A launcher that detects hangs allows a phase more time than a step.
        """
        return self.heartbeat.phase(name)

    def request_stop(self, reason: str) -> None:
        """Ask the run to stop at a step boundary. Only sets a flag, so a signal handler may call it."""
        self.stop_reason = reason

    def should_stop(self, step: int) -> bool:
        """Return whether all ranks stop now, the same answer on every rank. A collective, to call after each step.

        The vote of one step is read at the next, so that its communication overlaps with the step.
        """
        self.heartbeat.beat(step)
        if self.stopped:
            return True
        asked = bool(self.stop_reason) or self._stop_file()
        if self.world.world_size == 1:
            self.stopped = asked
        else:
            self.stopped = self._vote.result() if self._vote is not None else False
            self._vote = None if self.stopped else self.group.post_any(asked)
        return self.stopped

    def close(self) -> None:
        """Finish the save, the vote and the lines in progress and leave the group. May be called twice.

        Raises OSError if lines cannot be written because the disk is full.
        """
        vote, self._vote = self._vote, None
        if vote is not None:  # a vote in progress would disturb the end of the group
            with contextlib.suppress(RuntimeError):
                vote.settle()
        if "checkpoints" in self.__dict__:
            self.checkpoints.close()
        if "group" in self.__dict__:
            self.__dict__.pop("group").close()
        self._lines.flush()

    def _stop_file(self) -> bool:
        if self.world.rank or time.monotonic() < self._next_stat:
            return False
        self._next_stat = time.monotonic() + STAT_SECONDS
        if (self.run_dir / "stop").exists():
            self.stop_reason = "the file `stop` in the run directory"
            return True
        return False
