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
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

Record = Mapping[str, Any]


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


@dataclass
class _Attempt:
    """What the events say of an attempt."""

    number: int
    ranks: int
    queue: float
    held_from: float  # devices are held from here on
    ended: float | None = None
    last_sign: float = 0.0  # the newest time in either log
    resumed: int | None = None  # the step it went on from, where it says so
    stalls: dict[int, float] = field(default_factory=dict)  # step of a checkpoint -> seconds that training waited
    silent_saves: bool = False  # checkpoints were saved, and nobody recorded how long training waited


def keep(events: Iterable[Record], records: Iterable[Record], now: float | None = None) -> Ledger:
    """Return the accounts of a run.

    Args:
        events: the records of ``events.jsonl``, in the order of the file.
        records: the records of ``metrics.jsonl``, in the order of the file.
        now: seconds since 1970, for a run that is still running: its last attempt counts up to here.
    """
    logs: dict[int, list[Record]] = {}
    for record in records:
        if isinstance(record.get("step"), int) and isinstance(record.get("time"), int | float):
            logs.setdefault(record.get("attempt", 1), []).append(record)
    pace, spacing = _habits(logs.values())
    accounts: list[Account] = []
    newest = end = 0  # the newest step ever done; the one at which the attempt before ended
    for attempt in _attempts(events, logs, now):
        log = logs.get(attempt.number, [])
        at = attempt.resumed
        if at is None:
            at = max(0, log[0]["step"] - spacing) if log else end
        if accounts:
            accounts[-1] = replace(accounts[-1], steps_lost=max(0, end - at))
        else:
            newest = at
        accounts.append(_account(attempt, log, at, newest, pace))
        end = max((record["step"] for record in log), default=at)
        newest = max(newest, end)
    return Ledger(_total(accounts), tuple(accounts))


def _attempts(events: Iterable[Record], logs: Mapping[int, Sequence[Record]], now: float | None) -> list[_Attempt]:
    """The attempts in the order in which they started; `now` ends one that nothing else has ended."""
    found: list[_Attempt] = []
    waiting: float | None = None  # since when the run has been in a queue
    held: float | None = None  # since when devices have waited for the next attempt
    for event in events:
        kind, time = event.get("event"), event.get("time")
        if not isinstance(time, int | float):
            continue
        attempt = next((a for a in reversed(found) if a.number == event.get("attempt", a.number)), None)
        if kind == "submitted":
            waiting, held = time, None
        elif kind == "started":
            if found and waiting is None and held is None:
                waiting = found[-1].last_sign  # its job disappeared without a word, and came back
            number, ranks = event.get("attempt", len(found) + 1), event.get("world_size", 1)
            queue = max(0.0, time - waiting) if waiting is not None else 0.0
            log = logs.get(number)
            last_sign = max(time, log[-1]["time"]) if log else time
            found.append(_Attempt(number, ranks, queue, held_from=time if held is None else held, last_sign=last_sign))
            waiting = held = None
        elif kind == "requeued" and attempt is None:  # by an attempt of which no rank had started
            waiting, held = time, None
        elif attempt is not None:
            attempt.last_sign = max(attempt.last_sign, time)
            match kind:
                case "failed" | "finished":
                    attempt.ended = time
                case "restarted":
                    attempt.ended = held = time
                case "requeued":
                    attempt.ended = waiting = time
                    held = None  # a node was lost, and the next attempt is on others
                case "resumed":
                    attempt.resumed = event["step"]
                case "saved" if isinstance(event.get("blocked"), int | float):
                    attempt.stalls[event["step"]] = event["blocked"]
                case "saved":
                    attempt.silent_saves = True
    if found and found[-1].ended is None:
        found[-1].ended = now
    return found


def _habits(logs: Iterable[Sequence[Record]]) -> tuple[float, int]:
    """The seconds of a step and the steps between two records of steps; medians over the run."""
    from statistics import median  # imported on use: `launch list` starts without it

    paces, gaps = [], []
    for log in logs:
        for before, after in pairwise(log):
            gap, seconds = after["step"] - before["step"], after["time"] - before["time"]
            if gap > 0 and seconds >= 0 and not ("eval" in before or "eval" in after):
                paces.append(seconds / gap)
                gaps.append(gap)
    # If the log has no two records of steps, the steps before a first record are those since step 0, and they took no time.
    return median(paces) if paces else 0.0, round(median(gaps)) if gaps else sys.maxsize


class _Parts:
    """The seconds of an attempt by name. What lies between two records is given out until nothing of it is left."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("startup", "useful", "replayed", "evaluation", "checkpoint", "other"), 0.0)
        self.left = 0.0

    def give(self, name: str, seconds: float = math.inf) -> None:
        part = min(self.left, max(0.0, seconds))
        self.seconds[name] += part
        self.left -= part


def _account(attempt: _Attempt, log: Sequence[Record], at: int, newest: int, pace: float) -> Account:
    """The account of an attempt that went on from step `at` when `newest` was the newest step ever done."""
    parts = _Parts()
    new = again = 0
    time, step = attempt.held_from, at
    first_pace = _habits([log[:4]])[0] or pace  # of the steps nearest to the first ones: paces drift
    for record in log:
        parts.left = max(0.0, record["time"] - time)
        done = max(0, record["step"] - step)
        parts.give("checkpoint", sum(s for saved, s in attempt.stalls.items() if step <= saved < record["step"]))
        if "eval" in record:
            known = done == 0 or (pace > 0 and record is not log[0])
            parts.give("evaluation", record.get("seconds", parts.left - done * pace if known else 0.0))
        if record is log[0]:
            parts.give("startup", parts.left - done * first_pace)
        if done:
            repeated = min(done, max(0, newest - step))
            parts.give("replayed", parts.left * repeated / done)
            parts.give("useful")
            new, again = new + done - repeated, again + repeated
        parts.give("other")
        time, step = record["time"], max(step, record["step"])
    parts.left = max(0.0, (attempt.last_sign if attempt.ended is None else attempt.ended) - time)
    parts.give("checkpoint", sum(s for saved, s in attempt.stalls.items() if step <= saved))
    parts.give("other" if log else "startup")
    seconds: dict[str, Any] = parts.seconds | {"queue": attempt.queue, "held": sum(parts.seconds.values())}
    if attempt.silent_saves:
        seconds["checkpoint"] = None
    return _closed(Account(attempt.number, attempt.ranks, steps=new, steps_replayed=again, **seconds))


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
