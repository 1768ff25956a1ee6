"""Detect hangs, and find the rank that caused one, from the heartbeats of the ranks."""

from __future__ import annotations

import re
import sysconfig
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from launcher.agent.hangs.collectives import find_absent
from launcher.agent.hangs.records import GroupRecord
from launcher.config.timeouts import TIMEOUTS
from training.distributed.heartbeat import CONNECTING, DEBUGGING, IDLE, STARTING, TRAINING

MOST_STEPS = 1 << 63
"""Steps have 64 bits, with a sign, in the memory that a rank writes them to."""

LONGER_ELSEWHERE = 10.0
"""Factor of the time limit outside of training steps: evaluations, saves and compilations take longer than a step."""

STOPPED_STATES = "T"
"""States of /proc/PID/stat of a process that was stopped by a signal, until SIGCONT (stopped by a debugger: ``t``)."""


@dataclass(frozen=True)
class RankStatus:
    """Status of one rank: its heartbeat (`training.distributed.heartbeat.Reading`) and its process state in ``/proc``."""

    step: int = -1
    phase: str = STARTING
    age: float = 0.0
    state: str = ""


def columns_of(ranks: Mapping[int, RankStatus]) -> dict[str, list[Any]]:
    """Return the statuses of ranks as columns, which take a fifth of the time of tables to encode and decode."""
    beats = ranks.values()
    return {
        "ranks": [*ranks],
        "steps": [beat.step for beat in beats],
        "phases": [beat.phase for beat in beats],
        "ages": [round(float(beat.age), 3) for beat in beats],
        "states": [beat.state for beat in beats],
    }


def statuses_of(columns: Any) -> dict[int, RankStatus]:
    """Return the statuses in what `columns_of` returned, after JSON.

    Raises:
        ValueError: it is something else.
    """
    match columns:
        case {"ranks": list(r), "steps": list(s), "phases": list(p), "ages": list(a), "states": list(z), **rest} if (
            not rest
            and len(r) == len(s) == len(p) == len(a) == len(z)
            and {*map(type, r), *map(type, s)} <= {int}
            and {*map(type, p), *map(type, z)} <= {str}
            and {*map(type, a)} <= {float}
            and isfinite(sum(a))
            and -MOST_STEPS <= min(s, default=0) <= max(s, default=0) < MOST_STEPS
        ):
            return dict(zip(r, map(RankStatus, s, p, a, z), strict=True))
    raise ValueError("heartbeats are columns of ranks, steps, phases, ages and states, as `columns_of` returns them")


class HangDetector:
    """Measures the duration of steps and detects ranks without a heartbeat.

    The limit during steps is `hang_after` seconds, or three times the longest step so far if that is more; in other phases
    it is `LONGER_ELSEWHERE` times as long. A rank that is starting (until its first step is done) has no limit, since downloads
    and first compilations vary too much; nor has one after its loop. While it connects to the others it has the limit of a
    step, counted from when the last rank began to. If a process is stopped (SIGSTOP), the limit of a step holds in all
    phases.

    While one rank evaluates or saves, other ranks may wait for it. This does not excuse a rank that is behind in steps,
    since ranks finish a step together. While a person holds a rank in a debugger, no time passes.
    """

    def __init__(self, hang_after: float) -> None:
        self.hang_after = hang_after
        self._gaps: deque[float] = deque(maxlen=100)
        self._newest: tuple[int, float] | None = None  # the newest step, and the time at which it was done
        self._looked: float | None = None
        self._woke = -float("inf")

    def see(self, beats: Mapping[int, RankStatus], now: float) -> bool:
        """Take the status of all ranks at the time `now` (seconds); return whether the run is hung."""
        if not beats or not self.hang_after:
            return False
        if self._looked is not None and now - self._looked > TIMEOUTS.suspended:
            self._woke = now  # this process was suspended, too: earlier heartbeats say nothing about hangs
        self._looked = now
        if any(beat.phase == DEBUGGING for beat in beats.values()):
            self._woke, self._newest = now, None
            return False
        groups = _grouped(beats, now - self._woke)
        self._learn(groups, now)
        patience = max(self.hang_after, 3 * max(self._gaps, default=0.0))
        if any(stopped and most > patience for (_, _, stopped), (_, most) in groups.items()):
            return True  # in any phase: sooner or later all ranks wait for the stopped one
        limits = {phase: self._limit(phase, patience) for phase, _, _ in groups}
        late = [step for (phase, step, _), (_, most) in groups.items() if most > limits[phase]]
        busy = [step for (phase, step, _), (least, _) in groups.items() if patience < limits[phase] >= least]
        return bool(late) and min(late) < min(busy, default=float("inf"))

    def _learn(self, groups: Groups, now: float) -> None:
        step, age = max(
            ((step, -least) for (phase, step, _), (least, _) in groups.items() if phase not in (STARTING, CONNECTING)),
            default=(-1, 0.0),
        )
        done = now + age
        if self._newest is not None and 0 < self._newest[0] < step:
            self._gaps.append((done - self._newest[1]) / (step - self._newest[0]))
        if self._newest is None or step > self._newest[0]:
            self._newest = step, done

    @staticmethod
    def _limit(phase: str, patience: float) -> float:
        if phase in (STARTING, IDLE):
            return float("inf")
        return patience if phase in (TRAINING, CONNECTING) else LONGER_ELSEWHERE * patience


