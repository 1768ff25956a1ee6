"""The file names of a run directory, and what the processes of a run record there."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from launcher.config.codec import to_json
from training.files import (
    FULL_DISK,
    MAX_LINES_BYTES,
    append_line,
    names_in,
    newest_records,
    open_plain,
    read_json,
    read_lines,
    write_atomic,
)

if TYPE_CHECKING:
    from launcher.lifecycle.records.attempts import AttemptsDigest
    from launcher.lifecycle.records.metrics import MetricsDigest

RESERVE_BYTES = 256 * 1024
"""Disk space in bytes that a run reserves for its last events and its result."""


PROGRESS = ("step", "total_steps", "epoch", "loss", "lr", "samples_per_second")
"""Fields of a line of metrics that say how far a run is."""


class FileOfRun:
    """A file or folder of the run directory by its name there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run_dir: RunPaths, _: object = None) -> Path:
        return run_dir.path / self.name


@dataclass(frozen=True)
class RunPaths:
    """The files of one run, by name."""

    path: Path

    plan_file = FileOfRun("plan.json")
    secrets_file = FileOfRun("secrets.json")
    job_file = FileOfRun("job.json")
    script_file = FileOfRun("script.sh")
    code = FileOfRun("code")
    packages = FileOfRun("packages")
    """Copies of code outside of the project."""
    snapshot_file = FileOfRun("snapshot.json")
    diff_file = FileOfRun("code.diff")
    target_pickle = FileOfRun("target.pkl")
    sources_file = FileOfRun("sources.json")
    """The text of the notebook cells from which `target_pickle` comes, for tracebacks."""
    arguments_pickle = FileOfRun("arguments.pkl")
    """Values for the target's parameters that JSON cannot hold."""
    value_pickle = FileOfRun("value.pkl")
    value_file = FileOfRun("value.json")
    """What the target returned, where that is a dict that JSON can hold."""
    stop_file = FileOfRun("stop")
    """Asks the run to stop at the next step boundary; `Context` looks for it too."""
    events_file = FileOfRun("events.jsonl")
    metrics_file = FileOfRun("metrics.jsonl")
    result_file = FileOfRun("result.json")
    heartbeat_file = FileOfRun("heartbeat")
    rendezvous_file = FileOfRun("rendezvous.json")
    reserve_file = FileOfRun(".reserve")
    head_file = FileOfRun("ray-head.json")
    """Where the head of a Ray is that lives inside the run's job."""
    token_file = FileOfRun(".ray-token")
    """The authentication token of a Ray cluster inside the run's job; readable by this user."""
    session_file = FileOfRun("session.json")
    visits = FileOfRun("visits")
    """Requests of clients to look inside (`launcher.lifecycle.records.visits`)."""
    debug_file = FileOfRun("debug.json")
    """What ``launch --debug`` asks of the ranks of the newest submission; only with it."""
    logs = FileOfRun("logs")

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs / str(attempt) / f"{rank}.log"

    def finished(self, attempt: int, rank: int) -> Path:
        """What a program creates to say that it is complete; its name is in the rank's LAUNCH_FINISHED."""
        return self.logs / str(attempt) / f"{rank}.finished"

    def collectives(self, attempt: int, rank: int) -> Path:
        """The newest collectives of a rank that hung (`training.distributed.hangs.collectives`)."""
        return self.logs / str(attempt) / f"{rank}.collectives.json"

    def profile(self, attempt: int, rank: int, visit: str) -> Path:
        """The Chrome trace that a rank wrote for ``launch profile``; the table is beside it, as ``.txt``."""
        return self.path / "profiles" / f"attempt-{attempt}-rank-{rank}-{visit}.json"

    def nccl_dump(self, attempt: int) -> Path:
        """What NCCL writes the record of a rank to at a timeout, followed by the number of the rank."""
        return self.logs / str(attempt) / "nccl-"

    def agent_log(self, node: int) -> Path:
        return self.logs / f"agent-{node}.log"

    def error(self, attempt: int, rank: int) -> Path:
        return self.path / "errors" / str(attempt) / f"{rank}.json"


