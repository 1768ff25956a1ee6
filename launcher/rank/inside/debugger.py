"""The debugger of a rank whose terminal is that of a command elsewhere: ``launch debug`` and ``launch --debug``.

It is `pdb`. What it prints and the lines that it reads go over a visit (`launcher.rank.inside.visit`) to the command::

    rank -> command    {"text": TEXT}, {"prompt": TEXT} to ask for a line, {"end": true}
    command -> rank    {"line": TEXT}

To quit, or to lose the connection, lets the program go on: a run of many ranks does not end because somebody leaves.
"""

from __future__ import annotations

import io
import json
import os
import pdb
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from launcher.rank.inside.visit import LONGEST, Visit, connect
from launcher.request import own_packages
from training.distributed import group
from training.distributed.heartbeat import Heartbeat
from training.distributed.world import World
from training.files import read_plain
from training.flags.typed import from_data

LOOK = 0.5
"""Seconds between two attempts of a rank at a breakpoint to find somebody who debugs."""

PATIENCE = timedelta(days=7)
"""Limit of a collective in a run with ``--debug``: the other ranks wait for a person."""

_OURS = (f"{own_packages.ROOT}/launcher/", "<string>", "<frozen")


class Terminal(io.TextIOBase):
    """The standard streams of the debugger: each line that it reads is asked for at the other end of `visit`."""

    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self.visit = visit
        self._last = ""  # the line that has no end yet: the prompt, when a line is asked for

    def write(self, text: str) -> int:
        """Send the whole lines of `text`."""
        lines, newline, self._last = (self._last + text).rpartition("\n")
        if newline:
            self.visit.send({"text": lines + newline})
        return len(text)

    def flush(self) -> None:
        """Send nothing: the rest of a line goes with the request for one."""

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
        """Return the next line of the command; empty if it has gone."""
        self.visit.send({"prompt": self._last})
        self._last = ""
        line = (self.visit.receive() or {}).get("line")
        return f"{line}\n" if isinstance(line, str) else ""


class Debugger(pdb.Pdb):
    """`pdb` at the other end of a visit, which ends when the program goes on without a breakpoint of the debugger.

    While it waits for a line, the heartbeat says so: no rank of the run counts as hung meanwhile.
    """

    def __init__(self, visit: Visit) -> None:
        self.terminal, self.heartbeat = Terminal(visit), Heartbeat.of_process or Heartbeat()
        super().__init__(stdin=self.terminal, stdout=self.terminal, nosigint=True)  # type: ignore[arg-type]

    def interaction(self, *where: Any, **more: Any) -> Any:
        """Ask for commands at a line of the program."""
        hold(self.heartbeat, True)
        try:
            return super().interaction(*where, **more)
        finally:
            hold(self.heartbeat, False)

    def get_stack(self, f: FrameType | None, t: Any) -> tuple[list[tuple[FrameType, int]], int]:
        """Return the stack without the calls of the launcher that lead to the program."""
        stack, index = super().get_stack(f, t)
        ours = 0
        while ours < index and stack[ours][0].f_code.co_filename.startswith(_OURS):
            ours += 1
        return stack[ours:], index - ours

    def do_continue(self, arg: str) -> Any:
        """c(ont(inue)): go on, and leave the debugger unless it has breakpoints."""
        result = super().do_continue(arg)
        if not self.breaks:
            self.leave()
        return result

    do_c = do_cont = do_continue

    def do_quit(self, arg: str) -> Any:
        """q(uit): leave the debugger; the program goes on. ``launch cancel`` ends a run."""
        self.clear_all_breaks()
        self.set_continue()
        self.leave()
        return 1

    do_q = do_exit = do_quit

    def do_EOF(self, arg: str) -> Any:
        """EOF: as quit."""
        return self.do_quit(arg)

    def leave(self) -> None:
        """End the visit; the program goes on at full speed."""
        self.terminal.visit.send({"end": True})
        self.terminal.visit.close()


def hold(heartbeat: Heartbeat, held: bool) -> None:
    """Report that a person holds this rank, or that the program goes on."""
    heartbeat.interactive = held
    if not held and heartbeat.read().step >= 0:
        heartbeat.beat()  # the time in the debugger is no hang


def stop(visit: Visit, frame: FrameType) -> None:
    """Open a debugger at the next line of `frame`, or at the breakpoint that waits for somebody, for the command of `visit`."""
    if _waiting and not _arrived:
        _arrived.append(visit)
    else:
        Debugger(visit).set_trace(frame)


_waiting: list[FrameType] = []
"""Where the program waits at a breakpoint."""

_arrived: list[Visit] = []
"""Who has come to that breakpoint by a signal."""


# ---- launch --debug ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DebugRequest:
    """What ``launch --debug`` asks of the ranks of a run, as ``debug.json`` of its directory.

    Attributes:
        ranks: those that stop at a breakpoint, None for all; the others pass over it.
        port: debugpy waits for an editor on this port plus the local rank, instead.
    """

    ranks: list[int] | None = None
    port: int | None = None


def begin(file: Path, world: World) -> None:
    """Prepare this process, a rank, for what `file` asks: `breakpoint` waits for the command."""
    request = from_data(DebugRequest, json.loads(read_plain(file, LONGEST, file.parent)), str(file))
    group.TIMEOUT = PATIENCE
    sys.meta_path.insert(0, _LongTimeouts())
    # NCCL's watchdog would end the ranks that wait.
    os.environ |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
    if os.environ.get("PYTHONBREAKPOINT") == "0":
        return
    if request.ranks is not None and world.rank not in request.ranks:
        sys.breakpointhook = lambda *_, **__: None
    elif request.port is not None:
        _wait_for_editor(world.rank, request.port + world.local_rank)
    else:
        sys.breakpointhook = lambda *_, **__: _wait(world)


def _wait(world: World) -> None:
    """Stop the program that called `breakpoint`, as soon as somebody debugs it."""
    frame = sys._getframe(2)
    heartbeat = Heartbeat.of_process or Heartbeat()
    hold(heartbeat, True)
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    opens = f"launch debug {world.run_id} --rank {world.rank}"
    print(f"launch: rank {world.rank} is at a breakpoint, {where}; `{opens}` opens it", flush=True)
    _waiting.append(frame)
    while not _arrived:
        if (found := connect("breakpoint")) is not None:
            _arrived.append(found[0])
        else:
            time.sleep(LOOK)
    _waiting.clear()
    stop(_arrived.pop(), frame)


def _wait_for_editor(rank: int, port: int) -> None:
    import debugpy

    heartbeat = Heartbeat.of_process or Heartbeat()
    hold(heartbeat, True)
    debugpy.listen(("127.0.0.1", port))
    host = os.uname().nodename
    print(f"launch: rank {rank} on {host} waits for an editor on 127.0.0.1:{port}", flush=True)
    debugpy.wait_for_client()
    hold(heartbeat, False)


class _LongTimeouts(MetaPathFinder, Loader):
    """Loads torch's constants of process groups with `PATIENCE` as the default timeout."""

    NAME = "torch.distributed.constants"

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of `NAME` with this object as its loader."""
        if name != self.NAME or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the interpreter."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, and then replace its timeouts."""
        assert self.loader is not None
        self.loader.exec_module(module)
        for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
            if getattr(module, name, None) is not None:
                setattr(module, name, PATIENCE)
