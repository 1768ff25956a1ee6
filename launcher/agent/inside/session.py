"""A session: connects to the client and does on this node what it asks for.

``python -m launcher.agent.inside.session`` is a child of the agent, which gives it a `SessionStart` on its standard input and keeps
that open: its end is the end of the agent or of its ranks, and ends the session with all that it started.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.agent.inside import commands, ranks, stacks
from launcher.agent.inside.line import Line, introduce
from launcher.agent.inside.start import SessionStart
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.records import visits
from launcher.lifecycle.records.visits import VisitRequest
from launcher.lifecycle.run_dir import RunDir
from launcher.rank.forkserver import PR_SET_CHILD_SUBREAPER, kill_orphans, prctl
from launcher.rank.messages import decode

MAX_START = 64 << 20

Serve = Callable[[Line, SessionStart, dict[str, Any]], Awaitable[None]]

SERVED: dict[str, Serve] = {
    "stacks": stacks.serve,
    "command": commands.serve_command,
    "shell": commands.serve_shell,
    "debug": ranks.serve_debug,
    "profile": ranks.serve_profile,
}
"""What serves each kind of request, with the first message of the client."""


async def connect(request: VisitRequest) -> Line:
    """Return the connection to the client. Its addresses are tried `Timeouts.visit_next` apart.

    Raises:
        ConnectionError: none of them leads to it; the reason of each is named.
    """
    addresses, reasons = list(request.addresses), []
    dialling: dict[asyncio.Task[Line], str] = {}
    introducing = asyncio.Lock()  # one at a time: the others are cancelled once the client has admitted one
    try:
        while addresses or dialling:
            if addresses:
                address = addresses.pop(0)
                dialling[asyncio.create_task(_dial(address, request, introducing))] = address
            seconds = TIMEOUTS.visit_next if addresses else None
            done, _ = await asyncio.wait(dialling, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                address = dialling.pop(task)
                if (error := task.exception()) is None:
                    return task.result()
                number = getattr(error, "errno", None)
                reasons.append(f"{address}: {os.strerror(number) if number else str(error) or 'no answer'}")
    finally:
        for task in dialling:
            task.cancel()
    raise ConnectionError(f"port {request.port} of the client cannot be reached ({'; '.join(reasons)})")


async def _dial(address: str, request: VisitRequest, introducing: asyncio.Lock) -> Line:
    async with asyncio.timeout(TIMEOUTS.visit_connect):
        reader, writer = await asyncio.open_connection(address, request.port)
        try:
            async with introducing:
                return await introduce(reader, writer, bytes.fromhex(request.key))
        except asyncio.IncompleteReadError:
            raise ConnectionError("the connection was closed") from None
        except BaseException:
            writer.close()
            raise


async def run() -> None:
    """Be a session until the client, the run or what it asked for ends."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        loop.add_signal_handler(number, lambda: None)  # the agent decides; children have the default
    control = asyncio.StreamReader(limit=MAX_START)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(control), sys.stdin)
    start: SessionStart = decode(SessionStart, await control.readline())
    try:
        line = await connect(start.request)
    except OSError as error:
        visits.leave_failure(RunDir(Path(start.run_dir)).visits, start.id, start.node, str(error))
        print(f"launch: {start.request.kind}: {error}", file=sys.stderr)
        return
    serving = asyncio.create_task(_serve(line, start))
    ending = asyncio.create_task(control.read())
    try:
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            serving.cancel()
            await asyncio.wait({serving})
            with suppress(OSError):
                await line.send(ended="the ranks of the node have ended, and with them the run or this attempt")
        elif (problem := serving.exception()) is not None and not isinstance(problem, ConnectionError):
            await line.send(error=f"{type(problem).__name__}: {problem}")
            raise problem
    finally:
        kill_orphans(set())
        await line.close()


async def _serve(line: Line, start: SessionStart) -> None:
    own = [each.rank for each in start.ranks]
    await line.send(node=start.node, host=start.host, attempt=start.attempt, ranks=own)
    if (fields := await line.receive_fields()) is not None:
        await SERVED[start.request.kind](line, start, fields)


def main() -> None:
    """``python -m launcher.agent.inside.session``."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))  # Ray blocks it in all that its nodes start
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # SLURM sends it to every process of a step, and it is for the agent
    asyncio.run(run())
    os._exit(0)


if __name__ == "__main__":
    main()
