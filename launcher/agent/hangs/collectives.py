"""Find the rank that did not enter a collective, from what torch's flight recorders have of all ranks."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from training.distributed.hangs.collectives import is_done
from training.files import read_json, read_plain

MOST_GROUPS, MOST_PENDING, MOST_RUNS, MOST_RANKS, LONGEST_TEXT = 16, 2, 32, 1 << 20, 80
"""Bounds of the report of one rank: its groups; unfinished collectives, runs of ranks and ranks of a group; characters of a
text."""

SAME_SIZES = frozenset(
    ("all_reduce", "allreduce_coalesced", "broadcast", "reduce", "_all_gather_base", "_reduce_scatter_base")
)
"""Collectives whose tensors have the same sizes on all ranks."""


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


# ---- the record of one rank -------------------------------------------------------------------------------------------


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


# ---- all ranks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stuck:
    """The first collective of a process group that does not end.

    Attributes:
        entered: what each rank that waits in it has entered.
        missing: ranks of the group that have not entered it.
        silent: ranks of the group without a record.
        ended: ranks of the group that have ended.
        done: ranks on which it has ended.
    """

    title: str
    number: int
    entered: Mapping[int, Entered]
    missing: Sequence[int]
    silent: Sequence[int]
    ended: Sequence[int]
    done: Sequence[int]

    def __str__(self) -> str:
        operation = Counter(each.operation for each in self.entered.values()).most_common(1)[0][0]
        return f"{operation} #{self.number:,} ({self.title})"

    @property
    def waits(self) -> str:
        """The ranks that wait, as the subject of a sentence."""
        return f"{ranks_text(self.entered)} {'waits' if len(self.entered) == 1 else 'wait'}"


def find_absent(
    records: Mapping[int, Sequence[GroupRecord] | None], ranks: Iterable[int], busy: Iterable[int] = ()
) -> tuple[int | None, str] | None:
    """Find the rank that others wait for in a collective, and describe it; None if the records do not say.

    Args:
        records: what each rank reported; None or absent: nothing.
        ranks: the ranks of the run that are alive.
        busy: ranks whose main thread is not in a collective; if ranks wait for each other, and only some of them are
            busy, these are at fault.
    """
    known = {rank: record for rank, record in records.items() if record is not None}
    stuck = find_stuck(known, set(ranks))
    for each in stuck:
        if found := _disagreement(each):
            return found
    exchanges = {rank: found for rank, groups in known.items() if (found := [e for g in groups for e in g.exchanges])}
    waiting = {rank for each in stuck if each.missing or each.silent for rank in each.entered} | exchanges.keys()
    absent = {rank for each in stuck for rank in each.missing}
    blamed = absent - waiting or (absent & {*busy} if absent - {*busy} else set())
    for each in stuck:
        if own := sorted(blamed & {*each.missing}):
            text = f"{ranks_text(own)} did not enter {each}, which {each.waits} in"
            return (own[0] if len(own) == 1 else None), text
    for each in stuck:
        if each.ended:
            text = f"{ranks_text(each.ended)} ended without {each}, which {each.waits} in"
            return (each.ended[0] if len(each.ended) == 1 else None), text
    if exchanges and (found := _without_peer(exchanges, waiting, set(ranks))):
        return found
    if absent or exchanges:
        pairs = [f"{each.waits} in {each} for {ranks_text(each.missing)}" for each in stuck if each.missing]
        pairs += [f"rank {rank} waits in {found[0]}" for rank, found in sorted(exchanges.items())]
        more = f"; and {len(pairs) - 4} more" if len(pairs) > 4 else ""
        return None, "the ranks wait for each other: " + "; ".join(pairs[:4]) + more
    for each in stuck:
        if each.silent:
            text = f"{ranks_text(each.silent)} left no record of collectives; {each.waits} in {each}"
            return (each.silent[0] if len(each.silent) == 1 else None), text
    for each in stuck:
        ended = f"; it ended on {ranks_text(each.done)}" if each.done else ""
        return None, f"{each.waits} in {each}, which all ranks of the group entered and which does not end{ended}"
    return None


def _without_peer(
    exchanges: Mapping[int, Sequence[Exchange]], waiting: Collection[int], ranks: set[int]
) -> tuple[int | None, str] | None:
    """Return the rank that others wait for in a send or receive, and that waits for nothing itself."""
    for rank, pending in sorted(exchanges.items()):
        for each in pending:
            if each.peer in waiting:
                continue
            own = "receive" if each.operation == "send" else "send"
            did = f"rank {each.peer} " + ("does not" if each.peer in ranks else "ended and did not") + f" {own}"
            return each.peer, f"{did}: rank {rank} waits in {each}"
    return None


def find_stuck(records: Mapping[int, Sequence[GroupRecord]], ranks: set[int]) -> list[Stuck]:
    """Return the first unfinished collective of each process group that has one."""
    groups: dict[str, dict[int, GroupRecord]] = {}
    for rank, record in sorted(records.items()):
        for group in record:
            groups.setdefault(group.name, {})[rank] = group
    found = []
    for of_rank in groups.values():
        pending = [each.number for group in of_rank.values() for each in group.pending]
        if not pending:
            continue
        first = min(pending)
        entered = {r: each for r, group in of_rank.items() for each in group.pending if each.number == first}
        runs = next((group.members for group in of_rank.values() if group.members), [])
        members = {r for begin, end, stride in runs for r in range(begin, end + 1, stride or 1)} | {*of_rank}
        reached = {r for r, group in of_rank.items() if group.last >= first}
        missing, silent = (members & {*records}) - reached, (members - {*records}) & ranks
        ended, done = members - {*records} - ranks, reached - {*entered}
        title = next(iter(of_rank.values())).title
        found.append(Stuck(title, first, entered, *map(sorted, (missing, silent, ended, done))))
    return found


def _disagreement(stuck: Stuck) -> tuple[int | None, str] | None:
    """Return the rank that entered another collective than the others, or one with other sizes."""
    kinds: dict[str, list[int]] = {}
    for rank, each in stuck.entered.items():
        sizes = f" of sizes {each.sizes}" if each.operation in SAME_SIZES and each.sizes else ""
        kinds.setdefault(f"{each.operation}{sizes}", []).append(rank)
    if len(kinds) < 2:
        return None
    most = max(len(ranks) for ranks in kinds.values())
    others = [rank for ranks in kinds.values() if len(ranks) < most for rank in ranks]
    fields = "; ".join(f"{ranks_text(ranks)} entered {kind}" for kind, ranks in list(kinds.items())[:4])
    text = f"the ranks disagree on collective #{stuck.number:,} ({stuck.title}): {fields}"
    return (others[0] if len(others) == 1 else None), text


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks in words, such as ``ranks 0-2 and 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    texts = [*texts[:8], f"{len(texts) - 8} more"] if len(texts) > 9 else texts
    joined = " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
    return f"rank {joined}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {joined}"
