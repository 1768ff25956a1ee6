"""Where the time of a run went: a pure function of what its directory records.

Goodput is the share of the time with devices held that went into training steps whose results were kept. The rest has a
name each, and the parts of an attempt add up to its `held`::

    queue | startup  useful  replayed  evaluation  checkpoint  other |
          |<----------------------- held -------------------------->|

Clocks: a duration is the difference of two times that stand next to each other in the log, and never negative. A clock
that jumps back costs the one duration in which it jumped, and the clocks of two nodes that differ touch only the first
and the last duration of an attempt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.lifecycle.records.attempts import Attempt, AttemptsDigest
from launcher.lifecycle.records.metrics import MetricsDigest, Record, StepLog, evaluation_seconds


@dataclass(frozen=True)
class Account:
    """An attempt's time in seconds, and its steps; or the sum over all attempts of a run.

    Where steps are not logged one by one, the log's spacing is the precision of all that is said about steps.

    Attributes:
        attempt: its number; 0 for the sum.
        ranks: how many took part, one on each device; in the sum, those of the newest attempt.
        queue: from the submission, or the request to be requeued, to the start. Where a job disappeared without a word
            and came back, the whole gap.
        held: with devices held: from the start, or from the failure before where the next attempt follows in place.
        startup: of that, until the first step began: imports, process group, data, model, checkpoint.
        useful: in steps that no attempt had done before.
        replayed: in steps done again, since the attempt went on from a checkpoint that was older than its end before.
        evaluation: in evaluations.
        checkpoint: in which training waited for a checkpoint; None where that was not recorded, and then it counts as
            useful or replayed.
        other: after the last step, up to the end: the final save, a hang until somebody noticed, a wait for a kill.
        steps: new ones.
        steps_replayed: those done again.
        steps_lost: those that the next attempt did not find in a checkpoint.
        goodput: useful / held, from 0 to 1; 0 where nothing was held.
        device_hours: held x ranks.
    """

    attempt: int
    ranks: int
    queue: float = 0.0
    held: float = 0.0
    startup: float = 0.0
    useful: float = 0.0
    replayed: float = 0.0
    evaluation: float = 0.0
    checkpoint: float | None = 0.0
    other: float = 0.0
    steps: int = 0
    steps_replayed: int = 0
    steps_lost: int = 0
    goodput: float = 0.0
    device_hours: float = 0.0


@dataclass(frozen=True)
class Ledger:
    """The accounts of a run."""

    total: Account
    attempts: tuple[Account, ...]


def keep(events: Iterable[Record], records: Iterable[Record], now: float | None = None) -> Ledger:
    """Return the accounts of a run; see `ledger`.

    Args:
        events: the records of ``events.jsonl``, in the order of the file.
        records: the records of ``metrics.jsonl``, in the order of the file.
        now: as for `ledger`.
    """
    attempts, metrics = AttemptsDigest(), MetricsDigest()
    attempts.add(events)
    metrics.add(records)
    return ledger(attempts, metrics, now)


def ledger(attempts: AttemptsDigest, metrics: MetricsDigest, now: float | None = None) -> Ledger:
    """Return the accounts of a run from the digests of its two logs.

    `now`: seconds since 1970, for a run that is still running: its last attempt counts up to here.
    """
    spacing, pace = metrics.spacing(), metrics.pace()
    accounts: list[Account] = []
    newest = end = 0  # the newest step ever done; the one at which the attempt before ended
    last_sign = 0.0  # of the attempt before
    for attempt in attempts.attempts:
        log = metrics.logs.get(attempt.number)
        at = attempt.resumed
        if at is None:
            # If the log has no two lines of steps, the steps before a first line are those from step 0 on.
            at = end if log is None else 0 if spacing is None else max(0, log.head[0].step - spacing)
        if accounts:
            accounts[-1] = replace(accounts[-1], steps_lost=max(0, end - at))
        else:
            newest = at
        waiting = last_sign if attempt.disappeared else attempt.waiting
        last_sign = max(attempt.last_sign, attempt.started if log is None else log.newest.time)
        ended = now if attempt.ended is None and attempt is attempts.attempts[-1] else attempt.ended
        account = _account(attempt, log, at, newest, pace, last_sign if ended is None else ended)
        accounts.append(replace(account, queue=0.0 if waiting is None else max(0.0, attempt.started - waiting)))
        end = at if log is None else log.step
        newest = max(newest, end)
    return Ledger(_total(accounts), tuple(accounts))


class _Parts:
    """The seconds of an attempt by name. What lies between two records is given out until nothing of it is left."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("startup", "useful", "replayed", "evaluation", "checkpoint", "other"), 0.0)
        self.left = 0.0

    def give(self, name: str, seconds: float = math.inf) -> None:
        part = min(self.left, max(0.0, seconds))
        self.seconds[name] += part
        self.left -= part


def _account(attempt: Attempt, log: StepLog | None, at: int, newest: int, pace: float, ended: float) -> Account:
    """The account of an attempt that went on from step `at` when `newest` was the newest step ever done."""
    parts = _Parts()
    new = again = 0
    stalls, time = attempt.stalls.items(), attempt.started if attempt.held is None else attempt.held
    if log is not None:
        new, again = _first_line(parts, log, at, newest, pace, attempt)
        new, again = new + log.steps, again + log.steps_replayed
        # Training waits for a checkpoint after its step, which the next line counts.
        kept = [(step, seconds) for step, seconds in stalls if log.head[0].step <= step < log.step]
        for name in ("replayed", "useful"):
            parts.left = getattr(log, name)
            parts.give("checkpoint", sum(s for step, s in kept if (step < log.before) == (name == "replayed")))
            parts.give(name)
        parts.seconds["evaluation"] += log.evaluation
        parts.seconds["other"] += log.other
        time = log.newest.time
    parts.left = max(0.0, ended - time)
    parts.give("checkpoint", sum(s for step, s in stalls if (at if log is None else max(at, log.step)) <= step))
    parts.give("startup" if log is None else "other")
    seconds: dict[str, Any] = parts.seconds | {"held": sum(parts.seconds.values())}
    if attempt.silent_saves:
        seconds["checkpoint"] = None
    return _closed(Account(attempt.number, attempt.ranks, steps=new, steps_replayed=again, **seconds))


def _first_line(parts: _Parts, log: StepLog, at: int, newest: int, pace: float, attempt: Attempt) -> tuple[int, int]:
    """Give out the time up to the first line of an attempt; return its new steps and those done again."""
    first = log.head[0]
    parts.left = max(0.0, first.time - (attempt.started if attempt.held is None else attempt.held))
    done = max(0, first.step - at)
    parts.give("checkpoint", sum(s for step, s in attempt.stalls.items() if at <= step < first.step))
    if first.evaluation:
        parts.give("evaluation", evaluation_seconds(first, parts.left, done, 0.0))
    parts.give("startup", parts.left - done * (log.first_pace() or pace))  # of the first steps: paces drift
    again = min(done, max(0, newest - at))
    if done:
        parts.give("replayed", parts.left * again / done)
        parts.give("useful")
    parts.give("other")
    return done - again, again


def _closed(account: Account) -> Account:
    """With what follows from the sums."""
    held = account.held
    return replace(account, goodput=account.useful / held if held else 0.0, device_hours=held * account.ranks / 3600)


def _total(accounts: Sequence[Account]) -> Account:
    if not accounts:
        return Account(0, 0)
    added = ("queue", "held", "startup", "useful", "replayed", "evaluation", "other")
    sums: dict[str, Any] = {
        name: sum(getattr(account, name) for account in accounts)
        for name in (*added, "steps", "steps_replayed", "steps_lost")
    }
    stalls = [account.checkpoint for account in accounts]
    sums["checkpoint"] = None if None in stalls else sum(filter(None, stalls), 0.0)
    total = _closed(Account(0, accounts[-1].ranks, **sums))
    return replace(total, device_hours=sum(account.device_hours for account in accounts))