@dataclass(frozen=True)
class RunFiles(RunPaths):
    """What the processes of a run write to its files, and read back. Nothing is read through a link below the run directory."""

    def open_agent_log(self, node: int) -> BinaryIO:
        """Open the log of a node's agent to append to it; only the owner can read it."""
        return os.fdopen(open_plain(self.agent_log(node), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")

    def event(self, event: str, /, **fields: Any) -> bool:
        """Add to the log of events. If that cannot be written, print the event to the supervisor's log and return False."""
        record = {"time": time.time(), "event": event, **fields}
        try:
            self._making_room(lambda: append_line(self.events_file, record))
        except OSError as error:
            print(f"launch: {self.events_file}: {error.strerror}: {record}", file=sys.stderr)
            return False
        return True

    def reserve(self) -> None:
        """Reserve `RESERVE_BYTES` of the disk, so that the result can be written when the disk is full."""
        with suppress(OSError):
            write_atomic(self.reserve_file, bytes(RESERVE_BYTES))

    def _making_room(self, write: Callable[[], None]) -> None:
        """Call `write`; where the disk is full, give up the reserve and call it again."""
        try:
            write()
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self.reserve_file.unlink(missing_ok=True)
            write()

    def events(self, only: re.Pattern[str] | None = None) -> list[dict[str, Any]]:
        """The events, of which each has a kind; with `only`, those in whose line it is found."""
        return [record for record in read_lines(self.events_file, only) if isinstance(record.get("event"), str)]

    def newest_event(self, *kinds: str) -> dict[str, Any] | None:
        """The newest event of one of these kinds; None if there is none. The log is read from its end."""
        found = newest_records(self.events_file, kinds, lambda kind, event: event.get("event") == kind, one=True)
        return next(iter(found.values()), None)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file)

    def newest_lines(self, limit: int = MAX_LINES_BYTES) -> dict[str, Any]:
        """The newest progress and evaluation in the last `limit` bytes of the metrics, and the size of their log.

        Of the progress, the fields `PROGRESS` are kept.
        """
        try:
            size = self.metrics_file.lstat().st_size
        except FileNotFoundError:
            return {"bytes": 0, "progress": {}, "evaluation": {}}
        found = newest_records(self.metrics_file, ("loss", "eval"), lambda key, record: key in record, limit)
        step, evaluation = found.get("loss", {}), found.get("eval", {}).get("eval")
        progress = {key: step[key] for key in PROGRESS if key in step}
        return {
            "bytes": size,
            "progress": progress,
            "evaluation": evaluation if isinstance(evaluation, dict) else {},
        }

    def digests(self) -> tuple[MetricsDigest, AttemptsDigest]:
        """What the logs of metrics and events add up to."""
        from launcher.lifecycle.records.index import read_digests

        return read_digests(self.metrics_file, self.events_file)

    def newest_step(self) -> int | None:
        """The newest step in the metrics; None where the target logs none."""
        return self.digests()[0].newest

    def first_step(self, attempt: int) -> int | None:
        """The first step in the metrics of an attempt; None where the target logged none."""
        log = self.digests()[0].logs.get(attempt)
        return None if log is None else log.least

    def has_saved(self) -> bool:
        """Whether the program has saved a checkpoint through its Context, in any attempt."""
        checkpoints = self.path / "checkpoints"
        with suppress(OSError):  # such as a link to another disk; then the events say it
            for name in names_in(checkpoints, self.path):
                if name.startswith("step-") and (checkpoints / name / "manifest.json").exists():
                    return True
        return self.newest_event("saved") is not None

    def claim_attempt(self) -> int:
        """Return the next attempt's number and make its folders; no two callers get the same one."""
        number = self.last_attempt() + 1
        while True:
            with suppress(FileExistsError):
                self._making_room(partial(self._make_attempt, number))
                return number
            number += 1

    def _make_attempt(self, number: int) -> None:
        self.logs.mkdir(exist_ok=True)
        errors = self.path / "errors" / str(number)
        errors.mkdir(parents=True, exist_ok=True)
        (self.logs / str(number)).mkdir()  # last: it is the claim

    def last_attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        names = names_in(self.logs, self.path)
        return max((int(name) for name in names if re.fullmatch("[0-9]{1,9}", name)), default=0)

    def ranks_with_logs(self, attempt: int) -> list[int]:
        """The ranks of an attempt that have a log, in ascending order."""
        names = names_in(self.logs / str(attempt), self.path)
        return sorted(int(name.removesuffix(".log")) for name in names if re.fullmatch(r"[0-9]{1,9}\.log", name))

    def beat(self) -> None:
        """Say that the run is supervised right now."""
        handle = open_plain(self.heartbeat_file, os.O_WRONLY | os.O_CREAT)
        try:
            os.utime(handle)
        finally:
            os.close(handle)

    def claim_session(self, host: str) -> str:
        """Take the run over as its one supervisor and return what says so; an earlier one sees it and leaves."""
        token = os.urandom(8).hex()
        text = to_json({"session": token, "host": host, "time": time.time()})
        self._making_room(lambda: write_atomic(self.session_file, text))
        return token

    def session(self) -> str | None:
        """What the newest `claim_session` returned."""
        found = (read_json(self.session_file) or {}).get("session")
        return found if isinstance(found, str) else None

    def heartbeat_age(self) -> float | None:
        """Seconds since the last beat, by this machine's clock; None when there was none."""
        with suppress(FileNotFoundError):
            return time.time() - self.heartbeat_file.lstat().st_mtime
        return None

    def request_stop(self, reason: str) -> None:
        write_atomic(self.stop_file, to_json({"reason": reason, "time": time.time()}))

    def errors(self, attempt: int) -> list[dict[str, Any]]:
        """The error records of an attempt, the likeliest cause first.

        A rank that raises breaks the collectives of the others, which then raise too: such errors come last, whatever
        the clocks of their nodes say; among the rest the earliest is first.
        """
        folder = self.path / "errors" / str(attempt)
        found = []
        for name in names_in(folder, self.path):
            with suppress(OSError, ValueError):
                error = read_json(folder / name, self.path) if name.endswith(".json") else None
                if isinstance(error, dict) and isinstance(error.get("time", 0.0), int | float):
                    found.append(error)
        return sorted(found, key=lambda e: (e.get("kind") == "communication", e.get("time", 0.0)))
