"""``launch status`` and ``launch logs``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.cli.parser import Once, command, whole
from launcher.cli.sent.unnamed import named_or_newest
from launcher.errors import BadRequest


def run_status(argv: Sequence[str]) -> int:
    """``launch status [RUN]``."""
    options = command("status", nargs="?", left_out="the newest of all your runs").parse_args(list(argv))
    from launcher.client.tail import printable, uncoloured
    from launcher.lifecycle.run_dir import reading

    run = named_or_newest(options)
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
    """``launch logs [RUN]``."""
    parser = command("logs", nargs="?", left_out="the newest of all your runs")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--rank", action=Once, type=whole, metavar="R", help="only this rank (default: all; 0 with -f)")
    parser.add_argument(
        "--attempt", action=Once, type=whole, metavar="N", help="an earlier attempt (default: the newest)"
    )
    options = parser.parse_args(list(argv))

    run = named_or_newest(options)
    if options.run is None and not options.json:
        from launcher.client.tail import printable

        print(f"launch: the newest run, {printable(run.name)} in {printable(run.path.parent)}", file=sys.stderr)
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
