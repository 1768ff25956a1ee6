"""Hangs: when a run counts as hung, and which rank held the others up. Both are arithmetic on what ranks say."""

from __future__ import annotations

import re
import sysconfig
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.config.timeouts import TIMEOUTS
from training.distributed.heartbeat import STARTING, TRAINING

LONGER_ELSEWHERE = 10.0
"""How much more patience there is outside of training steps, where evaluations, saves and compilations take their time."""

STOPPED_STATES = "T"
"""States of /proc/PID/stat in which a process does nothing until it is told to: stopped by a signal (not by a debugger)."""


@dataclass(frozen=True)
class RankStatus:
    """What is known of one rank: its pulse (`training.distributed.heartbeat.Reading`) and the state of its process in ``/proc``."""

    step: int = -1
    phase: str = STARTING
    age: float = 0.0
    state: str = ""


class HangDetector:
    """Learns how long steps take and says when a rank has been silent for too long.

    `hang_after` seconds of silence are too long during steps, or three times the longest step seen where that is more;
    ten times that in any other phase. A rank that is starting, which lasts until its first step is done, is never too
    slow: downloads and first compilations have no usual time, and the process group has time-outs of its own. A process
    that was stopped has no such excuse, nor do those that are at something else while it is.

    While one rank evaluates or saves, others may wait for it; but not those that have yet to finish a step which it has
    finished, since ranks finish a step together.
    """

    def __init__(self, hang_after: float) -> None:
        self.hang_after = hang_after
        self._gaps: deque[float] = deque(maxlen=100)
        self._newest: tuple[int, float] | None = None  # the newest step, and when it was done
        self._looked: float | None = None
        self._woke = -float("inf")

    def see(self, beats: Mapping[int, RankStatus], now: float) -> bool:
        """Look at the ranks, at time `now` in seconds; return whether the run is hung."""
        if not beats or not self.hang_after:
            return False
        if self._looked is not None and now - self._looked > TIMEOUTS.suspended:
            self._woke = now  # everything stood still, this process included; what ranks said before says nothing
        self._looked = now
        beats = {rank: replace(beat, age=min(beat.age, now - self._woke)) for rank, beat in beats.items()}
        self._learn(beats, now)
        patience = max(self.hang_after, 3 * max(self._gaps, default=0.0))
        limits = {rank: self._limit(beat, patience) for rank, beat in beats.items()}
        if any(beat.state and beat.state in STOPPED_STATES and beat.age > patience for beat in beats.values()):
            return True  # whatever the others are at: they will wait for it in the end, if they do not yet
        late = [beat.step for rank, beat in beats.items() if beat.age > limits[rank]]
        busy = [beat.step for rank, beat in beats.items() if patience < limits[rank] >= beat.age]
        return any(not any(other <= step for other in busy) for step in late)

    def _learn(self, beats: Mapping[int, RankStatus], now: float) -> None:
        step, age = max(
            ((beat.step, -beat.age) for beat in beats.values() if beat.phase != STARTING), default=(-1, 0.0)
        )
        done = now + age
        if self._newest is not None and 0 < self._newest[0] < step:
            self._gaps.append((done - self._newest[1]) / (step - self._newest[0]))
        if self._newest is None or step > self._newest[0]:
            self._newest = step, done

    @staticmethod
    def _limit(beat: RankStatus, patience: float) -> float:
        if beat.phase == STARTING:
            return float("inf")
        return patience if beat.phase == TRAINING else LONGER_ELSEWHERE * patience


# ---- who holds the others up ----------------------------------------------------------------------------------------

FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
WAITING = re.compile(r"/torch/(distributed/|autograd/graph)|/training/group\.py|/torch/nn/parallel/distributed")
"""Files whose innermost frames mean that a rank waits, or may wait, for the others. Gradients travel inside of autograd."""

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


@dataclass(frozen=True)
class StackLocation:
    """Where a rank stands.

    Attributes:
        line: ``file:line in function``, the innermost frame outside of installed libraries; empty where none is known.
        waiting: the innermost frames are a collective's.
    """

    line: str = ""
    waiting: bool = False


def stack_location_of(dump: str) -> StackLocation:
    """Where the main thread stands, by the stack that `faulthandler` wrote (the last thread of its dump)."""
    threads = re.split(r"^(?:Current thread|Thread) .*$", dump, flags=re.MULTILINE)
    frames = [match for line in threads[-1].splitlines() if (match := FRAME.match(line))]
    if not frames:
        return StackLocation()
    own = next((f for f in frames if not f["file"].startswith((*_LIBRARIES, "<"))), frames[0])
    above = frames[: frames.index(own) + 1]
    return StackLocation(
        f"{own['file']}:{own['line']} in {own['function']}", any(WAITING.search(f["file"]) for f in above)
    )


def find_culprit(beats: Mapping[int, RankStatus], places: Mapping[int, StackLocation]) -> tuple[int | None, str]:
    """Name the rank that the others wait for, and say why in a sentence; None where it is no single one.

    A stopped process comes first. Else the ranks that did fewest steps are behind, and among them those that do not stand
    in a collective hold up the others. Where all that are behind stand in a collective, a rank that is ahead of them
    went on without taking part in it.
    """
    stopped = [rank for rank, beat in beats.items() if beat.state and beat.state in STOPPED_STATES]
    if stopped:
        rank = min(stopped)
        return rank, f"rank {rank} is stopped (SIGSTOP or a terminal) at step {beats[rank].step}{_at(rank, places)}"
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
    return None, f"all ranks stand still after step {least}: " + ", ".join(
        f"rank {rank}{_at(rank, places)}" for rank in sorted(beats)
    )


def _at(rank: int, places: Mapping[int, StackLocation]) -> str:
    place = places.get(rank)
    return f" at {place.line}" if place is not None and place.line else ""
