"""The run directory: the only thing that crosses from the submitting side to the working side.

Every file name lives here. Every file appears whole or not at all; the two logs of events are append-only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import BadRequest
from launcher.records import from_data, to_data
from launcher.spec import Plan, State
from launcher.trust import check_job, check_own
from training.files import FULL_DISK, append_line, open_plain, read_json, read_lines, write_atomic
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
    reserve_file = _In(".reserve")
    head_file = _In("ray-head.json")
    """Where the head of a Ray is that lives inside the run's job."""
    token_file = _In(".ray-token")
    """What a Ray that lives inside the run's job wants to hear from all that connect to it; for this user alone."""
    session_file = _In("session.json")
    logs = _In("logs")

    def log(self, attempt: int, rank: int) -> Path:
        return self.logs / str(attempt) / f"{rank}.log"

    def finished(self, attempt: int, rank: int) -> Path:
        """What a program creates to say that it is complete; its name is in the rank's LAUNCH_FINISHED."""
        return self.logs / str(attempt) / f"{rank}.finished"

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
            self.path.mkdir(0o700)
            # Whatever the umask took away; a set-group-id bit stays, by which some sites count quotas.
            self.path.chmod(0o700 | (self.path.stat().st_mode & stat.S_ISGID))
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
        except (OSError, ValueError, RecursionError) as error:
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
        with suppress(OSError, ValueError, RecursionError), os.fdopen(open_plain(self.events_file), "rb") as file:
            first = json.loads(file.readline(64 * 1024))
        if isinstance(first, dict) and (first.get("event") == "submitted" or "format" in first):
            _check_format(self.events_file, first.get("format"))

    def write_job(self, backend: str, job_id: str) -> None:
        """Leave what any shell needs to ask the engine about the run."""
        record = {"backend": backend, "job_id": job_id, "host": socket.gethostname(), "time": time.time()}
        write_atomic(self.job_file, to_json(record))

    def job(self) -> dict[str, Any] | None:
        """Read back what `write_job` left; None before.

        Raises:
            BadRequest: its engine is unknown, or its job id has not that engine's form.
        """
        record = self._record(self.job_file)
        return None if record is None else check_job(record, self.job_file)

    def _record(self, file: Path) -> dict[str, Any] | None:
        try:
            record = read_json(file)
        except (OSError, ValueError) as error:
            raise BadRequest(f"{file} cannot be read: {error}.") from None
        if record is not None and not isinstance(record, dict):
            raise BadRequest(f"{file} cannot be read: it is not a JSON object.")
        return record

    def check_own(self) -> None:
        """Check that this user, and nobody else, can change the run directory. What acts on a run calls it first.

        Raises:
            BadRequest: others can, it belongs to another user, or one of its files is a symbolic link.
        """
        names = [value.name for value in vars(RunDir).values() if isinstance(value, _In)]
        check_own(self.path, [*(name for name in names if name != "code"), "errors", "submitit", "environment.json"])

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
        return max((int(p.name) for p in self.logs.iterdir() if re.fullmatch("[0-9]{1,9}", p.name)), default=0)

    def beat(self) -> None:
        """Say that the run is supervised right now."""
        handle = open_plain(self.heartbeat_file, os.O_WRONLY | os.O_CREAT)
        try:
            os.utime(handle)
        finally:
            os.close(handle)

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
            return time.time() - self.heartbeat_file.lstat().st_mtime
        return None

    def answer(self, job_id: str, seconds: float) -> str | None:
        """What the engine said of the job in the last `seconds`, if anybody asked."""
        with suppress(OSError, ValueError, TypeError, KeyError):  # a damaged answer is none
            answer = read_json(self.answer_file) or {}
            fresh = 0 <= time.time() - answer.get("time", 0.0) < seconds
            if fresh and answer["job_id"] == job_id:
                return State(answer["state"]).value
        return None

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
        found = []
        for path in folder.glob("*.json") if folder.is_dir() else ():
            with suppress(OSError, ValueError):
                found.append(read_json(path))
        return sorted((e for e in found if e), key=lambda e: (e.get("kind") == "communication", e.get("time", 0.0)))

    # ---- the end --------------------------------------------------------------------------------------------------

    def write_result(self, state: State, **fields: Any) -> None:
        """Leave the result. Raises OSError where the run directory takes no more files."""
        text = to_json({"state": state.value, "time": time.time(), **fields})
        self._making_room(lambda: write_atomic(self.result_file, text))
        self.reserve_file.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        return self._record(self.result_file)

    def _end(self) -> tuple[Path, ...]:
        ended = (self.result_file, self.value_file, self.value_pickle)
        return (*ended, self.stop_file, self.heartbeat_file, self.rendezvous_file, self.answer_file)

    def reopen(self) -> None:
        """Forget the end of the last submission so that the run can be submitted again; its history stays in events."""
        for path in self._end():
            path.unlink(missing_ok=True)

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """As `reopen`; where the block raises, the end, the plan, the job and the events are again what they were."""
        kept = self.path / f".end-{secrets.token_hex(8)}"
        kept.mkdir(0o700)
        changed = (self.plan_file, self.job_file, self.script_file)
        size = self.events_file.stat().st_size if self.events_file.exists() else 0
        begun = False
        try:
            for path in (path for path in changed if path.exists()):
                shutil.copy2(path, kept / path.name, follow_symlinks=False)
            for path in self._end():
                with suppress(FileNotFoundError):
                    os.rename(path, kept / path.name)
            begun = True
            yield
        except BaseException:
            if begun:
                self.reopen()
            for path in kept.iterdir():
                os.replace(path, self.path / path.name)
            with suppress(FileNotFoundError):
                os.truncate(self.events_file, size)
            raise
        finally:
            shutil.rmtree(kept, ignore_errors=True)


def _check_format(file: Path, found: object) -> None:
    if type(found) is not int or found != FORMAT:
        shown = "no format version" if found is None else f"format version {brief(found, 40)}"
        raise BadRequest(
            f"{file} has {shown}; this launch reads version {FORMAT}. Use the launch that made the run, or start a new one."
        )


def tail(path: Path, lines: int = 20) -> list[str]:
    """Return the last `lines` lines of a log, reading its end only; an absent file has none."""
    try:
        with os.fdopen(open_plain(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def all_runs(folder: Path) -> Iterable[RunDir]:
    """The runs in `folder`, newest first.

    Raises:
        BadRequest: the folder cannot be read.
    """
    found = []
    try:
        for path in folder.glob("*/plan.json"):
            with suppress(OSError):  # removed just now, or not to be read by this user
                found.append((path.lstat().st_mtime, RunDir(path.parent)))
    except OSError as error:  # such as a name that is too long for a folder
        raise BadRequest(f"the runs folder {folder} cannot be read: {error.strerror or error}.") from None
    return [run for _, run in sorted(found, key=lambda each: each[0], reverse=True)]


def to_json(data: Any) -> str:
    """Return `data` as the text of a JSON file for people to read."""
    return json.dumps(data, indent=2) + "\n"
