"""The terminal of debuggers in ranks: ``launch debug`` and ``launch --debug``."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from launcher.client.inside.target import Target, inside
from launcher.client.inside.visitor import Session, Visitor
from launcher.client.run import Run
from launcher.client.screen import Screen
from launcher.client.tail import printable
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest, LaunchError

LEAVE = "`q` leaves the debugger and lets the rank go on"

Ask = Callable[[str], str]


class Debugging:
    """Debuggers of ranks, which use one terminal in turn: what they print, and the lines that they ask for.

    The connections live in a thread; `serve` is called by the thread of the terminal.

    Args:
        ranks: which ranks; None: all.
        interrupt: stop them at their next line, rather than at their next breakpoint.

    Attributes:
        over: the session has ended, or all of `ranks` go on without a debugger.
    """

    def __init__(
        self, target: Target, ranks: Sequence[int] | None, interrupt: bool, screen: Screen, ask: Ask = input
    ) -> None:
        self.target, self.ranks, self.interrupt = target, ranks, interrupt
        self.screen, self.ask = screen, ask
        self.left = set(ranks or ()) if interrupt else set[int]()
        self.over = False
        self.problem: LaunchError | None = None
        self._inbox: queue.Queue[tuple[Session | None, dict[str, Any]]] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="debug", daemon=True)
        self._thread.start()

    # ---- the thread of the connections -----------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._visiting = self._loop.create_task(self._visit())
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._visiting)
        self._loop.close()
        self._inbox.put((None, {}))

    async def _visit(self) -> None:
        try:
            async with Visitor(self.target, "debug") as visitor:
                serving = [asyncio.create_task(self._receive(session)) async for session in visitor.sessions()]
                await asyncio.gather(*serving)
        except LaunchError as error:
            self.problem = error

    async def _receive(self, session: Session) -> None:
        with suppress(OSError):
            await session.line.send(ranks=None if self.ranks is None else list(self.ranks), interrupt=self.interrupt)
            while (fields := await session.line.receive_fields()) is not None:
                self._inbox.put((session, fields))

    def _answer(self, session: Session, rank: int, line: str) -> None:
        async def send() -> None:
            with suppress(OSError):
                await session.line.send(rank=rank, line=line)

        with suppress(RuntimeError):  # the loop has ended
            asyncio.run_coroutine_threadsafe(send(), self._loop)

    # ---- the thread of the terminal -----------------------------------------------------------------------------------------

    def serve(self, seconds: float) -> None:
        """Print and ask for what the debuggers send, waiting for the first of it for `seconds` at most.

        Raises:
            LaunchError: no debugger can be reached, or a rank has none.
        """
        try:
            message = self._inbox.get(timeout=seconds)
        except queue.Empty:
            return
        while True:
            self._act(*message)
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return

    def _act(self, session: Session | None, fields: dict[str, Any]) -> None:
        if session is None:
            self.over = True
            if self.problem is not None:
                raise self.problem
            return
        if "error" in fields:
            self._print(str(fields["error"]))
        rank = fields.get("rank")
        if type(rank) is not int:
            return
        if "refused" in fields:
            raise BadRequest(f"rank {rank} {fields['refused']}: it has no debugger for this command.")
        if fields.get("late"):
            self._print(f"rank {rank} is in native code, such as a collective: it stops when it comes back from there")
        elif "text" in fields:
            for line in str(fields["text"]).splitlines():
                self.screen.line(f"[{rank}] {printable(line)}")
        elif "prompt" in fields:
            self._answer(session, rank, self._line(f"[{rank}] {printable(str(fields['prompt']))}"))
        elif fields.get("end"):
            self._print(f"rank {rank} goes on")
            self.left.discard(rank)
            self.over = self.interrupt and self.ranks is not None and not self.left

    def _line(self, prompt: str) -> str:
        while True:
            self.screen.erase()
            self.screen.flush()
            try:
                return self.ask(prompt)
            except EOFError:
                self.screen.line("")
                return "q"
            except KeyboardInterrupt:
                self.screen.line("")
                self._print(f"{LEAVE}; `launch cancel {self.target.name}` stops the run")

    def _print(self, text: str) -> None:
        self.screen.line(f"launch: {printable(text, 1000)}")
        self.screen.flush()

    def close(self) -> None:
        """Leave: programs in a debugger go on."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._visiting.cancel)
        self._thread.join(TIMEOUTS.hello)


def debug(target: Target, rank: int) -> None:
    """Stop `rank` at its next line of Python and serve its debugger at this terminal, until it goes on without one.

    Raises:
        BadRequest: the rank cannot be reached, or runs no Python program.
    """
    debugging = Debugging(target.of_rank(rank), [rank], True, Screen(sys.stdout))
    try:
        while not debugging.over and not target.run.dir.result_file.exists():
            debugging.serve(TIMEOUTS.visit_look)
    except KeyboardInterrupt:
        print(f"\nlaunch: rank {rank} goes on without a debugger", flush=True)
    finally:
        debugging.close()


class AtBreakpoints:
    """The debuggers of a run that was sent with ``--debug``, for the command that follows it.

    ``breakpoint()`` in one of `ranks` (None: in any) opens here, in each attempt.
    """

    def __init__(self, run: Run, ranks: Sequence[int] | None) -> None:
        self.run, self.ranks = run, ranks
        self._attempt = 0
        self._debugging: Debugging | None = None

    def wait(self, screen: Screen, seconds: float) -> None:
        """Serve the debuggers; wait for them for `seconds` at most."""
        attempt = self.run.dir.last_attempt()
        if attempt != self._attempt:
            self.close()
            with suppress(LaunchError):  # its ranks have not started yet
                self._debugging = Debugging(inside(self.run), self.ranks, False, screen)
                self._attempt = attempt
        if self._debugging is None or self._debugging.over:
            time.sleep(seconds)
            return
        try:
            self._debugging.serve(seconds)
        except LaunchError as error:
            screen.line(f"launch: {printable(str(error), 1000)}")

    def close(self) -> None:
        """Leave: programs in a debugger go on."""
        if self._debugging is not None:
            self._debugging.close()
            self._debugging = None
