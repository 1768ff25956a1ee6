"""What torch's flight recorders have of one rank: collectives, and sends and receives, that it has entered."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.distributed.hangs.collectives import is_done
from training.files import read_json, read_plain

MOST_GROUPS, MOST_PENDING, MOST_RUNS, MOST_RANKS, LONGEST_TEXT = 16, 2, 32, 1 << 20, 80
"""Bounds of the report of one rank: its groups; unfinished collectives, runs of ranks and ranks of a group; characters of a
text."""

DIRECTIONS = {"send": "to", "recv": "from"}

EXCHANGE = re.compile(r"\w+:(send|recv) [0-9]{1,7}(?:->|<-)([0-9]{1,7})")
"""The name of a send or receive, with the numbers of both ranks in the group: ``nccl:send 1->2``, ``nccl:recv 3<-0``."""


@dataclass(frozen=True)
class Entered:
    """A collective that a rank has entered: its number in the group, its name, and the sizes of its input tensors."""

    number: int
    operation: str
    sizes: str


@dataclass(frozen=True)
class Exchange:
    """A send to the rank `peer`, or a receive (``recv``) from it, that has not ended."""

    operation: str
    peer: int

    def __post_init__(self) -> None:
        if self.operation not in DIRECTIONS or not 0 <= self.peer < MOST_RANKS:
            raise ValueError(f"no exchange of two ranks: {self}")

    def __str__(self) -> str:
        return f"{self.operation} {DIRECTIONS[self.operation]} rank {self.peer}"


@dataclass(frozen=True)
class GroupRecord:
    """The collectives of one rank in one process group.

    Attributes:
        name: the backend and torch's name of the group, the same on all ranks.
        title: the group for people.
        members: the ranks of the group as runs (first, last, stride); empty: not known.
        last: the number of the newest collective that the rank entered.
        pending: the first collectives that have not ended on this rank.
        exchanges: sends and receives that have not ended on this rank, the first ones.
    """

    name: str
    title: str
    members: list[list[int]]
    last: int
    pending: list[Entered] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)

    def __post_init__(self) -> None:
        runs = self.members
        if len(runs) > MOST_RUNS or not all(len(run) == 3 and 0 <= run[0] <= run[1] < MOST_RANKS for run in runs):
            raise ValueError(f"{len(runs)} runs that are none of ranks below {MOST_RANKS}")


def read_record(path: Path) -> list[GroupRecord] | None:
    """Read what a rank wrote (`training.distributed.hangs.collectives.dump`); None if there is none, or it cannot be read.

    What has another form than torch's is left out, since the file may hold anything.
    """
    try:
        data = read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
    match data:
        case {"groups": dict(members), "traces": dict(traces)}:
            found = [_groups(str(backend), trace, members) for backend, trace in traces.items()]
            return [group for groups in found for group in groups][:MOST_GROUPS]
    return None


DUMP_BYTES = 64 << 20
"""The largest dump of NCCL that is read; 2,000 collectives with their stacks take about a tenth."""

BROKEN = (
    *(
        OSError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ),
    pickle.PickleError,
)
"""What `pickle` raises for data that is none, or whose end is missing."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, texts and numbers only."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def read_nccl_dump(path: Path) -> list[GroupRecord] | None:
    """Read what NCCL's watchdog wrote at a timeout, a pickle of plain data; None as in `read_record`."""
    try:
        trace = _PlainUnpickler(io.BytesIO(read_plain(path, DUMP_BYTES))).load()
        found = trace.get("pg_config") if isinstance(trace, dict) else None
        groups = found.items() if isinstance(found, dict) else ()
        members = {name: json.loads(group["ranks"]) for name, group in groups}
    except BROKEN:
        return None
    return _groups("nccl", trace, members) if isinstance(trace, dict) else None


def _groups(backend: str, trace: Any, members: Mapping[str, Any]) -> list[GroupRecord]:
    entries = trace.get("entries") if isinstance(trace, dict) else None
    found: dict[str, GroupRecord] = {}
    for entry in entries if isinstance(entries, list) else ():
        match entry:
            case {
                "process_group": [str(name), str(title), *_],
                "collective_seq_id": int(number),
                "profiling_name": str(operation),
                "is_p2p": bool(alone),
            } if alone or 0 < number < 1 << 63:
                pass
            case _:
                continue
        waits = not is_done(backend, entry)
        exchange = _exchange(operation, members.get(name)) if alone and waits else None
        if alone and exchange is None:
            continue
        if name not in found:
            runs = runs_of(members.get(name))
            found[name] = GroupRecord(_clip(f"{backend} {name}"), _title(backend, name, title), runs, 0)
        group = found[name]
        if exchange is not None:
            found[name] = replace(group, exchanges=[*group.exchanges, exchange][:MOST_PENDING])
            continue
        if waits and number not in {each.number for each in group.pending}:
            sizes = _clip(str(entry.get("input_sizes", "")))
            pending = [*group.pending, Entered(number, _clip(operation.rpartition(":")[2]), sizes)]
            group = replace(group, pending=_first(pending))
        found[name] = replace(group, last=max(group.last, number))
    return sorted(found.values(), key=lambda group: (not (group.pending or group.exchanges), -group.last))[:MOST_GROUPS]


def _exchange(operation: str, members: object) -> Exchange | None:
    """The exchange that is called `operation` in a group of the ranks `members`; None if its peer is not known."""
    match = EXCHANGE.match(operation)
    if match is None or not isinstance(members, list) or int(match[2]) >= len(members):
        return None
    peer = members[int(match[2])]
    return Exchange(match[1], peer) if type(peer) is int and 0 <= peer < MOST_RANKS else None


def _first(pending: list[Entered]) -> list[Entered]:
    return sorted(pending, key=lambda each: each.number)[:MOST_PENDING]


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."


def _title(backend: str, name: str, title: str) -> str:
    known = [name, *([title] if title not in ("", "undefined", name) else []), backend]
    return _clip(f"process group {', '.join(known)}")


def runs_of(ranks: object) -> list[list[int]]:
    """Return ascending `ranks` as runs (first, last, stride); empty if they are too many runs, or no ranks."""
    runs: list[list[int]] = []
    for rank in ranks if isinstance(ranks, list) else ():
        if not isinstance(rank, int) or not (runs[-1][1] if runs else -1) < rank < MOST_RANKS:
            return []
        if runs and rank == runs[-1][1] + (runs[-1][2] or rank - runs[-1][0]):
            runs[-1][1], runs[-1][2] = rank, runs[-1][2] or rank - runs[-1][0]
        else:
            runs.append([rank, rank, 0])
    return runs if len(runs) <= MOST_RUNS else []


def spans(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last of each run of numbers that follow each other."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [(first, last) for first, last in found]
