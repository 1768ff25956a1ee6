"""Answers of schedulers, which all commands of a user on one machine share.

A file in the user's runtime folder holds the newest answer of a cluster; a lock beside it lets one process ask at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.backends.base import Backend
from launcher.config.timeouts import TIMEOUTS
from launcher.errors import BadRequest
from launcher.lifecycle.records.user_files import remove_old, user_folder
from launcher.request.spec import State
from training.files import open_plain, read_json, write_atomic

WANTED = 60.0
"""Seconds for which a job that was asked for by its id is part of the next questions."""


MOST_STATES = 100_000
"""States in one answer; of more, those of the named jobs are kept."""


@dataclass(frozen=True)
class Answer:
    """What a cluster answered.

    Attributes:
        asked: when the question was sent, in seconds since 1970.
        states: of jobs by id. A cluster that does not answer has none.
        wanted: ids of the jobs that the question named, each with the time until which questions name it.
    """

    asked: float = 0.0
    states: Mapping[str, State] = field(default_factory=dict)
    wanted: Mapping[str, float] = field(default_factory=dict)
    answered: bool = True


def states(backend: Backend, jobs: Mapping[str, float]) -> dict[str, State]:
    """Return the states of jobs, from an answer of at most `Capabilities.poll_seconds` ago if it knows them.

    `jobs` are ids with the time of their submission in seconds since 1970, 0 if unknown. A job that was submitted within
    `poll_seconds` and that the answer does not know is QUEUED.
    """
    lasts = backend.capabilities.poll_seconds
    folder = user_folder("answers", runtime=True) if lasts else None
    if folder is None:
        return dict(backend.poll_all(list(jobs)))
    name = f"{os.uname().nodename}:{backend.name}:{backend.identity()}"
    file = folder / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"
    found = _known(_read(file), jobs, lasts)
    if len(found) < len(jobs):
        with _lock(file):
            answer = _read(file)  # another process may have asked meanwhile
            found = _known(answer, jobs, lasts)
            if missing := set(jobs) - set(found):
                answer = _ask(backend, answer, missing, lasts)
                _write(file, answer)
                found |= {job: answer.states.get(job, State.UNKNOWN) for job in missing}
    return found


def _known(answer: Answer, jobs: Mapping[str, float], lasts: float) -> dict[str, State]:
    """The states that `answer` and the times of the submissions suffice for."""
    now = time.time()
    if not 0 <= now - answer.asked < lasts:
        return {}
    if not answer.answered:
        return dict.fromkeys(jobs, State.UNKNOWN)
    found = {job: answer.states[job] for job in jobs if job in answer.states}
    new = [job for job, submitted in jobs.items() if job not in found and 0 <= now - submitted < lasts]
    return found | dict.fromkeys(new, State.QUEUED)


def _ask(backend: Backend, before: Answer, missing: Collection[str], lasts: float) -> Answer:
    """Send a question that names `missing` and the jobs of the last minute; a fresh answer only gets what it lacks."""
    now = time.time()
    wanted = {
        job: until for job, until in before.wanted.items() if now < until <= now + WANTED and _is_id(backend, job)
    }
    if fresh := 0 <= now - before.asked < lasts:
        found = {**before.states, **backend.poll_all(sorted(missing))}
    else:
        found = backend.poll_all(sorted({*missing, *wanted}))
    wanted |= dict.fromkeys(missing, now + WANTED)
    answered = fresh or any(state is not State.UNKNOWN for state in found.values())
    return Answer(before.asked if fresh else now, found, wanted, answered)


def _is_id(backend: Backend, job: str) -> bool:
    try:
        backend.check_id(job)
    except BadRequest:
        return False
    return True


_newest: dict[Path, tuple[tuple[int, ...], Answer]] = {}
"""The answers that this process has read, with the inode and the times of their files."""


def _read(file: Path) -> Answer:
    """The answer in `file`; an empty one if there is none, or a damaged one."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
        info = file.lstat()
        facts = (info.st_ino, info.st_mtime_ns, info.st_ctime_ns, info.st_size)
        if file in _newest and _newest[file][0] == facts:
            return _newest[file][1]
        data: Any = read_json(file)
        found = {str(job): State(state) for job, state in data["states"].items()}
        wanted = {str(job): float(until) for job, until in data["wanted"].items()}
        answer = Answer(float(data["asked"]), found, wanted, bool(data["answered"]))
        _newest[file] = facts, answer
        return answer
    return Answer()


def _write(file: Path, answer: Answer) -> None:
    """Share `answer`; nothing is shared if the folder cannot be written."""
    few = answer.wanted if len(answer.states) > MOST_STATES else answer.states
    data = {
        "asked": answer.asked,
        "answered": answer.answered,
        "states": {job: state.value for job, state in answer.states.items() if job in few},
        "wanted": dict(answer.wanted),
    }
    with suppress(OSError):
        write_atomic(file, json.dumps(data))
        remove_old(file.parent)


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Let one process ask at a time; without a lock if none can be had within `TIMEOUTS.answer`."""
    handle, deadline = -1, time.monotonic() + TIMEOUTS.answer
    with suppress(OSError):
        handle = open_plain(file.with_suffix(".lock"), os.O_RDWR | os.O_CREAT)
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)
