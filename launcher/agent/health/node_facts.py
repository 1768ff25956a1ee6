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
"""The results of a node's checks, as JSON can hold them."""

RENAMES = 20


def versions() -> dict[str, str]:
    """The versions of Python, of the packages that `launch` needs, and of its own code."""
    installed = environment_record.packages()
    return {
        "python": platform.python_version(),
        "launch": code_hash(),
        **{name: installed.get(name, "missing") for name in environment_record.PACKAGES},
    }


def differences(local: Mapping[str, str], reference: Mapping[str, str], host: str) -> list[str]:
    """Compare `local` versions with those of the reference `host`: ``has torch 2.12, n0 has 2.13`` for each difference."""
    return [f"has {n} {v}, {host} has {reference.get(n)}" for n, v in local.items() if v != reference.get(n)]


def code_hash() -> str:
    """A hash of the code of `launch` on this node, 12 hexadecimal digits."""
    total = hashlib.sha256()
    for package in ("launcher", "training"):
        for path in sorted((Path(__file__).parents[2] / package).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def renames(path: Path, times: int = RENAMES) -> float:
    """The median time of `times` atomic writes of a small file, in seconds."""
    taken = []
    for number in range(times):
        started = time.perf_counter()
        write_atomic(path, str(number))
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def within(limit: float, work: Callable[[], T]) -> T | None:
    """The result of `work`; None if it raises OSError or takes more than `limit` seconds."""
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
    """Seconds until a file of another node is visible on this node; -1 after `Timeouts.probe`."""
    started = time.monotonic()

    def there() -> bool:
        os.listdir(path.parent)  # makes an NFS client refresh its cache
        return path.exists()

    return time.monotonic() - started if _until(there, TIMEOUTS.probe) else -1.0


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait up to `seconds` until `condition` holds; returns whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds
