"""The events of a run: what they say of its attempts so far, and those that more than one place records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

JobFate = Literal["", "preempting", "requeued"]
"""What a scheduler does with a job whose ranks it asked to stop: nothing more, takes its nodes, or starts it again."""

NAMED = 10
"""How many of the saves that failed ``result.json`` names."""


@dataclass(frozen=True)
class FailedAttempt:
    """One attempt that failed: the kind of failure, the rank and host at fault, and the newest step that was done.

    `rank` and `host` are None where no single one is at fault, `step` where the target does not say its steps.
    """

    kind: str
    rank: int | None = None
    host: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class FailedSave:
    """A checkpoint that could not be saved."""

    step: int
    error: str


@dataclass(frozen=True)
class History:
    """The failed attempts since the run was last submitted by a person, oldest first.

    Attributes:
        failed_attempts: attempts that failed.
        preempted: the newest step at the last time the scheduler took the nodes away; None: it never did, or the target
            does not say its steps.
        excluded: excluded hosts of the cluster that it was last sent to.
        losses: how many of the newest stops in a row the program lost everything at.
        first: the first step that was logged in the attempt that was preempted last; None: none was.
        same_first: how many preempted attempts before it, in a row, began no earlier.
        failed_saves: saves that failed.
    """

    failed_attempts: tuple[FailedAttempt, ...] = ()
    preempted: int | None = None
    excluded: tuple[str, ...] = ()
    losses: int = 0
    first: int | None = None
    same_first: int = 0
    failed_saves: tuple[FailedSave, ...] = ()

    def saves_that_failed(self) -> dict[str, Any] | None:
        """Return {"count", "newest": [{"step", "error"}, ...]} with the newest `NAMED` ones; None if none failed."""
        if not self.failed_saves:
            return None
        return {"count": len(self.failed_saves), "newest": [asdict(each) for each in self.failed_saves[-NAMED:]]}

    def repeats(self, kind: str, rank: int | None, step: int | None) -> bool:
        """Whether the attempt before ended with the same failure of the same rank at the same step."""
        last = self.failed_attempts[-1] if self.failed_attempts else None
        known = rank is not None and step  # before its first step a rank may fail for reasons of the moment
        return bool(known) and last is not None and (last.kind, last.rank, last.step) == (kind, rank, step)

    def failures_without_progress(self, step: int | None) -> int:
        """How many of the newest failed attempts had no step of progress after them, now that `step` is the newest."""
        return len(self._without_progress(step))

    def failures_without_progress_on(self, host: str | None, step: int | None) -> int:
        """`failures_without_progress`, where all of them were on `host`; else 0."""
        failures = self._without_progress(step)
        return len(failures) if host is not None and all(each.host == host for each in failures) else 0

    def _without_progress(self, step: int | None) -> list[FailedAttempt]:
        failures = []
        for failed_attempt in reversed(self.failed_attempts):
            if step is not None and (failed_attempt.step is None or failed_attempt.step < step):
                break
            failures.append(failed_attempt)
        return failures

    def never_connected(self) -> bool:
        """Whether the attempt before ended before its first step, by a hang or an error of communication."""
        last = self.failed_attempts[-1] if self.failed_attempts else None
        return last is not None and last.kind in ("hung", "communication") and not last.step

    def stuck(self, step: int | None) -> bool:
        """Whether nothing was done since the nodes were taken away the last time, now that they are again."""
        return self.preempted is not None and step is not None and step <= self.preempted

    def begun_again(self, first: int | None) -> int:
        """How many attempts in a row, the present one included, did not begin after the one that was preempted before.

        `first` is the first step that the present one logged.
        """
        again = first is not None and self.first is not None and first <= self.first
        return self.same_first + 1 if again else 0


def submissions(events: Iterable[Mapping[str, Any]]) -> int:
    """Return how often a person has sent the run."""
    return sum(event["event"] == "submitted" for event in events)


LINES = re.compile('"(?:submitted|failed|interrupted|save-failed|save-interrupted|excluded|readmitted|requeued)"')
"""What the lines of the events that `read` reads contain; most lines of a long run do not."""


def read(events: Iterable[Mapping[str, Any]]) -> History:
    """Build the history from the events of a run. Values of other types than this version writes are left out."""
    history, cluster = History(), None
    failures: list[FailedAttempt] = []
    saves: dict[FailedSave, None] = {}  # ranks may record the same
    for event in events:
        match event:
            case {"event": "submitted"}:
                same, cluster = cluster in (None, event.get("cluster")), event.get("cluster")
                history = History(excluded=history.excluded if same else ())
                failures, saves = [], {}
            case {"event": "failed", "kind": str(kind)}:
                rank, host, step = (event.get(key) for key in ("rank", "host", "step"))
                failures.append(
                    FailedAttempt(kind, _whole(rank), host if isinstance(host, str) else None, _whole(step))
                )
            case {"event": "interrupted"}:
                history = replace(history, losses=history.losses + 1 if event.get("lost_everything") else 0)
            case {"event": "save-failed" | "save-interrupted", "step": int(step), "error": error}:
                saves[FailedSave(step, str(error))] = None
            case {"event": "excluded", "exclude": hosts}:
                history = _without(history, hosts)
            case {"event": "readmitted"}:
                history = replace(history, excluded=())
            case {"event": "requeued"}:
                preempted = event.get("reason") == "preempted"
                taken = _whole(event.get("step")) if preempted else history.preempted
                history = replace(_without(history, event.get("exclude", ())), preempted=taken)
                if preempted:
                    first = _whole(event.get("first"))
                    history = replace(history, first=first, same_first=history.begun_again(first))
    return replace(history, failed_attempts=tuple(failures), failed_saves=tuple(saves))


def _whole(value: object) -> int | None:
    return value if type(value) is int else None


def _without(history: History, hosts: object) -> History:
    """The history with more excluded hosts."""
    names = [host for host in hosts if isinstance(host, str)] if isinstance(hosts, list | tuple) else []
    return replace(history, excluded=tuple(dict.fromkeys((*history.excluded, *names)))) if names else history


class EventLog(Protocol):
    """What events are recorded in: a `RunDir`."""

    def event(self, kind: str, /, **fields: Any) -> bool:
        """Append an event; return whether it could be written."""


def record_started(
    log: EventLog, attempt: int, world_size: int, hosts: Sequence[str], switches: Sequence[str] = ()
) -> None:
    """Record that the ranks of an attempt start on `hosts`, in their order; `switches` are those above each, if known."""
    known = {"switches": list(switches)} if any(switches) else {}
    log.event("started", attempt=attempt, world_size=world_size, hosts=list(hosts), **known)


def record_stopping(log: EventLog, reason: str, **fields: Any) -> None:
    """Record that the ranks stop; `fields` say how they were asked to, if this process asked them."""
    log.event("stopping", reason=reason, **fields)


def record_preempted(log: EventLog, **fields: Any) -> None:
    """Record that the scheduler takes nodes away; `fields` are its signal and reason, or the nodes."""
    log.event("preempted", **fields)


def record_warnings(log: EventLog, attempt: int, warnings: Mapping[str, list[str]]) -> None:
    """Record what the preflight found on hosts that are used all the same: the hosts of each warning."""
    for text, hosts in warnings.items():
        log.event("node-warning", attempt=attempt, hosts=hosts, message=text)


def record_waiting(log: EventLog, message: str, **fields: Any) -> None:
    """Record what the run waits for."""
    log.event("waiting", message=message, **fields)


def record_visited(log: EventLog, kind: str, ranks: Sequence[int], nodes: Sequence[int]) -> None:
    """Record that a client looks inside: at the nodes of `ranks`, at `nodes`, or without both at every node."""
    log.event("visited", kind=kind, ranks=list(ranks), nodes=list(nodes))


def record_excluded(log: EventLog, attempt: int, hosts: Sequence[str]) -> None:
    """Record that the next attempts run on none of `hosts`."""
    log.event("excluded", attempt=attempt, exclude=list(hosts))


def record_failed(log: EventLog, fields: Mapping[str, Any]) -> bool:
    """Record a failed attempt; return whether the event could be written."""
    return log.event("failed", **fields)


def record_finished(log: EventLog, state: str, **fields: Any) -> None:
    """Record that the submission has ended in `state`."""
    log.event("finished", **fields, state=state)
