"""One rank: open the Context, call the target, leave a result or an error. The same on every backend."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.binding import settle
from launcher.exit_status import FINISHED, RAISED, REFUSED, STOPPED, classify, headline, unheard
from launcher.records import from_data
from launcher.rundir import RunDir
from launcher.spec import Plan
from launcher.target import call, short_traceback
from training.context import Context
from training.errors import DeviceError, ReplicaError
from training.files import write_atomic
from training.pulse import Pulse
from training.world import World

SETTLED_SECONDS = 3.0
"""How long a target must not have imported anything before what it imported is told."""


class Stopping(BaseException):
    """Raised in a target that cannot be asked to stop, when it is told to (SIGTERM)."""


def work(run_dir: RunDir, world: World, pulse: Pulse | None = None) -> int:
    """Run the target as the rank that `world` describes; return the exit status. `pulse` is where it says how it gets on.

    What the target returned is left by rank 0 in ``value.pkl``; what it raised in ``errors/<attempt>/<rank>.json``.
    """
    plan = run_dir.plan()
    prepare(plan, world)
    opened: list[Context] = []

    def context() -> Context:
        opened.append(Context(run_dir.path, world, args=plan.target.args, pulse=pulse))
        return opened[0]

    on_signal = _install_signal_handlers(opened)
    try:
        if world.device == "cuda":
            settle(world.local_rank, world.local_world_size)
        value = call(plan.target, run_dir.target_pickle, context)
    except Stopping:
        return STOPPED
    except SystemExit as error:
        if error.code in (None, 0):
            return FINISHED
        return _leave_error(run_dir, world, error, "user error")
    except KeyboardInterrupt:
        return STOPPED
    except BaseException as error:
        return _leave_error(run_dir, world, error, classify(error, world.device))
    finally:
        on_signal()
        with suppress(OSError):
            sys.stdout.flush()
    stopped = bool(opened and opened[0].stopped)
    try:
        for each in opened:
            each.close()
        if world.rank == 0 and not stopped:
            _leave_value(run_dir, value)
    except OSError as error:
        return _leave_error(run_dir, world, error, classify(error))
    return STOPPED if stopped else FINISHED


def prepare(plan: Plan, world: World) -> None:
    """Give this process the environment, the threads and the folder of its rank."""
    os.environ.update(plan.environment)
    os.environ.update(world.environment())
    if world.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # scripts ask torch.cuda.is_available() rather than us
    if world.threads and "torch" in sys.modules:
        # OMP_NUM_THREADS is read when the library is loaded, which for a forked rank was before the fork.
        sys.modules["torch"].set_num_threads(world.threads)
    if plan.cwd.is_dir():
        os.chdir(plan.cwd)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _install_signal_handlers(opened: list[Context]) -> Callable[[], None]:
    """Turn signals into the Context's flag, or into `Stopping` for a target that has none. Returns the undoing."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # a Ray worker's thread: there the file `stop` says the same

    def handle(number: int, _: object) -> None:
        if opened:
            opened[0].request_stop(signal.Signals(number).name)
        else:
            # What a script or a plain function would do on its own, but with its finally blocks run.
            raise Stopping

    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGUSR2)}

    def undo() -> None:
        for number, handler in previous.items():
            # The last word is said: from here on a polite signal must not interrupt what is being written.
            signal.signal(number, signal.SIG_IGN if handler is signal.SIG_DFL else handler)

    return undo


def _leave_error(run_dir: RunDir, world: World, error: BaseException, kind: str) -> int:
    """Leave what the target raised, in the log and as a record; returns the rank's exit status."""
    plain = isinstance(error, DeviceError | ReplicaError)  # where our own code was says nothing about them
    text = f"{error}\n" if plain or kind == "bad request" else short_traceback(error)
    if kind == "communication":
        # The echo of another rank's failure; in full it would drown the cause for whoever watches rank 0.
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
        "type": type(error).__name__,
        "message": str(error)
        if not isinstance(error, SystemExit)
        else f"the script ended with exit status {error.code}",
        "traceback": text,
    }
    path = run_dir.error(world.attempt, world.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(record))
    except OSError as problem:
        with suppress(OSError):
            print(f"launch: the error of rank {world.rank} cannot be left in {path}: {problem}", file=sys.stderr)
        return unheard(problem)
    return REFUSED if kind == "bad request" else RAISED


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
            write_atomic(run_dir.value_file, json.dumps(value))


def _tell_imports(run_dir: RunDir, before: set[str]) -> None:
    """Once the target has settled, leave the names of the modules that it imported only while it ran.

    Libraries such as transformers import most of themselves on first use, which after a fork is once for each rank and
    attempt. Only further modules of packages that the forkserver has are named: whether others stand a fork is not known.
    """
    packages = {name.partition(".")[0] for name in before}
    found: list[str] = []
    while True:
        time.sleep(SETTLED_SECONDS)
        # In the order in which they came, so that each finds what it needs in place.
        new = [name for name in list(sys.modules) if name not in before and name.partition(".")[0] in packages]
        if new == found:
            break
        found = new
    with suppress(OSError):
        write_atomic(
            run_dir.imports_file, json.dumps([name for name in found if name.isascii() and name != "__mp_main__"])
        )


def main(run_dir: Path, world: dict[str, Any], pulses: int) -> int:
    """Enter a rank's process: what the forkserver calls in a fork, and ``python -m launcher.worker`` after a spawn."""
    faulthandler.enable(2)  # a crash in native code leaves the Python stack in the log
    faulthandler.register(signal.SIGQUIT, 2)  # and the agent asks a rank that hangs for it
    rank = from_data(World, world, "world")
    if rank.rank == 0 and not RunDir(run_dir).imports_file.exists():
        threading.Thread(target=_tell_imports, args=(RunDir(run_dir), set(sys.modules)), daemon=True).start()
    return work(RunDir(run_dir), rank, Pulse.of(pulses, rank.local_rank))


if __name__ == "__main__":
    from launcher.forkserver import finish
    from launcher.output import outlive_a_full_disk

    outlive_a_full_disk()
    finish(main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])))
