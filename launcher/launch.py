"""The Python API, which reads like the river: a request becomes a plan, the plan is sent, and a Run is what comes back."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from launcher import backends, cluster, rundir, snapshot, target
from launcher.errors import BadRequest, RunFailed, RunStopped
from launcher.placement import Devices, place
from launcher.records import to_data
from launcher.rundir import BEAT_SECONDS, RunDir
from launcher.spec import Plan, RunSpec, State, Target, check_name, parse_minutes
from training.files import write_atomic

FRESH_SECONDS = 5 * BEAT_SECONDS
"""A heartbeat younger than this says that the run is alive without asking its engine."""

DEFAULT_MINUTES = 60


def launch(target: str | Callable[..., Any] = RunSpec.target, *args: str, wait: bool = True, **options: Any) -> Run:
    """Send `target` to where the accelerators are.

    Args:
        target: ``"package.module:function"``, ``"script.py"``, ``"-m module"``, or a function; one that has no
            importable name (a notebook's, a nested one) travels by value.
        args: command-line arguments of the target.
        wait: follow the run to its end, printing what rank 0 prints, and raise if it fails.
        options: as on the command line: ``backend, cluster, gpus, tpus, cpus, nodes, accelerator, topology, name, time,
            max_restarts``.

    Returns:
        The run; ``launch(...).result()`` is what the target returned on rank 0.

    Raises:
        BadRequest: nothing was sent.
        RunFailed, RunStopped: only with `wait`.
    """
    known = [f.name for f in fields(RunSpec) if f.name not in ("target", "args")]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise BadRequest(f"launch() has no option {name!r}{hint}. Options: {', '.join(known)}, wait.")
    function = target if callable(target) else None
    named = _name_of(target) if callable(target) else target
    run = submit(make_plan(RunSpec(named, tuple(args), **options), Path.cwd(), function), function)
    if wait:
        from launcher.view import follow

        follow(run, sys.stdout)
        run.check()
    return run


def resume(name: str | Path, *, runs_folder: str | Path = "runs", wait: bool = True, **options: Any) -> Run:
    """Take a run that ended before its goal up again, from its newest checkpoint and with the code it was sent with.

    Args:
        name: the run's name or its directory.
        options: as for `launch`, where something should differ this time (``gpus``, ``time``, ``cluster``, ...).

    Raises:
        BadRequest: there is no such run, it is running, or it has succeeded.
    """
    run = resubmit(find(name, Path(runs_folder)), **options)
    if wait:
        from launcher.view import follow

        follow(run, sys.stdout)
        run.check()
    return run


def runs(folder: str | Path = "runs") -> list[Run]:
    """The runs in `folder`, newest first."""
    return [Run(r) for r in rundir.all_runs(Path(folder))]


def find(name: str | Path, folder: Path) -> Run:
    """Return the run called `name` in `folder`, or the one whose directory `name` is.

    Raises:
        BadRequest: there is none; near names are offered.
    """
    with suppress(OSError):  # such as a name that is too long for a file
        for path in (folder / name, Path(name)):
            if (path / "plan.json").is_file():
                return Run(RunDir(path.resolve()))
    known = [r.path.name for r in rundir.all_runs(folder)]
    near = difflib.get_close_matches(str(name), known, n=3) or known[:3]
    hint = f" Runs there: {', '.join(near)}." if near else ""
    raise BadRequest(f"there is no run {str(name)!r} in {folder.resolve()}.{hint} A path to a run directory works too.")


# ---- plan, then act -------------------------------------------------------------------------------------------------


def make_plan(spec: RunSpec, cwd: Path, function: Callable[..., Any] | None = None) -> Plan:
    """Work out everything that would be sent. Writes nothing and starts nothing.

    Raises:
        BadRequest: the request cannot be met.
    """
    site = cluster.load(spec.cluster or _backend_name(spec.backend), cwd)
    if spec.backend is not None and spec.backend != site.backend:
        raise BadRequest(
            f"--backend {spec.backend} --cluster {spec.cluster}: that cluster's backend is {site.backend}."
        )
    site = backends.get(site.backend).survey(site)
    placement = place(spec.devices() or _default_devices(spec, site), site)
    if spec.devices() is None and placement.device == "cpu":
        # Nothing was asked for: one rank with the whole machine, the quickest way to see something.
        placement = replace(
            placement, cpus_per_rank=site.node.cpus, threads=site.node.cpus, why="one CPU rank, all cores"
        )
    folder = Path(os.path.abspath(cwd / site.runs))
    run_dir = RunDir(folder / (spec.name or _new_name(spec, folder)))
    _check_folder(run_dir.path, site)
    found, project = _find_target(spec, cwd, function)
    path: tuple[str, ...] = ()
    if project is not None:
        root, _ = snapshot.project_root(project)
        path = target.python_path(root, run_dir.code, project)
        target.check_shadowing([str(project)])
        found = replace(found, path=path, **_moved(found, root, run_dir.code))
    text = spec.time or site.time
    return Plan(
        name=run_dir.path.name,
        run_dir=run_dir.path,
        spec=spec,
        backend=site.backend,
        cluster=site,
        placement=placement,
        target=found,
        cwd=cwd,
        time_minutes=parse_minutes(text) if text else DEFAULT_MINUTES,
        environment=site.environment,
    )


def submit(plan: Plan, function: Callable[..., Any] | None = None) -> Run:
    """Make the run directory, copy the code, and send the plan. After an error nothing of it is left.

    Raises:
        BadRequest: a check failed, or the engine refused.
    """
    run_dir = RunDir(plan.run_dir)
    run_dir.create()
    try:
        if plan.target.kind == "value":
            _pickle(function, run_dir.target_pickle)
        if plan.target.path:
            _copy_code(plan, run_dir)
        run_dir.write_plan(plan)
        return _send(plan, run_dir)
    except BaseException:
        shutil.rmtree(run_dir.path, ignore_errors=True)
        raise


def resubmit(run: Run, **options: Any) -> Run:
    """Send a run again; see `resume`."""
    state = run.state()
    if state is State.SUCCEEDED:
        raise BadRequest(
            f"run {run.name!r} has succeeded; there is nothing to resume. Another --name starts a new one."
        )
    if not state.done:
        raise BadRequest(f"run {run.name!r} is {state.value}; `launch cancel {run.name}` stops it first.")
    plan = run.dir.plan()
    options = {key: value for key, value in options.items() if value is not None}
    if options:
        kinds = ("gpus", "tpus", "cpus")
        if any(kind in options for kind in kinds):
            options = dict.fromkeys((*kinds, "nodes")) | options
        spec = replace(plan.spec, name=plan.name, **options)
        # Placed afresh as a run of another name; the code, the name and the directory stay.
        fresh = make_plan(replace(spec, target=RunSpec.target, args=(), name=None), plan.cwd)
        plan = replace(fresh, name=plan.name, run_dir=plan.run_dir, spec=spec, target=plan.target)
    run.dir.reopen()
    run.dir.write_plan(plan)
    return _send(plan, run.dir)


def _send(plan: Plan, run_dir: RunDir) -> Run:
    _check_target(plan, run_dir)
    run_dir.event("submitted", backend=plan.backend, world_size=plan.placement.world_size)
    run_dir.write_job(plan.backend, backends.get(plan.backend).submit(plan))
    return Run(run_dir)


# ---- a run ----------------------------------------------------------------------------------------------------------


class Run:
    """A run that was sent. Any process can make one from the run directory; all it knows is there."""

    def __init__(self, directory: RunDir) -> None:
        self.dir = directory

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.state().value})"

    @property
    def name(self) -> str:
        return self.dir.path.name

    @property
    def path(self) -> Path:
        return self.dir.path

    def state(self) -> State:
        """Where the run is: by its files first, by its engine where they are silent."""
        if result := self.dir.result():
            return State(result["state"])
        job = self.dir.job()
        if job is None:
            return State.UNKNOWN  # being submitted just now, or the submitting process died in the middle of it
        age = self.dir.heartbeat_age()
        if age is not None and abs(age) < FRESH_SECONDS:
            return State.RUNNING if self._started() else State.QUEUED
        hint = backends.get(job["backend"]).poll(job["job_id"])
        if hint is State.LOST and (result := self.dir.result()):
            return State(result["state"])  # it ended between the two looks
        return hint

    def _started(self) -> bool:
        for event in reversed(self.dir.events()):
            if event["event"] in ("started", "submitted"):
                return bool(event["event"] == "started")
        return False

    def status(self) -> dict[str, Any]:
        """Everything a person or a program may want to know, as plain data."""
        plan, job, result = self.dir.plan(), self.dir.job() or {}, self.dir.result() or {}
        steps = [m for m in self.dir.metrics() if "loss" in m]
        evaluations = [m for m in self.dir.metrics() if "eval" in m]
        kept = ("step", "total_steps", "epoch", "loss", "lr", "samples_per_second")
        return {
            "name": self.name,
            "state": self.state().value,
            "backend": plan.backend,
            "cluster": plan.cluster.name,
            "job_id": job.get("job_id"),
            "placement": to_data(plan.placement),
            "target": " ".join((plan.target.name, *plan.target.args)),
            "attempt": self.dir.last_attempt(),
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
            raise RunStopped(f"run {self.name!r} stopped before its end. `launch resume {self.name}` goes on with it.")
        if state is not State.SUCCEEDED:
            raise RunFailed(self.explain())

    def explain(self, shown_rank: int | None = None) -> str:
        """Say why the run failed, its first exception first, and what to do; `shown_rank`'s log was seen already."""
        failure = (self.dir.result() or {}).get("failure")
        if not failure:
            job = self.dir.job() or {}
            return (
                f"run {self.name!r} ended and left no result (job {job.get('job_id')}, {job.get('backend')}). Either its"
                f" supervisor was killed, or {self.path} is not the same folder on the nodes. Its own logs:"
                f" {self.dir.logs} and {self.path / 'submitit'}."
            )
        where = f" [rank {failure['rank']} on {failure['host']}]" if failure.get("host") else ""
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
        import pickle

        # The run's own value, written by the run's own rank 0 into the run's own directory.
        return pickle.loads(self.dir.value_pickle.read_bytes())

    def logs(self, rank: int | None = None, attempt: int | None = None) -> Iterator[str]:
        """The lines of the logs of an attempt (default: the newest), of one rank or of all in turn."""
        folder = self.dir.logs / str(attempt or self.dir.last_attempt())
        files = sorted(folder.glob("*.log"), key=lambda p: int(p.stem)) if folder.is_dir() else []
        for file in files:
            if rank is None or file.stem == str(rank):
                prefix = f"[{file.stem}] " if rank is None and len(files) > 1 else ""
                with file.open(errors="replace") as lines:
                    yield from (prefix + line.rstrip("\n") for line in lines)

    def cancel(self) -> State:
        """Stop the run at its next step boundary, with a checkpoint; kill it when its grace is over. Returns its state.

        Raises:
            LaunchError: it is supervised from another machine and did not stop by itself.
        """
        state = self.state()
        if state.done:
            return state
        self.dir.request_stop("cancelled")
        deadline = time.monotonic() + (0 if state is State.QUEUED else self.dir.plan().cluster.grace)
        while not self.state().done and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.kill()

    def kill(self) -> State:
        """End the run now, without a checkpoint. Returns its state."""
        job = self.dir.job()
        if job is not None and not self.state().done:
            backends.get(job["backend"]).cancel(job["job_id"])
        if self.dir.result() is None:
            self.dir.write_result(State.STOPPED, attempts=self.dir.last_attempt())
            self.dir.event("finished", state=State.STOPPED.value)
        return self.state()


# ---- pieces of the plan ---------------------------------------------------------------------------------------------


def _backend_name(backend: str | None) -> str:
    if backend is not None:
        backends.get(backend)
    return backend or "local"


def _default_devices(spec: RunSpec, site: cluster.Cluster) -> Devices:
    """One device, or all of the nodes that were asked for."""
    kind, each = ("gpu", site.node.gpus) if site.node.gpus else ("cpu", site.node.cpus)
    count = spec.nodes * (each or 1) if spec.nodes else 1
    return Devices("gpu" if kind == "gpu" else "cpu", count, spec.nodes, spec.accelerator, spec.topology)


def _new_name(spec: RunSpec, folder: Path) -> str:
    """A name that says what and when, and is free."""
    what = spec.target.removeprefix("-m ").rpartition(":")[2]
    stem = "".join(c if c.isalnum() else "-" for c in Path(what).stem).strip("-")[:40] or "run"
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base if n == 1 else f"{base}-{n}" for n in range(1, 1000))
    name = next(n for n in names if not (folder / n).exists())
    check_name(name)
    return name


