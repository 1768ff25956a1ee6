"""Share the step, the phase and the time of the last progress of a rank through shared memory."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

_LAYOUT = struct.Struct("<qd16s")  # step, time of the last progress, phase
SLOT = 64
"""Bytes of the heartbeat of one rank: a cache line, which no other rank writes to."""

STARTING, CONNECTING, TRAINING, IDLE = "starting", "connecting", "training", "idle"
DEBUGGING = "debugging"
"""The phase that a launcher gives a rank while it is `Heartbeat.interactive`: the others wait for a person."""

_INTERACTIVE = _LAYOUT.size  # offset of one byte
_DUMP = _LAYOUT.size + 1  # offset of one byte: `_ANSWERS` or `_REQUESTED`, else the rank answers no requests
_ANSWERS, _REQUESTED = 1, 2


@dataclass(frozen=True)
class Reading:
    """The heartbeat of a rank at one moment.

    Attributes:
        step: the last optimizer step done in this attempt; 0 before the first, -1 for a rank that has not reported,
            such as a script.
        phase: the activity, such as ``training`` or ``evaluating``; at most 16 bytes.
        age: seconds since the last progress.
    """

    step: int = -1
    phase: str = STARTING
    age: float = 0.0


class Heartbeat:
    """Write and read one slot of shared memory; without `memory`, a private buffer.

    A write takes about a microsecond and no system call. Times are those of the monotonic clock, which all processes of
    a machine share. Writes are not atomic: a reader may see an incomplete one, and sees it complete at its next read.

    Attributes:
        of_process: the one that the launcher of this process reads; a Context that a script makes reports to it.
        after_step: called after each step that is reported, while a profile runs.
        beats: whether this rank reports its steps by `beat`.
    """

    of_process: ClassVar[Heartbeat | None] = None
    after_step: ClassVar[Callable[[], None] | None] = None

    def __init__(self, memory: mmap.mmap | bytearray | None = None, slot: int = 0) -> None:
        self._memory = bytearray(SLOT) if memory is None else memory
        self._offset = 0 if memory is None else slot * SLOT
        self._step, self._phase = 0, STARTING
        self.beats = False

    @classmethod
    def of(cls, descriptor: int, slot: int) -> Heartbeat:
        """Return the heartbeat in `slot` of the memory of an inherited file descriptor, which stays open."""
        return cls(mmap.mmap(descriptor, 0), slot)

    def beat(self, step: int | None = None) -> None:
        """Report progress of this rank; with `step`, that this step is done and the rank is training."""
        if step is not None:
            self._step, self.beats = step, True
            if self._phase in (STARTING, IDLE):
                self._phase = TRAINING
        _LAYOUT.pack_into(self._memory, self._offset, self._step, time.monotonic(), self._phase.encode()[:16])
        if step is not None and Heartbeat.after_step is not None:
            Heartbeat.after_step()

    def note(self, step: int) -> None:
        """Report that `step` is done, unless the rank reports its steps by `beat`; then report progress only."""
        further = not self.beats and step > self._step
        if further:
            self._step = step
        self.beat()
        if further and Heartbeat.after_step is not None:
            Heartbeat.after_step()

    def idle(self) -> None:
        """Report that the training loop has ended: what follows has no time limit, until the next step."""
        self._phase = IDLE
        self.beat()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Report the phase `name` while the block runs."""
        previous, self._phase = self._phase, name
        self.beat()
        try:
            yield
        finally:
            self._phase = previous
            self.beat()

    def read(self) -> Reading:
        """Return the last report of the rank in this slot; before the first, phase ``starting`` and age 0."""
        step, moved, phase = _LAYOUT.unpack_from(self._memory, self._offset)
        if not moved:
            return Reading()
        name = phase.rstrip(b"\0").decode(errors="replace")
        return Reading(step, name, max(0.0, time.monotonic() - moved))

    @property
    def interactive(self) -> bool:
        """Whether the rank is at a prompt of its terminal, or in a debugger."""
        return bool(self._memory[self._offset + _INTERACTIVE])

    @interactive.setter
    def interactive(self, value: bool) -> None:
        self._memory[self._offset + _INTERACTIVE] = value

    @property
    def shared(self) -> bool:
        """Whether another process can read this heartbeat."""
        return isinstance(self._memory, mmap.mmap)

    @property
    def dump_requested(self) -> bool:
        """Whether the launcher asked for the collectives of this rank, and it has not answered yet."""
        return self._memory[self._offset + _DUMP] == _REQUESTED

    def request_dump(self) -> bool:
        """Ask the rank for its collectives; return whether it answers such requests."""
        answers = bool(self._memory[self._offset + _DUMP])
        if answers:
            self._memory[self._offset + _DUMP] = _REQUESTED
        return answers

    def answer_dump(self) -> None:
        """Report that this rank answers requests for its collectives, and that there is none which it has not answered."""
        self._memory[self._offset + _DUMP] = _ANSWERS

    def clear(self) -> None:
        """Erase the report of the rank that used this slot before."""
        self._memory[self._offset : self._offset + SLOT] = bytes(SLOT)
