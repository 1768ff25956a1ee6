"""Texts of the command line about a plan and about the end of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.client.tail import safe, uncoloured
from launcher.config.durations import in_words
from launcher.request.spec import RunSpec, State
from training.files import read_json


def describe(plan: Any) -> str:
    """The plan in a few lines for a person."""
    from launcher import backends
    from launcher.cli.foreign import accelerate_config

    limited = backends.of(plan.cluster).capabilities.time_limit
    note = accelerate_config.note() if plan.target.name != RunSpec.target else ""
    where = plan.backend if plan.cluster.name == plan.backend else f"{plan.backend} ({plan.cluster.name})"
    return (
        f"launch: {plan.target.spelled(plan.spec.target)}"
        f"\n  on     {where}: {plan.placement.why}"
        + _profile(plan)
        + (f"\n  gpu    {plan.gpu}" if plan.gpu else "")
        + f"\n  run    {_short(plan.run_dir)}"
        + (f"\n  limit  {in_words(plan.time_minutes)}{_source_of_limit(plan)}" if limited else "")
        + "".join(f"\n  shell  {safe(line)}" for line in plan.shell)
        + (f"\n  start  {plan.start}" if plan.start else "")
        + (f"\n  note   {safe(note)}" if note else "")
    )


def _source_of_limit(plan: Any) -> str:
    """Where a time limit comes from that was not typed."""
    if plan.spec.time:
        return ""
    if any("SBATCH_TIMELIMIT" in line for line in plan.shell):
        return ", from SBATCH_TIMELIMIT"
    return ", from the profile" if plan.cluster.time else ", the default"


def _profile(plan: Any) -> str:
    """A line with the file of the profile, unless it is one that came with `launch`."""
    from launcher.config import profiles

    asked = plan.spec.cluster or plan.spec.backend or plan.backend
    if asked.endswith(".toml"):
        return f"\n  from   {safe(asked)}"
    found = next((each for each in profiles.profiles(plan.cwd) if each.name == asked), None)
    return f"\n  from   {safe(_short(found.path))}" if found is not None and found.where != "shipped" else ""


def describe_ranks(plan: Any) -> str:
    """What every rank gets besides: the part of a plan that only a dry run shows."""
    code = f"\n  code   {plan.target.path[0]}, a copy of the project as it is" if plan.target.path else ""
    code += "".join(f"\n  {line}" for line in what_travels(plan))
    return code + "".join(f"\n  env    {name}={safe(value)}" for name, value in plan.masked().environment.items())


def what_travels(plan: Any) -> list[str]:
    """Lines about code besides the project's, and about what is linked or left out; see `launcher.request.snapshot`."""
    from launcher.request import snapshot

    if not plan.target.path or plan.project is None:
        return []
    parts, _, _ = snapshot.parts(plan.project, plan.cwd, plan.run_dir, plan.target.kind == "module")
    return snapshot.describe([(part, part.look(snapshot.excluded(part.root, plan.run_dir))) for part in parts])


def not_copied(run: Any) -> list[str]:
    """Lines about what the run goes without, or reads where later edits reach it, from its ``snapshot.json``."""
    from launcher.request.code.survey import RUNS_FOLDER, shown

    record = read_json(run.dir.snapshot_file) or {}
    left = {name: why for name, why in record.get("left", {}).items() if why != RUNS_FOLDER}
    live = [f"{each['root']} ({each['left']['']})" for each in record.get("packages", ()) if each["left"].get("")]
    lines = [f"not copied: {each}" for each in live]
    if left:
        name, why = next(iter(left.items()))
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        lines.append(f"not copied: {shown(name)}{more} ({why}); --dry-run lists all")
    return lines


def summary(run: Any) -> str:
    """The end of a run: its result or its failure, and where to look."""
    state, result = run.state(), run.dir.result() or {}
    if state is State.SUCCEEDED:
        metrics = {k: v for k, v in result.get("metrics", {}).items() if isinstance(v, int | float | str)}
        shown = "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        lines = [f"launch: succeeded in {result.get('seconds', 0.0):.1f} s", *([f"  {shown}"] if shown else [])]
    elif state is State.STOPPED:
        lines = [f"launch: stopped before the end; {run.resumption()}"]
        if result.get("failure"):
            lines.append(f"  {run.explain(shown_rank=0)}")
    else:
        lines = [f"launch: failed: {run.explain(shown_rank=0)}"]
    lines += [f"  {line}" for line in failed_saves(result)]
    lines += [f"  run in {_short(run.path)}", f"  look: launch status {run.name}, launch logs {run.name}"]
    return uncoloured("\n".join(lines))


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
