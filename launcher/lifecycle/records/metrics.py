"""Digest of ``metrics.jsonl``: one pass over its lines, in memory that does not grow with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, fields
from itertools import pairwise
from typing import Any

from training.flags.typed import is_count, is_number

Record = Mapping[str, Any]

MOST_ATTEMPTS = 10_000
"""Attempts that are counted one by one; the lines of further ones are left out."""

MOST_GAPS = 1000
"""Different numbers of steps between two lines that are counted."""

PACES = 31
"""Paces of which the median is taken."""

HEAD = 4
"""Lines of an attempt that are kept; the pace of its first steps follows from them."""


@dataclass(slots=True)
class Line:
    """A line of metrics: its time, its step, and for an evaluation its seconds, if recorded."""

    time: float
    step: int
    evaluation: bool = False
    seconds: float | None = None


@dataclass(slots=True)
class StepLog:
    """The lines of one attempt.

    Attributes:
        before: newest step in the lines of other attempts, when the first line of this one was read.
        newest: the last line.
        step: the largest step.
        least: the smallest step.
        head: the first `HEAD` lines.
        useful, replayed, evaluation, other: seconds between the first line and the last one; see `Account`. Waits for
            checkpoints are in them.
        steps, steps_replayed: between the same lines.
    """

    before: int
    newest: Line
    step: int
    least: int
    head: list[Line] = field(default_factory=list)
    useful: float = 0.0
    replayed: float = 0.0
    evaluation: float = 0.0
    other: float = 0.0
    steps: int = 0
    steps_replayed: int = 0

    def add(self, line: Line, pace: float) -> None:
        """Add the next line. `pace`: seconds of a step, for an evaluation without a duration; 0 if unknown."""
        left = max(0.0, line.time - self.newest.time)
        done = line.step - self.step
        if line.evaluation:
            spent = evaluation_seconds(line, left, done, pace)
            self.evaluation += spent
            left -= spent
        if done > 0:
            again = min(done, max(0, self.before - self.step))
            part = left * again / done
            self.replayed += part
            self.useful += left - part
            self.steps += done - again
            self.steps_replayed += again
            self.step = line.step
        else:
            self.other += left
        self.newest = line
        self.least = min(self.least, line.step)
        if len(self.head) < HEAD:
            self.head.append(line)

    def first_pace(self) -> float:
        """Seconds of a step by the first lines; 0 if unknown."""
        return median(pace for pair in pairwise(self.head) if (pace := pace_between(*pair)) is not None)


def evaluation_seconds(line: Line, left: float, done: int, pace: float) -> float:
    """Return how many of the `left` seconds since the line before, which had `done` steps, the evaluation `line` took."""
    if line.seconds is not None:
        return min(left, max(0.0, line.seconds))
    if done <= 0:
        return left
    return max(0.0, left - done * pace) if pace > 0 else 0.0


def pace_between(before: Line, after: Line) -> float | None:
    """Seconds of a step between two lines; None if they say nothing about it."""
    gap, seconds = after.step - before.step, after.time - before.time
    return None if gap <= 0 or seconds < 0 or before.evaluation or after.evaluation else seconds / gap


def median(values: Iterable[float]) -> float:
    """The median; 0 without values."""
    found = sorted(values)
    middle = len(found) // 2
    return 0.0 if not found else found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2


@dataclass
class MetricsDigest:
    """What the lines of ``metrics.jsonl`` add up to.

    Attributes:
        count: of the records.
        newest: the largest step of any record; None if no record has one.
        logs: by attempt, in the order of their first lines.
        gaps: how many lines are so many steps after the line before them.
        paces: seconds of a step between the newest lines of steps.
    """

    count: int = 0
    newest: int | None = None
    logs: dict[int, StepLog] = field(default_factory=dict)
    gaps: dict[int, int] = field(default_factory=dict)
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=PACES))

    def add(self, records: Iterable[Record]) -> None:
        """Add the next records of the file, in its order."""
        for record in records:
            self.count += 1
            step, time, attempt = record.get("step"), record.get("time"), record.get("attempt", 1)
            if is_number(time) and is_count(step) and is_count(attempt):
                evaluation = "eval" in record
                seconds = record.get("seconds") if evaluation else None
                self._add(attempt, Line(time, step, evaluation, seconds if is_number(seconds) else None))

    def _add(self, attempt: int, line: Line) -> None:
        log = self.logs.get(attempt)
        if log is not None:
            self._note_pace(log.newest, line)
            log.add(line, self.pace() if line.evaluation and line.seconds is None else 0.0)
        elif len(self.logs) < MOST_ATTEMPTS:
            self.logs[attempt] = StepLog(self.newest or 0, line, line.step, line.step, [line])
        if self.newest is None or line.step > self.newest:
            self.newest = line.step

    def _note_pace(self, before: Line, line: Line) -> None:
        pace = pace_between(before, line)
        if pace is not None:
            self.paces.append(pace)
            gap = line.step - before.step
            if gap in self.gaps or len(self.gaps) < MOST_GAPS:
                self.gaps[gap] = self.gaps.get(gap, 0) + 1

    def spacing(self) -> int | None:
        """The median of the steps between two lines; None if unknown."""
        total, seen = sum(self.gaps.values()), 0
        for gap, count in sorted(self.gaps.items()):
            seen += count
            if 2 * seen > total:
                return gap
        return max(self.gaps, default=None)

    def pace(self) -> float:
        """Seconds of a step by the newest lines; 0 if unknown."""
        return median(self.paces)

    def packed(self) -> list[Any]:
        """Return the digest as JSON data."""
        logs = [
            [number, *(getattr(log, name) for name in PLAIN), astuple(log.newest), [astuple(line) for line in log.head]]
            for number, log in self.logs.items()
        ]
        return [self.count, self.newest, list(self.gaps.items()), list(self.paces), logs]

    @classmethod
    def unpacked(cls, data: Any) -> MetricsDigest:
        """Return what `packed` packed."""
        count, newest, gaps, paces, logs = data
        digest = cls(count, newest, gaps=dict(gaps), paces=deque(paces, PACES))
        for number, *values, last, head in logs:
            digest.logs[number] = StepLog(
                newest=Line(*last), head=[Line(*line) for line in head], **dict(zip(PLAIN, values, strict=True))
            )
        return digest


PLAIN = tuple(each.name for each in fields(StepLog) if each.name not in ("newest", "head"))
"""Fields of `StepLog` that are numbers."""
