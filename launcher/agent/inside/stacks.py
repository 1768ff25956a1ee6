"""The Python stacks of the ranks of a node.

A rank writes them itself when it gets a signal (`launcher.rank.output.write_stacks_on_signal`). A process that has not
registered for it is not sent the signal, which would end it: py-spy is asked, if it is installed and the system allows it.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.agent.hangs.detection import FRAME, LIBRARIES, STOPPED_STATES
from launcher.agent.inside.line import Line
from launcher.agent.inside.start import SessionStart, VisitedRank
from launcher.agent.processes import catches, has_signal, process_state, start_time
from launcher.config.timeouts import TIMEOUTS
from launcher.rank.output import STACK_FILE, STACK_SIGNAL
from launcher.request import own_packages

MAX_DUMP = 1 << 20
THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[(.*)\])? \(most recent call first\):$")
MAIN = "MainThread"
_TOOLKIT = f"{own_packages.ROOT}/launcher/"
_NOT_OF_USER = (*LIBRARIES, _TOOLKIT, "<frozen")


@dataclass(frozen=True)
class Frame:
    """A call on a stack."""

    file: str
    line: int
    function: str

    @property
    def native(self) -> bool:
        """Whether it is a function of a library or a program in machine code."""
        return ".so" in os.path.basename(self.file) or self.line == 0


@dataclass(frozen=True)
class Thread:
    """A thread and its calls, the innermost first."""

    name: str
    frames: list[Frame]


@dataclass(frozen=True)
class RankStacks:
    """What is known about a rank: its threads, the main thread first; or `reason`, why there is none."""

    rank: int
    threads: list[Thread]
    reason: str = ""


class NoStacksError(Exception):
    """A process does not show its stacks."""


async def serve(line: Line, start: SessionStart, fields: dict[str, Any]) -> None:
    """Send the stacks of the ranks. With ``native`` in `fields` they are py-spy's, with the frames of native code."""
    native = bool(fields.get("native"))
    found = await asyncio.gather(*(_look(rank, start.command, native) for rank in start.ranks))
    await line.send(stacks=folded(found))


def folded(found: Sequence[RankStacks]) -> list[dict[str, Any]]:
    """Return the stacks as plain data; ranks whose threads are at the same calls are in one entry, as ``ranks``."""
    return joined(
        {"ranks": [each.rank], "where": where(each.threads), "threads": [asdict(thread) for thread in each.threads]}
        | ({"reason": each.reason} if each.reason else {})
        for each in found
    )


