"""``launch stacks``: where the ranks of a running run stand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.cli.parser import Once, command, whole


def run_stacks(argv: Sequence[str]) -> int:
    """``launch stacks RUN``."""
    parser = command("stacks", "The run goes on meanwhile, and nothing is written to its logs.")
    parser.add_argument("--rank", action=Once, type=whole, metavar="R", help="only this rank (default: all)")
    parser.add_argument("--threads", action="store_true", help="all threads, not only the main thread")
    parser.add_argument("--native", action="store_true", help="ask py-spy, which also shows native frames")
    options = parser.parse_args(list(argv))
    from launcher.client.inside.stacks import stacks
    from launcher.client.run import find
    from launcher.client.tail import printable

    try:
        found = stacks(find(options.run, Path(options.runs)), options.rank, options.native)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(found))
    else:
        for line in _lines(found["stacks"], options.threads):
            print(printable(line, 1000))
    for host, reason in found["missing"].items():
        print(printable(f"launch: {host}: {reason}", 1000), file=sys.stderr)
    return 1 if found["missing"] else 0


def _lines(stacks: Sequence[Mapping[str, Any]], threads: bool) -> Iterator[str]:
    from launcher.client.inside.stacks import ranges, summary

    yield summary(stacks)
    for each in stacks:
        yield ""
        many = len(each["ranks"]) > 1
        yield f"rank{'s' * many} {ranges(each['ranks'])}" + (f": {each['reason']}" if each.get("reason") else "")
        for thread in each["threads"] if threads else each["threads"][:1]:
            if threads:
                yield f"  thread {thread['name']}"
            yield from (f"  {frame['function']}  {frame['file']}:{frame['line']}" for frame in thread["frames"])
        more = len(each["threads"]) - 1
        if more > 0 and not threads:
            yield f"  and {more} other thread{'s' * (more > 1)} (--threads)"
