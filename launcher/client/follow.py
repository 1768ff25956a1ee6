"""A run as a person watches it: what rank 0 prints, what happens to the run, and on a terminal one line of progress."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TextIO

from launcher import backends
from launcher.client.run import Run
from launcher.client.screen import Screen
from launcher.client.tail import LiveTail, Tail, printable, safe_line
from launcher.client.terminal import Terminal
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.accounting import Account, ledger
from launcher.lifecycle.run_dir import WatchedDir
from launcher.request.spec import RunSpec, State
from training.files import parse_json
from training.flags.typed import is_count, is_number

Wait = Callable[[Screen, float], None]


def follow(run: Run, out: TextIO, rank: int = 0) -> State:
    """Print what happens until the run has ended, and return its state; see `Follower`."""
    return Follower(run, out, rank).follow()


class Follower:
    """Prints what one rank prints and what happens to the run; on a terminal, one line of progress below.

    With `terminal` the rank itself writes to it, and its log is not read. `wait` takes the place of a pause between two looks.
    """

    def __init__(
        self, run: Run, out: TextIO, rank: int = 0, terminal: Terminal | None = None, wait: Wait | None = None
    ) -> None:
        self.run = Run(WatchedDir(run.path))
        self.rank, self.terminal, self.wait = rank, terminal, wait
        self.screen = Screen(out)
        plan = run.dir.plan()
        self.backend, self.has_queue = plan.backend, backends.of(plan.cluster).capabilities.queue
        self.events = Tail(run.dir.events_file)
        # Ends of earlier submissions: earlier events were printed then.
        ends = sum(event["event"] == "finished" for event in run.dir.events(re.compile('"finished"')))
        self.ended = ends - (run.dir.result() is not None)
        self.log: Tail | None = None
        self.metrics = Tail(run.dir.metrics_file)  # read on from where it was: it grows for as long as the run lasts
        self.steps: deque[dict[str, Any]] = deque(maxlen=20)
        self.attempt = max(0, run.dir.last_attempt() - 1)  # the newest that is not shown, or shown to its end
        self.queued = False

    def follow(self) -> State:
        """Print until the run has ended. After an interruption, a second call goes on where the first one was."""
        news = time.monotonic()
        while True:
            before = self.screen.written
            state = self._look()
            if state.done:
                return state
            if self.screen.written != before:
                news = time.monotonic()
            pause = max(TIMEOUTS.follow, min((time.monotonic() - news) / 20, TIMEOUTS.follow_silent))
            if self.terminal is not None and self.terminal.connection is not None:
                self.terminal.relay(self.screen, pause)
            elif self.wait is not None:
                self.wait(self.screen, pause)
            else:
                time.sleep(pause)

    def _look(self) -> State:
        """Print what is new, and return the state of the run."""
        state = self.run.state()
        if self.terminal is not None and state.done:
            self.terminal.relay(self.screen, TIMEOUTS.ranks_end)
        self.print_events()
        self._print_log(end=state.done)
        if state is State.QUEUED and not self.queued and self.has_queue:
            self.queued = True
            self.screen.line(f"launch: waiting in the queue of {printable(self.backend)}")
        if self.screen.live and not state.done:
            word = "starting" if state is State.QUEUED and not self.has_queue else state.value
            self.steps.extend(line for line in _records(self.metrics) if is_step(line))
            self.screen.progress(printable(status_line(self.run.name, word, self.steps)))
        if state.done:
            self.screen.erase()
            metrics, attempts = self.run.dir.digests()
            if text := account_line(ledger(attempts, metrics).total):
                self.screen.line(f"launch: {text}")
        self.screen.flush()
        return state

    def print_events(self) -> None:
        """Print what has happened to the run since the last call."""
        for event in _records(self.events):
            if self.ended > 0:
                self.ended -= event.get("event") == "finished"
            elif text := described(event):
                self._print_log()  # what the rank said before it
                self.screen.line(f"launch: {printable(text)}")

    def _print_log(self, end: bool = False) -> None:
        """Print what the rank's log gained; of the newest attempt, and of those since the last look to their end."""
        if self.terminal is not None:
            return
        for attempt in range(self.attempt + 1, self.run.dir.last_attempt() + 1):
            self._print(end=True)
            log = self.run.dir.log(attempt, self.rank)
            self.log, self.attempt = (LiveTail if self.screen.live else Tail)(log, self.run.path), attempt
        self._print(end)

    def _print(self, end: bool) -> None:
        for text in self.log.read(end) if self.log is not None else ():
            if self.screen.live:
                self.screen.text(text)
            else:
                self.screen.line(safe_line(text))