def joined(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `entries` with those of the same reason and calls as one, whose ranks ascend."""
    groups: dict[str, dict[str, Any]] = {}
    for each in entries:
        key = json.dumps([each.get("reason"), [thread["frames"] for thread in each["threads"]]])
        if key in groups:
            groups[key]["ranks"] = sorted([*groups[key]["ranks"], *each["ranks"]])
        else:
            groups[key] = each
    return list(groups.values())


def where(threads: Sequence[Thread]) -> str:
    """Return ``FUNCTION FILE:LINE`` of the main thread: the innermost call in the user's code, and what it calls there."""
    frames = threads[0].frames if threads else []
    if not frames:
        return ""
    own = next((n for n, frame in enumerate(frames) if not (frame.native or frame.file.startswith(_NOT_OF_USER))), 0)
    frame = frames[own]
    return f"{frames[max(0, own - 1)].function} {os.path.basename(frame.file)}:{frame.line}"


async def _look(rank: VisitedRank, command: str, native: bool) -> RankStacks:
    try:
        if not rank.pid or start_time(rank.pid) != rank.started:
            raise NoStacksError("does not run")
        if command:
            return RankStacks(rank.rank, await _of_command(rank.pid, command, native))
        if native:
            return RankStacks(rank.rank, await _py_spy(rank.pid, native))
        return RankStacks(rank.rank, await _of_rank(rank.pid))
    except NoStacksError as error:
        return RankStacks(rank.rank, [], str(error))
    except OSError as error:
        reason = "has ended" if not Path(f"/proc/{rank.pid}").exists() else f"cannot be read: {error.strerror or error}"
        return RankStacks(rank.rank, [], reason)


async def _of_rank(pid: int) -> list[Thread]:
    try:
        return parse(await dump(pid))
    except NoStacksError as error:
        try:
            return await _py_spy(pid, native=False)
        except NoStacksError:
            raise error from None


async def _of_command(pid: int, command: str, native: bool) -> list[Thread]:
    """The stacks of the program that the rank has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    program = int(children[0]) if children else pid
    try:
        return await _py_spy(program, native)
    except NoStacksError as error:
        raise NoStacksError(f"runs the command {command}, {_condition(program)}; {error}") from None


# ---- by the signal --------------------------------------------------------------------------------------------------


async def dump(pid: int) -> str:
    """Return what a rank writes about its threads.

    Raises:
        NoStacksError: it has not registered for the signal, is stopped, or does not answer.
    """
    if process_state(pid) in [*STOPPED_STATES, "t"]:
        raise NoStacksError(f"is {_condition(pid)}")
    with open(os.open(_stack_file(pid), os.O_RDWR | os.O_CLOEXEC), "r+b", buffering=0) as file:
        deadline = asyncio.get_running_loop().time() + TIMEOUTS.stack_answer
        while not _locked(file.fileno()):  # another client reads it
            await _pause(deadline, pid)
        own = len(file.readline())
        file.truncate(own)
        blocked = _threads_that_block(pid)
        if not catches(pid, STACK_SIGNAL):
            raise NoStacksError("has replaced the handler of the signal that asks for its stacks")
        os.kill(pid, STACK_SIGNAL)
        while (
            not (written := os.fstat(file.fileno()).st_size > own)
            or _pending(pid)
            or _threads_that_block(pid) - blocked
        ):
            if written and asyncio.get_running_loop().time() > deadline:
                break  # a thread has come up that blocks all signals
            await _pause(deadline, pid)
        file.seek(own)
        return file.read(MAX_DUMP).decode(errors="replace")


async def _pause(deadline: float, pid: int) -> None:
    if asyncio.get_running_loop().time() > deadline:
        raise NoStacksError(f"does not answer: {_condition(pid)}")
    await asyncio.sleep(0.005)


def _locked(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _stack_file(pid: int) -> str:
    """The path of the file that a rank writes its stacks into. Raises NoStacksError if it has none."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with suppress(OSError):
            if os.readlink(path).startswith(f"/memfd:{STACK_FILE}"):
                with open(path, "rb", buffering=0) as file:
                    if file.readline() == f"{name}\n".encode():
                        return path
    raise NoStacksError("has no Python stacks to show: it is starting, or has closed the file for them")


def _pending(pid: int) -> bool:
    return has_signal(f"/proc/{pid}/status", "ShdPnd", STACK_SIGNAL)


def _threads_that_block(pid: int) -> set[str]:
    """The threads of a process that block the signal: one that runs its handler does."""
    found = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(OSError):
            if has_signal(f"/proc/{pid}/task/{thread}/status", "SigBlk", STACK_SIGNAL):
                found.add(thread)
    return found


def _condition(pid: int) -> str:
    """The state of a process, and where in the kernel it waits."""
    waits = ""
    with suppress(OSError):
        waits = Path(f"/proc/{pid}/wchan").read_text(errors="replace").strip("0\n")
    state = process_state(pid) or "gone"
    meaning = {"T": "stopped, until SIGCONT", "t": "stopped by a debugger", "D": "in an uninterruptible wait"}
    return f"state {state}" + (f" ({meaning[state]})" if state in meaning else "") + (f", in {waits}" if waits else "")


def parse(text: str) -> list[Thread]:
    """Return the threads in what `faulthandler` wrote, the main thread first."""
    threads: list[Thread] = []
    for line in text.splitlines():
        if header := THREAD.match(line):
            threads.append(Thread(header[2] or header[1], []))
        elif threads and (frame := FRAME.match(line)):
            threads[-1].frames.append(Frame(frame["file"], int(frame["line"]), frame["function"]))
    if not threads:
        return []
    return [Thread(MAIN, _of_program(threads[-1].frames)), *threads[:-1]]


def _of_program(frames: list[Frame]) -> list[Frame]:
    """Leave out the outermost calls of a rank, which are those of this toolkit."""
    outer = len(frames)
    while outer and frames[outer - 1].native:  # by which the interpreter was started
        outer -= 1
    if outer > 1 and frames[outer - 1].file == "<string>" and frames[outer - 2].file.startswith(_TOOLKIT):
        outer -= 1  # the statement with which its interpreter was started
    while outer and frames[outer - 1].file.startswith(_TOOLKIT):
        outer -= 1
    return frames[:outer] or frames


# ---- by py-spy ------------------------------------------------------------------------------------------------------


async def _py_spy(pid: int, native: bool) -> list[Thread]:
    """The stacks that py-spy finds. Raises NoStacksError."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}")
    if program is None:
        raise NoStacksError("py-spy, which shows more, is not installed on the node")
    process = await asyncio.create_subprocess_exec(
        *(program, "dump", "--json", "--pid", str(pid), *(["--native"] if native else [])),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUTS.py_spy):
            output, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        raise NoStacksError(f"py-spy did not answer within {TIMEOUTS.py_spy:g} s") from None
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no reason"]
        raise NoStacksError(f"py-spy: {lines[0][:300]}")
    return parse_py_spy(output)


def parse_py_spy(output: bytes) -> list[Thread]:
    """Return the threads in the JSON of ``py-spy dump``, the main thread first. Raises NoStacksError for other text."""
    try:
        threads = [
            Thread(
                str(each["thread_name"] or each["thread_id"]),
                [Frame(str(f["filename"]), int(f["line"]), str(f["name"])) for f in each["frames"]],
            )
            for each in json.loads(output)
        ]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise NoStacksError("py-spy's answer cannot be read") from None
    found = sorted(threads, key=lambda thread: thread.name != MAIN)
    return [Thread(each.name, _of_program(each.frames)) for each in found]
