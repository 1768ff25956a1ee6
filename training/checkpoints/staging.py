"""The staging folder of a save, which all ranks of a sharded save fill before rank 0 commits it.

Each rank above 0 writes its files, then a report with their manifest entries. Rank 0 collects the reports and renames
the folder. A rank that fails creates a marker beside the folder, and the other ranks stop waiting.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from training.errors import CheckpointError
from training.files import read_json, write_atomic

POLL_SECONDS = 0.02


class Staging:
    """The staging folder of one save.

    Attributes:
        path: the folder.
        patience: seconds that a rank waits for the other ranks.
    """

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self.patience = patience
        self._given_up = path.with_suffix(".given-up")

    def create(self, *, shared: bool) -> None:
        """Create the folder. If it is `shared` it may exist, otherwise its content is removed.

        Raises:
            CheckpointError: another rank has given up, or the path is a symbolic link.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not shared:
            self.remove()
        self.check_given_up()
        if self.path.is_symlink():
            raise CheckpointError(f"{self.path} is a symbolic link, which is not followed; remove it")
        self.path.mkdir(exist_ok=shared)

    def report(self, rank: int, files: dict[str, Any]) -> None:
        """Report the manifest entries of the files that `rank` has written."""
        write_atomic(self._report(rank), json.dumps(files))

    def collect(self, ranks: int) -> dict[str, Any]:
        """Wait for the reports of ranks 1 and above; returns their manifest entries.

        Raises:
            CheckpointError: a rank has given up, or has not reported within `patience` seconds.
        """
        files: dict[str, Any] = {}
        deadline = time.monotonic() + self.patience
        for rank in range(1, ranks):
            while (written := read_json(self._report(rank))) is None:
                self.check_given_up()
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"rank {rank} has not written its part of {self.path.name} in {self.patience:.0f} s"
                    )
                time.sleep(POLL_SECONDS)
            self._report(rank).unlink()
            files |= written
        return files

    def wait_for_commit(self, target: Path) -> None:
        """Wait until rank 0 has renamed the folder to `target`.

        Raises:
            CheckpointError: a rank has given up, or `target` does not exist after `patience` seconds.
        """
        deadline = time.monotonic() + self.patience
        while self.path.exists() and time.monotonic() < deadline:
            self.check_given_up()
            time.sleep(POLL_SECONDS)
        if not target.exists():
            raise CheckpointError(f"{target} has not been committed by rank 0")

    def check_given_up(self) -> None:
        """Raise CheckpointError if a rank has given up."""
        if self._given_up.exists():
            raise CheckpointError(f"another rank could not write its part of {self.path.name}")

    def give_up(self) -> None:
        """Create a marker for the other ranks, also for those that have not begun to write."""
        with contextlib.suppress(OSError):
            self._given_up.mkdir(exist_ok=True)

    def remove(self) -> None:
        """Remove the folder and its content, if it exists."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _report(self, rank: int) -> Path:
        return self.path / f"part-{rank:05d}.json"
