"""Collect what the ranks of a node leave when they hang: the locations of their threads and their collectives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from launcher.agent.hangs.detection import StackLocation, stack_location_of
from launcher.agent.hangs.records import GroupRecord, read_record
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir


async def stack_locations(
    run_dir: RunDir, attempt: int, ranks: Iterable[int], ask: Callable[[list[int]], None]
) -> dict[int, StackLocation]:
    """Return the locations of `ranks`, which write their stacks into their logs if they are asked (`ask`)."""
    logs = {rank: run_dir.log(attempt, rank) for rank in sorted(ranks)}
    sizes = {rank: log.stat().st_size for rank, log in logs.items() if log.exists()}
    ask(sorted(logs))
    await asyncio.sleep(TIMEOUTS.stack_dump)
    found = {}
    for rank, size in sizes.items():
        with logs[rank].open("rb") as log:
            log.seek(size)
            found[rank] = stack_location_of(log.read(1 << 20).decode(errors="replace"))
    return found


async def records(
    run_dir: RunDir, attempt: int, ranks: Iterable[int], running: set[int]
) -> AsyncIterator[tuple[int, list[GroupRecord] | None]]:
    """Yield the collectives of each of `ranks` as soon as it has written them; None if it writes none in time.

    `running` are the ranks that run, at any time; the others are left out.
    """
    left, deadline = {*ranks}, asyncio.get_running_loop().time() + TIMEOUTS.collectives
    while left := left & running:
        late = asyncio.get_running_loop().time() > deadline
        for rank in sorted(left):
            path = run_dir.collectives(attempt, rank)
            if late or path.exists():
                left.discard(rank)
                yield rank, await asyncio.to_thread(read_record, path)
        await asyncio.sleep(0.1)
