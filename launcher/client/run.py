"""Handle of a submitted run: its state, result, logs and cancellation, read from its run directory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher import backends
from launcher.client.tail import Tail
from launcher.config.codec import to_data
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest, LaunchError, RunFailed, RunStopped
from launcher.lifecycle import accounting, history, run_dir
from launcher.lifecycle.run_dir import RunDir
from launcher.lifecycle.trust import is_own
from launcher.request.spec import State, as_path
from training.errors import nearest
from training.files import open_plain, read_json


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors of the block, from a damaged run directory at `path`, to BadRequest."""
    try:
        yield
    except (LaunchError, BrokenPipeError):
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise BadRequest(
            f"{path} cannot be read: a file in it is damaged ({type(error).__name__}: {error})."
        ) from error


class Run:
    """A submitted run. Any process can create one from the run directory, which holds its state."""

    def __init__(self, directory: RunDir) -> None:
        self.dir = directory
        self._checked = False

    def __repr__(self) -> str:
        try:
            return f"Run({self.name!r}, {self.state().value})"
        except BadRequest:
            return f"Run({self.name!r}, unreadable)"

    def check_format(self) -> None:
        """Check that this version can read the run; see `RunDir.check_format`. Later calls do nothing."""
        if not self._checked:
            self.dir.check_format()
            self._checked = True

    @property
    def name(self) -> str:
        return self.dir.path.name

    @property
    def path(self) -> Path:
        return self.dir.path

    def state(self) -> State:
        """State of the run, from its files; from its engine if they do not suffice.

        Raises:
            BadRequest: the files are damaged, or the run directory has another format version.
        """
        with reading(self.path):
            self.check_format()
            return _state(self.dir)

    def job(self) -> dict[str, Any] | None:
        """Return the engine and the id of the run's job; None before its submission.

        Raises:
            BadRequest: the engine is unknown, or the id is not one of its job ids.
        """
        return _job(self.dir)

    def status(self) -> dict[str, Any]:
        """Everything that ``launch status`` shows, as plain data. Raises BadRequest if the files are damaged."""
        with reading(self.path):
            self.check_format()
            return _status(self.dir, self.state())

    def brief(self) -> dict[str, Any]:
        """What ``launch list`` shows: a part of `status`, at less cost. Raises as `status` does."""
        with reading(self.path):
            self.check_format()
            return _brief(self.dir, self.state())

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the run has ended.

        Raises:
            TimeoutError: it has not ended within `timeout` seconds (default: no limit).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.state().done:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.name!r} is still {self.state().value} after {timeout} s")
            time.sleep(0.2)
        return self

    def check(self) -> None:
        """Raise the error of a run that has ended; nothing if it succeeded.

        Raises:
            BadRequest: the target refused its input.
            RunFailed: the run failed; the message begins with the exception of the rank that raised first.
            RunStopped: the run was stopped and can be resumed.
        """
        state = self.state()
        failure = (self.dir.result() or {}).get("failure")
        if failure and failure["kind"] == "bad request":
            raise BadRequest(failure["message"])
        if state is State.STOPPED:
            raise RunStopped(f"run {self.name!r} stopped before its end; {self.resumption()}.")
        if state is not State.SUCCEEDED:
            raise RunFailed(self.explain())

    def has_saved(self) -> bool:
        """Whether the program has saved a checkpoint through its Context, in any attempt."""
        checkpoints = (self.path / "checkpoints").glob("step-*/manifest.json")
        return any(checkpoints) or any(event["event"] == "saved" for event in self.dir.events())

    def resumption(self) -> str:
        """What ``launch resume`` does with this stopped run."""
        if self.has_saved():
            return f"`launch resume {self.name}` resumes from the newest checkpoint"
        return f"`launch resume {self.name}` starts the program again (it saved no checkpoint through launch)"

    def explain(self, shown_rank: int | None = None) -> str:
        """Why the run failed and what to do; without the log of `shown_rank`, which the user has seen."""
        return _explanation(self.dir, shown_rank)

    def result(self) -> Any:
        """Wait for the end of the run; return the return value of the target on rank 0.

        Raises:
            BadRequest, RunFailed, RunStopped: see `check`.
        """
        self.wait().check()
        if not self.dir.value_pickle.exists():
            return None
        self.dir.check_own()
        import pickle

        # A file of this user's own: `check_own` has checked the owner and the permissions.
        with os.fdopen(open_plain(self.dir.value_pickle), "rb") as file:
            return pickle.load(file)

    def logs(self, rank: int | None = None, attempt: int | None = None) -> Iterator[str]:
        """The log lines of an attempt (default: the newest), of one `rank` or of all ranks one after another."""
        self.check_format()
        folder = self.dir.logs / str(attempt or self.dir.last_attempt())
        files = [p for p in folder.glob("*.log") if re.fullmatch("[0-9]{1,9}", p.stem)] if folder.is_dir() else []
        for file in sorted(files, key=lambda p: int(p.stem)):
            if rank is None or file.stem == str(rank):
                prefix = f"[{file.stem}] " if rank is None and len(files) > 1 else ""
                with reading(self.path):
                    yield from (prefix + line for line in Tail(file).read(end=True))

    def cancel(self) -> State:
        """Stop the run, and kill it after the grace time; returns its state.

        A program with a Context stops at its next step.

        Raises:
            BadRequest: other users can write to the run directory, or its job id is malformed.
            LaunchError: the run is supervised on another machine and did not stop in time.
        """
        self.dir.check_own()
        state = self.state()
        if state.done:
            return state
        self.dir.request_stop("cancelled")
        # The grace time begins when the supervisor sees the request, which it checks every TIMEOUTS.run_heartbeat.
        deadline = time.monotonic() + (
            0 if state is State.QUEUED else self.dir.plan().cluster.grace + TIMEOUTS.run_heartbeat_age
        )
        while not self.state().done and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.kill()

    def kill(self) -> State:
        """Kill the run, without a checkpoint. Returns its state. Raises as `cancel` does."""
        self.dir.check_own()
        self.check_format()
        job = self.job()
        if job is not None and not self.state().done:
            # So that a batch script, which outlives the ranks, does not take this for a lost node.
            self.dir.request_stop("killed")
            try:
                backends.get(job["backend"]).cancel(job["job_id"])
            except BadRequest as error:
                raise BadRequest(f"{self.dir.job_file}: {error}") from None
        if self.dir.result() is None:
            self.dir.write_result(State.STOPPED, attempts=self.dir.last_attempt())
            history.record_finished(self.dir, State.STOPPED.value)
        return self.state()


# ---- read from the run directory --------------------------------------------------------------------------------


def _state(directory: RunDir) -> State:
    if result := directory.result():
        return State(result["state"])
    job = _job(directory)
    if job is None:
        return State.UNKNOWN  # the submission is in progress, or was interrupted
    age = directory.heartbeat_age()
    alive = age is not None and abs(age) < TIMEOUTS.run_heartbeat_age
    if alive and backends.get(job["backend"]).capabilities.poll_seconds:
        return _supervised_state(directory)  # without a query
    polled = _polled_state(directory, job["backend"], job["job_id"])
    if polled is State.LOST and (result := directory.result()):
        return State(result["state"])  # it ended after the result was read
    return _supervised_state(directory) if alive and not polled.done else polled


def _job(directory: RunDir) -> dict[str, Any] | None:
    job = directory.job()
    if job is not None:
        try:
            backends.get(job["backend"]).check_id(job["job_id"])
        except BadRequest as error:
            raise BadRequest(f"{directory.job_file}: {error}") from None
    return job


def _polled_state(directory: RunDir, backend: str, job_id: str) -> State:
    """The state that the engine reports; an answer up to `poll_seconds` old is reused."""
    engine = backends.get(backend)
    lasts = engine.capabilities.poll_seconds
    if lasts and (answer := directory.answer(job_id, lasts)):
        return State(answer)
    polled = engine.poll(job_id)
    if lasts and is_own(directory.path):
        directory.keep_answer(job_id, polled)
    return polled


def _supervised_state(directory: RunDir) -> State:
    """RUNNING if the supervisor of the run has started ranks, else QUEUED."""
    kinds = ("started", "submitted", "requeued")
    newest = next((e["event"] for e in reversed(directory.events()) if e["event"] in kinds), None)
    return State.RUNNING if newest == "started" else State.QUEUED


def _status(directory: RunDir, state: State) -> dict[str, Any]:
    plan, job, result = directory.plan(), _job(directory) or {}, directory.result() or {}
    events, records = directory.events(), directory.metrics()
    steps = [m for m in records if "loss" in m]
    evaluations = [m for m in records if "eval" in m]
    past = history.read(events)
    return {
        "name": directory.path.name,
        "state": state.value,
        "backend": plan.backend,
        "cluster": plan.cluster.name,
        "job_id": job.get("job_id"),
        "waits_for": backends.get(job["backend"]).waits_for(job["job_id"]) if job and state is State.QUEUED else "",
        "placement": to_data(plan.placement),
        "target": plan.target.spelled(plan.target.name),
        "code": read_json(directory.snapshot_file) or {},
        "attempt": directory.last_attempt(),
        "failed_attempts": to_data(past.failed_attempts),
        "excluded_nodes": list(past.excluded),
        "ledger": to_data(accounting.keep(events, records, None if state.done else time.time())),
        "progress": _progress(steps[-1]) if steps else {},
        "evaluation": evaluations[-1]["eval"] if evaluations else {},
        "metrics": result.get("metrics", {}),
        "failed_saves": past.saves_that_failed(),
        "failure": result.get("failure"),
        "seconds": result.get("seconds"),
        "run_dir": str(directory.path),
    }


def _brief(directory: RunDir, state: State) -> dict[str, Any]:
    return {
        "name": directory.path.name,
        "state": state.value,
        "backend": str(directory.plan_data()["backend"]),
        "progress": _progress(directory.newest_metrics("loss")),
        "evaluation": dict(directory.newest_metrics("eval").get("eval", {})),
    }


def _progress(record: dict[str, Any]) -> dict[str, Any]:
    kept = ("step", "total_steps", "epoch", "loss", "lr", "samples_per_second")
    return {key: record[key] for key in kept if key in record}


def _explanation(directory: RunDir, shown_rank: int | None) -> str:
    failure = (directory.result() or {}).get("failure")
    if not failure:
        job = _job(directory) or {}
        end = backends.get(job["backend"]).ended_as(job["job_id"]) if job else ""
        return (
            f"run {directory.path.name!r} ended without a result (job {job.get('job_id')}, {job.get('backend')}).{end} Either its"
            f" supervisor was killed, or {directory.path} is not the same folder on the nodes. Check its folders logs and submitit."
        )
    rank = "" if failure["rank"] is None else f"rank {failure['rank']} "
    where = f" [{rank}on {failure['host']}]" if failure.get("host") else ""
    text = f"{failure['message']}{where}\n"
    if shown_rank is not None and failure["rank"] == shown_rank:
        pass
    elif failure.get("traceback"):
        text += "\n" + failure["traceback"].rstrip() + "\n"
    elif failure.get("log"):
        text += "\nThe last lines of its log:\n" + "\n".join(failure["log"]) + "\n"
    warnings = failure.get("nccl_warnings") or []
    if warnings:
        more = [f"... and those of {len(warnings) - 4} more ranks"] if len(warnings) > 4 else []
        text += "\n" + "\n".join([*warnings[:4], *more]) + "\n"
    return f"{text}{failure['kind']}: {failure['advice']}"


# ---- runs of a folder -------------------------------------------------------------------------------------------


def runs(folder: str | Path = "runs") -> list[Run]:
    """The runs in `folder`, newest first."""
    return [Run(r) for r in run_dir.all_runs(as_path("folder", folder))]


def find(name: str | Path, folder: str | Path) -> Run:
    """Return the run `name` in `folder`, or the run in the directory `name`.

    Raises:
        BadRequest: there is none (the message lists similar names), or its format version is unknown.
    """
    folder, _ = as_path("runs folder", folder), as_path("run", name)
    with suppress(OSError):  # such as a name that is too long for a file name
        for path in (folder / name, Path(name)):
            if (path / "plan.json").is_file():
                run = Run(RunDir(path.resolve()))
                run.check_format()
                return run
    known = [r.path.name for r in run_dir.all_runs(folder)]
    near = nearest(str(name), known, most=3) or known[:3]
    hint = f" Runs there: {', '.join(near)}." if near else ""
    raise BadRequest(f"there is no run {str(name)!r} in {folder.resolve()}.{hint} A path to a run directory works too.")