def _check_folder(run_dir: Path, site: cluster.Cluster) -> None:
    if any(ord(c) < 32 for c in str(run_dir)):
        raise BadRequest(f"{run_dir!r}: a run directory's path cannot hold line breaks.")
    if run_dir.exists():
        RunDir(run_dir).create()  # says what to do about it
    above = next(p for p in run_dir.parents if p.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise BadRequest(
            f"the runs folder {run_dir.parent} cannot be written (`runs` in profile {site.name!r} sets it)."
        )
    shared = [Path(os.path.expanduser(s)).resolve() for s in site.shared]
    if shared and not any(s == p for s in shared for p in run_dir.resolve().parents):
        raise BadRequest(
            f"the runs folder {run_dir.parent} is not shared by the nodes of cluster {site.name!r}: its profile names"
            f" {', '.join(map(str, shared))}. Start from there, or set `runs` in the profile to a folder below."
        )


def _find_target(spec: RunSpec, cwd: Path, function: Callable[..., Any] | None) -> tuple[Target, Path | None]:
    if function is not None and not _importable(function):
        target.signature(function)
        return Target("value", spec.target, spec.args, source=()), cwd
    return target.resolve(spec.target, spec.args, cwd)


def _moved(found: Target, root: Path, code: Path) -> dict[str, Any]:
    """The target's files, as they will lie in the snapshot."""

    def move(file: str) -> str:
        path = Path(file)
        return str(code / path.relative_to(root)) if root in path.parents else file

    return {
        "name": move(found.name) if found.kind == "script" else found.name,
        "source": tuple(move(s) for s in found.source),
    }


def _name_of(function: Callable[..., Any]) -> str:
    return f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', 'function')}"


def _importable(function: Callable[..., Any]) -> bool:
    """Whether another process can import `function` by its name."""
    module = getattr(function, "__module__", None)
    name = getattr(function, "__qualname__", "<")
    return module not in (None, "__main__") and "<" not in name and hasattr(sys.modules.get(str(module)), "__file__")


def _pickle(function: Callable[..., Any] | None, path: Path) -> None:
    import cloudpickle

    try:
        path.write_bytes(cloudpickle.dumps(function))
    except Exception as error:
        raise BadRequest(
            f"the function cannot be sent: {error}. It, or a variable it uses, does not pickle (an open file, a lock, a"
            " live model on a GPU); create such things inside the function."
        ) from None


def _copy_code(plan: Plan, run_dir: RunDir) -> None:
    _, project = _project_of(plan)
    root, in_git = snapshot.project_root(project)
    taken = snapshot.take(root, in_git, run_dir.code, exclude=run_dir.path.parent)
    for file in map(Path, plan.target.source):
        if run_dir.code in file.parents and not file.is_file():
            raise BadRequest(
                f"{root / file.relative_to(run_dir.code)} is not copied with the run: git ignores it (`git add -f` takes"
                " it along), or it lies in the runs folder."
            )
    record = {key: value for key, value in asdict(taken).items() if key != "diff"}
    write_atomic(run_dir.snapshot_file, rundir.to_json(to_data(record)))
    if taken.diff:
        write_atomic(run_dir.diff_file, taken.diff.encode("utf-8", "surrogateescape"))


def _project_of(plan: Plan) -> tuple[Target, Path]:
    if plan.target.kind == "value":
        return plan.target, plan.cwd
    found, project = target.resolve(plan.spec.target, plan.spec.args, plan.cwd)
    assert project is not None, "a target with entries on the path has a project"
    return found, project


def _check_target(plan: Plan, run_dir: RunDir) -> None:
    """Import the target here before it waits in a queue. On this machine the ranks say the same as soon."""
    if plan.backend == "local" or plan.target.kind != "function":
        return
    command = [sys.executable, "-P", "-m", "launcher.check", str(run_dir.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadRequest(done.stderr.strip())
