"""The table of a chaos run: fault x engine, and what became of the runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from tests.chaos.faults import FAULTS
from tests.chaos.play import Ending, Finding


def table(findings: Sequence[Finding], endings: Sequence[Ending]) -> str:
    """One line for each fault and engine, in the order of `FAULTS`."""
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
    healed = sum(f.outcome in ("healed", "unaffected") for f in findings)
    lines.append(f"\n{len(findings)} faults: {healed} without a hand, {len(findings) - healed} with one or not at all")
    for engine in dict.fromkeys(e.engine for e in endings):
        mine_too = [e for e in endings if e.engine == engine]
        states = ", ".join(f"{n} {state}" for state, n in Counter(e.state for e in mine_too).most_common())
        lines.append(
            f"{engine}: {len(mine_too)} runs, {states}; {sum(e.equal for e in mine_too)} ended in the weights of an"
            " undisturbed run, bit for bit"
        )
    left = [f"  {e.engine}, after {', '.join(e.faults)}: {', '.join(e.left)}" for e in endings if e.left]
    lines += ["left behind:", *left] if left else ["left behind: nothing"]
    return "\n".join(lines)


def spread(values: Sequence[float], form: str) -> str:
    """Median and largest, as in ``0.8 (max 2.1)``."""
    return f"{statistics.median(values):{form}} (max {max(values):{form}})" if values else "-"
