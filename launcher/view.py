"""A run as a person watches it: what rank 0 prints, what happens to the run, and on a terminal one line of progress."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

from launcher.launch import Run
from launcher.spec import State

LOOK_SECONDS = 0.2
TOLD = ("started", "stopping", "preempted", "requeued", "failed", "restarted")
"""The events worth a line while one watches."""


class Tail:
    """The complete lines that a growing file gained since the last look; the file may not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] | None = None
        self.rest = b""

    def read(self) -> Iterator[str]:
        if self.file is None:
            if not self.path.exists():
                return
            self.file = self.path.open("rb")
        *lines, self.rest = (self.rest + self.file.read()).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rpartition("\r")[2]

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def follow(run: Run, out: TextIO, rank: int = 0) -> State:
    """Print what happens until the run has ended, and return its state. Prints plain lines where `out` is no terminal."""
    live = out.isatty()
    seen = len([e for e in run.dir.events() if e["event"] == "finished"])  # of earlier submissions
    events, log, attempt = _events_since(run, seen), None, 0
    state = State.QUEUED
    told = ""
    while True:
        state = run.state()
        if live:
            out.write("\r\x1b[K")
        number = run.dir.last_attempt()
        if log is None or number != attempt:
            if log is not None:
                _print(log.read(), out)
                log.close()
            log, attempt = Tail(run.dir.log(number, rank)), number
        for event in events():
            line = describe(event)
            if line:
                out.write(f"launch: {line}\n")
        _print(log.read(), out)
        if state.done:
            log.close()
            return state
        if state is State.QUEUED and told != "queued" and run.dir.plan().backend != "local":
            told = "queued"
            out.write(f"launch: waiting in the queue of {run.dir.plan().backend}\n")
        if live:
            out.write(status_line(run, state)[: shutil.get_terminal_size().columns - 1])
        out.flush()
        time.sleep(LOOK_SECONDS)


def _print(lines: Iterator[str], out: TextIO) -> None:
    for line in lines:
        out.write(line + "\n")


def _events_since(run: Run, finished: int) -> Any:
    """A function that returns the events since it was last called, beginning after the `finished`-th end of the run."""
    tail = Tail(run.dir.events_file)
    import json

    left = finished

    def read() -> Iterator[dict[str, Any]]:
        nonlocal left
        for line in tail.read():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # a line whose writer died
            if left:
                left -= event["event"] == "finished"
            else:
                yield event

    return read


def describe(event: dict[str, Any]) -> str:
    """One line for a person about `event`; empty for those that the log shows anyway."""
    match event:
        case {"event": "started", "attempt": attempt, "world_size": size, "hosts": hosts}:
            again = f"attempt {attempt}: " if attempt > 1 else ""
            return f"{again}{size} rank{'s' * (size > 1)} on {', '.join(hosts)}"
        case {"event": "stopping", "reason": reason}:
            return f"stopping at the next step ({reason})"
        case {"event": "preempted"}:
            return "preempted: saving and leaving"
        case {"event": "requeued"}:
            return "asked the scheduler to start the run again"
        case {"event": "failed", "attempt": attempt, "kind": kind, "message": message}:
            return f"attempt {attempt} failed: {kind}: {message}" if kind != "bad request" else ""
        case {"event": "restarted", "restarts_left": left}:
            return f"starting all ranks again from the newest checkpoint ({left} restarts left)"
    return ""


def status_line(run: Run, state: State) -> str:
    """State, step, rate, loss and time left, as one line."""
    steps = [m for m in run.dir.metrics()[-20:] if "loss" in m]
    parts = [f"[{run.name}] {state.value}"]
    if state is State.RUNNING and steps:
        last = steps[-1]
        total = last.get("total_steps")
        parts.append(f"step {last['step']}" + (f"/{total}" if total else ""))
        parts.append(f"loss {last['loss']:.4f}")
        if rate := last.get("samples_per_second"):
            parts.append(f"{rate:.0f} samples/s")
        spread = last["time"] - steps[0]["time"]
        if total and spread > 0 and last["step"] > steps[0]["step"]:
            left = (total - last["step"]) * spread / (last["step"] - steps[0]["step"])
            parts.append(f"{duration(left)} left")
    return "  ".join(parts)


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
