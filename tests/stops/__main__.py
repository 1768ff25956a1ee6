"""``python -m tests.stops [--engine local|slurm|ray] [--stop NAME]... [PROGRAM ...]``: the whole table of an engine."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.stops.engines import SOURCES, rows_of, started
from tests.stops.table import HEADER


def main() -> int:
    """Play the stops and print a line for each program; the exit status is 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="local", choices=list(SOURCES))
    parser.add_argument("--stop", action="append", help="only this kind; may be given more than once")
    parser.add_argument("programs", nargs="*", help="default: all")
    options = parser.parse_args()
    sources = [each for each in SOURCES[options.engine] if each.name in (options.stop or [each.name])]
    wrong = 0
    print(f"engine {options.engine}\n{HEADER}", flush=True)
    with started(options.engine) as cluster, tempfile.TemporaryDirectory(prefix="stops-") as scratch:
        for row in rows_of(options.engine, sources, Path(scratch), cluster, options.programs):
            problems = row.problems()
            wrong += bool(problems)
            print(row.text() + (f"  WRONG: {'; '.join(problems)}" if problems else ""), flush=True)
    print(f"{wrong} wrong")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
