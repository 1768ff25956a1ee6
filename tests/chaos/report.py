"""The records of a chaos run, and its table of faults and engines."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.play import WELL, Ending, Finding
from training.files import append_line, read_lines

BY_HAND = {(fault.name, engine) for fault in FAULTS for engine in fault.engines if fault.by_hand}


@dataclass(frozen=True)
class Record:
    """A file of records, to which several processes append lines."""

    path: Path

    def note(self, what: Finding | Ending) -> None:
        append_line(self.path, {type(what).__name__.lower(): asdict(what)})

    def note_undisturbed(self, engine: str, weights: str) -> None:
        append_line(self.path, {"undisturbed": engine, "weights": weights})

    def findings(self) -> list[Finding]:
        return [Finding(**line["finding"]) for line in read_lines(self.path) if "finding" in line]

    def endings(self) -> list[Ending]:
        found = [Ending(**line["ending"]) for line in read_lines(self.path) if "ending" in line]
        return [replace(each, faults=tuple(each.faults), left=tuple(each.left)) for each in found]

    def undisturbed(self) -> dict[str, set[str]]:
        """Engine -> hashes of the final weights of uninterrupted runs."""
        found: dict[str, set[str]] = {}
        for line in read_lines(self.path):
            if "undisturbed" in line:
                found.setdefault(line["undisturbed"], set()).add(line["weights"])
        return found

    def well(self) -> bool:
        """Whether all faults and runs ended as expected, and there was one."""
        findings, endings = self.findings(), self.endings()
        return (
            bool(findings)
            and all(map(well, findings))
            and all(e.state == "succeeded" and e.equal and not e.left for e in endings)
        )


def well(finding: Finding) -> bool:
    """Whether the fault ended as expected."""
    by_hand = (finding.fault, finding.engine) in BY_HAND and finding.outcome.endswith("; resumed by hand")
    return finding.outcome in WELL or by_hand


def table(record: Record) -> str:
    """One line per fault and engine, in the order of `FAULTS`."""
    findings, endings = record.findings(), record.endings()
    lines = [f"{'fault':<30} {'engine':<6} {'n':>3} {'s to next step':>18} {'steps lost':>11}  {'equal':<6} outcome"]
    for fault in dict.fromkeys(fault.name for fault in FAULTS):
        for engine in ("local", "slurm", "ray"):
            mine = [f for f in findings if (f.fault, f.engine) == (fault, engine)]
            if mine:
                runs = [e for e in endings if e.engine == engine and fault in e.faults]
                equal = f"{sum(e.equal for e in runs)}/{len(runs)}"
                seconds = spread([f.seconds for f in mine if f.seconds is not None], ".1f")
                lost = spread([f.lost for f in mine if f.lost is not None], ".0f")
                outcomes = ", ".join(f"{name} ({n})" for name, n in Counter(f.outcome for f in mine).most_common())
                lines.append(
                    f"{fault:<30} {engine:<6} {len(mine):>3} {seconds:>18} {lost:>11}  {equal:<6} {outcomes}".rstrip()
                )
    healed = sum(f.outcome in WELL for f in findings)
    by_hand = sum(well(f) for f in findings) - healed
    lines.append(
        f"\n{len(findings)} faults: {healed} without a hand, {by_hand} that need one resumed by hand,"
        f" {len(findings) - healed - by_hand} that did not end as they should"
    )
    for engine in dict.fromkeys(e.engine for e in endings):
        mine_too = [e for e in endings if e.engine == engine]
        states = ", ".join(f"{n} {state}" for state, n in Counter(e.state for e in mine_too).most_common())
        lines.append(
            f"{engine}: {len(mine_too)} runs, {states}; {sum(e.equal for e in mine_too)} ended in the weights of an"
            " undisturbed run, bit for bit"
        )
    weights = record.undisturbed()
    if len(weights) > 1:
        same = "the same weights" if len(set().union(*weights.values())) == 1 else "DIFFERENT weights"
        lines.append(f"undisturbed runs on {', '.join(weights)} ended in {same}")
    left = [f"  {e.engine}, after {', '.join(e.faults)}: {', '.join(e.left)}" for e in endings if e.left]
    lines += ["left behind:", *left] if left else ["left behind: nothing"]
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    """Median and maximum, as in ``0.8 (max 2.1)``."""
    return f"{statistics.median(values):{form}} (max {max(values):{form}})" if values else "-"
