"""Errors of NVIDIA GPUs (Xid) in the kernel's log, if this user may read it."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

KMSG = Path("/dev/kmsg")
"""Each read returns one record, ``priority,number,microseconds since boot,flags;text`` (Documentation/ABI/testing/dev-kmsg)."""

MOST_RECORDS, MOST_SHOWN = 100_000, 4

XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]{1,20})\): (\d{1,4}),? ?(.*)")

OF_PROGRAMS = frozenset((13, 31, 43, 45, 68))
"""Xids that a program causes by itself (https://docs.nvidia.com/deploy/xid-errors)."""


def xid_errors(source: Path = KMSG) -> list[str]:
    """Return a sentence for the newest errors of GPUs that no program causes; empty if the log cannot be read."""
    newest: dict[tuple[str, int], str] = {}
    for seconds, text in _records(source):
        if (found := XID.search(text)) and int(found[2]) not in OF_PROGRAMS:
            minutes = max(0.0, time.monotonic() - seconds) / 60
            key = found[1], int(found[2])
            newest.pop(key, None)
            newest[key] = f"GPU at PCI {found[1]} had Xid {found[2]} {minutes:.0f} min ago: {found[3].strip()[:120]}"
    return list(newest.values())[-MOST_SHOWN:]


def _records(source: Path) -> list[tuple[float, str]]:
    """Return the time in seconds since boot and the text of the records that are there."""
    found: list[tuple[float, str]] = []
    with suppress(OSError):
        handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for _ in range(MOST_RECORDS):
                try:
                    record = os.read(handle, 8192)
                except BrokenPipeError:  # records were overwritten meanwhile
                    continue
                if not record:
                    break
                for line in record.decode(errors="replace").splitlines():  # a file has many lines
                    fields, _, text = line.partition(";")
                    moment = fields.split(",")[2:3]
                    if moment and moment[0].isdigit():
                        found.append((int(moment[0]) / 1e6, text))
        except BlockingIOError:  # the end of the log
            pass
        finally:
            os.close(handle)
    return found
