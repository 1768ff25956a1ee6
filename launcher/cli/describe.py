"""Texts of the command line about a plan and about the end of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.client.tail import safe
from launcher.request.spec import RunSpec, State


def describe(plan: Any) -> str:
    """The plan in a few lines for a person."""
    from launcher import backends
    from launcher.request import accelerate_config

    limited = backends.of(plan.cluster).capabilities.time_limit
    note = accelerate_config.note() if plan.target.name != RunSpec.target else ""
    where = plan.backend if plan.cluster.name == plan.backend else f"{plan.backend} ({plan.cluster.name})"
    return (
        f"launch: {plan.target.spelled(plan.spec.target)}"
        f"\n  on     {where}: {plan.placement.why}"
        f"\n  run    {_short(plan.run_dir)}"
        + (f"\n  limit  {plan.time_minutes} min" if limited else "")
        + (f"\n  start  {plan.start}" if plan.start else "")
        + (f"\n  note   {safe(note)}" if note else "")
    )


def describe_ranks(plan: Any) -> str:
    """What every rank gets besides: the part of a plan that only a dry run shows."""
    code = f"\n  code   {plan.target.path[0]}, a copy of the project as it is" if plan.target.path else ""
    return code + "".join(f"\n  env    {name}={value}" for name, value in plan.environment.items())


def summary(run: Any) -> str:
    """The end of a run: its result or its failure, and where to look."""
    state, result = run.state(), run.dir.result() or {}
    if state is State.SUCCEEDED:
        metrics = {k: v for k, v in result.get("metrics", {}).items() if isinstance(v, int | float | str)}
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        lines = [f"launch: succeeded in {result['seconds']:.1f} s", *([f"  {shown}"] if shown else [])]
    elif state is State.STOPPED:
        lines = [f"launch: stopped before the end; {run.resumption()}"]
        if result.get("failure"):
            lines.append(f"  {run.explain(shown_rank=0)}")
    else:
        lines = [f"launch: failed: {run.explain(shown_rank=0)}"]
    lines += [f"  {line}" for line in failed_saves(result)]
    return "\n".join(
        [*lines, f"  run in {_short(run.path)}", f"  look: launch status {run.name}, launch logs {run.name}"]
    )


def failed_saves(result: Mapping[str, Any]) -> list[str]:
    """The line about checkpoints that could not be saved, from a result or status; none if all were."""
    found = result.get("failed_saves")
    if not found or not found["newest"]:
        return []
    several, newest = "s" * (found["count"] > 1), found["newest"][-1]
    return [f"{found['count']} checkpoint{several} could not be saved; step {newest['step']}: {newest['error']}"]


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
