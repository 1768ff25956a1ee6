"""Which checkpoints of a run Ray Train has not been told of yet, and what is known of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from launcher.rundir import RunDir


class Reports:
    """Looks into the folder of checkpoints: one appears there whole or not at all, whoever saved it.

    The driver looks rather than the ranks tell, because Ray's `report` is a barrier of all workers and would hold up
    training.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.folder = run_dir.path / "checkpoints"
        self.told: set[str] = set()

    def begin(self) -> None:
        """What is there now was told to an earlier `fit`."""
        self.told = {path.name for path in self._there()}

    def _there(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d+", path.name))

    def new(self) -> bool:
        """Whether there is something to tell."""
        return any(path.name not in self.told for path in self._there())

    def take(self) -> list[tuple[dict[str, Any], Path]]:
        """The metrics and the folder of each checkpoint that is new, oldest first; told now."""
        found = [path for path in self._there() if path.name not in self.told]
        self.told |= {path.name for path in found}
        records = self.run_dir.metrics() if found else []
        return [(_metrics(int(path.name.removeprefix("step-")), records), path) for path in found]


def _metrics(step: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest numbers of a step: its evaluation's and its loss."""
    metrics: dict[str, Any] = {"step": step}
    for record in records:
        if record.get("step") == step:
            metrics |= {k: v for k, v in record.items() if isinstance(v, int | float) and k not in ("time", "attempt")}
            metrics |= record.get("eval", {})
    return metrics
