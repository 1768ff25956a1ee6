"""A run that was sent, from any process: its state, its end, its logs, its stop. All of it is read from its directory."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from launcher import backends
from launcher.config.codec import to_data
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest, LaunchError, RunFailed, RunStopped
from launcher.lifecycle import accounting, history, run_dir
from launcher.lifecycle.run_dir import RunDir
from launcher.lifecycle.trust import is_own
from launcher.request.spec import State
from training.errors import nearest
from training.files import open_plain, read_json


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the block trips over in a damaged or foreign run directory into a BadRequest that names it."""
    try:
        yield
    except (LaunchError, BrokenPipeError):
        raise
    except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
        raise BadRequest(
            f"{path} cannot be read: a file in it is damaged ({type(error).__name__}: {error})."
        ) from error


class Run:
    """A run that was sent. Any process can make one from the run directory; all it knows is there."""

    def __init__(self, directory: RunDir) -> None:
        self.dir = directory
        self._checked = False

    def __repr__(self) -> str:
        try:
            return f"Run({self.name!r}, {self.state().value})"
        except BadRequest:
            return f"Run({self.name!r}, unreadable)"

    def check_format(self) -> None:
        """Check once that this version can read the run; see `RunDir.check_format`."""
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
        """Where the run is: by its files first, by its engine where they are silent.

        Raises:
            BadRequest: the files are damaged, or the run directory has another format version.
        """
        with reading(self.path):
            return self._state()

    def _state(self) -> State:
        self.check_format()
        if result := self.dir.result():
            return State(result["state"])
        job = self.job()
        if job is None:
            return State.UNKNOWN  # being submitted just now, or the submitting process died in the middle of it
        age = self.dir.heartbeat_age()
        alive = age is not None and abs(age) < TIMEOUTS.run_heartbeat_age
        if alive and backends.get(job["backend"]).capabilities.poll_seconds:
            return self._phase()  # no need to ask
        hint = self._poll(job["backend"], job["job_id"])
        if hint is State.LOST and (result := self.dir.result()):
            return State(result["state"])  # it ended between the two looks
        return self._phase() if alive and not hint.done else hint

    def job(self) -> dict[str, Any] | None:
        """Return the engine and the id of the run's job; None before it was sent.

        Raises:
            BadRequest: the engine is unknown, or the id has not the form of its ids.
        """
        job = self.dir.job()
        if job is not None:
            try:
                backends.get(job["backend"]).check_id(job["job_id"])
            except BadRequest as error:
                raise BadRequest(f"{self.dir.job_file}: {error}") from None
        return job

    def _poll(self, backend: str, job_id: str) -> State:
        """Return the state that the engine reports; reuse an answer up to `poll_seconds` old."""
        engine = backends.get(backend)
        lasts = engine.capabilities.poll_seconds
        if lasts and (answer := self.dir.answer(job_id, lasts)):
            return State(answer)
        hint = engine.poll(job_id)
        if lasts and is_own(self.path):
            self.dir.keep_answer(job_id, hint)
        return hint

    def _phase(self) -> State:
        """Whether a run that is supervised has ranks."""
        fields = ("started", "submitted", "requeued")
        last = next((e["event"] for e in reversed(self.dir.events()) if e["event"] in fields), None)
        return State.RUNNING if last == "started" else State.QUEUED

    def status(self) -> dict[str, Any]:
        """Everything a person or a program may want to know, as plain data.

        Raises:
            BadRequest: the files are damaged.
        """
        with reading(self.path):
            return self._status()

    def _status(self) -> dict[str, Any]:
        self.check_format()
        plan, job, result = self.dir.plan(), self.job() or {}, self.dir.result() or {}
        records = self.dir.metrics()
        steps = [m for m in records if "loss" in m]
        evaluations = [m for m in records if "eval" in m]
        kept = ("step", "total_steps", "epoch", "loss", "lr", "samples_per_second")
        events, state = self.dir.events(), self.state()
        past = history.read(events)
        return {
            "name": self.name,
            "state": state.value,
            "backend": plan.backend,
            "cluster": plan.cluster.name,
            "job_id": job.get("job_id"),
            "placement": to_data(plan.placement),
            "target": " ".join((plan.target.name, *plan.target.args)),
            "code": read_json(self.dir.snapshot_file) or {},
            "attempt": self.dir.last_attempt(),
            "failed_attempts": to_data(past.failed_attempts),
            "excluded_nodes": list(past.excluded),
            "ledger": to_data(accounting.keep(events, records, None if state.done else time.time())),
            "progress": {k: steps[-1][k] for k in kept if k in steps[-1]} if steps else {},
            "evaluation": evaluations[-1]["eval"] if evaluations else {},
            "metrics": result.get("metrics", {}),
            "failure": result.get("failure"),
            "seconds": result.get("seconds"),
            "run_dir": str(self.dir.path),
        }

    def wait(self, timeout: float | None = None) -> Run:
        """Wait until the run has ended, `timeout` seconds at most.

        Raises:
            TimeoutError: it has not.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.state().done:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.name!r} is still {self.state().value} after {timeout} s")
            time.sleep(0.2)
        return self

    def check(self) -> None:
        """Raise what the end of the run calls for; nothing for success.

        Raises:
            BadRequest: the target refused its input.
            RunFailed: it failed; the text begins with the exception of the rank that raised first.
            RunStopped: it was stopped and can be resumed.
        """
        state = self.state()
        failure = (self.dir.result() or {}).get("failure")
        if failure and failure["kind"] == "bad request":
            raise BadRequest(failure["message"])
        if state is State.STOPPED:
            raise RunStopped(f"run {self.name!r} stopped before its end; {self.resumption()}.")
        if state is not State.SUCCEEDED:
            raise RunFailed(self.explain())

    def resumption(self) -> str:
        """What ``launch resume`` does with this run, which has stopped."""
        if any((self.path / "checkpoints").glob("step-*/manifest.json")):
            return f"`launch resume {self.name}` goes on from the newest checkpoint"
        return f"`launch resume {self.name}` starts the program again (it saved no checkpoint through launch)"

    def explain(self, shown_rank: int | None = None) -> str:
        """Say why the run failed, its first exception first, and what to do; `shown_rank`'s log was seen already."""
        failure = (self.dir.result() or {}).get("failure")
        if not failure:
            job = self.job() or {}
            return (
                f"run {self.name!r} ended and left no result (job {job.get('job_id')}, {job.get('backend')}). Either its"
                f" supervisor was killed, or {self.path} is not the same folder on the nodes. Its own logs:"
                f" {self.dir.logs} and {self.path / 'submitit'}."
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
        return f"{text}{failure['kind']}: {failure['advice']}"

    def result(self) -> Any:
        """Wait for the end and return what the target returned on rank 0.

        Raises:
            BadRequest, RunFailed, RunStopped: see `check`.
        """
        self.wait().check()
        if not self.dir.value_pickle.exists():
            return None
        self.dir.check_own()
        import pickle

        # The run's own value, written by the run's own rank 0 into the run's own directory.
        with os.fdopen(open_plain(self.dir.value_pickle), "rb") as file:
            return pickle.load(file)

    def logs(self, rank: int | None = None, attempt: int | None = None) -> Iterator[str]:
        """The lines of the logs of an attempt (default: the newest), of one rank or of all in turn."""
        self.check_format()
        folder = self.dir.logs / str(attempt or self.dir.last_attempt())
        files = [p for p in folder.glob("*.log") if re.fullmatch("[0-9]{1,9}", p.stem)] if folder.is_dir() else []
        for file in sorted(files, key=lambda p: int(p.stem)):
            if rank is None or file.stem == str(rank):
                prefix = f"[{file.stem}] " if rank is None and len(files) > 1 else ""
                with reading(self.path), os.fdopen(open_plain(file), errors="replace") as lines:
                    yield from (prefix + line.rstrip("\n") for line in lines)

    def cancel(self) -> State:
        """Ask the run to stop, a program with a Context at its next step; kill it after its grace. Returns its state.

        Raises:
            BadRequest: the run directory is not this user's alone, or names no job that could be cancelled.
            LaunchError: it is supervised from another machine and did not stop by itself.
        """
        self.dir.check_own()
        state = self.state()
        if state.done:
            return state
        self.dir.request_stop("cancelled")
        # The grace begins once the supervisor has seen the request, which it looks for every TIMEOUTS.run_heartbeat.
        deadline = time.monotonic() + (
            0 if state is State.QUEUED else self.dir.plan().cluster.grace + TIMEOUTS.run_heartbeat_age
        )
        while not self.state().done and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.kill()

    def kill(self) -> State:
        """End the run now, without a checkpoint. Returns its state. Raises as `cancel` does."""
        self.dir.check_own()
        self.check_format()
        job = self.job()
        if job is not None and not self.state().done:
            # For what outlives the others for a moment, such as a batch script, which would take this for a lost node.
            self.dir.request_stop("killed")
            try:
                backends.get(job["backend"]).cancel(job["job_id"])
            except BadRequest as error:
                raise BadRequest(f"{self.dir.job_file}: {error}") from None
        if self.dir.result() is None:
            self.dir.write_result(State.STOPPED, attempts=self.dir.last_attempt())
            history.record_finished(self.dir, State.STOPPED.value)
        return self.state()


def runs(folder: str | Path = "runs") -> list[Run]:
    """The runs in `folder`, newest first."""
    return [Run(r) for r in run_dir.all_runs(Path(folder))]


def find(name: str | Path, folder: Path) -> Run:
    """Return the run called `name` in `folder`, or the one whose directory `name` is.

    Raises:
        BadRequest: there is none; near names are offered. Or its format version is unknown.
    """
    with suppress(OSError):  # such as a name that is too long for a file
        for path in (folder / name, Path(name)):
            if (path / "plan.json").is_file():
                run = Run(RunDir(path.resolve()))
                run.check_format()
                return run
    known = [r.path.name for r in run_dir.all_runs(folder)]
    near = nearest(str(name), known, most=3) or known[:3]
    hint = f" Runs there: {', '.join(near)}." if near else ""
    raise BadRequest(f"there is no run {str(name)!r} in {folder.resolve()}.{hint} A path to a run directory works too.")