def _records(tail: Tail) -> Iterator[dict[str, Any]]:
    for line in tail.read():
        with suppress(ValueError):  # a line whose writer died
            record = parse_json(line.encode(errors="replace"))
            if isinstance(record, dict):
                yield record


def is_step(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics has what `status_line` shows, in its types."""
    rate = line.get("samples_per_second") or 0
    return "loss" in line and is_count(line.get("step")) and is_number(line.get("time")) and is_number(rate)


def described(event: Mapping[str, Any]) -> str:
    """As `describe`; empty also for an event whose fields have other types than this version writes."""
    try:
        return describe(event)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return ""


STARTS_OVER = "the program logged no step, so it begins anew unless it loads a checkpoint of its own"


def describe(event: Mapping[str, Any]) -> str:
    """One line for a person about `event`; empty for those that the log shows anyway."""
    match event:
        case {"event": "started", "attempt": attempt, "world_size": size, "hosts": hosts}:
            again = f"attempt {attempt}: " if attempt > 1 else ""
            switches = len({*event.get("switches", [])})
            below = f" in the order of their {switches} switches" if switches > 1 else ""
            return f"{again}{size} rank{'s' * (size > 1)} on {', '.join(hosts)}{below}"
        case {"event": "stopping", "reason": reason, "context": False, "ranks": ranks, "grace": grace}:
            one = "it is" if ranks == 1 else "they are"
            several = "s" * (ranks > 1)
            return f"stopping: sent SIGTERM to {ranks} rank{several}, {grace:g} seconds until {one} killed ({reason})"
        case {"event": "stopping", "reason": reason, "context": True}:
            return f"stopping at the next step ({reason})"
        case {"event": "stopping", "reason": reason}:
            return f"stopping ({reason})"
        case {"event": "interrupted", "message": message, "last_line": line, "lost_everything": lost}:
            lines = f"; its last line: {line}" if line else ""
            return f"stopped: {message}{lines}" + ("; nothing was saved on SIGTERM" if lost else "")
        case {"event": "save-interrupted", "step": step, "error": error}:
            return f"the checkpoint of step {step} could not be saved: {error}"
        case {"event": "node-warning", "hosts": [first, *others], "message": message}:
            more = f" and {len(others)} more node{'s' * (len(others) > 1)}" if others else ""
            return f"{first}{more}: {message}"
        case {"event": "waiting", "message": message}:
            return f"waiting: {message}"
        case {"event": "preempted"}:
            return "preempted: the scheduler wants the nodes"
        case {"event": "requeued"}:
            return "asked the scheduler to start the run again"
        case {"event": "restarted", "attempt": attempt, "kind": kind, "message": message, "restarts_left": left}:
            text = f"attempt {attempt} failed: {kind}: {message}; starting all ranks again ({left} restarts left)"
            return text if event.get("step") is not None else f"{text}; {STARTS_OVER}"
    return ""


def status_line(name: str, word: str, steps: Sequence[dict[str, Any]]) -> str:
    """State, step, rate, loss and time left, as one line; `steps` are the newest records of steps."""
    parts = [f"[{name}] {word}"]
    if word == State.RUNNING and steps:
        last = steps[-1]
        total = last.get("total_steps") if is_count(last.get("total_steps")) else None
        parts.append(f"step {last['step']}" + (f"/{total}" if total else ""))
        loss = last["loss"]
        parts.append(f"loss {loss:.4f}" if isinstance(loss, int | float) else f"loss {loss}")  # such as "NaN"
        if rate := last.get("samples_per_second"):
            parts.append(f"{rate:.0f} samples/s")
        spread = last["time"] - steps[0]["time"]
        if total and spread > 0 and last["step"] > steps[0]["step"]:
            left = (total - last["step"]) * spread / (last["step"] - steps[0]["step"])
            parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def account_line(total: Account) -> str:
    """Goodput and where the rest of the time went, as one line; empty for a run that never came to a step."""
    if not total.steps:
        return ""
    spent = {
        "in the queue": total.queue,
        "starting": total.startup,
        "evaluating": total.evaluation,
        "waiting for checkpoints": total.checkpoint or 0.0,
        f"doing {total.steps_replayed} steps again": total.replayed,
    }
    rest = "".join(f", {duration(seconds)} {what}" for what, seconds in spent.items() if seconds >= 1)
    hours = f"{total.device_hours:.3g} device-hour{'s' * (total.device_hours != 1)}"
    return f"goodput {100 * total.goodput:.0f} % of {duration(total.held)}{rest}; {hours}"


def duration(seconds: float) -> str:
    """``42s``, ``3m07s``, ``2h05m`` or ``1d04h``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


class Terminated(KeyboardInterrupt):
    """SIGTERM was received while a run was followed."""


def attend(run: Run, out: TextIO, terminal: Terminal | None = None, wait: Wait | None = None) -> State | None:
    """Follow a run to its end and return its state; None if Ctrl-C ended only the watching. See `Follower`.

    On this machine the first Ctrl-C, or SIGTERM, asks the run to stop, and the second one ends it; so does a pipe that
    nobody reads any more. A run of a cluster continues after Ctrl-C; SIGTERM keeps its usual effect there.
    """
    follower = Follower(run, out, terminal=terminal, wait=wait)
    follower.attempt = _earlier_attempts(
        run.dir.events(re.compile('"(?:submitted|started)"'))
    )  # the first ones may be over
    if not backends.of(run.dir.plan().cluster).capabilities.interrupt_stops:
        try:
            return follower.follow()
        except KeyboardInterrupt:
            print(
                f"\nlaunch: no longer watching; {run.name} goes on. Come back with `launch logs -f {run.name}`, see"
                f" `launch status {run.name}`, end it with `launch cancel {run.name}`.",
                file=sys.stderr,
            )
            return None
    with _sigterm_raises(), terminal.used() if terminal is not None else nullcontext():
        if terminal is not None:
            terminal.on_start = follower.print_events
            terminal.on_stop = lambda: follower.screen.line(f"launch: {how_it_stops(run)}; Ctrl-C again ends at once")
        return _until_stopped(run, follower)


def _earlier_attempts(events: Iterable[dict[str, Any]]) -> int:
    """The number of attempts before the run was last submitted."""
    found = newest = 0
    for event in events:
        if event["event"] == "submitted":
            found = newest
        elif event["event"] == "started" and is_count(event.get("attempt")):
            newest = max(newest, event["attempt"])
    return found


def _until_stopped(run: Run, follower: Follower) -> State:
    """Follow a run of this machine to its end, and stop it on request."""
    try:
        return follower.follow()
    except KeyboardInterrupt as interruption:
        reason = "SIGTERM" if isinstance(interruption, Terminated) else "Ctrl-C"
    except BrokenPipeError:
        reason = "nobody reads its output"
        # What it writes from now on, and the last flush of this process, go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), follower.screen.out.fileno())
    again = "" if reason.startswith("nobody") else f"; {reason} again ends at once"
    newline = "\r\n" if follower.screen.raw else "\n"
    print(f"{newline}launch: {how_it_stops(run)}{again}", end=newline, file=sys.stderr)
    run.dir.request_stop(reason)
    try:
        return follower.follow()
    except KeyboardInterrupt:
        return run.kill()


def how_it_stops(run: Run) -> str:
    """Describe what a request to stop does: only a program with a Context, which logs its steps, stops at a step."""
    plan = run.dir.plan()
    if run.dir.metrics_file.exists():
        saves = plan.target.name == RunSpec.target or run.has_saved()
        checkpoint = ", with a checkpoint" if saves else ""
        return f"stopping at the next step{checkpoint}; ranks that still run after {plan.cluster.grace:g} seconds are killed"
    return (
        f"stopping: SIGTERM goes to every rank, {plan.cluster.grace:g} seconds before those that still run are killed"
    )


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`, unless the program has a handler of its own or this is not its main thread."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
