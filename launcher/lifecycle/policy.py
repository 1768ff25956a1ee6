"""What the end of an attempt means and what follows from it: a pure function and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from signal import SIGTERM, Signals
from typing import Any

from launcher.lifecycle.exit_status import (
    BAD_REQUEST,
    DISK_FULL,
    ERROR_NOT_WRITTEN,
    FINISHED,
    STOPPED,
    advice,
    is_missing,
    sign_in,
)
from launcher.lifecycle.history import History


class Action(StrEnum):
    """What the coordinator does after an attempt."""

    FINISH = "finish"
    STOP = "stop"
    RESTART = "restart"  # on the present nodes
    MOVE = "move"  # on other nodes: the scheduler is asked to start the job again
    FAIL = "fail"


class Retry(StrEnum):
    """Where a failure is worth another attempt."""

    HERE = "here"
    ELSEWHERE = "elsewhere"
    NEVER = "never"


@dataclass(frozen=True)
class Rule:
    """What follows from a kind of failure: where to try again, and the advice to the user if it ends the run."""

    retry: Retry
    advice: str

    @property
    def resumable(self) -> bool:
        """Whether a run that failed by it can get further as it is, so that `launch resume` is worth a try."""
        return self.retry is not Retry.NEVER or "`launch resume`" in self.advice


RULES: dict[str, Rule] = {
    "user error": Rule(Retry.NEVER, "The target raised this itself; fix it and start again."),
    "bad request": Rule(Retry.NEVER, "Correct the request and start again."),
    "out of memory": Rule(
        Retry.NEVER, "Use a smaller batch, gradient accumulation, a lower precision or more ranks."
    ),  # the same batch needs the same memory
    "diverged": Rule(
        Retry.NEVER,
        "The ranks train different models. If the target is your own: wrap the model in DDP, give all ranks the same seed for"
        " the order of the data, and change weights on all ranks alike.",
    ),  # another attempt would train as many models again
    "disk full": Rule(Retry.NEVER, "Free space where the run directory lies, then `launch resume`."),
    "storage": Rule(
        Retry.ELSEWHERE,
        "A file system failed on that node, or became read-only; look at its mounts, then `launch resume`.",
    ),
    "killed": Rule(
        Retry.HERE,
        "If the kernel killed it for memory, ask for more memory or fewer ranks a node; then `launch resume`.",
    ),
    "not started": Rule(
        Retry.HERE, "Ray says more in its own logs on the nodes, and in `ray status`; then `launch resume`."
    ),
    "communication": Rule(
        Retry.HERE, "Communication between ranks failed; look at the network between the nodes, then `launch resume`."
    ),
    "hung": Rule(
        Retry.HERE,
        "The stacks of all ranks are in their logs, and beside these what each rank had entered (<rank>.collectives.json);"
        " then `launch resume`.",
    ),
    "device": Rule(
        Retry.ELSEWHERE,
        "A GPU, its driver or the build of torch for it is at fault, not the target; report the node to the cluster's"
        " administrators if it is not yours.",
    ),
    "unfit node": Rule(
        Retry.ELSEWHERE,
        "A node did not pass the profile's preflight, or a line of its node_setup failed there; see to it"
        " (`launch doctor --on-nodes` looks closer), then `launch resume`.",
    ),
    "node lost": Rule(Retry.ELSEWHERE, "A node stopped answering; check it, then `launch resume`."),
    "no progress": Rule(
        Retry.NEVER,
        "Give the run more time between two stops, or save and log more often; a script saves in a SIGTERM handler of its"
        " own, or raises requeues_without_progress in the profile if it saves by itself. Then `launch resume`.",
    ),
}
"""Every way in which a run can fail. Source of truth for the policy, for the texts and for the README's table."""

ADVICE = {kind: rule.advice for kind, rule in RULES.items()}

FAILURES_BEFORE_EXCLUSION = 3
"""Failures of one node in a row, without a step of progress between them, before the run is moved away from it."""

