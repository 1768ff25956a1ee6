"""Standby interpreters: a rank of the next attempt is started ahead, with the libraries that the last one had imported.

A restart of a program that is not forked costs the start of an interpreter and its imports. While an attempt runs, the
forkserver keeps one more interpreter for each rank. It has the environment of that rank, imports the same libraries in the
same order, and waits; at the next start it becomes the rank, with its own threads, ids and random state.

A standby imports no module of the user. It is not used if anything that an import may read differs from what the rank
would find: other variables than those of the attempt itself, a variable that the program changed before the import, a file
of the user that hides a library, or a library that changes a variable, installs a signal handler, or uses a GPU while it
is imported. A program can see one difference: libraries that it imports later are in ``sys.modules`` when its first line
runs, and variables that they add are set. ``start_method = "spawn"`` switches standbys off.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.config.timeouts import TIMEOUTS
from launcher.rank.imports import importable
from launcher.rank.messages import StartRank, decode, encode
from launcher.rank.output import redirect_output

PER_ATTEMPT = frozenset(
    (
        *("MASTER_ADDR", "MASTER_PORT", "JAX_COORDINATOR_ADDRESS", "LAUNCH_FINISHED"),
        *("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
    )
)
"""Variables of a rank that change from attempt to attempt; no library reads them while it is imported."""

SPARE_BYTES = 2 * 2**30
"""Memory that has to stay available beside that of the standby interpreters."""

STANDBY_BYTES = 2**30
"""Memory counted for each standby interpreter; one with torch, transformers and datasets has about 0.4 GiB of its own."""

PRINTED_BYTES = 2**20
"""What libraries print while they are imported is kept up to this size, for the log of the rank."""

# ---- in the standby interpreter --------------------------------------------------------------------------------------


def read_request(descriptor: int) -> tuple[StartRank, list[str]]:
    """Return the start of the attempt before and the modules to import, which the forkserver has written."""
    with open(descriptor, "rb") as file:
        file.seek(0)
        start, modules = file.read().split(b"\n", 1)
    return decode(StartRank, start), json.loads(modules)


def wait_for_start(control: int, start: StartRank, modules: Sequence[str]) -> tuple[StartRank, bool]:
    """Import `modules` and wait to become a rank.

    Returns:
        The message that starts the rank, and whether this process can be the rank: False if an import failed or changed
        what the program would find, so that the rank has to be a new interpreter.
    """
    output = os.memfd_create("output")
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    usable = import_all(modules)
    with socket.socket(fileno=control) as line, line.makefile("rb") as lines:
        message = lines.readline()
    if not message:
        os._exit(0)
    new: StartRank = decode(StartRank, message)
    if usable:
        for name in start.environment.keys() - new.environment.keys():
            os.environ.pop(name, None)
        for name in PER_ATTEMPT & new.environment.keys():
            os.environ[name] = new.environment[name]
    sys.stdout.flush()
    sys.stderr.flush()
    printed = os.pread(output, PRINTED_BYTES, 0) if usable else b""
    os.close(output)
    redirect_output(new.log, new.world.rank)
    with suppress(OSError):
        os.write(1, printed)
    return new, usable


def import_all(modules: Sequence[str]) -> bool:
    """Import `modules`; return whether a program that imports them later finds nothing changed."""
    before = dict(os.environ)
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    try:
        for name in modules:
            with suppress(ImportError):  # it was tried and failed in the rank, too
                importlib.import_module(name)
    except (Exception, SystemExit):
        return False
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        os._exit(1)  # it would hold memory of the GPU that the running rank uses
    return (
        all(os.environ.get(name) == value for name, value in before.items())
        and [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    )


# ---- in the forkserver -----------------------------------------------------------------------------------------------


@dataclass
class Standby:
    """A started interpreter: its process, the connection to it, and the rank that it can become."""

    pid: int
    control: socket.socket
    start: StartRank


@dataclass
class Slot:
    """One rank of this node: its record of imports, its newest start, and its standby.

    Attributes:
        size: bytes of the record at the last look; `settled_at` is when it was found to be that long.
        refused: there is no standby for this program.
    """

    record: int
    start: StartRank
    standby: Standby | None = None
    size: int = -1
    settled_at: float = 0.0
    refused: bool = False


@dataclass
class Standbys:
    """The standby interpreters of a node.

    Attributes:
        spawn: forks a process with the signals and the session of a rank; returns its pid, 0 in the child.
        execute: makes the child an interpreter: the descriptor of its record, further arguments, and variables.
    """

    spawn: Callable[[], int]
    execute: Callable[[int, list[str], Mapping[str, str]], None]
    enabled: bool = False
    target: str = ""
    user_folders: tuple[str, ...] = ()
    slots: dict[int, Slot] = field(default_factory=dict)

    def record_for(self, start: StartRank) -> int:
        """Return the descriptor of an empty record for the rank that starts now; -1 if there is none."""
        if not self.enabled:
            return -1
        slot = self.slots.get(start.world.rank)
        if slot is None:
            slot = self.slots[start.world.rank] = Slot(os.memfd_create("imports"), start)
        os.ftruncate(slot.record, 0)
        os.lseek(slot.record, 0, os.SEEK_SET)
        slot.start, slot.size, slot.refused = start, -1, False
        return slot.record

    def take(self, start: StartRank) -> int | None:
        """Make the standby of a rank the rank; return its pid, None if there is none that fits."""
        slot = self.slots.get(start.world.rank)
        standby = slot.standby if slot is not None else None
        if slot is None or standby is None:
            return None
        slot.standby = None
        with standby.control:
            if fits(standby.start, start):
                with suppress(OSError):
                    standby.control.sendall(encode(start))
                    slot.start, slot.size = start, -1  # its record goes on
                    return standby.pid
        kill_group(standby.pid)
        return None

    def prepare(self, running: set[int]) -> bool:
        """Start the standbys that are due for the ranks that run; return whether there may be more to do."""
        slots = [
            slot for rank, slot in self.slots.items() if rank in running and slot.standby is None and not slot.refused
        ]
        if not self.enabled or not slots:
            return False
        now = time.monotonic()
        for slot in slots:
            size = os.fstat(slot.record).st_size
            if size != slot.size:
                slot.size, slot.settled_at = size, now
        if any(now - slot.settled_at < TIMEOUTS.standby for slot in slots):
            return True
        if available_memory() < SPARE_BYTES + len(slots) * STANDBY_BYTES:
            for slot in slots:
                slot.refused = True
            return False
        for slot in slots:
            self._start(slot)
        return False

    def _start(self, slot: Slot) -> None:
        record = os.pread(slot.record, slot.size, 0).decode(errors="replace")
        modules = importable(record, self.target, self.user_folders)
        if not modules:
            slot.refused = True
            return
        local, remote = socket.socketpair()
        pid = self.spawn()
        if pid == 0:
            request = os.memfd_create("standby", 0)  # too long for an argument
            with open(request, "wb", closefd=False) as file:
                file.write(encode(slot.start) + json.dumps(modules).encode())
            os.set_inheritable(remote.fileno(), True)
            self.execute(slot.record, ["standby", str(remote.fileno()), str(request)], slot.start.environment)
        remote.close()
        slot.standby = Standby(pid, local, slot.start)

    @property
    def pids(self) -> set[int]:
        """The processes that wait."""
        return {slot.standby.pid for slot in self.slots.values() if slot.standby is not None}

    def forget(self, pid: int) -> None:
        """Note that a standby has ended."""
        for slot in self.slots.values():
            if slot.standby is not None and slot.standby.pid == pid:
                slot.standby.control.close()
                slot.standby, slot.refused = None, True

    def close(self) -> None:
        """Kill the interpreters that wait, and keep no others."""
        self.enabled = False
        for pid in self.pids:
            kill_group(pid)
            self.forget(pid)


def fits(waiting: StartRank, start: StartRank) -> bool:
    """Return whether an interpreter that was started for one attempt can be the rank of another."""
    old, new = waiting.world, start.world
    if replace(old, attempt=new.attempt, master_addr=new.master_addr, master_port=new.master_port) != new:
        return False
    changed = {k for k in waiting.environment.keys() | start.environment.keys()
               if waiting.environment.get(k) != start.environment.get(k)}  # fmt: skip
    return changed <= PER_ATTEMPT


def available_memory() -> int:
    """Return the bytes that this process may still use: of the machine, and of its control group (version 2)."""
    found = [2**63]
    with suppress(OSError, ValueError, StopIteration):
        line = next(each for each in Path("/proc/meminfo").read_text().splitlines() if each.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError, KeyError, StopIteration):
        group = next(each for each in Path("/proc/self/cgroup").read_text().splitlines() if each.startswith("0::"))[3:]
        folder = Path("/sys/fs/cgroup") / group.lstrip("/")
        for each in (folder, *folder.parents):
            limit = each / "memory.max"
            if each.is_relative_to("/sys/fs/cgroup") and limit.exists() and limit.read_text().strip() != "max":
                used = int((each / "memory.current").read_text())
                cache = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())["inactive_file"]
                found.append(int(limit.read_text()) - used + int(cache))
    return min(found)


def kill_group(pid: int) -> None:
    """Kill a process and its group; a process just forked does not lead its group yet."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
