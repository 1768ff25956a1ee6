"""The run directory: the only thing that crosses from the submitting side to the working side.

Every file name lives here. Every file appears whole or not at all; the two logs of events are append-only.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import BadRequest
from launcher.records import from_data, to_data
from launcher.spec import Plan, State
from training.files import FULL_DISK, append_line, read_json, read_lines, write_atomic
from training.typed import brief

BEAT_SECONDS = 2.0
"""How often whoever supervises a run touches its heartbeat."""

FORMAT = 2
"""The version of what run directories hold, in ``plan.json`` and in ``submitted`` events; the first had none."""

RESERVE_BYTES = 256 * 1024
"""What a run holds of the disk to be able to tell its end; logs and the last events take their share of it."""


class _In:
    """A file or folder of the run directory by its name there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run_dir: RunDir, _: object = None) -> Path:
        return run_dir.path / self.name


@dataclass(frozen=True)
class RunDir:
    """The files of one run, by name."""

    path: Path

    plan_file = _In("plan.json")
    job_file = _In("job.json")
    script_file = _In("script.sh")
    code = _In("code")
    snapshot_file = _In("snapshot.json")
    diff_file = _In("code.diff")
    target_pickle = _In("target.pkl")
    value_pickle = _In("value.pkl")
    value_file = _In("value.json")
    """What the target returned, where that is a dict that JSON can hold."""
    stop_file = _In("stop")
    """Asks the run to stop at the next step boundary; `Context` looks for it too."""
    events_file = _In("events.jsonl")
    metrics_file = _In("metrics.jsonl")
    result_file = _In("result.json")
    heartbeat_file = _In("heartbeat")
    rendezvous_file = _In("rendezvous.json")
    answer_file = _In("poll.json")
    """What the engine said when it was last asked for the job."""
    imports_file = _In("imports.json")
    """What rank 0 imported on its way, for the forkservers of this start and of later ones."""
    reserve_file = _In(".reserve")
    head_file = _In("ray-head.json")
    """Where the head of a Ray is that lives inside the run's job."""
    token_file = _In(".ray-token")
    """What a Ray that lives inside the run's job wants to hear from all that connect to it; for this user alone."""
    session_file = _In("session.json")
    logs = _In("logs")

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs / str(attempt) / f"{rank}.log"

    def agent_log(self, node: int) -> Path:
        return self.logs / f"agent-{node}.log"

    def error(self, attempt: int, rank: int) -> Path:
        return self.path / "errors" / str(attempt) / f"{rank}.json"

    # ---- written once ---------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the directory, and the runs folder that holds it (which git is told to ignore).

        Raises:
            BadRequest: a run of this name exists, or the folder cannot be written.
        """
        try:
            if not self.path.parent.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)  # another run may be making it, too
                (self.path.parent / ".gitignore").write_text("*\n")
            self.path.mkdir()
        except FileExistsError:
            raise BadRequest(
                f"run {self.path.name!r} exists already in {self.path.parent}. `launch resume {self.path.name}` goes on"
                f" with it; another --name starts a new one."
            ) from None
        except OSError as error:
            raise BadRequest(f"the run directory {self.path} cannot be made: {error.strerror or error}.") from None

    def write_plan(self, plan: Plan) -> None:
        write_atomic(self.plan_file, to_json({"format": FORMAT, **to_data(plan)}))

    def plan(self) -> Plan:
        """Read the plan back.

        Raises:
            BadRequest: there is none, so this is not a run directory; or its format is not `FORMAT`.
        """
        try:
            data = read_json(self.plan_file)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{self.plan_file} cannot be read: {error}.") from None
        if data is None:
            raise BadRequest(f"{self.path} is not a run directory: it has no plan.json.")
        if isinstance(data, dict):
            _check_format(self.plan_file, data.pop("format", None))
        return from_data(Plan, data, str(self.plan_file))

    def check_format(self) -> None:
        """Check that the plan and the log of events are of this version's format, and change nothing.

        Raises:
            BadRequest: one is not; the text names both versions.
        """
        self.plan()
        first: object = None
        with suppress(OSError, ValueError, RecursionError), self.events_file.open("rb") as file:
            first = json.loads(file.readline(64 * 1024))
        if isinstance(first, dict) and (first.get("event") == "submitted" or "format" in first):
            _check_format(self.events_file, first.get("format"))

    def write_job(self, backend: str, job_id: str) -> None:
        """Leave what any shell needs to ask the engine about the run."""
        record = {"backend": backend, "job_id": job_id, "host": socket.gethostname(), "time": time.time()}
        write_atomic(self.job_file, to_json(record))

    def job(self) -> dict[str, Any] | None:
        return read_json(self.job_file)

    # ---- while it runs --------------------------------------------------------------------------------------------

    def event(self, event: str, /, **fields: Any) -> bool:
        """Add to the log of events. Where that cannot be written, the run goes on and the supervisor's own log has it.

        Says whether it could.
        """
        record = {"time": time.time(), "event": event, **fields}
        try:
            self._making_room(lambda: append_line(self.events_file, record))
        except OSError as error:
            print(f"launch: {self.events_file}: {error.strerror}: {record}", file=sys.stderr)
            return False
        return True

    def reserve(self) -> None:
        """Hold a little of the disk, so that the end of a run can be told also when the disk is full."""
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

    def events(self) -> list[dict[str, Any]]:
        return read_lines(self.events_file)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file)

    def newest_step(self) -> int | None:
        """The newest step in the metrics; None where the target logs none."""
        return max((int(m.get("step", 0)) for m in self.metrics()), default=None)

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
        if not self.logs.is_dir():
            return 0
        return max((int(p.name) for p in self.logs.iterdir() if p.name.isdigit()), default=0)

    def beat(self) -> None:
        """Say that the run is supervised right now."""
        self.heartbeat_file.touch()

    def claim_session(self, host: str) -> str:
        """Take the run over as its one supervisor and return what says so; an earlier one sees it and leaves."""
        token = secrets.token_hex(8)
        text = to_json({"session": token, "host": host, "time": time.time()})
        self._making_room(lambda: write_atomic(self.session_file, text))
        return token

    def session(self) -> str | None:
        """What the newest `claim_session` returned."""
        return (read_json(self.session_file) or {}).get("session")

    def heartbeat_age(self) -> float | None:
        """Seconds since the last beat, by this machine's clock; None when there was none."""
        with suppress(FileNotFoundError):
            return time.time() - self.heartbeat_file.stat().st_mtime
        return None

    def answer(self, job_id: str, seconds: float) -> str | None:
        """What the engine said of the job in the last `seconds`, if anybody asked."""
        answer = read_json(self.answer_file) or {}
        fresh = 0 <= time.time() - answer.get("time", 0.0) < seconds
        return str(answer["state"]) if fresh and answer["job_id"] == job_id else None

    def keep_answer(self, job_id: str, state: State) -> None:
        """Keep what the engine said for whoever asks next; a run directory that cannot be written keeps nothing."""
        with suppress(OSError):
            write_atomic(self.answer_file, to_json({"job_id": job_id, "state": state.value, "time": time.time()}))

    def request_stop(self, reason: str) -> None:
        write_atomic(self.stop_file, to_json({"reason": reason, "time": time.time()}))

    def errors(self, attempt: int) -> list[dict[str, Any]]:
        """The error records of an attempt, the likeliest cause first.

        A rank that raises breaks the collectives of the others, which then raise too: such errors come last, whatever
        the clocks of their nodes say; among the rest the earliest is first.
        """
        folder = self.path / "errors" / str(attempt)
        found = [read_json(p) for p in folder.glob("*.json")] if folder.is_dir() else []
        return sorted((e for e in found if e), key=lambda e: (e.get("kind") == "communication", e.get("time", 0.0)))

    # ---- the end --------------------------------------------------------------------------------------------------

    def write_result(self, state: State, **fields: Any) -> None:
        """Leave the result. Raises OSError where the run directory takes no more files."""
        text = to_json({"state": state.value, "time": time.time(), **fields})
        self._making_room(lambda: write_atomic(self.result_file, text))
        self.reserve_file.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        return read_json(self.result_file)

    def reopen(self) -> None:
        """Forget the end of the last submission so that the run can be submitted again; its history stays in events."""
        ended = (self.result_file, self.value_file, self.value_pickle)
        for path in (*ended, self.stop_file, self.heartbeat_file, self.rendezvous_file, self.answer_file):
            path.unlink(missing_ok=True)


def _check_format(file: Path, found: object) -> None:
    if type(found) is not int or found != FORMAT:
        shown = "no format version" if found is None else f"format version {brief(found, 40)}"
        raise BadRequest(
            f"{file} has {shown}; this launch reads version {FORMAT}. Use the launch that made the run, or start a new one."
        )


def tail(path: Path, lines: int = 20) -> list[str]:
    """Return the last `lines` lines of a log, reading its end only; an absent file has none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def all_runs(folder: Path) -> Iterable[RunDir]:
    """The runs in `folder`, newest first.

    Raises:
        BadRequest: the folder cannot be read.
    """
    try:
        found = [RunDir(p.parent) for p in folder.glob("*/plan.json")]
    except OSError as error:  # such as a name that is too long for a folder
        raise BadRequest(f"the runs folder {folder} cannot be read: {error.strerror or error}.") from None
    return sorted(found, key=lambda r: r.plan_file.stat().st_mtime, reverse=True)


def to_json(data: Any) -> str:
    """Return `data` as the text of a JSON file for people to read."""
    return json.dumps(data, indent=2) + "\n"
