"""One rank: open the Context, call the target, leave a result or an error. The same on every backend."""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from launcher.config.codec import from_data
from launcher.lifecycle.exit_status import (
    BAD_REQUEST,
    FINISHED,
    RAISED,
    STOPPED,
    classify,
    error_not_written_status,
    headline,
)
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.affinity import settle
from launcher.rank.inside.receive import receive_visits
from launcher.rank.output import drop_output_on_full_disk, write_stacks_on_signal
from launcher.request import own_packages
from launcher.request.spec import Plan
from launcher.request.target import call, short_traceback
from training.context import Context
from training.distributed.heartbeat import Heartbeat
from training.distributed.world import World
from training.errors import DeviceError, ReplicaError
from training.files import plain, write_atomic


def work(run_dir: RunDir, world: World, heartbeat: Heartbeat | None = None, *, prepared: bool = False) -> int:
    """Run the target as the rank that `world` describes; return the exit status. Progress is reported to `heartbeat`.

    The value that the target returned is written by rank 0 to ``value.pkl``, an error to ``errors/<attempt>/<rank>.json``.
    SIGTERM sets the flag of a Context; a target without one keeps Python's default, or the handler that it installs.
    """
    plan = run_dir.plan()
    if not prepared:
        prepare(plan, world)
    Heartbeat.of_process, Context.latest = heartbeat, None
    opened: list[Context] = []

    def context() -> Context:
        opened.append(Context(run_dir.path, world, args=plan.target.args, heartbeat=heartbeat))
        _stop_on_sigterm(opened[0])
        return opened[0]

    try:
        if world.device == "cuda" and not prepared:
            settle(world.local_rank, world.local_world_size)
        value = call(plan.target, run_dir.target_pickle, context, run_dir.arguments_pickle)
    except SystemExit as error:
        if _stopped():
            return STOPPED
        if system_exit_status(error) == 0:
            return FINISHED
        return _leave_error(run_dir, world, error, "user error")
    except KeyboardInterrupt:
        return STOPPED
    except BaseException as error:
        return _leave_error(run_dir, world, error, classify(error, world.device))
    finally:
        if opened:
            _ignore_sigterm()
        with suppress(OSError):
            sys.stdout.flush()
    stopped = _stopped()
    try:
        for each in opened:
            each.close()
        if world.rank == 0 and not stopped:
            _leave_value(run_dir, value)
    except OSError as error:
        return _leave_error(run_dir, world, error, classify(error))
    return STOPPED if stopped else FINISHED


def _stopped() -> bool:
    """Whether the target has stopped at the request of its Context, which a script may have made itself.

    A Context finds the request in the run directory, and may do so before the agent has sent SIGTERM.
    """
    return Context.latest is not None and Context.latest.stopped


def prepare(plan: Plan, world: World) -> None:
    """Give this process the import path, for processes that it starts too, and the folder of its rank."""
    # Only now: this module's own imports must not find the user's files, such as a `queue.py`.
    own = [*plan.target.path, *own_packages.for_children(plan.target.moved)]
    path = [*own, *filter(None, [os.environ.get("PYTHONPATH")])]
    if path:
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    if plan.cwd.is_dir():
        os.chdir(plan.cwd)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _stop_on_sigterm(context: Context) -> None:
    """Make SIGTERM ask `context` to stop."""

    def handle(number: int, _: object) -> None:
        context.request_stop(signal.Signals(number).name)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handle)


