"""Find what made ranks abort, with the help of what NCCL's watchdogs write at a timeout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.agent.hangs.collectives import find_absent
from launcher.agent.hangs.records import read_nccl_dump
from launcher.lifecycle.recovery import abort_causes
from launcher.lifecycle.run_dir import RunDir


def causes_of_aborts(
    run_dir: RunDir, attempt: int, ranks: Iterable[int], exits: Mapping[int, int]
) -> dict[int, tuple[str, str]]:
    """Return the kind and the message of what made ranks abort, as `abort_causes` does.

    At a timeout NCCL's watchdogs write what they recorded: if these dumps name the rank that did not enter a collective,
    the message does, too. `ranks` are those of the run.
    """
    causes = abort_causes(run_dir, attempt, exits)
    if all(kind != "communication" for kind, _ in causes.values()):
        return causes
    prefix = run_dir.nccl_dump(attempt)
    names = re.compile(re.escape(prefix.name) + "([0-9]{1,7})")
    try:
        written = sorted(int(found[1]) for name in os.listdir(prefix.parent) if (found := names.fullmatch(name)))
    except OSError:
        return causes
    absent = find_absent({rank: read_nccl_dump(Path(f"{prefix}{rank}")) for rank in written}, ranks)
    if absent is None:
        return causes
    return {
        rank: (kind, f"{text}; {absent[1]}" if kind == "communication" else text)
        for rank, (kind, text) in causes.items()
    }
