"""SIGTERM to the ranks of a node, once for each stop: the agent and a scheduler may both send it, in any order."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launcher.config.timeouts import TIMEOUTS

NEVER = float("inf")


class StopSignal:
    """Decides whether and when a node's ranks are sent SIGTERM.

    A scheduler sends it to every process of a step, so a process beside the ranks that receives it knows that they have it.

    Attributes:
        due: when `ranks` are to be sent SIGTERM, by `time.monotonic`; `NEVER` if no request waits.
    """

    def __init__(self) -> None:
        self.due = NEVER
        self.ranks: Sequence[int] = ()
        self._outside_at = -NEVER

    def note_outside(self, *_: object) -> None:
        """Note a SIGTERM from outside; a signal handler."""
        self._outside_at = time.monotonic()

    def request(self, ranks: Sequence[int], after: float) -> None:
        """Send SIGTERM to `ranks` after so many seconds, unless it arrives from outside before."""
        self.due, self.ranks = time.monotonic() + after, ranks

    def take(self) -> Sequence[int]:
        """Return the ranks that are sent SIGTERM now."""
        if time.monotonic() < self.due:
            return ()
        self.due = NEVER
        # It may have arrived before the request, or while that waited.
        return () if time.monotonic() - self._outside_at < 2 * TIMEOUTS.same_stop else self.ranks

    def seconds(self, others: float | None) -> float | None:
        """How long to wait for a message: until a request is due, `others` at most. None: no limit."""
        limits = [others] if others is not None else []
        if self.due < NEVER:
            limits.append(max(0.0, self.due - time.monotonic()))
        return min(limits, default=None)
