"""Send one train/eval function to where the accelerators are: this machine, SLURM or Ray.

>>> import launcher
>>> run = launcher.launch("training.train:train", cpus=2)   # doctest: +SKIP
>>> run.wait().state()                                      # doctest: +SKIP
<State.SUCCEEDED: 'succeeded'>
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launcher.client.api import launch, resume
    from launcher.client.run import Run
    from launcher.client.sent.choose import runs
    from launcher.client.sent.compare import diff
    from launcher.client.sent.remove import remove
    from launcher.client.sent.waiting import wait
    from launcher.errors import BadRequest, LaunchError, RunFailed, RunStopped
    from launcher.request.spec import State

__all__ = [
    "BadRequest",
    "LaunchError",
    "Run",
    "RunFailed",
    "RunStopped",
    "State",
    "diff",
    "launch",
    "remove",
    "resume",
    "runs",
    "wait",
]

_HOME = {
    **dict.fromkeys(("launch", "resume"), "client.api"),
    **dict.fromkeys(("BadRequest", "LaunchError", "RunFailed", "RunStopped"), "errors"),
    "Run": "client.run",
    "runs": "client.sent.choose",
    "wait": "client.sent.waiting",
    "diff": "client.sent.compare",
    "remove": "client.sent.remove",
    "State": "request.spec",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: agents, forkservers and ranks import this package too, and need none of it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"launcher.{_HOME[name]}"), name)
