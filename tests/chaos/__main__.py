"""``python -m tests.chaos``: inject faults into real runs, and print a table of the results."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from tests.chaos.engine import play, stop_politely
from tests.chaos.faults import FAULTS
from tests.chaos.kills import HEAD, TARGETS
from tests.chaos.kills import table as table_of_kills
from tests.chaos.report import Record, table

SHARES = {"local": 6, "slurm": 5, "ray": 4}
"""Share of the faults of each engine; of 200 faults, each fault of an engine occurs three times."""


def main() -> int:
    """Play the schedule of the seed on all engines in parallel; returns 1 if a run did not end as expected."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=main.__doc__)
    parser.add_argument("--backend", default=",".join(SHARES), help="local, slurm, ray, or several with commas between")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=60, help="on all backends together")
    parser.add_argument("--per-run", type=int, default=6, help="faults in each run")
    parser.add_argument("--only", action="append", default=[], help="a fault of the table, by name; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no fault after so many")
    parser.add_argument(
        "--record", type=Path, help="a file to add each finding to as it comes; the table is of all in it"
    )
    parser.add_argument("--kills", choices=sorted(TARGETS), help="kill ranks of this program by schedule instead")
    parser.add_argument("--schedules", type=int, default=50, help="with --kills")
    parser.add_argument("--first", type=int, default=0, help="number of the first schedule, with --kills")
    parser.add_argument("--changing", action="store_true", help="with --kills: another number of ranks at each restart")
    args = parser.parse_args()
    if args.kills:
        return kill(args)
    engines = args.backend.split(",")
    if unknown := [name for name in engines if name not in SHARES]:
        parser.error(f"--backend {unknown[0]}: the backends are {', '.join(SHARES)}")
    if wrong := [name for name in args.only if name not in {fault.name for fault in FAULTS}]:
        parser.error(f"--only {wrong[0]!r}: the faults are {', '.join(sorted({fault.name for fault in FAULTS}))}")
    stop_politely()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-record-") as name:
        record = Record((args.record or Path(name) / "record.jsonl").absolute())
        whole = sum(SHARES[engine] for engine in engines)
        context = multiprocessing.get_context("spawn")  # each engine needs its own environment
        players = [
            context.Process(
                target=play, args=(engine, round(args.faults * SHARES[engine] / whole), args, record, began)
            )
            for engine in engines
        ]
        try:
            for player in players:
                player.start()
            for player in players:
                player.join()
        finally:
            for player in players:
                player.terminate()
            for player in players:
                player.join()
            print(f"\npython -m tests.chaos {' '.join(sys.argv[1:])}\n{date.today()}, {os.cpu_count()} cores,", end=" ")
            print(f"load {os.getloadavg()[0]:.1f}, {(time.monotonic() - began) / 60:.0f} min\n\n{table(record)}")
        return 0 if record.well() and not any(player.exitcode for player in players) else 1


def kill(args: argparse.Namespace) -> int:
    """Play kill schedules; returns 1 if a run did not end as one that was never killed."""
    numbers = range(args.first, args.first + args.schedules)
    with tempfile.TemporaryDirectory(prefix="chaos-kills-") as name:
        lines, well = table_of_kills(Path(name), args.kills, args.seed, numbers, changing=args.changing)
    print(f"\npython -m tests.chaos {' '.join(sys.argv[1:])}\n{HEAD}\n{lines}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
