"""How a rank ended: its exit statuses, and the kind of failure that an exception or the end of a log speaks of."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterable, Sequence

from launcher.errors import BadRequest
from launcher.lifecycle.error_signs import NAMES, SIGNS, Sign
from training.errors import ConfigError, DeviceError, ReplicaError
from training.files import FULL_DISK

FINISHED, RAISED, BAD_REQUEST, STOPPED = 0, 1, 2, 3
"""Exit statuses of a rank; the same numbers, with the same meanings, as those of the command."""

DISK_FULL, ERROR_NOT_WRITTEN = 4, 5
"""Exit statuses of a rank that raised and could not leave its error in the run directory, for want of room or otherwise."""

STORAGE = (errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO)
"""What a file system says that has gone away under a process: a disk that fails, a mount that was lost or made read-only."""

ABORTS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
"""Signals by which a process ends itself; the end of its log may say why."""

TAIL_LINES = 400
"""Lines of a log that are searched for the cause of an abort: stacks of all threads may follow it."""


def classify(error: BaseException, device: str = "cuda") -> str:
    """Name the kind of an exception, a key of `launcher.lifecycle.policy.RULES`.

    An exception that says nothing by itself is of the kind of its explicit cause (``raise ... from cause``), unless that is
    a connection of the program's own, such as a download. `device` is the type of the rank's device: a rank that was given
    no accelerator and looks for one has made a mistake of its own.
    """
    seen: BaseException | None = error
    for _ in range(8):  # causes can form a circle
        if seen is None:
            break
        kind = _kind(seen)
        own = kind == "bad request" or (kind == "communication" and isinstance(seen, OSError))
        if device == "cpu" and is_missing(kind, type(seen).__name__, str(seen)):
            kind = "user error"
        if kind != "user error" and not (own and seen is not error):
            return kind
        seen = seen.__cause__
    return "user error"


def _kind(error: BaseException) -> str:
    match error:
        case MemoryError():
            return "out of memory"
        case ConfigError() | BadRequest():
            return "bad request"
        case DeviceError():
            return "device"
        case ReplicaError():
            return "diverged"
        case OSError() if error.errno in FULL_DISK:
            return "disk full"
        case OSError() if error.errno in STORAGE:
            return "storage"
        case OSError() if error.errno == errno.ENOMEM:
            return "out of memory"
    name = type(error).__name__
    sign = sign_in(str(error))
    # Programs use the words of networks in errors of their own, too.
    if sign is not None and (sign.kind != "communication" or name in ("RuntimeError", *NAMES)):
        return sign.kind
    return "communication" if isinstance(error, ConnectionError) else NAMES.get(name, "user error")


def sign_in(text: str) -> Sign | None:
    """The first of `SIGNS` that `text` shows, its C++ stack left out."""
    text = text.split("Exception raised from")[0]
    return next((sign for sign in SIGNS if sign.pattern.search(text)), None)


def advice(kind: str, text: str) -> str:
    """What to do about a failure of `kind` with `text`, where that is known better than by its kind; else empty."""
    sign = sign_in(text)
    return sign.advice if sign is not None and sign.kind == kind else ""


def is_missing(kind: str, name: str, text: str) -> bool:
    """Whether a failure says that a device is not there for this software: another try on the same node finds it no more."""
    sign = sign_in(text)
    return kind == "device" and (name == DeviceError.__name__ or (sign is not None and sign.lasting))


def headline(text: str) -> str:
    """The first line of an error, and of one of NCCL also its last error, which holds the cause."""
    lines = [line.strip() for line in text.split("Exception raised from")[0].splitlines() if line.strip()]
    if not lines:
        return ""
    place = next((n for n, line in enumerate(lines) if line.startswith("Last error:")), None)
    last = " ".join(lines[place:]) if place else ""
    return f"{lines[0]} ... {last}" if last.removeprefix("Last error:").strip() else lines[0]


def error_not_written_status(problem: OSError) -> int:
    """The exit status of a rank that cannot write into the run directory because of `problem`."""
    return DISK_FULL if classify(problem) == "disk full" else ERROR_NOT_WRITTEN


# ---- ranks that abort ---------------------------------------------------------------------------------------------


WHAT = re.compile(r"^\s*what\(\):\s*(.*)")
TERMINATE = re.compile(r"terminate called after throwing an instance of '([^']+)'")
WATCHDOG = re.compile(r"\[[EF][^\]]* ProcessGroupNCCL\.cpp:\d+\]\s*(.*)")
"""What ProcessGroupNCCL logs as an error or as fatal."""
BEFORE_STACK = re.compile(r"^(Exception raised from|frame #|Fatal Python error|\*\*\* )|Stack trace|^Current thread 0x")


def cause_in(lines: Sequence[str]) -> tuple[str, str] | None:
    """The kind and the words of what made a process abort, by the end of its log; None where that is not said.

    C++ says what was thrown (``what():``); NCCL's watchdog also logs it before.
    """
    for number in reversed(range(len(lines))):
        if said := WHAT.match(lines[number]):
            return _verdict("\n".join([said[1], *_until_stack(lines[number + 1 :])]))
        if thrown := TERMINATE.search(lines[number]):  # reached first only if nothing was said
            return ("out of memory", thrown[1]) if thrown[1] == "std::bad_alloc" else None
    logged = [found[1] for line in lines if (found := WATCHDOG.search(line))]
    fields = next((text for text in logged if sign_in(text)), None)
    return _verdict(fields) if fields else None


def _until_stack(lines: Iterable[str]) -> list[str]:
    kept = []
    for line in lines:
        if BEFORE_STACK.search(line) or not line.strip():
            break
        kept.append(line)
    return kept[:20]


def _verdict(text: str) -> tuple[str, str] | None:
    if not (words := text.strip()):
        return None
    sign = sign_in(words)
    return (sign.kind if sign is not None else "user error"), words
