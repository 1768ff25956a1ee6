"""Parts of lines about runs, and questions on the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.client.run import Run


def started(run: Run) -> str:
    """Return when a run was sent, by the calendar; empty if that is unknown."""
    with suppress(OSError, OverflowError, ValueError):  # removed just now, or the time is none of a calendar
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.dir.plan_file.lstat().st_mtime))
    return ""


def in_bytes(number: int) -> str:
    """``512 B``, ``1.5 MB``, ``273 GB``: in powers of 1000, as disks are sold and `df -H` writes."""
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def at_terminal(options: argparse.Namespace) -> bool:
    """Return whether there is somebody to ask."""
    return not options.json and sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def asked(question: str) -> str:
    """Ask on the terminal; return the answer, empty after Ctrl-C or Ctrl-D."""
    print(question, end="", file=sys.stderr, flush=True)
    try:
        answer = sys.stdin.readline()
    except KeyboardInterrupt:
        answer = ""
    if not answer.endswith("\n"):
        print(file=sys.stderr)
    return answer.rstrip("\n")
