"""Commands on existing runs: list, status, logs and cancel."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.cli.parser import Once, command, whole
from launcher.errors import BadRequest, LaunchError
from launcher.request.spec import State

if TYPE_CHECKING:
    from launcher.client.run import Run


def run_list(argv: Sequence[str]) -> int:
    """``launch list``."""
    parser = command("list", run=False)
    parser.add_argument(
        "--here", dest="this_folder", action="store_true", help="only those in the folder of runs, not in other folders"
    )
    options = parser.parse_args(list(argv))
    from launcher.client.run import Run, ask_at_once, runs
    from launcher.client.tail import printable
    from launcher.lifecycle.run_dir import DEFAULT_FOLDER, everywhere

    this_folder = options.this_folder or Path(options.runs) != DEFAULT_FOLDER
    found = runs(options.runs) if this_folder else list(map(Run, everywhere()))
    ask_at_once(found)
    if options.json:
        print(json.dumps([_listed(run, run.status) for run in found]))
        return 0
    if not found:
        print(f"no runs in {options.runs}")
    for run in found:
        status = _listed(run, run.brief)
        if "error" in status:
            print(f"{printable(run.name):<32} unreadable: {printable(status['error'], 1000)}")
            continue
        line = f"{run.name:<32} {status['state']:<10} {status['backend']:<6} {_started(run)}  {_step(status):<12}"
        shown = "  ".join(f"{k} {v:.4f}" for k, v in status["evaluation"].items() if isinstance(v, float))
        folder = "" if run.path.parent == DEFAULT_FOLDER.resolve() else f"  in {run.path.parent}"
        print(printable(f"{line} {shown}".rstrip() + folder * (not this_folder), 1000))
    return 0


def _started(run: Run) -> str:
    with suppress(OSError, OverflowError, ValueError):  # removed just now, or the time is none of a calendar
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.dir.plan_file.lstat().st_mtime))
    return ""


def _step(status: Mapping[str, Any]) -> str:
    progress = status["progress"]
    return f"{progress.get('step')}/{progress['total_steps']}"[:40] if "total_steps" in progress else ""


def _listed(run: Run, read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `read` finds; a run that cannot be read does not hide the others."""
    try:
        return read()
    except LaunchError as error:
        return {"name": run.name, "state": State.UNKNOWN.value, "error": str(error)}


def run_status(argv: Sequence[str]) -> int:
    """``launch status RUN``."""
    options = command("status").parse_args(list(argv))
    from launcher.client.run import find
    from launcher.client.tail import printable, uncoloured
    from launcher.lifecycle.run_dir import reading

    run = find(options.run, Path(options.runs))
    if options.json:
        print(json.dumps(run.status()))
        return 0
    status = run.overview()
    for line in _status_lines(status):
        print(printable(line, 1000))
    if status["state"] in ("failed", "lost"):
        with reading(run.path):
            print(uncoloured(run.explain()))
    return 0


def _status_lines(status: Mapping[str, Any]) -> Iterator[str]:
    from launcher.cli.describe import failed_saves

    yield f"{status['name']}: {status['state']}"
    yield f"  target      {status['target']}"
    where = f"{status['backend']} ({status['cluster']}), job {status['job_id']}"
    yield f"  on          {where}: {status['placement']['why']}"
    if status["waits_for"]:
        yield f"  waits for   {status['waits_for']}"
    if commit := status["code"].get("commit"):
        yield f"  code        {str(commit)[:12]}{' and uncommitted changes' if status['code'].get('dirty') else ''}"
    yield f"  attempt     {status['attempt']}{_failures(status['failed_attempts'])}"
    if status["excluded_nodes"]:
        yield f"  nodes       excluded: {', '.join(status['excluded_nodes'])}"
    for title in ("progress", "evaluation", "metrics"):
        if status[title]:
            fields = (f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in status[title].items())
            yield f"  {title:<11} " + "  ".join(fields)
    for line in failed_saves(status):
        yield f"  saves       {line}"
    yield f"  run dir     {status['run_dir']}"


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
        from launcher.lifecycle.run_dir import reading

        try:
            with reading(run.path):
                follow(run, sys.stdout, options.rank or 0)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        return 0
    lines = run.logs(options.rank, options.attempt)
    if options.json:
        _print_list(lines)
        return 0
    from launcher.client.tail import safe_line

    for line in lines:
        print(safe_line(line))
    return 0


def _print_list(lines: Iterator[str]) -> None:
    """Print a JSON list, line by line: a log may be larger than the memory."""
    first = next(lines, None)  # raises before anything is printed
    print("[" if first is None else f"[{json.dumps(first)}", end="")
    for line in lines:
        print(f", {json.dumps(line)}", end="")
    print("]")


def run_cancel(argv: Sequence[str]) -> int:
    """``launch cancel RUN``."""
    parser = command("cancel", "It ends by itself within the cluster's grace, or is killed.")
    parser.add_argument("--now", action="store_true", help="kill it without a checkpoint")
    options = parser.parse_args(list(argv))
    from launcher.client.run import find
    from launcher.client.tail import printable

    run = find(options.run, Path(options.runs))
    state = run.kill() if options.now else run.cancel()
    text = json.dumps({"name": run.name, "state": state.value}) if options.json else f"{run.name}: {state.value}"
    print(printable(text))
    return 0