def _ignore_sigterm() -> None:
    """Keep SIGTERM from interrupting what is written after the target has ended."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave_error(run_dir: RunDir, world: World, error: BaseException, kind: str) -> int:
    """Leave what the target raised, in the log and as a record; returns the rank's exit status."""
    plain = isinstance(error, DeviceError | ReplicaError)  # where our own code was says nothing about them
    exits = isinstance(error, SystemExit)
    text = f"{error}\n" if plain or kind == "bad request" else "" if exits else short_traceback(error)
    if isinstance(error, SystemExit) and not isinstance(error.code, int | None):
        text = f"{error.code}\n"  # as the interpreter prints it
    if kind == "communication":
        # The echo of another rank's failure; in full it would drown the cause in the log of rank 0.
        line = headline(str(error))
        sys.stderr.write(f"launch: rank {world.rank} lost its peers: {type(error).__name__}: {line}\n")
    else:
        with suppress(OSError):  # the log may lie on the disk that is full
            sys.stderr.write(text)
    record = {
        "time": time.time(),
        "rank": world.rank,
        "host": socket.gethostname(),
        "kind": kind,
        "type": "SystemExit" if exits else type(error).__name__,  # also of a subclass
        "message": f"the script ended with exit status {error.code}" if isinstance(error, SystemExit) else str(error),
        "traceback": text,
    }
    path = run_dir.error(world.attempt, world.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record))
    except OSError as problem:
        with suppress(OSError):
            print(f"launch: the error of rank {world.rank} cannot be left in {path}: {problem}", file=sys.stderr)
        return error_not_written_status(problem)
    return BAD_REQUEST if kind == "bad request" else RAISED


def system_exit_status(error: SystemExit) -> int:
    """Return the exit status with which the interpreter would end because of `error`."""
    if isinstance(error.code, int | None):
        return (error.code or 0) & 0xFF
    return 1


def _leave_value(run_dir: RunDir, value: Any) -> None:
    if value is None:
        return
    import cloudpickle

    try:
        data = cloudpickle.dumps(value)
    except Exception as error:
        print(f"launch: the value that the target returned cannot be pickled and is not kept: {error}", file=sys.stderr)
        return
    write_atomic(run_dir.value_pickle, data)
    if isinstance(value, dict):
        with suppress(TypeError, ValueError):
            write_atomic(run_dir.value_file, json.dumps(plain(value)))


def main(run_dir: Path, world: World, heartbeats: int, *, prepared: bool = False) -> int:
    """Run a rank in this process; return its exit status."""
    faulthandler.enable(2)  # a crash in native code leaves the Python stack in the log
    faulthandler.register(signal.SIGQUIT, 2)  # and the agent asks a rank that hangs for it
    write_stacks_on_signal()
    receive_visits()
    heartbeat = Heartbeat.of(heartbeats, world.local_rank)
    if os.isatty(0):
        from launcher.rank.terminal.prompts import report_prompts

        report_prompts(heartbeat)
    own = RunDir(run_dir)
    if own.debug_file.exists():
        from launcher.rank.inside import debugger

        Heartbeat.of_process = heartbeat
        debugger.begin(own.debug_file, world)
    return work(own, world, heartbeat, prepared=prepared)


def enter(bare: frozenset[str]) -> NoReturn:
    """Run a rank in a fresh interpreter, as its arguments say; `bare` are the modules that it began with.

    The arguments are the run directory, the descriptor of the heartbeats, that of the record of imports (-1: none), and either
    ``rank`` with the world, or ``standby`` with the descriptors of the forkserver's socket and of its request.
    """
    own_packages.loaded_at_start = bare
    drop_output_on_full_disk()
    run_dir, heartbeats, record, (kind, *arguments) = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4:],
    )
    if kind == "standby":
        from launcher.rank import standby

        before, modules = standby.read_request(int(arguments[1]))
        prepare(RunDir(run_dir).plan(), before.world)
        if before.world.device == "cuda":
            settle(before.world.local_rank, before.world.local_world_size)
        start, usable = standby.wait_for_start(int(arguments[0]), before, modules)
        world = start.world
        if not usable:
            interpreter = sys.orig_argv[: 1 - len(sys.argv)]
            words = [*sys.argv[1:4], "rank", json.dumps(asdict(world))]
            os.execve(sys.executable, [*interpreter, *words], start.environment)
    else:
        world = from_data(World, json.loads(arguments[0]), "world")
    if record >= 0:
        from launcher.rank.imports import record_imports

        record_imports(record)
    finish(main(run_dir, world, heartbeats, prepared=kind == "standby"))


def finish(status: int) -> NoReturn:
    """End a rank: wait for its threads, run its exit handlers, flush, and exit without tearing down modules.

    The interpreter's own teardown of a process with CUDA or gloo threads in it can hang or crash after the work is done.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
