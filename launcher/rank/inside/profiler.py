"""Profile a rank at the request of ``launch profile``: some steps of a program with a Context, some seconds of another one."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from launcher.rank.inside.visit import Visit
from training.distributed.heartbeat import Heartbeat

ROWS = 10
"""Rows of the table of operations."""


class Profile:
    """One profile by torch's profiler, from the beginning of a step to the end of the last one.

    Args:
        trace: the path of the Chrome trace.
        steps: how many steps of a program with a Context; another one is profiled until the next visit.
    """

    running: Profile | None = None

    def __init__(self, visit: Visit, trace: str, steps: int) -> None:
        from torch import profiler

        self.visit, self.trace, self.steps = visit, trace, steps
        self.left = steps
        self._profiler = profiler.profile()
        self._begun = False

    def start(self) -> None:
        """Begin to record."""
        self._profiler.start()
        self._begun = True

    def on_step(self) -> None:
        """Take in that a step has ended: the first one begins the profile, the last one ends it."""
        if not self._begun:
            self.start()
            return
        self.left -= 1
        if self.left <= 0:
            self.end()

    def end(self) -> None:
        """Stop, write the trace and send the table."""
        Profile.running, Heartbeat.after_step = None, None
        try:
            self._profiler.stop()
            self._write()
        except Exception as error:  # of the profiler; the program goes on
            self.visit.send({"error": f"{type(error).__name__}: {error}"})
        self.visit.close()

    def _write(self) -> None:
        temporary = f"{self.trace}.{os.getpid()}.json"
        self._profiler.export_chrome_trace(temporary)
        os.replace(temporary, self.trace)
        averages = self._profiler.key_averages()
        device = any(getattr(each, "self_device_time_total", 0) for each in averages)
        table = averages.table(sort_by=f"self_{'device' if device else 'cpu'}_time_total", row_limit=ROWS)
        with suppress(OSError), open(f"{os.path.splitext(self.trace)[0]}.txt", "w") as file:
            file.write(table)
        self.visit.send({"trace": self.trace, "table": table, "steps": self.steps - self.left})


def begin(visit: Visit, asked: dict[str, Any]) -> None:
    """Profile this process as `asked`, or end the profile that runs."""
    if Profile.running is not None:
        running, Profile.running = Profile.running, None
        visit.close()
        running.end()
        return
    if "torch" not in sys.modules:
        visit.send({"error": "the program has not imported torch, so its profiler has nothing to record"})
        visit.close()
        return
    with_steps = Heartbeat.of_process is not None and Heartbeat.of_process.read().step > 0
    profile = Profile(visit, str(asked["trace"]), int(asked["steps"]) if with_steps else 0)
    Profile.running = profile
    visit.send({"steps": with_steps})
    if with_steps:
        Heartbeat.after_step = profile.on_step
    else:
        profile.start()
