"""The text report of the differential suite: each program with what it observed under both launchers."""

from __future__ import annotations

import json
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tests.differential.suite import Observed, Shape


@dataclass(frozen=True)
class Compared:
    """A program with both observations and their differences."""

    name: str
    torchrun: Observed
    launch: Observed
    differences: Sequence[str]

    def data(self) -> dict[str, Any]:
        """As an object of the JSON report."""
        found = {"torchrun": self.torchrun.found, "launch": self.launch.found}
        return {"program": self.name, **found, "differ": list(self.differences)}


def text(compared: Sequence[Compared], engine: str, shape: Shape, date: str, command: str) -> str:
    """Return the report: versions, the number of differences, then two lines or more a program."""
    wrong = sum(bool(each.differences) for each in compared)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray", "accelerate"))
    lines = [
        f"Differential suite on {engine}, {shape}, {date}: {len(compared)} programs, {wrong} differ.",
        f"Repeat: {command}",
        f"Python {platform.python_version()}, {versions}.",
        "Ranks with the same observation share a line. Folders of this machine are PREFIX, BASE and TMP.",
    ]
    for each in compared:
        lines += ["", f"{each.name}: {'; '.join(each.differences) or 'same'}"]
        lines += _lines("torchrun", each.torchrun) + _lines("launch", each.launch)
    return _without_folders("\n".join(lines)) + "\n"


def _lines(launcher: str, observed: Observed) -> list[str]:
    end = "succeeded" if observed.succeeded else "failed"
    lines = [f"  {launcher} {end}; {ranks}: {value}" for ranks, value in _by_value(observed.found)]
    lines += [f"  {launcher} distinct; {ranks}: {value}" for ranks, value in _by_value(observed.distinct)]
    lines += [f"  {launcher} error; {observed.error}"] if observed.error else []
    return lines or [f"  {launcher} {end}; no report"]


def _by_value(found: Mapping[int, Any]) -> list[tuple[str, str]]:
    """The ranks of each value, and the value as JSON."""
    ranks: dict[str, list[int]] = {}
    for rank, value in sorted(found.items()):
        ranks.setdefault(json.dumps(value), []).append(rank)
    return [(f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}", value) for value, who in ranks.items()]


def _without_folders(report: str) -> str:
    report = report.replace(sys.prefix, "PREFIX").replace(sys.base_prefix, "BASE")
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/[^\s\"']*", "TMP", report)
