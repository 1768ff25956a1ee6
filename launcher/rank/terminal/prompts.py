"""Report to the agent that a rank is at a prompt, where Ctrl-C is for the program and does not stop the run."""

from __future__ import annotations

import sys
from typing import Any

from training.distributed.heartbeat import Heartbeat

TRACING = ("sys.settrace", "sys.monitoring.register_callback")
"""Audit events of a debugger that starts to trace; `pdb` and its relatives do so in the module `bdb`."""


def report_prompts(heartbeat: Heartbeat) -> None:
    """Set `heartbeat.interactive` while the program waits in `input`, and from its first use of a debugger on.

    An audit hook (PEP 578) changes nothing that the program can see.
    """
    debugged = [False]

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event == "builtins.input":
            heartbeat.interactive = True
        elif event == "builtins.input/result":
            heartbeat.interactive = debugged[0]
            if heartbeat.read().step >= 0:
                heartbeat.beat()  # the time at the prompt is no hang
        elif event in TRACING and sys._getframe(1).f_globals.get("__name__") == "bdb":
            debugged[0] = heartbeat.interactive = True

    sys.addaudithook(hook)
