"""The run directory: the only thing that crosses from the submitting side to the working side.

Every file name lives here. Every file appears whole or not at all; the two logs of events are append-only.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from launcher.config.codec import from_data, to_data, to_json
from launcher.errors import BadRequest, LaunchError
from launcher.lifecycle.records import registry, removal
from launcher.lifecycle.records.result import check_result
from launcher.lifecycle.run_files import FileOfRun, RunFiles, RunPaths
from launcher.lifecycle.trust import check_job, check_own
from launcher.request.spec import Plan, State
from training.errors import nearest
from training.files import MAX_JSON_BYTES, open_plain, read_json, write_atomic
from training.flags.typed import brief

FORMAT = 2
"""The version of what run directories hold, in ``plan.json`` and in ``submitted`` events; the first had none."""

MAX_JOB_BYTES = 1 << 16


@dataclass(frozen=True)
class RunDir(RunFiles):
    """A run directory: its files, its plan, its job and its end."""

    # ---- written once ---------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Make the directory, and the runs folder that holds it (which git ignores).

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
        """Write the plan; the values of its secret variables go into a file of their own."""
        if plan.secrets:
            write_atomic(self.secrets_file, to_json({name: plan.environment[name] for name in plan.secrets}))
        write_atomic(self.plan_file, to_json({"format": FORMAT, **to_data(plan.public())}))

    def plan(self) -> Plan:
        """Read the plan back.

        Raises:
            BadRequest: there is none, so this is not a run directory; or its format is not `FORMAT`.
        """
        plan = from_data(Plan, self.plan_data(), str(self.plan_file))
        if not plan.secrets:
            return plan
        values = self._record(self.secrets_file) or {}
        return replace(plan, environment=plan.environment | {name: str(values.get(name, "")) for name in plan.secrets})

    def plan_data(self) -> Any:
        """Read the plan as plain data, of which only the format is checked. Raises as `plan` does."""
        try:
            data = read_json(self.plan_file)
        except (OSError, ValueError, RecursionError) as error:
            raise BadRequest(f"{self.plan_file} cannot be read: {error}.") from None
        if data is None:
            raise BadRequest(f"{self.path} is not a run directory: it has no plan.json.")
        if isinstance(data, dict):
            _check_format(self.plan_file, data.pop("format", None))
        return data

    def check_format(self) -> Any:
        """Check that the plan and the log of events are of this version's format, and return `plan_data`.

        Raises:
            BadRequest: one is not; the text names both versions.
        """
        plan = self.plan_data()
        first: object = None
        with suppress(OSError, ValueError, RecursionError):
            handle = open_plain(self.events_file)
            try:
                first = json.loads(os.read(handle, 64 * 1024).partition(b"\n")[0])
            finally:
                os.close(handle)
        if isinstance(first, dict) and (first.get("event") == "submitted" or "format" in first):
            _check_format(self.events_file, first.get("format"))
        return plan

    def write_job(self, backend: str, job_id: str) -> None:
        """Leave what any shell needs to ask the engine about the run."""
        record = {"backend": backend, "job_id": job_id, "host": os.uname().nodename, "time": time.time()}
        write_atomic(self.job_file, to_json(record))

    def job(self) -> dict[str, Any] | None:
        """Read back what `write_job` left; None before.

        Raises:
            BadRequest: its engine is unknown, or its job id has not that engine's form.
        """
        record = self._record(self.job_file, MAX_JOB_BYTES)
        return None if record is None else check_job(record, self.job_file)

    def _record(self, file: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
        try:
            record = read_json(file, limit=limit)
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
        names = [value.name for value in vars(RunPaths).values() if isinstance(value, FileOfRun)]
        check_own(
            self.path,
            [*(name for name in names if name not in ("code", "packages")), "errors", "submitit", "environment.json"],
        )

    # ---- the end --------------------------------------------------------------------------------------------------

    def write_result(self, state: State, **fields: Any) -> None:
        """Leave the result. Raises OSError where the run directory takes no more files."""
        text = to_json({"state": state.value, "time": time.time(), **fields})
        self._making_room(lambda: write_atomic(self.result_file, text))
        self.reserve_file.unlink(missing_ok=True)

    def result(self) -> dict[str, Any] | None:
        """Read back what `write_result` left; None before.

        Raises:
            BadRequest: it cannot be read, or a value has another type than `write_result` gave it.
        """
        record = self._record(self.result_file)
        return None if record is None else check_result(record, [state.value for state in State], self.result_file)

    def _end(self) -> tuple[Path, ...]:
        ended = (self.result_file, self.value_file, self.value_pickle)
        return (*ended, self.stop_file, self.heartbeat_file, self.rendezvous_file)

    def reopen(self) -> None:
        """Forget the end of the last submission so that the run can be submitted again; its history stays in events."""
        for path in self._end():
            path.unlink(missing_ok=True)

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """As `reopen`; where the block raises, the end, the plan, the job and the events are again what they were."""
        kept = self.path / f".end-{os.urandom(8).hex()}"
        kept.mkdir(0o700)
        changed = (self.plan_file, self.job_file, self.script_file)
        size = self.events_file.stat().st_size if self.events_file.exists() else None
        begun = False
        try:
            for path in (path for path in changed if path.exists()):
                try:
                    os.link(path, kept / path.name, follow_symlinks=False)  # what changes it writes a new file
                except OSError:  # a file system without hard links
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
                self.events_file.unlink() if size is None else os.truncate(self.events_file, size)
            raise
        finally:
            shutil.rmtree(kept, ignore_errors=True)


T = TypeVar("T")


@dataclass(frozen=True)
class WatchedDir(RunDir):
    """A run directory that is looked at again and again: a file is read again once it has changed."""

    _found: dict[object, tuple[object, Any]] = field(default_factory=dict, compare=False, repr=False)

    def _again(self, key: object, path: Path, read: Callable[[], T]) -> T:
        try:
            info = path.lstat()
            facts = (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_nlink)
        except FileNotFoundError:
            facts = None
        if key not in self._found or self._found[key][0] != facts:
            self._found[key] = facts, read()
        found: T = self._found[key][1]
        return found

    def job(self) -> dict[str, Any] | None:
        """As `RunDir.job`."""
        return self._again("job", self.job_file, super().job)

    def result(self) -> dict[str, Any] | None:
        """As `RunDir.result`."""
        return self._again("result", self.result_file, super().result)

    def newest_event(self, *kinds: str) -> dict[str, Any] | None:
        """As `RunDir.newest_event`."""
        return self._again(kinds, self.events_file, partial(super().newest_event, *kinds))

    def last_attempt(self) -> int:
        """As `RunDir.last_attempt`."""
        return self._again("last_attempt", self.logs, super().last_attempt)


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
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    # Of a line that a progress bar wrote over, what was left to see. Other characters than a line break end no line.
    found = [line.rstrip("\r").rpartition("\r")[2] for line in text.removesuffix("\n").split("\n")[-lines:]]
    return found if text else []


def all_runs(folder: Path) -> Iterable[RunDir]:
    """The runs in `folder`, newest first, with absolute paths; also those that this user cannot read.

    Raises:
        BadRequest: the folder cannot be read.
    """
    found = []
    try:
        with os.scandir(os.path.realpath(folder)) as entries:
            for entry in entries:
                if entry.name.startswith(removal.PREFIX):
                    continue
                try:
                    found.append((os.lstat(f"{entry.path}/plan.json").st_mtime, RunDir(Path(entry.path))))
                except PermissionError:
                    found.append((0.0, RunDir(Path(entry.path))))
                except OSError:  # no run, or removed just now
                    continue
    except FileNotFoundError:
        return []
    except OSError as error:  # such as a name that is too long for a folder
        raise BadRequest(f"the runs folder {folder} cannot be read: {error.strerror or error}.") from None
    return [run for _, run in sorted(found, key=lambda each: each[0], reverse=True)]


DEFAULT_FOLDER = Path("runs")


def find(name: str | Path, folder: Path) -> RunDir:
    """Return the run directory `name` in `folder`, or at `name`; in the default folder's place, any of the user's.

    Raises:
        BadRequest: there is none (the message lists similar names), it cannot be read, or its format version is unknown;
            several of the user's runs in other folders have this name.
    """
    for path in (folder / name, Path(name)):
        try:
            os.lstat(path / "plan.json")
            found = RunDir(path.resolve())
        except PermissionError as error:
            raise BadRequest(f"the run {path} cannot be read: {error.strerror}.") from None
        except (OSError, RuntimeError):  # no run, a name that is too long for a file name, or a circle of links
            continue
        found.check_format()
        return found
    elsewhere = registry.named(str(name)) if folder == DEFAULT_FOLDER else []
    if len(elsewhere) == 1:
        return find(elsewhere[0], elsewhere[0].parent)
    if elsewhere:
        shown = ", ".join(map(str, elsewhere[:5]))
        raise BadRequest(f"{len(elsewhere)} runs are called {str(name)!r}: {shown}. Write the path of one of them.")
    known = [run.path.name for run in all_runs(folder)]
    near = nearest(str(name), known, most=3) or known[:3]
    hint = f" Runs there: {', '.join(near)}." if near else ""
    raise BadRequest(f"there is no run {str(name)!r} in {folder.resolve()}.{hint} A path to a run directory works too.")


@contextmanager
def acting(path: Path) -> Iterator[None]:
    """Convert errors of the file system in the block, which uses the run directory `path`, to BadRequest."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BadRequest(f"{error.filename or path} cannot be used: {error.strerror or error}.") from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors in the block, which reads a run directory at `path` that may be damaged, to BadRequest."""
    try:
        with acting(path):
            yield
    except (LaunchError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise BadRequest(
            f"{path} cannot be read: a file in it is damaged ({type(error).__name__}: {error})."
        ) from error
