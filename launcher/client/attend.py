"""Follow a run in the foreground: Ctrl-C and SIGTERM stop a run of this machine, and end the watching of any other."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from launcher import backends
from launcher.client.follow import Follower
from launcher.client.run import Run
from launcher.request.spec import State


class Terminated(KeyboardInterrupt):
    """SIGTERM was received while a run was followed."""


def attend(run: Run, out: TextIO) -> State | None:
    """Follow a run to its end and return its state; None if Ctrl-C ended only the watching.

    On this machine the first Ctrl-C, or SIGTERM, asks the run to stop, and the second one ends it. A run of a cluster
    continues after Ctrl-C; SIGTERM keeps its usual effect there.
    """
    follower = Follower(run, out)
    if not backends.of(run.dir.plan().cluster).capabilities.interrupt_stops:
        try:
            return follower.follow()
        except KeyboardInterrupt:
            print(
                f"\nlaunch: no longer watching; {run.name} goes on. Come back with `launch logs -f {run.name}`, see"
                f" `launch status {run.name}`, end it with `launch cancel {run.name}`.",
                file=sys.stderr,
            )
            return None
    with _sigterm_raises():
        try:
            return follower.follow()
        except KeyboardInterrupt as interruption:
            reason = "SIGTERM" if isinstance(interruption, Terminated) else "Ctrl-C"
        print(f"\nlaunch: {how_it_stops(run)}; {reason} again ends at once", file=sys.stderr)
        run.dir.request_stop(reason)
        try:
            return follower.follow()
        except KeyboardInterrupt:
            return run.kill()


def how_it_stops(run: Run) -> str:
    """Describe what a request to stop does: only a program with a Context, which logs its steps, stops at a step."""
    plan = run.dir.plan()
    if run.dir.metrics_file.exists():
        return "stopping at the next step, with a checkpoint if the program saves one"
    return (
        f"stopping: SIGTERM goes to every rank, {plan.cluster.grace:g} seconds before those that still run are killed"
    )


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`, unless the program has a handler of its own or this is not its main thread."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
