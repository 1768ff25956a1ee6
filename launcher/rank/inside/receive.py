"""Receive the visits of a rank by a signal."""

from __future__ import annotations

import signal
from types import FrameType

from launcher.rank.inside.visit import VISIT_SIGNAL, connect


def receive_visits() -> None:
    """From here on this process acts on `VISIT_SIGNAL`, in its main thread, between two instructions of Python."""
    signal.signal(VISIT_SIGNAL, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if (found := connect("profile")) is not None:
        from launcher.rank.inside import profiler

        profiler.begin(*found)
    if frame is not None and (found := connect("debug")) is not None:
        from launcher.rank.inside import debugger

        debugger.stop(found[0], frame)
