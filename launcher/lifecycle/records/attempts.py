"""Digest of ``events.jsonl`` for the ledger: when each attempt of a run began, stopped and saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from training.flags.typed import is_count, is_number

MOST_STARTS = 10_000
"""Attempts that are kept; events of further ones are left out."""

MOST_RANKS = 10_000_000


@dataclass(slots=True)
class Attempt:
    """What the events of an attempt add up to.

    Attributes:
        number: its number.
        ranks: how many started.
        started: the time of its start.
        waiting: the time from which the run was in a queue; None: it was in none, or nobody recorded it.
        disappeared: the attempt before ended without an event, so that the queue began at its last sign of life.
        held: the time from which devices were held for it; None: from its start.
        ended: the time of its end; None: it has not ended, or without an event.
        last_sign: the newest time of its events.
        resumed: the step that it resumed from, if recorded.
        silent_saves: checkpoints were saved without a record of how long training waited.
        stalls: step of a checkpoint -> seconds that training waited for it.
    """

    number: int
    ranks: int
    started: float
    waiting: float | None = None
    disappeared: bool = False
    held: float | None = None
    ended: float | None = None
    last_sign: float = 0.0
    resumed: int | None = None
    silent_saves: bool = False
    stalls: dict[int, float] = field(default_factory=dict)


@dataclass
class AttemptsDigest:
    """What the events add up to.

    Attributes:
        attempts: in the order in which they started.
        waiting: the time from which the run has been in a queue, if it is.
        held: the time from which devices have been held for the next attempt, if they are.
    """

    attempts: list[Attempt] = field(default_factory=list)
    waiting: float | None = None
    held: float | None = None
    _newest: dict[int, Attempt] = field(default_factory=dict)

    def add(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Add the next events of the file, in its order."""
        for event in events:
            kind, time = event.get("event"), event.get("time")
            if not is_number(time):
                continue
            if kind == "submitted":
                self.waiting, self.held = time, None
            elif kind == "started":
                self._start(event, time)
            elif (attempt := self._attempt_of(event)) is not None:
                attempt.last_sign = max(attempt.last_sign, time)
                self._note(attempt, event, time)
            elif kind == "requeued":  # by an attempt of which no rank had started
                self.waiting, self.held = time, None

    def _attempt_of(self, event: Mapping[str, Any]) -> Attempt | None:
        if "attempt" not in event:
            return self.attempts[-1] if self.attempts else None
        number = event["attempt"]
        return self._newest.get(number) if is_count(number) else None

    def _start(self, event: Mapping[str, Any], time: float) -> None:
        if len(self.attempts) >= MOST_STARTS:
            return
        number, ranks = event.get("attempt", len(self.attempts) + 1), event.get("world_size", 1)
        if not is_count(number) or not is_count(ranks) or ranks > MOST_RANKS:
            return
        disappeared = bool(self.attempts) and self.waiting is None and self.held is None
        attempt = Attempt(number, ranks, time, self.waiting, disappeared, self.held, last_sign=time)
        self.attempts.append(attempt)
        self._newest[number] = attempt
        self.waiting = self.held = None

    def _note(self, attempt: Attempt, event: Mapping[str, Any], time: float) -> None:
        match event.get("event"):
            case "failed" | "finished":
                attempt.ended = time
            case "restarted":
                attempt.ended = self.held = time
            case "requeued":
                attempt.ended = self.waiting = time
                self.held = None  # a node was lost, and the next attempt is on others
            case "resumed" if is_count(event.get("step")):
                attempt.resumed = event["step"]
            case "saved" if is_number(event.get("blocked")) and is_count(event.get("step")):
                attempt.stalls[event["step"]] = event["blocked"]
            case "saved":
                attempt.silent_saves = True

    def packed(self) -> list[Any]:
        """Return the digest as JSON data."""
        attempts = [[*(getattr(each, name) for name in PLAIN), list(each.stalls.items())] for each in self.attempts]
        return [self.waiting, self.held, attempts]

    @classmethod
    def unpacked(cls, data: Any) -> AttemptsDigest:
        """Return what `packed` packed."""
        waiting, held, attempts = data
        digest = cls(waiting=waiting, held=held)
        for *values, stalls in attempts:
            attempt = Attempt(*values)
            attempt.stalls.update(stalls)
            digest.attempts.append(attempt)
            digest._newest[attempt.number] = attempt
        return digest


PLAIN = tuple(each.name for each in fields(Attempt) if each.name != "stalls")
"""Fields of `Attempt` that are single values."""