Groups = dict[tuple[str, int, bool], tuple[float, float]]
"""The least and the greatest age of the ranks of each phase and step; True: of those that are stopped."""


def _grouped(beats: Mapping[int, RankStatus], most: float) -> Groups:
    """Group the ranks, whose ages are `most` seconds at most; all that connect have the least age of these."""
    groups: Groups = {}
    for beat in beats.values():
        stopped = beat.state != "" and beat.state in STOPPED_STATES
        key, age = (beat.phase, beat.step, stopped), beat.age
        ages = groups.get(key)
        if ages is None:
            groups[key] = age, age
        elif age > ages[1]:
            groups[key] = ages[0], age
        elif age < ages[0]:
            groups[key] = age, ages[1]
    groups = {key: (min(low, most), min(high, most)) for key, (low, high) in groups.items()}
    last = min((low for (phase, _, _), (low, _) in groups.items() if phase == CONNECTING), default=0.0)
    return {key: (last, last) if key[0] == CONNECTING else ages for key, ages in groups.items()}


# ---- the culprit ----------------------------------------------------------------------------------------------------

FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
WAITING = re.compile(r"/torch/(distributed/|autograd/graph)|/training/group\.py|/torch/nn/parallel/distributed")
"""Files of frames in which a rank waits, or may wait, for others. Gradients are reduced inside of autograd."""

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
"""Folders of installed libraries."""


@dataclass(frozen=True)
class StackLocation:
    """Location of a rank's main thread.

    Attributes:
        line: ``file:line in function``, the innermost frame outside of installed libraries; empty: unknown.
        waiting: the thread is in a collective.
    """

    line: str = ""
    waiting: bool = False


def stack_location_of(dump: str) -> StackLocation:
    """The location of the main thread, which is the last thread of a dump of `faulthandler`."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", dump, flags=re.MULTILINE)
    frames = [match for line in threads[-1].splitlines() if (match := FRAME.match(line))]
    if not frames:
        return StackLocation()
    own = next((f for f in frames if not f["file"].startswith((*LIBRARIES, "<"))), frames[0])
    above = frames[: frames.index(own) + 1]
    return StackLocation(
        f"{own['file']}:{own['line']} in {own['function']}", any(WAITING.search(f["file"]) for f in above)
    )


def find_culprit(
    beats: Mapping[int, RankStatus],
    places: Mapping[int, StackLocation],
    records: Mapping[int, Sequence[GroupRecord] | None] | None = None,
) -> tuple[int | None, str]:
    """Find the rank that the others wait for, and describe the hang; None if no single rank caused it.

    In this order: a stopped process; a rank that did not enter a collective, by the `records` of all ranks (the others
    may wait for their GPU, far from the collective); of the ranks with the fewest steps, one that is not in a collective; if all of these
    are in a collective, a rank with more steps, which did not take part in it.
    """
    if all(beat.phase == CONNECTING for beat in beats.values()):
        return None, (
            f"the {len(beats)} ranks did not connect to each other: "
            + ", ".join(f"rank {r}{_at(r, places)}" for r in sorted(beats)[:4])
        )
    stopped = [rank for rank, beat in beats.items() if beat.state and beat.state in STOPPED_STATES]
    if stopped:
        rank = min(stopped)
        return rank, f"rank {rank} is stopped (SIGSTOP or a terminal) at step {beats[rank].step}{_at(rank, places)}"
    busy = {rank for rank, place in places.items() if not place.waiting}
    if found := find_absent(records or {}, beats, busy):
        culprit, text = found
        if culprit is not None and culprit in beats:
            text = f"{text}; rank {culprit} is after step {beats[culprit].step}{_at(culprit, places)}"
        return culprit, text
    least, most = (find(beat.step for beat in beats.values()) for find in (min, max))
    behind = sorted(rank for rank, beat in beats.items() if beat.step == least)
    absent = [rank for rank in behind if not places.get(rank, StackLocation()).waiting]
    if absent and (len(absent) < len(beats) or len(beats) == 1):
        rank = absent[0]
        others = "" if len(beats) == 1 else "; the others wait for it"
        return rank, f"rank {rank} makes no progress after step {least}{_at(rank, places)}{others}"
    ahead = sorted(rank for rank, beat in beats.items() if beat.step > least)
    if ahead:
        rank = ahead[0]
        waits = behind[0]
        return rank, (
            f"rank {rank} went on to step {most} without the collective in which rank {waits} waits{_at(waits, places)}"
        )
    return None, f"no rank makes progress after step {least}: " + ", ".join(
        f"rank {rank}{_at(rank, places)}" for rank in sorted(beats)
    )


def _at(rank: int, places: Mapping[int, StackLocation]) -> str:
    place = places.get(rank)
    return f" at {place.line}" if place is not None and place.line else ""
