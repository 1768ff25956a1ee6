"""The Python API, which reads like the river: a request becomes a plan, the plan is sent, and a Run is what comes back."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from launcher import backends
from launcher.client.plan import NOTHING_GIVEN, Given, check_shared, chosen_again, make_plan, name_of
from launcher.client.run import Run, find
from launcher.config.codec import to_data, to_json
from launcher.errors import BadRequest
from launcher.lifecycle.records import registry
from launcher.lifecycle.run_dir import FORMAT, RunDir, acting, reading
from launcher.request import own_packages, snapshot
from launcher.request.binding import values_of
from launcher.request.spec import DEVICES, NOT_RESUMED, Plan, RunSpec, State, check_name, check_options, options
from launcher.request.values import check_given, write
from training.files import write_atomic

if TYPE_CHECKING:
    from launcher.client.terminal import Attachment
    from launcher.rank.inside.debugger import DebugRequest

F = TypeVar("F", bound=Callable[..., Any])


def _with_options(*without: str) -> Callable[[F], F]:
    """Give a function that takes ``**options`` the signature and the documentation of the options of `RunSpec`."""

    def decorate(function: F) -> F:
        known = options(without)
        function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace(
            "{options}", "\n    ".join(f"{name}: {option.help.rstrip(chr(46))}." for name, option in known.items())
        )
        own = inspect.signature(function, eval_str=False)
        keywords = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in fields(RunSpec)
            if f.name in known
        ]
        function.__signature__ = own.replace(parameters=keywords)  # type: ignore[attr-defined]
        return function

    return decorate


@_with_options()
def launch(
    target: str | Callable[..., Any] = RunSpec.target,
    *words: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    wait: bool = True,
    **given: Any,
) -> Run:
    """Send `target` to where the accelerators are.

    Args:
        target: ``"package.module:function"``, ``"script.py"``, ``"-m module"``, or a function; one that has no
            importable name (a notebook's, a nested one) travels by value.
        words: command-line arguments of the target, such as ``"--lr", "3e-4"``.
        args: values for the parameters of a function, by position; its Context is not counted.
        kwargs: values for the parameters of a function, by name.
        wait: follow the run to its end, printing what rank 0 prints, and raise if it fails.
        {options}

    Returns:
        The run; ``launch(...).result()`` is what the target returned on rank 0.

    Raises:
        BadRequest: nothing was sent.
        RunFailed, RunStopped: only with `wait`.
    """
    check_options("launch", given, options(), "args, kwargs, wait")
    values = check_given(words, args, kwargs)
    function = target if callable(target) else None
    named = name_of(target) if callable(target) else target
    run = submit(make_plan(RunSpec(named, words, **given), Path.cwd(), function, values), function, values)
    return _attended(run) if wait else run


@_with_options(*NOT_RESUMED)
def resume(name: str | Path, *, runs_folder: str | Path = "runs", wait: bool = True, **given: Any) -> Run:
    """Take a run that ended before its goal up again, from its newest checkpoint and with the code it was sent with.

    Args:
        name: the run's name or its directory.
        runs_folder: the folder in which a name is looked up.
        wait: as for `launch`.
        {options}

    An option that is left out stays as it was when the run was sent.

    Raises:
        BadRequest: there is no such run, it is running, or it has succeeded.
    """
    check_options("resume", given, options(NOT_RESUMED), "runs_folder, wait")
    run = resubmit(find(name, runs_folder), **given)
    return _attended(run) if wait else run


def _attended(run: Run) -> Run:
    from launcher.client.follow import attend

    if attend(run, sys.stdout) is None:
        raise KeyboardInterrupt  # the run goes on, and a cell or a script that started it does not
    drop_refused(run)
    run.check()
    return run


def drop_refused(run: Run) -> None:
    """Remove a run whose target refused its input at the start: it counts as never sent.

    Raises:
        BadRequest: with the target's words.
    """
    failure = (run.dir.result() or {}).get("failure")
    if failure and failure["kind"] == "bad request" and run.dir.last_attempt() <= 1 and not run.dir.digests()[0].count:
        for _ in range(200):
            shutil.rmtree(run.path, ignore_errors=True)
            if not run.path.exists():
                break
            time.sleep(0.05)  # its supervisor is still ending, and has written to it meanwhile
        registry.forget(run.path)
        raise BadRequest(failure["message"])


def submit(
    plan: Plan,
    function: Callable[..., Any] | None = None,
    given: Given = NOTHING_GIVEN,
    attachment: Attachment | None = None,
    debug: DebugRequest | None = None,
) -> Run:
    """Make the run directory, copy the code, and send the plan. After an error nothing of it is left.

    `function` and `given` are those of `make_plan`, and `attachment` has streams of this process for the rank. With `debug` the
    ranks wait at their breakpoints.

    Raises:
        BadRequest: a check failed, or the engine refused.
    """
    run_dir = RunDir(plan.run_dir)
    run_dir.create()
    try:
        if plan.target.kind == "value":
            _pickle(function, run_dir)
        if plan.target.values.pickled:
            write(run_dir.arguments_pickle, *values_of(plan.target, function, given))
        if plan.target.path:
            _copy_code(plan, run_dir)
        run_dir.write_plan(plan)
        _write_debug(run_dir, debug)
        _check_target(plan)
        return _send(plan, run_dir, attachment)
    except BaseException:
        shutil.rmtree(run_dir.path, ignore_errors=True)
        raise


def resubmit(
    run: Run,
    attach: Callable[[Plan], Attachment | None] = lambda _: None,
    debug: DebugRequest | None = None,
    **changes: Any,
) -> Run:
    """Send a run again; see `resume`. After an error the run directory is what it was.

    `attach` returns streams of this process for the rank of the plan that is sent; `debug` as for `submit`.
    """
    with reading(run.path):
        run.dir.check_own()
        state = run.state()
        if state is State.SUCCEEDED:
            raise BadRequest(
                f"run {run.name!r} has succeeded; there is nothing to resume. Another --name starts a new one."
            )
        if not state.done:
            raise BadRequest(f"run {run.name!r} is {state.value}; `launch cancel {run.name}` stops it first.")
        plan = _relocated(run.dir.plan(), run.dir)
    changes = {key: value for key, value in changes.items() if value is not None}
    if changes:
        kinds = (*DEVICES, "ranks", "ranks_per_node")
        if any(kind in changes for kind in kinds):
            changes = dict.fromkeys((*kinds, "nodes")) | changes
        changes["settings"] = (*plan.spec.settings, *changes.get("settings", ()))
        spec = replace(plan.spec, name=plan.name, **changes)
        # Placed afresh as a run of another name; the code, the name and the directory stay.
        fresh = make_plan(replace(spec, target=RunSpec.target, args=(), name=None), plan.cwd)
        kept = {name: plan.environment[name] for name in plan.variables}
        fresh = replace(
            fresh,
            environment=fresh.environment | {k: v for k, v in kept.items() if k not in fresh.variables},
            variables=tuple(dict.fromkeys((*plan.variables, *fresh.variables))),
            secrets=tuple(dict.fromkeys((*plan.secrets, *fresh.secrets))),
        )
        spec = replace(spec, env=(), env_file=())
        plan = replace(fresh, name=plan.name, run_dir=plan.run_dir, spec=spec, target=plan.target, project=plan.project)
    else:
        plan = chosen_again(plan)
        backends.of(plan.cluster).check(plan)
    check_shared(plan.run_dir, plan.cluster)
    _check_target(plan)
    with acting(run.path), run.dir.reopened():
        run.dir.write_plan(plan)
        _write_debug(run.dir, debug)
        return _send(plan, run.dir, attach(plan))


def _relocated(plan: Plan, run_dir: RunDir) -> Plan:
    """The plan of the run in `run_dir`, which may have been moved or copied there since it was sent.

    Raises:
        BadRequest: the new name is none that a run can have, or a file of the target did not come along.
    """
    old, new = plan.run_dir, run_dir.path
    with suppress(OSError):
        if os.path.samefile(old, new):
            return plan
    check_name(new.name)

    def move(text: str) -> str:
        path = Path(os.path.normpath(text))
        if not path.is_relative_to(old):
            return text
        moved = new / path.relative_to(old)
        if not moved.exists():
            raise BadRequest(
                f"{new} was moved from {old} without {moved}. Move the whole directory, or `launch` afresh."
            )
        return str(moved)

    target = plan.target
    name = move(target.name) if target.kind == "script" else target.name
    path, source = tuple(map(move, target.path)), tuple(map(move, target.source))
    moved = {folder: move(copy) for folder, copy in target.moved.items()}
    target = replace(target, name=name, path=path, source=source, moved=moved)
    return replace(plan, name=new.name, run_dir=new, target=target)


def _send(plan: Plan, run_dir: RunDir, attachment: Attachment | None = None) -> Run:
    fields = {"backend": plan.backend, "cluster": plan.cluster.name, "world_size": plan.placement.world_size}
    run_dir.event("submitted", format=FORMAT, **fields)
    backend = backends.of(plan.cluster)
    if attachment is None:
        job = backend.submit(plan)
    else:
        job = backend.attach(plan, attachment.kind, attachment.passed)
        attachment.sent()
    run_dir.write_job(backend.name, job)
    registry.register(run_dir.path)
    return Run(run_dir)


def _write_debug(run_dir: RunDir, debug: DebugRequest | None) -> None:
    if debug is None:
        run_dir.debug_file.unlink(missing_ok=True)
    else:
        write_atomic(run_dir.debug_file, to_json(to_data(debug)))


def _pickle(function: Callable[..., Any] | None, run_dir: RunDir) -> None:
    from launcher.client.cells import pickle_with_sources

    try:
        data, sources = pickle_with_sources(function)
        write_atomic(run_dir.target_pickle, data)
        if sources:
            write_atomic(run_dir.sources_file, json.dumps(sources))
    except Exception as error:
        raise BadRequest(
            f"the function cannot be sent: {error}. It, or a variable it uses, does not pickle (an open file, a lock, a"
            " live model on a GPU); create such things inside the function."
        ) from None


def _copy_code(plan: Plan, run_dir: RunDir) -> None:
    assert plan.project is not None, "a target with entries on the path has a project"
    parts, _, _ = snapshot.parts(plan.project, plan.cwd, run_dir.path, plan.target.kind == "module")
    taken, *others = [snapshot.take_part(part, snapshot.excluded(part.root, run_dir.path)) for part in parts]
    if plan.target.kind in ("script", "module"):
        own_packages.make_regular(plan.target.path)
    record = {key: value for key, value in asdict(taken).items() if key != "diff"}
    record["packages"] = [{"root": str(o.root), "commit": o.commit, "files": o.files, "left": o.left} for o in others]
    write_atomic(run_dir.snapshot_file, to_json(to_data(record)))
    if taken.diff:
        write_atomic(run_dir.diff_file, taken.diff.encode("utf-8", "surrogateescape"))


def _check_target(plan: Plan) -> None:
    """Import the target here before it waits in a queue; where its ranks start at once, they report the same.

    Values from Python are checked in any case, here unless the function itself was given.
    """
    values = plan.target.values
    unchecked = bool(values.shown) and values.context is None
    if plan.target.kind != "function" or not (backends.of(plan.cluster).capabilities.precheck or unchecked):
        return
    command = own_packages.command("launcher.client.preimport")
    done = subprocess.run(
        command, input=to_json(to_data(plan)), capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        raise BadRequest(done.stderr.strip())
