"""Context: what a train/eval function is given. Its world, its run directory, and what it does together with others."""

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

STAT_SECONDS = 0.25  # how often at most rank 0 looks for the file `stop`; a shared disk may take long to answer


class Context:
    """One rank of a run. Used as a context manager, or closed by hand, so that no group or thread is left over."""

    def __init__(
        self, run_dir: Path, world: World, *, args: tuple[str, ...] = (), heartbeat: Heartbeat | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        self.world = world
        self.args = args
        self.heartbeat = heartbeat or Heartbeat()
        self.heartbeat.beat()
        self.stopped = False  # True once should_stop has said so
        self.stop_reason = ""  # what this rank was told; empty on ranks that only heard of it from others
        self._vote: Vote | None = None
        self._next_stat = 0.0
        self._lines = Lines()

    @classmethod
    def single_process(cls, run_dir: str | Path) -> Context:
        """A Context for this process alone, on its GPU if it has one; for notebooks and plain Python."""
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
        """What the device computes with, and how that differs from the others."""
        return RUNTIMES[self.world.device]

    @cached_property
    def device(self) -> torch.device:
        """The device of this rank. Raises DeviceError if there is none that can be used."""
        if self.runtime.group_first:
            _ = self.group
        return self.runtime.device(self.world)

    @cached_property
    def group(self) -> Group:
        """All ranks of the run; made on first use, by all of them."""
        if not self.runtime.group_first:
            _ = self.device  # such as NCCL, which needs to know it
        return make_group(self.world)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run, in `run_dir/checkpoints`."""
        from training.checkpoints.store import Checkpoints

        return Checkpoints(self.run_dir / "checkpoints")

    def log(self, step: int, **values: Any) -> None:
        """Append {"time", "attempt", "step", **values} to `metrics.jsonl`; rank 0 only, elsewhere nothing happens.

        A full disk does not end training: the lines wait until there is room, at the latest until `close`.
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
        """Say that this rank is at something that takes longer than a step, such as ``evaluating``, inside the block.

        A launcher that watches for hangs allows much more time there than between two calls of `should_stop`.
        """
        return self.heartbeat.phase(name)

    def request_stop(self, reason: str) -> None:
        """Ask the run to stop at a step boundary. Only sets a flag, so a signal handler may call it."""
        self.stop_reason = reason

    def should_stop(self, step: int) -> bool:
        """Whether all ranks stop now; the same answer on every rank. Every rank calls it once after every step.

        The question of one step is answered at the next, so that nobody waits: the vote travels while the step runs.
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
        """Finish what is under way (a save, a vote, lines) and leave the group. Twice is as good as once.

        Raises OSError where lines still wait for room on the disk.
        """
        vote, self._vote = self._vote, None
        if vote is not None:  # the last vote has no next step to be read at; leaving it under way would upset the group
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
