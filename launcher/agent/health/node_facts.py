"""Facts of a node that have to be the same on all nodes of a run."""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from launcher.agent.health import environment_record
from launcher.config.timeouts import TIMEOUTS
from training.files import write_atomic

T = TypeVar("T")

Facts = dict[str, Any]
"""What the checks of a node found, as JSON can hold it."""


RENAMES = 20


def versions() -> dict[str, str]:
    """What has to be the same on all nodes: Python, the packages that `launch` needs, and its own code."""
    installed = environment_record.packages()
    return {
        "python": platform.python_version(),
        "launch": code_hash(),
        **{name: installed.get(name, "missing") for name in environment_record.PACKAGES},
    }


def differences(mine: Mapping[str, str], theirs: Mapping[str, str], whose: str) -> list[str]:
    """What of `mine` differs from `theirs`, the versions of the host `whose`; each as ``has torch 2.12, n0 has 2.13``."""
    return [f"has {n} {v}, {whose} has {theirs.get(n)}" for n, v in mine.items() if v != theirs.get(n)]


def code_hash() -> str:
    """A short hash of the code of `launch` on this node."""
    total = hashlib.sha256()
    for package in ("launcher", "training"):
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def renames(path: Path, times: int = RENAMES) -> float:
    """The median of seconds that an atomic write of a small file takes, tried `times` times."""
    taken = []
    for number in range(times):
        started = time.perf_counter()
        write_atomic(path, str(number))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def within(limit: float, work: Callable[[], T]) -> T | None:
    """The result of `work`, or None where it raises OSError or takes longer than `limit` seconds; name services hang."""
    done: list[T] = []

    def run() -> None:
        try:
            done.append(work())
        except OSError:
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    return done[0] if done else None


def appears(path: Path) -> float:
    """Seconds until a file that another node has written is seen here; -1 for never."""
    started = time.monotonic()

    def there() -> bool:
        os.listdir(path.parent)  # makes an NFS client look again
        return path.exists()

    return time.monotonic() - started if _until(there, TIMEOUTS.probe) else -1.0


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until `condition` holds, `seconds` at most; whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds
