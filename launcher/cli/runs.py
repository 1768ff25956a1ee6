"""Commands on existing runs: list, status, logs and cancel."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.parser import Once, command, whole
from launcher.errors import BadRequest, LaunchError
from launcher.request.spec import State

if TYPE_CHECKING:
    from launcher.client.run import Run


def run_list(argv: Sequence[str]) -> int:
    """``launch list``."""
    options = command("list", run=False).parse_args(list(argv))
    from launcher.client.run import runs

    found = runs(options.runs)
    if options.json:
        print(json.dumps([_listed(run, run.status) for run in found]))
        return 0
    if not found:
        print(f"no runs in {options.runs}")
    for run in found:
        status = _listed(run, run.brief)
        if "error" in status:
            print(f"{run.name:<32} unreadable: {status['error']}")
            continue
        progress = status["progress"]
        step = f"{progress['step']}/{progress['total_steps']}" if "total_steps" in progress else ""
        shown = "  ".join(f"{k} {v:.4f}" for k, v in status["evaluation"].items() if isinstance(v, float))
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.dir.plan_file.lstat().st_mtime))
        print(f"{run.name:<32} {status['state']:<10} {status['backend']:<6} {started}  {step:<12} {shown}".rstrip())
    return 0


def _listed(run: Run, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` finds; a run that cannot be read does not hide the others."""
    try:
        return read()
    except LaunchError as error:
        return {"name": run.name, "state": State.UNKNOWN.value, "error": str(error)}


def run_status(argv: Sequence[str]) -> int:
    """``launch status RUN``."""
    options = command("status").parse_args(list(argv))
    from launcher.cli.describe import failed_saves
    from launcher.client.run import find

    run = find(options.run, Path(options.runs))
    status = run.status()
    if options.json:
        print(json.dumps(status))
        return 0
    placement = status["placement"]
    print(f"{run.name}: {status['state']}")
    print(f"  target      {status['target']}")
    print(f"  on          {status['backend']} ({status['cluster']}), job {status['job_id']}: {placement['why']}")
    if status["waits_for"]:
        print(f"  waits for   {status['waits_for']}")
    if commit := status["code"].get("commit"):
        print(f"  code        {commit[:12]}{' and uncommitted changes' if status['code'].get('dirty') else ''}")
    print(f"  attempt     {status['attempt']}{_failures(status['failed_attempts'])}")
    if status["excluded_nodes"]:
        print(f"  nodes       excluded: {', '.join(status['excluded_nodes'])}")
    for title in ("progress", "evaluation", "metrics"):
        if status[title]:
            print(
                f"  {title:<11} "
                + "  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in status[title].items())
            )
    for line in failed_saves(status):
        print(f"  saves       {line}")
    print(f"  run dir     {status['run_dir']}")
    if status["state"] in ("failed", "lost"):
        print(run.explain())
    return 0


def _failures(failed_attempts: Sequence[Mapping[str, Any]]) -> str:
    """Why there were attempts before, in brackets."""
    fields = [each["kind"] + (f" on {each['host']}" if each["host"] else "") for each in failed_attempts]
    return f" ({', '.join(fields)} before)" if fields else ""


def run_logs(argv: Sequence[str]) -> int:
    """``launch logs RUN``."""
    parser = command("logs")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--rank", action=Once, type=whole, metavar="R", help="only this rank (default: all; 0 with -f)")
    parser.add_argument(
        "--attempt", action=Once, type=whole, metavar="N", help="an earlier attempt (default: the newest)"
    )
    options = parser.parse_args(list(argv))
    from launcher.client.run import find

    run = find(options.run, Path(options.runs))
    size = run.dir.plan().placement.world_size
    if options.rank is not None and not 0 <= options.rank < size:
        raise BadRequest(f"--rank {options.rank}: the ranks of {run.name} are 0 to {size - 1}.")
    if options.follow:
        from launcher.client.follow import follow
        from launcher.client.run import reading

        try:
            with reading(run.path):
                follow(run, sys.stdout, options.rank or 0)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        return 0
    lines = run.logs(options.rank, options.attempt)
    if options.json:
        print(json.dumps(list(lines)))
        return 0
    from launcher.client.tail import safe

    for line in lines:
        print(safe(line))
    return 0


def run_cancel(argv: Sequence[str]) -> int:
    """``launch cancel RUN``."""
    parser = command("cancel", "It ends by itself within the cluster's grace, or is killed.")
    parser.add_argument("--now", action="store_true", help="kill it without a checkpoint")
    options = parser.parse_args(list(argv))
    from launcher.client.run import find

    run = find(options.run, Path(options.runs))
    state = run.kill() if options.now else run.cancel()
    print(json.dumps({"name": run.name, "state": state.value}) if options.json else f"{run.name}: {state.value}")
    return 0
