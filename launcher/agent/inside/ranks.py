"""Debuggers and profilers in the ranks of a node: what they say goes to the client, and its answers to them.

A rank connects to the session, at a signal or at a breakpoint (`launcher.rank.inside.visit`). Its messages are passed on with its number
as ``rank``, and answers name it, too.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.agent.inside.line import Line
from launcher.agent.inside.start import SessionStart, VisitedRank
from launcher.agent.processes import catches, start_time
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.inside.visit import LONGEST, VISIT_SIGNAL, Kind, address_of, is_own


class Ranks:
    """The connections of a session to ranks of its node, for visits of one kind; `seen` is called with what they say."""

    def __init__(
        self,
        line: Line,
        kind: Kind,
        asked: Mapping[str, Any],
        seen: Callable[[VisitedRank, dict[str, Any]], None] | None = None,
    ) -> None:
        self.line, self.kind, self.asked, self.seen = line, kind, asked, seen
        self._writers: dict[int, asyncio.StreamWriter] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []

    async def listen(self, rank: VisitedRank) -> bool:
        """Wait for `rank` to connect from now on; False, with a message to the client, if another session does."""

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if not is_own(writer.get_extra_info("socket")):
                writer.transport.abort()
                return
            writer.write(json.dumps(self.asked).encode() + b"\n")
            self._writers[rank.rank] = writer
            try:
                while raw := await reader.readline():
                    message = json.loads(raw) | {"rank": rank.rank}
                    if self.seen is not None:
                        self.seen(rank, message)
                    await self.line.send(**message)
            except (OSError, ValueError):
                pass
            finally:
                self._writers.pop(rank.rank, None)
                writer.close()

        try:
            server = await asyncio.start_unix_server(connected, path=address_of(rank.pid, self.kind), limit=LONGEST)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            await self.line.send(rank=rank.rank, refused=f"is in the hands of another `launch {self.kind}`")
            return False
        self._servers.append(server)
        return True

    async def signal(self, rank: VisitedRank) -> None:
        """Ask `rank` to connect, and report to the client if it does not soon."""
        _ask(rank)
        task = asyncio.create_task(self._report_if_late(rank))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report_if_late(self, rank: VisitedRank) -> None:
        await asyncio.sleep(TIMEOUTS.rank_answers)
        if rank.rank not in self._writers and start_time(rank.pid) == rank.started:
            with suppress(OSError):
                await self.line.send(rank=rank.rank, late=True)

    def answer(self, fields: Mapping[str, Any]) -> None:
        """Pass the client's answer on to the rank that it names."""
        writer = self._writers.get(fields.get("rank", -1))
        if writer is not None:
            writer.write(json.dumps({"line": str(fields.get("line", ""))}).encode() + b"\n")

    def close(self) -> None:
        """End all connections: a program in a debugger goes on."""
        for server in self._servers:
            server.close()
        for writer in self._writers.values():
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()


async def serve_debug(line: Line, start: SessionStart, fields: dict[str, Any]) -> None:
    """Connect the debuggers of ranks with the client: at once (``interrupt`` in `fields`), or at their next breakpoint."""
    interrupt = bool(fields.get("interrupt"))
    ranks = Ranks(line, "debug" if interrupt else "breakpoint", {})
    try:
        for rank in await _usable(line, start, fields):
            if await ranks.listen(rank) and interrupt:
                await ranks.signal(rank)
        while (answer := await line.receive_fields()) is not None:
            ranks.answer(answer)
    finally:
        ranks.close()


async def serve_profile(line: Line, start: SessionStart, fields: dict[str, Any]) -> None:
    """Have ranks profile themselves for ``steps`` of `fields`, and send what each of them says about it.

    A program that reports no steps is asked a second time after ``seconds`` of `fields`, which ends its profile.
    """
    run_dir, seconds = RunDir(Path(start.run_dir)), float(fields["seconds"])
    loop = asyncio.get_running_loop()

    def seen(rank: VisitedRank, message: dict[str, Any]) -> None:
        if message.get("steps") is False:
            loop.call_later(seconds, _ask, rank)

    opened: list[Ranks] = []
    try:
        for rank in await _usable(line, start, fields):
            trace = run_dir.profile(start.attempt, rank.rank, start.id[:8])
            trace.parent.mkdir(mode=0o700, exist_ok=True)
            asked = {"trace": str(trace), "steps": int(fields["steps"])}
            opened.append(Ranks(line, "profile", asked, seen))
            if await opened[-1].listen(rank):
                await opened[-1].signal(rank)
        while await line.receive_fields() is not None:
            pass
    finally:
        for each in opened:
            each.close()


def _ask(rank: VisitedRank) -> None:
    if start_time(rank.pid) == rank.started:
        os.kill(rank.pid, VISIT_SIGNAL)


async def _listens(pid: int) -> bool:
    """Whether a rank acts on the signal, which one that is starting will soon."""
    deadline = asyncio.get_running_loop().time() + TIMEOUTS.rank_answers
    while not (found := _catches(pid)) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    return found


def _catches(pid: int) -> bool:
    try:
        return catches(pid, VISIT_SIGNAL)
    except OSError:  # it has ended
        return False


async def _usable(line: Line, start: SessionStart, fields: Mapping[str, Any]) -> list[VisitedRank]:
    """The ranks that the client asks for and that act on the signal; the client receives the reason for each of the others."""
    wanted = fields.get("ranks")
    found = []
    for rank in start.ranks:
        if isinstance(wanted, list) and rank.rank not in wanted:
            continue
        reason = ""
        if not rank.pid or start_time(rank.pid) != rank.started:
            reason = "does not run"
        elif start.command:
            reason = f"runs the command {start.command}, which is no Python program of launch"
        elif not await _listens(rank.pid):
            reason = "is starting, or has replaced the handler of the signal"
        if reason:
            await line.send(rank=rank.rank, refused=reason)
        else:
            found.append(rank)
    return found
