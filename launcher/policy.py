"""What the end of an attempt means and what follows from it: a pure function and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from signal import Signals
from typing import Any

from launcher.worker import FINISHED, REFUSED, STOPPED


class Action(StrEnum):
    """What the coordinator does after an attempt."""

    FINISH = "finish"
    STOP = "stop"
    RESTART = "restart"
    FAIL = "fail"


RETRIED: dict[str, bool] = {
    # kind of failure: is it worth another attempt?
    "user error": False,  # the same code on the same data raises again
    "bad request": False,
    "out of memory": False,  # the same batch needs the same memory
    "disk full": False,
    "killed": True,  # kill -9, the kernel's OOM killer, a crash in native code
    "communication": True,  # a peer went away
    "node lost": True,
}

ADVICE: dict[str, str] = {
    "user error": "The target raised this itself; fix it and start again.",
    "bad request": "Correct the request and start again.",
    "out of memory": "Use a smaller batch, gradient accumulation, a lower precision or more ranks.",
    "disk full": "Free space where the run directory lies, then `launch resume`.",
    "killed": "If the kernel killed it for memory, ask for more memory or fewer ranks a node; then `launch resume`.",
    "communication": "The ranks lost each other; look at the network between the nodes, then `launch resume`.",
    "node lost": "A node stopped answering; `launch resume` goes on from the newest checkpoint.",
}


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        exits: exit code by rank, in the order in which they were seen; negative: ended by that signal. Ranks that the
            coordinator killed itself are left out.
        errors: the error records that ranks left, the likeliest cause first.
        stop: why the attempt was asked to stop; empty where it was not.
        lost: nodes that stopped answering.
    """

    exits: Mapping[int, int]
    errors: Sequence[Mapping[str, Any]] = ()
    stop: str = ""
    lost: Sequence[int] = ()


@dataclass(frozen=True)
class Failure:
    """A failure with its name: what happened, where, and what to do."""

    kind: str
    message: str
    rank: int | None = None
    host: str | None = None
    advice: str = ""
    traceback: str = field(default="", repr=False)


def decide(outcome: Outcome, restarts_left: int) -> tuple[Action, Failure | None]:
    """Say what follows from `outcome`, and name the failure if it was one."""
    bad = {rank: code for rank, code in outcome.exits.items() if code not in (FINISHED, STOPPED)}
    if not bad and not outcome.lost:
        if outcome.stop and not outcome.exits:
            return Action.STOP, None  # stopped before, or killed after, its ranks could say anything
        return (Action.STOP if STOPPED in outcome.exits.values() else Action.FINISH), None
    if outcome.stop and all(code < 0 for code in bad.values()) and not outcome.lost:
        return Action.STOP, None  # ranks that die of a stop are not a failure
    failure = name_failure(outcome, bad)
    return (Action.RESTART if RETRIED[failure.kind] and restarts_left > 0 else Action.FAIL), failure


def name_failure(outcome: Outcome, bad: Mapping[int, int]) -> Failure:
    """Name the failure of an attempt with the bad exits `bad` (exit code by rank)."""
    signalled = next((r for r, code in bad.items() if code < 0), None)
    cause = next(iter(outcome.errors), None)
    if outcome.lost:
        kind, message = "node lost", f"node {outcome.lost[0]} stopped answering"
        return Failure(kind, message, advice=ADVICE[kind])
    if cause is not None and (cause["kind"] != "communication" or signalled is None):
        kind = str(cause["kind"])
        text = cause["message"] if kind == "bad request" else f"{cause['type']}: {cause['message']}"
        return Failure(kind, text, cause["rank"], cause["host"], ADVICE[kind], cause.get("traceback", ""))
    if signalled is not None:
        number = -bad[signalled]
        name = {each.value: each.name for each in Signals}.get(number, f"signal {number}")
        return Failure("killed", f"rank {signalled} was ended by {name}", signalled, advice=ADVICE["killed"])
    rank, code = next(iter(bad.items()))
    kind = "bad request" if code == REFUSED else "user error"
    return Failure(kind, f"rank {rank} ended with exit status {code} and left no error", rank, advice=ADVICE[kind])
