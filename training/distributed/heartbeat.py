"""The pulse of a rank: where it is and when it last moved, in memory that whoever watches it shares."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_LAYOUT = struct.Struct("<qd16s")  # step, time of the last move, phase
SLOT = 64
"""Bytes that the pulse of one rank takes; a slot each, so that no two ranks write to the same cache line."""

STARTING, TRAINING = "starting", "training"


@dataclass(frozen=True)
class Reading:
    """A pulse as it was read.

    Attributes:
        step: the newest optimizer step that is done in this attempt; 0 before the first, -1 for a rank that never said
            anything, such as a script's.
        phase: what the rank is at, such as ``training`` or ``evaluating``; at most 16 letters.
        age: seconds since it last moved.
    """

    step: int = -1
    phase: str = STARTING
    age: float = 0.0


class Heartbeat:
    """Writes and reads one slot of a shared memory. Without one it writes to memory of its own that nobody reads.

    A write costs about a microsecond and no system call. Times are those of the monotonic clock, which all processes of
    a machine share; a reader may see a write half done, and then sees it whole at its next look.
    """

    def __init__(self, memory: mmap.mmap | bytearray | None = None, slot: int = 0) -> None:
        self._memory = bytearray(SLOT) if memory is None else memory
        self._offset = 0 if memory is None else slot * SLOT
        self._step, self._phase = 0, STARTING
        self._beats = False  # whether this rank says itself which steps are done

    @classmethod
    def of(cls, descriptor: int, slot: int) -> Heartbeat:
        """The pulse in `slot` of the memory behind an inherited file descriptor, which stays open."""
        return cls(mmap.mmap(descriptor, 0), slot)

    def beat(self, step: int | None = None) -> None:
        """Say that this rank moved; with `step`, that it has done that step and is training."""
        if step is not None:
            self._step, self._beats = step, True
            if self._phase == STARTING:
                self._phase = TRAINING
        _LAYOUT.pack_into(self._memory, self._offset, self._step, time.monotonic(), self._phase.encode()[:16])

    def note(self, step: int) -> None:
        """Say that `step` is done, from a rank that is not watched for it; one that beats after its steps only moved."""
        if not self._beats:
            self._step = max(self._step, step)
        self.beat()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say that this rank is at something other than a step, for as long as the block runs."""
        previous, self._phase = self._phase, name
        self.beat()
        try:
            yield
        finally:
            self._phase = previous
            self.beat()

    def read(self) -> Reading:
        """What the rank of this slot last said; before its first word, that it is starting and moved just now."""
        step, moved, phase = _LAYOUT.unpack_from(self._memory, self._offset)
        if not moved:
            return Reading()
        name = phase.rstrip(b"\0").decode(errors="replace")
        return Reading(step, name, max(0.0, time.monotonic() - moved))

    def clear(self) -> None:
        """Forget the rank that had this slot before."""
        self._memory[self._offset : self._offset + SLOT] = bytes(SLOT)
