"""One rank of a run: its world, run directory, device, process group, checkpoints, records and votes."""

from __future__ import annotations

import contextlib
import operator
import sys
import time
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from training.distributed.devices import RUNTIMES, Runtime
from training.distributed.group import Group, Vote, make_group
from training.distributed.hangs.collectives import CollectiveDumper, answer_requests
from training.distributed.heartbeat import CONNECTING, Heartbeat
from training.distributed.random_state import make_deterministic
from training.distributed.world import World
from training.files import Lines, plain

if TYPE_CHECKING:
    import torch

    from training.checkpoints.mirror import Mirror
    from training.checkpoints.store import Checkpoint, Checkpoints

STAT_SECONDS = 0.25  # between two checks of rank 0 for the file `stop`, because a shared file system may be slow


class Rank:
    """The base of Context: what one rank has and records, without the training loop.

    Attributes:
        stopped: set by `should_stop`.
        stop_reason: the reason given to this rank; empty if another rank was asked to stop.
        failed_saves: {"step", "error"} of each save of this rank that failed, oldest first.
        mirror: the store to which checkpoints are copied; set by `Context.state`.
    """

    def __init__(
        self, run_dir: Path, world: World, *, args: tuple[str, ...] = (), heartbeat: Heartbeat | None = None
    ) -> None:
        self.run_dir = Path(run_dir)
        self.world = world
        self.args = args
        self.heartbeat = heartbeat or Heartbeat.of_process or Heartbeat()
        self.heartbeat.beat()
        self.stopped = False
        self.stop_reason = ""
        self.failed_saves: list[dict[str, Any]] = []
        self.mirror: Mirror | None = None
        self._votes: dict[str, Vote] = {}
        self._next_stat = 0.0
        self._dumper: CollectiveDumper | None = None
        self._lines = Lines()

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
        with self.phase(CONNECTING):
            group = make_group(self.world)
        self._dumper = answer_requests(self.run_dir, self.world, self.heartbeat)
        return group

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run, in `run_dir/checkpoints`. Saves are recorded as events."""
        from training.checkpoints.store import Checkpoints

        checkpoints = Checkpoints(self.run_dir / "checkpoints")
        checkpoints.on_saved = self._on_saved
        checkpoints.on_failed = self.note_failed_save
        checkpoints.on_damaged = lambda error: self.event("checkpoint-damaged", error=str(error))
        return checkpoints

    def _on_saved(self, saved: Checkpoint) -> None:
        self.note_saved(saved.step, saved.stall_seconds)
        if self.mirror is not None:
            self.mirror.push(saved)

    def seed(self, seed: int, *, deterministic: bool = False) -> None:
        """Seed Python, numpy and torch alike on all ranks. With `deterministic`, GPUs repeat the same bits, as CPUs do."""
        if deterministic:
            make_deterministic()
        self.runtime.seed(seed)

    def log(self, step: SupportsIndex, **values: Any) -> None:
        """Append {"time", "attempt", "step", **values} to `metrics.jsonl`; other ranks than 0 write nothing.

        `step` is a number or a step of `Context.steps`, which adds "epoch" and "total_steps". Values are converted by
        `training.files.plain`: tensors and numpy values become numbers or lists, and a number that is not finite becomes
        the string "NaN", "Infinity" or "-Infinity", which `float` reads. A full disk does not end training: lines are kept
        until the disk has free space, at the latest until `close`.
        """
        number = operator.index(step)
        self.heartbeat.note(number)
        if self.world.rank == 0:
            values = {**getattr(step, "facts", {}), **values}
            record = {"time": time.time(), "attempt": self.world.attempt, "step": number, **plain(values)}
            self._lines.append(self.run_dir / "metrics.jsonl", record)

    def event(self, kind: str, **fields: Any) -> None:
        """Append {"time", "attempt", "rank", "event": kind, **fields} to `events.jsonl`, as `log` does."""
        record = {"time": time.time(), "attempt": self.world.attempt, "rank": self.world.rank, "event": kind}
        self._lines.append(self.run_dir / "events.jsonl", record | plain(fields))

    def note_saved(self, step: int, stall_seconds: float | None = None) -> None:
        """Record a committed checkpoint as the event `saved`, with the seconds that training waited, if known."""
        # The field has the name by which the launcher's accounting reads it.
        stall = {} if stall_seconds is None else {"blocked": round(stall_seconds, 6)}
        with _never_raising():
            self.event("saved", step=step, **stall)

    def note_failed_save(self, step: int, error: Exception) -> None:
        """Record a failed save: in `failed_saves`, as the event `save-failed`, and as a line on stderr."""
        text = f"{type(error).__name__}: {error}"
        self.failed_saves.append({"step": step, "error": text})
        with _never_raising():
            self.event("save-failed", step=step, error=text)
        with _never_raising():
            print(f"the checkpoint of step {step} could not be saved: {text}", file=sys.stderr)

    def note_resumed(self, step: int) -> None:
        """Record as the event `resumed` that this run continues after `step`."""
        self.event("resumed", step=step)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Report the phase of this rank inside the block, such as ``evaluating``; it may take longer than a step."""
        return self.heartbeat.phase(name)

    def request_stop(self, reason: str) -> None:
        """Ask the run to stop at a step boundary. Only sets a flag, so a signal handler may call it."""
        self.stop_reason = reason

    def vote(self, name: str, flag: bool) -> bool:
        """Return whether `flag` was true on a rank at the last call with this `name`; for one process, at this call.

        A collective that is read at the next call, so that its communication overlaps with a step.
        """
        if self.world.world_size == 1:
            return flag
        found = self.read_vote(name)
        self.post_vote(name, flag)
        return found

    def post_vote(self, name: str, flag: bool) -> None:
        """Start a vote, which `read_vote` reads. A collective."""
        self._votes[name] = self.group.post_any(flag)

    def read_vote(self, name: str) -> bool:
        """Return the result of the vote that was posted before, the same on every rank; false if there was none."""
        before = self._votes.pop(name, None)
        return before is not None and before.result()

    def vote_to_stop(self, step: int) -> bool:
        """Report progress and return whether all ranks stop now, the same answer on every rank. A collective."""
        self.heartbeat.beat(step)
        if not self.stopped:
            # A vote that follows the one to stop is settled by `close`.
            self.stopped = self.vote("stop", bool(self.stop_reason) or self._stop_file())
        return self.stopped

    def close(self) -> None:
        """Finish the save, the vote and the lines in progress and leave the group. May be called twice.

        Raises OSError if lines cannot be written because the disk is full.
        """
        votes, self._votes = self._votes, {}
        for vote in votes.values():  # one in progress would disturb the end of the group
            with contextlib.suppress(RuntimeError):
                vote.settle()
        for each in (self.__dict__.get("checkpoints"), self.mirror, self._dumper, self.__dict__.pop("group", None)):
            if each is not None:
                each.close()
        self._lines.flush()

    def _stop_file(self) -> bool:
        if self.world.rank or time.monotonic() < self._next_stat:
            return False
        self._next_stat = time.monotonic() + STAT_SECONDS
        if (self.run_dir / "stop").exists():
            self.stop_reason = "the file `stop` in the run directory"
            return True
        return False


def _never_raising() -> AbstractContextManager[None]:
    """A record of a save that cannot be written must not end training."""
    return contextlib.suppress(OSError)
