"""Find the rank that did not enter a collective, from what torch's flight recorders have of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from launcher.agent.hangs.records import Entered, Exchange, GroupRecord, spans

SAME_SIZES = frozenset(
    ("all_reduce", "allreduce_coalesced", "broadcast", "reduce", "_all_gather_base", "_reduce_scatter_base")
)
"""Collectives whose tensors have the same sizes on all ranks."""


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
    exchanges = {rank: [each for group in groups for each in group.exchanges] for rank, groups in known.items()}
    exchanges = {rank: each for rank, each in exchanges.items() if each}
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
        pairs += [f"rank {rank} waits in {each[0]}" for rank, each in sorted(exchanges.items())]
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
    runs = spans(ranks)
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    texts = [*texts[:8], f"{len(texts) - 8} more"] if len(texts) > 9 else texts
    joined = " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
    return f"rank {joined}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {joined}"
