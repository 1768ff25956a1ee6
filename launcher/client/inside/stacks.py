"""The Python stacks of the ranks of a running run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.agent.hangs.records import spans
from launcher.agent.inside.stacks import joined
from launcher.client.inside.target import Target, inside
from launcher.client.inside.visitor import Session, Visitor, run_visit
from launcher.client.run import Run
from launcher.config.timeouts import TIMEOUTS


def stacks(run: Run, rank: int | None = None, native: bool = False) -> dict[str, Any]:
    """Return the Python stacks of one `rank` of a running run, or of all.

    ``stacks`` has an entry for ranks at the same calls: their numbers (``ranks``), ``where`` they are, ``threads`` (the main
    thread first; ``frames`` from the innermost call), and ``reason`` if there are none. ``missing`` has the nodes that did not
    answer, with the reason. With `native` py-spy is asked, which shows the frames of native code, too.

    Raises:
        BadRequest: the run does not run, belongs to somebody else, has no such rank, or no node answers.
    """
    target = inside(run) if rank is None else inside(run).of_rank(rank)
    return run_visit(_collect(target, native))


async def _collect(target: Target, native: bool) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    async with Visitor(target, "stacks") as visitor:
        answers = [asyncio.create_task(_ask(session, native)) async for session in visitor.sessions()]
        missing = dict(visitor.missing)
        for session, stacks in await asyncio.gather(*answers):
            if stacks is None:
                missing[session.host] = "its session ended without an answer"
            found += stacks or ()
    return {"stacks": merged(found), "missing": missing}


async def _ask(session: Session, native: bool) -> tuple[Session, list[dict[str, Any]] | None]:
    try:
        async with asyncio.timeout(TIMEOUTS.stack_answer + TIMEOUTS.py_spy + TIMEOUTS.hello):
            await session.line.send(native=native)
            answer = await session.line.receive_fields() or {}
    except (TimeoutError, OSError):
        answer = {}
    stacks = answer.get("stacks")
    return session, stacks if isinstance(stacks, list) else None


def merged(stacks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the entries of several nodes that have the same stacks; the one with most ranks comes first."""
    return sorted(joined(stacks), key=lambda group: (-len(group["ranks"]), group["ranks"]))


def summary(stacks: Sequence[Mapping[str, Any]]) -> str:
    """Return one line: ``62 ranks in all_reduce train.py:88; rank 9 in load data.py:41``."""
    places: dict[str, list[int]] = {}
    for each in stacks:
        place = f"in {each['where']}" if each["where"] else str(each.get("reason") or "without Python frames")
        places.setdefault(place, []).extend(each["ranks"])
    parts = sorted(places.items(), key=lambda part: (-len(part[1]), part[1]))
    return "; ".join(
        f"{f'rank {ranks[0]}' if len(ranks) == 1 else f'{len(ranks)} ranks'} {place}" for place, ranks in parts
    )


def ranges(ranks: Iterable[int]) -> str:
    """Return numbers as text: ``0-3, 7``."""
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in spans(ranks))
