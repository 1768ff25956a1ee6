"""Profiles of ranks of a running run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from launcher.client.inside.target import inside
from launcher.client.inside.visitor import Session, Visitor, run_visit
from launcher.client.run import Run
from launcher.errors import BadRequest


def profile(run: Run, ranks: Sequence[int] = (0,), steps: int = 5, seconds: float = 5.0) -> list[dict[str, Any]]:
    """Profile `ranks` of a running run with torch's profiler.

    Args:
        steps: how many steps of a program with a Context.
        seconds: how long, for a program that reports no steps.

    Returns:
        For each rank its number (``rank``), the path of the Chrome trace (``trace``) and the costliest operations as text
        (``table``); ``error`` if it has no profile.

    Raises:
        BadRequest: the run does not run, belongs to somebody else, has no such rank, or no node answers.
    """
    if steps < 1 or not 0 < seconds <= 3600:
        raise BadRequest(
            f"a profile of {steps} steps and {seconds:g} s: at least one step, and at most an hour, is needed."
        )
    target = inside(run)
    for rank in ranks:
        target.of_rank(rank)
    wanted = sorted(set(ranks))
    fields = {"ranks": wanted, "steps": steps, "seconds": seconds}
    only = target.of_rank(ranks[0]) if len(wanted) == 1 else target

    async def collect() -> list[dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        async with Visitor(only, "profile") as visitor:
            answers = [asyncio.create_task(_collect(each, fields, found)) async for each in visitor.sessions()]
            await asyncio.gather(*answers)
        for rank in wanted:
            found.setdefault(rank, {"rank": rank, "error": "it ended before its profile"})
        return [found[rank] for rank in sorted(found)]

    return run_visit(collect())


async def _collect(session: Session, fields: dict[str, Any], found: dict[int, dict[str, Any]]) -> None:
    wanted = {rank for rank in session.ranks if rank in fields["ranks"]}
    if not wanted:
        return
    await session.line.send(**fields)
    while wanted - found.keys() and (answer := await session.line.receive_fields()) is not None:
        if (rank := answer.get("rank")) not in wanted:
            continue
        if "refused" in answer:
            found[rank] = {"rank": rank, "error": str(answer["refused"])}
        elif "error" in answer or "table" in answer:
            found[rank] = answer
