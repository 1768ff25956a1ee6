"""What the log of a run says of its attempts so far: how often it failed, where, and whether it got on in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

JobFate = Literal["", "preempting", "requeued"]
"""What a scheduler does with a job whose ranks it asked to stop: nothing more, takes its nodes, or starts it again."""


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
class History:
    """The failed attempts since the run was last submitted by a person, oldest first.

    Attributes:
        failed_attempts: attempts that failed.
        preempted: the newest step at the last time the scheduler took the nodes away; None: it never did, or the target
            does not say its steps.
        excluded: excluded hosts of the cluster that it was last sent to.
        losses: how many of the newest stops in a row a program without a Context lost everything at.
    """

    failed_attempts: tuple[FailedAttempt, ...] = ()
    preempted: int | None = None
    excluded: tuple[str, ...] = ()
    losses: int = 0

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

    def stuck(self, step: int | None) -> bool:
        """Whether nothing was done since the nodes were taken away the last time, now that they are again."""
        return self.preempted is not None and step is not None and step <= self.preempted


def read(events: Iterable[Mapping[str, Any]]) -> History:
    """Build the history from the events of a run."""
    history, cluster = History(), None
    for event in events:
        match event:
            case {"event": "submitted"}:
                same, cluster = cluster in (None, event.get("cluster")), event.get("cluster")
                history = History(excluded=history.excluded if same else ())
            case {"event": "failed", "kind": kind}:
                failed_attempt = FailedAttempt(kind, event.get("rank"), event.get("host"), event.get("step"))
                history = replace(history, failed_attempts=(*history.failed_attempts, failed_attempt))
            case {"event": "interrupted"}:
                history = replace(history, losses=history.losses + 1 if event.get("lost_everything") else 0)
            case {"event": "excluded", "exclude": hosts}:
                history = replace(history, excluded=tuple(dict.fromkeys((*history.excluded, *hosts))))
            case {"event": "readmitted"}:
                history = replace(history, excluded=())
            case {"event": "requeued"}:
                taken = event.get("step") if event.get("reason") == "preempted" else history.preempted
                excluded = tuple(dict.fromkeys((*history.excluded, *event.get("exclude", ()))))
                history = replace(history, preempted=taken, excluded=excluded)
    return history
