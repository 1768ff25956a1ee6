"""Kills for memory by the kernel, as the control group of this process counts them, and the records of ranks that they ended."""

from __future__ import annotations

import json
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

from launcher.lifecycle.run_dir import RunDir
from training.files import write_atomic

TEXT = (
    "the kernel killed the process for memory (SIGKILL): the limit of the job, or the memory of the node, was exceeded"
)
"""The message of such a rank; `launcher.lifecycle.error_signs` has the advice."""


def count(root: Path = Path("/")) -> int:
    """Return how many processes of this process's control group were killed for memory; 0 if nothing counts them.

    Source: ``oom_kill`` in memory.events (version 2) and memory.oom_control (version 1), in the kernel's
    admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    groups = root / "sys/fs/cgroup"
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_bytes().decode(errors="replace").splitlines():
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            below = path.lstrip("/")
            # In a container the path may be that of the host; the container's own group is then the mounted one.
            if controllers == "":
                files = [
                    folder / name / "memory.events" for folder in (groups, groups / "unified") for name in (below, "")
                ]
            elif "memory" in controllers.split(","):
                files = [groups / "memory" / name / "memory.oom_control" for name in (below, "")]
            else:
                continue
            for file in files:
                if file.is_file() and (found := re.search(rb"^oom_kill (\d{1,18})$", file.read_bytes(), re.MULTILINE)):
                    return int(found[1])
    return 0


class MemoryKills:
    """Distinguishes the ranks of an attempt on `host` that the kernel killed for memory from those that others killed."""

    def __init__(self, run_dir: RunDir, attempt: int, host: str) -> None:
        self.run_dir, self.attempt, self.host = run_dir, attempt, host
        self.known = count()

    def note(self, rank: int, code: int) -> None:
        """Leave the error of a rank that ended with `code`, if the kernel killed it for memory."""
        if code != -signal.SIGKILL or count() <= self.known:
            return
        self.known += 1  # one kill ends one rank; the others are then killed by their agents
        record = {"time": time.time(), "rank": rank, "host": self.host, "kind": "out of memory", "type": "Killed"}
        path = self.run_dir.error(self.attempt, rank)
        with suppress(OSError):
            if not path.exists():
                write_atomic(path, json.dumps({**record, "message": TEXT, "traceback": ""}))
