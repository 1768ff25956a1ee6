"""Handle of a submitted run: its state, result, logs and cancellation, read from its run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import backends
from launcher.client.tail import Tail
from launcher.config.codec import to_data
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest, RunFailed, RunStopped
from launcher.lifecycle import history, run_dir
from launcher.lifecycle.records.result import explain
from launcher.lifecycle.run_dir import RunDir, reading
from launcher.request.spec import State, as_path
from training.files import MAX_LINES_BYTES, open_plain, read_json
from training.flags.typed import is_number


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
        """Everything that ``launch status --json`` shows, as plain data. Raises BadRequest if the files are damaged."""
        found = self.overview()
        with reading(self.path):
            return found | {"ledger": _ledger(self.dir, State(found["state"]))}

    def overview(self) -> dict[str, Any]:
        """What ``launch status`` shows: `status` without the ledger, which takes the whole logs."""
        with reading(self.path):
            self.check_format()
            return _overview(self.dir, self.state())

    def brief(self) -> dict[str, Any]:
        """What ``launch list`` shows: a part of `status`, at less cost. Raises as `status` does."""
        with reading(self.path):
            plan = self.dir.check_format()
            self._checked = True
            return _brief(self.dir, plan)

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
        return self.dir.has_saved()

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
        return _value(self.dir)

    def logs(self, rank: int | None = None, attempt: int | None = None) -> Iterator[str]:
        """The log lines of an attempt (default: the newest), of one `rank` or of all ranks one after another."""
        self.check_format()
        with reading(self.path):
            attempt = self.dir.last_attempt() if attempt is None else attempt
            ranks = self.dir.ranks_with_logs(attempt)
        for number in ranks:
            if rank is None or number == rank:
                prefix = f"[{number}] " if rank is None and len(ranks) > 1 else ""
                with reading(self.path):
                    lines = Tail(self.dir.log(attempt, number), self.path).read(end=True)
                    yield from (prefix + line for line in lines)

    def cancel(self) -> State:
        """Stop the run, and kill it after the grace time; returns its state.

        A program with a Context stops at its next step.

        Raises:
            BadRequest: other users can write to the run directory, or its job id is malformed.
            LaunchError: the run is supervised on another machine and did not stop in time.
        """
        with reading(self.path):
            self.dir.check_own()
            state = self.state()
            if state.done:
                return state
            self.dir.request_stop("cancelled")
            # The grace time begins when the supervisor sees the request, which it checks every TIMEOUTS.run_heartbeat.
            grace = self.dir.plan().cluster.grace + TIMEOUTS.run_heartbeat_age
        deadline = time.monotonic() + (0 if state is State.QUEUED else grace)
        while not self.state().done and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.kill()

    def kill(self) -> State:
        """Kill the run, without a checkpoint. Returns its state. Raises as `cancel` does."""
        with reading(self.path):
            self.dir.check_own()
            self.check_format()
            job = self.job()
            if job is not None and not self.state().done:
                # So that a batch script, which outlives the ranks, does not take this for a lost node.
                self.dir.request_stop("killed")
                _cancel_job(self.dir, job)
            if self.dir.result() is None:
                self.dir.write_result(State.STOPPED, attempts=self.dir.last_attempt())
                history.record_finished(self.dir, State.STOPPED.value)
        return self.state()


def _value(directory: RunDir) -> Any:
    if not directory.value_pickle.exists():
        return None
    directory.check_own()
    import pickle

    # A file of this user's own: `check_own` has checked the owner and the permissions.
    with os.fdopen(open_plain(directory.value_pickle), "rb") as file:
        return pickle.load(file)


def _cancel_job(directory: RunDir, job: Mapping[str, Any]) -> None:
    try:
        backends.get(job["backend"]).cancel(job["job_id"])
    except BadRequest as error:
        raise BadRequest(f"{directory.job_file}: {error}") from None


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
    polled = polled_states(job["backend"], {job["job_id"]: submitted_at(job)})[job["job_id"]]
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


def polled_states(backend: str, jobs: Mapping[str, float]) -> dict[str, State]:
    """Return the states that the engine reports for `jobs`, from an answer that all commands of this user share."""
    from launcher.backends import answers

    return answers.states(backends.get(backend), jobs)


def submitted_at(job: Mapping[str, Any]) -> float:
    """Return when a job was submitted, in seconds since 1970; 0 if unknown."""
    return float(job["time"]) if is_number(job.get("time")) else 0.0


def _supervised_state(directory: RunDir) -> State:
    """RUNNING if the supervisor of the run has started ranks, else QUEUED."""
    newest = directory.newest_event("started", "submitted", "requeued")
    return State.RUNNING if newest is not None and newest["event"] == "started" else State.QUEUED


def _ledger(directory: RunDir, state: State) -> Any:
    from launcher.lifecycle import accounting

    metrics, attempts = directory.digests()
    return to_data(accounting.ledger(attempts, metrics, None if state.done else time.time()))


def _overview(directory: RunDir, state: State) -> dict[str, Any]:
    plan, job, result = directory.plan(), _job(directory) or {}, directory.result() or {}
    past, code = history.read(directory.events(history.LINES)), read_json(directory.snapshot_file)
    newest = _newest_lines(directory, result)
    return {
        "name": directory.path.name,
        "state": state.value,
        "backend": plan.backend,
        "cluster": plan.cluster.name,
        "job_id": job.get("job_id"),
        "waits_for": backends.get(job["backend"]).waits_for(job["job_id"]) if job and state is State.QUEUED else "",
        "placement": to_data(plan.placement),
        "target": plan.target.spelled(plan.target.name),
        "code": code if isinstance(code, dict) else {},
        "attempt": directory.last_attempt(),
        "failed_attempts": to_data(past.failed_attempts),
        "excluded_nodes": list(past.excluded),
        "progress": newest["progress"],
        "evaluation": newest["evaluation"],
        "metrics": result.get("metrics", {}),
        "failed_saves": past.saves_that_failed(),
        "failure": result.get("failure"),
        "seconds": result.get("seconds"),
        "run_dir": str(directory.path),
    }


LIST_BYTES = 4 << 20
"""The end of the metrics in which ``launch list`` looks for the newest values, unless the result has them."""


def _brief(directory: RunDir, plan: Any) -> dict[str, Any]:
    result = directory.result()
    newest = _newest_lines(directory, result or {}, LIST_BYTES)
    return {
        "name": directory.path.name,
        "state": result["state"] if result else _state(directory).value,
        "backend": str(plan["backend"]),
        "progress": newest["progress"],
        "evaluation": newest["evaluation"],
    }


def _newest_lines(directory: RunDir, result: Mapping[str, Any], limit: int = MAX_LINES_BYTES) -> dict[str, Any]:
    """The newest progress and evaluation: from the result if the metrics have not grown after it, else from their log."""
    newest = result.get("newest")
    if newest and all(isinstance(newest.get(key), dict) for key in ("progress", "evaluation")):
        with suppress(FileNotFoundError):
            if newest.get("bytes") == directory.metrics_file.lstat().st_size:
                return dict(newest)
    return directory.newest_lines(limit)


def _explanation(directory: RunDir, shown_rank: int | None) -> str:
    failure = (directory.result() or {}).get("failure")
    if not failure:
        job = _job(directory) or {}
        end = backends.get(job["backend"]).ended_as(job["job_id"]) if job else ""
        return (
            f"run {directory.path.name!r} ended without a result (job {job.get('job_id')}, {job.get('backend')}).{end} Either its"
            f" supervisor was killed, or {directory.path} is not the same folder on the nodes. Check its folders logs and submitit."
        )
    return explain(failure, shown_rank)


def find(name: str | Path, folder: str | Path) -> Run:
    """Return the run `name`; see `launcher.lifecycle.run_dir.find`. Raises as that does."""
    folder, _ = as_path("runs folder", folder), as_path("run", name)
    return Run(run_dir.find(name, folder))