LONGEST_BACK_OFF = 30.0  # seconds


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended.

    Attributes:
        exits: exit code by rank, in the order in which they were seen; negative: ended by that signal. Ranks that the
            coordinator killed itself are left out.
        errors: the error records that ranks left, the likeliest cause first.
        stop: why the attempt was asked to stop; empty where it was not.
        lost: hosts that stopped answering.
        hosts: the host of each rank.
        step: the newest step that a rank had done; None where ranks do not say.
        hung: the rank that held the others up (None: no single one) and the sentence about it; None: nothing hung.
        unfit: what is wrong with each host that did not pass the preflight; then no rank has started.
        not_started: why the engine could not start the ranks; empty if it could.
        traceback: the last lines of a lost supervisor, the likeliest cause of its loss.
        joined: False if a rank ended without having opened a Context: a script, or a function without one.
        finished: rank 0 created the file LAUNCH_FINISHED, by which a program says that it is complete.
        aborts: the kind and the words of what made ranks abort, by rank, where their logs say it.
        ended_before_stop: ranks that had ended when the others were asked to stop.
    """

    exits: Mapping[int, int]
    errors: Sequence[Mapping[str, Any]] = ()
    stop: str = ""
    lost: Sequence[str] = ()
    hosts: Mapping[int, str] = field(default_factory=dict)
    step: int | None = None
    hung: tuple[int | None, str] | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)
    not_started: str = ""
    traceback: str = ""
    joined: bool = True
    finished: bool = False
    aborts: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    ended_before_stop: frozenset[int] = frozenset()

    @property
    def killed(self) -> bool:
        """Whether ranks that were asked to stop had to be killed."""
        return bool(self.stop) and not self.finished and bool(self.hosts.keys() - self.exits.keys())

    @property
    def interrupted(self) -> bool:
        """Whether a program without a Context was asked to stop and did not say that it had finished.

        What it then did (exit status 0 included) is not its own end, so it is neither a success nor a failure.
        """
        return bool(self.stop) and not self.joined and not self.finished

    @property
    def lost_everything(self) -> bool:
        """Whether a program that was stopped saved nothing, as far as that can be known from outside.

        Every rank that ran until then died of SIGTERM, for which it had no handler, or was killed at the end of the grace;
        and it logged no step.
        """
        codes = [code for rank, code in self.exits.items() if rank not in self.ended_before_stop]
        return (self.interrupted or self.killed) and self.step is None and all(code == -SIGTERM for code in codes)

    @property
    def missing_device(self) -> bool:
        """Whether a rank found no device that its software can use: another attempt on the same nodes finds none either."""
        cause = next(iter(self.errors), None)
        return cause is not None and is_missing(cause["kind"], cause["type"], cause["message"])

    @property
    def all_unfit(self) -> bool:
        """Whether not one of several hosts passed: what is wrong with each of them is not for another node to put right."""
        hosts = set(self.hosts.values())
        return len(hosts) > 1 and hosts <= self.unfit.keys()


@dataclass(frozen=True)
class Failure:
    """A failure with its name: what happened, where, and what to do."""

    kind: str
    message: str
    rank: int | None = None
    host: str | None = None
    advice: str = ""
    traceback: str = field(default="", repr=False)


def decide(
    outcome: Outcome,
    restarts_left: int,
    history: History | None = None,
    movable: bool = False,
    spare: bool = False,
) -> tuple[Action, Failure | None]:
    """Say what follows from `outcome`, and name the failure if it was one.

    `history` is what the attempts before came to. `movable`: a scheduler can start the job again elsewhere. `spare`: there
    are nodes enough here to go on without the lost and the unfit ones.
    """
    history = history or History()
    if outcome.stop and outcome.finished:
        return Action.FINISH, None
    if outcome.interrupted:
        return Action.STOP, None
    good = (FINISHED, STOPPED) if outcome.joined else (FINISHED,)
    bad = {rank: code for rank, code in outcome.exits.items() if code not in good}
    if not (bad or outcome.lost or outcome.unfit or outcome.hung or outcome.not_started):
        if outcome.stop and (not outcome.exits or outcome.killed):
            return Action.STOP, None  # stopped before, or killed after, its ranks could report their end
        return (Action.STOP if STOPPED in outcome.exits.values() else Action.FINISH), None
    if outcome.stop and all(code < 0 for code in bad.values()) and not outcome.lost:
        return Action.STOP, None  # ranks that die of a stop are not a failure
    failure = name_failure(outcome, bad)
    if outcome.stop and RULES[failure.kind].retry is not Retry.NEVER:
        return Action.STOP, None  # what dies while everything is ending is no reason to begin anew
    if RULES[failure.kind].retry is Retry.NEVER or restarts_left <= 0 or outcome.all_unfit:
        return Action.FAIL, failure
    if history.repeats(failure.kind, failure.rank, outcome.step):
        return Action.FAIL, replace(failure, message=f"{failure.message}, again at step {outcome.step}")
    if failure.kind == "device" and outcome.missing_device and not movable:
        return Action.FAIL, failure
    missing = bool(outcome.lost or outcome.unfit)
    if missing and spare:
        return Action.RESTART, failure
    if missing and not movable:
        return Action.FAIL, failure  # ranks cannot start on a node that is gone, and should not on an unfit one
    elsewhere = movable and (
        RULES[failure.kind].retry is Retry.ELSEWHERE or bool(unfit(failure, history, outcome.step))
    )
    return (Action.MOVE if elsewhere else Action.RESTART), failure


def unfit(failure: Failure, history: History, step: int | None) -> tuple[str, ...]:
    """The hosts to exclude after `failure`: at once for a device, else after repeated failures without progress."""
    if failure.host is None:
        return ()
    strikes = 1 if failure.kind in ("device", "storage", "unfit node") else FAILURES_BEFORE_EXCLUSION
    return (failure.host,) if history.failures_without_progress_on(failure.host, step) >= strikes - 1 else ()


def no_progress(history: History, step: int | None, allowed: int, first: int | None = None) -> Failure | None:
    """The failure that ends a preempted run instead of another requeue; None if the run may be requeued.

    A run that logs steps ends after two preemptions without a step between them; `step` is its newest. A program that
    lost everything (`Outcome.lost_everything`) at each of the last preemptions, or began again at the same step after each
    of them, ends after `allowed` requeues. `first` is the first step that the attempt logged.
    """
    if history.losses > allowed:
        text = (
            f"the program was stopped {history.losses} times in a row and saved nothing (no handler of SIGTERM or Context"
            " ended it within the grace), so it would start over each time"
        )
    elif (again := history.begun_again(first)) >= max(allowed, 1):
        text = f"the program began at step {first} after each of the last {again} preemptions: it resumes from nothing"
    elif history.stuck(step):
        text = f"the nodes were taken away twice, and no step was done in between (the newest is {step})"
    else:
        return None
    return Failure("no progress", text, advice=ADVICE["no progress"])


def backoff_seconds(history: History, step: int | None) -> float:
    """Seconds to wait before the next attempt: none while the run makes progress, else 1, 2, 4, ... for each failure without progress."""
    failures = history.failures_without_progress(step)
    return min(LONGEST_BACK_OFF, 2.0 ** (failures - 1)) if failures else 0.0


def describe_interruption(outcome: Outcome) -> str:
    """What the first four ranks of an interrupted program did, in one line."""
    ranks = sorted(outcome.exits.keys() | outcome.hosts.keys())
    errors = {error["rank"]: error for error in outcome.errors}
    fields = []
    for rank in ranks[:4]:
        code = outcome.exits.get(rank)
        if rank in errors:
            message = str(errors[rank]["message"])
            exited = errors[rank]["type"] == "SystemExit"
            text = message.removeprefix("the script ") if exited else f"raised {errors[rank]['type']}: {message}"
        elif code is None:
            text = "was killed"
        else:
            text = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit status {code}"
        fields.append(f"rank {rank} {text}")
    return "; ".join(fields + ["..."] * (len(ranks) > 4))


def _signal_name(number: int) -> str:
    return {each.value: each.name for each in Signals}.get(number, f"signal {number}")


def name_failure(outcome: Outcome, bad: Mapping[int, int]) -> Failure:
    """Name the failure of an attempt with the bad exits `bad` (exit code by rank)."""
    echoes = {rank for rank, (kind, _) in outcome.aborts.items() if kind == "communication"}
    died = sorted((rank for rank, code in bad.items() if code < 0), key=lambda rank: rank in echoes)  # the cause first
    signalled = died[0] if died else None
    cause = next(iter(outcome.errors), None)

    def failure(kind: str, message: str, rank: int | None, traceback: str = "", host: str | None = None) -> Failure:
        if rank is not None:  # the scheduler's name of a node goes before the one that the node has for itself
            host = outcome.hosts.get(rank, host)
        return Failure(kind, message, rank, host, advice(kind, message) or ADVICE[kind], traceback)

    if outcome.hung is not None:
        rank, text = outcome.hung
        sign = sign_in(text)  # ranks that call different collectives do so again
        return failure("user error" if sign is not None and sign.kind == "user error" else "hung", text, rank)
    if outcome.lost:
        text = f"{outcome.lost[0]} stopped answering"
        return failure("node lost", text, None, outcome.traceback, outcome.lost[0])
    if outcome.not_started:
        return failure("not started", outcome.not_started, None)
    if outcome.unfit:
        fields = "; ".join(f"{host}: {text}" for host, text in outcome.unfit.items())
        return failure("unfit node", fields, None, host=next(iter(outcome.unfit)))
    if cause is not None and (cause["kind"] != "communication" or signalled is None or signalled in echoes):
        kind = str(cause["kind"])
        text = cause["message"] if kind == "bad request" else f"{cause['type']}: {cause['message']}"
        return failure(kind, text, cause["rank"], cause.get("traceback", ""), cause["host"])
    if signalled is not None:
        name = _signal_name(-bad[signalled])
        if signalled in outcome.aborts:
            kind, words = outcome.aborts[signalled]
            return failure(kind, f"rank {signalled} was ended by {name}: {words}", signalled)
        return failure("killed", f"rank {signalled} was ended by {name}", signalled)
    rank, code = next(iter(bad.items()))
    if code in (DISK_FULL, ERROR_NOT_WRITTEN):
        kind = "disk full" if code == DISK_FULL else "storage"
        return failure(kind, f"rank {rank} could not write its error into the run directory", rank)
    kind = "bad request" if code == BAD_REQUEST else "user error"
    return failure(kind, f"rank {rank} ended with exit status {code} and left no error", rank)
