"""Checks of what a run directory says and of who can change it, before anything is done because of it."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import BadRequest

PROCESS_ID = re.compile(r"([!-9;-~]{1,255}):([1-9][0-9]{0,6}):([0-9]{1,20})")
"""``host:pid:start time``; a pid has at most 7 digits (PID_MAX_LIMIT of Linux is 4,194,304)."""

SLURM_ID = re.compile(r"[1-9][0-9]{0,9}(?:_[0-9]{1,10})?")
"""A job, or one element of an array. Steps, lists and options never match."""


ANY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,255}")
"""What no command takes for an option or a list."""


def check_id(form: re.Pattern[str], job_id: object) -> re.Match[str]:
    """Match a job id against its engine's form.

    Raises:
        BadRequest: it has another form, or it is that of process 1.
    """
    match = form.fullmatch(job_id) if isinstance(job_id, str) else None
    if match is None or (form is PROCESS_ID and int(match[2]) <= 1):
        needed = {
            PROCESS_ID: "HOST:PID:START with a PID above 1",
            SLURM_ID: "a SLURM job number such as 1234 or 1234_5",
        }.get(form, "letters, digits and ._:@- of one word")
        raise BadRequest(f"{str(job_id)[:80]!r} is not a job id; {needed} is needed. Nothing was cancelled.")
    return match


def check_job(record: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the content of ``job.json`` if it names an engine and a job; the engine checks the job's id.

    Raises:
        BadRequest: it does not; `where` is named.
    """
    for key in ("backend", "job_id"):
        if not isinstance(record.get(key), str):
            raise BadRequest(f"{where}: {key} is {str(record.get(key))[:80]!r}, which is not a text.")
    return dict(record)


def check_own(folder: Path, names: Iterable[str]) -> None:
    """Check that a run directory belongs to this user and that nobody else can change what is in it.

    Of the files `names`, and of those below them, a symbolic link out of the directory is refused. Only numeric user ids are
    compared. In a directory that only this user can enter, the modes of the files do not matter: under umask 002, those of a
    scheduler's logs let the group write.

    Raises:
        BadRequest: it belongs to another user (the owner is named), others can write to it (the command that ends that is
            named), or one of `names` is a link.
    """
    top = folder.stat()
    _check_entry(folder, folder, top)
    closed = not top.st_mode & 0o011
    for name in names:
        for path in _tree(folder / name):
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISLNK(found.st_mode):
                # submitit names the script of a job by two names
                if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)) and path.exists():
                    continue
                raise BadRequest(
                    f"{path} is a symbolic link out of the run directory, or to nothing, which is not followed."
                    f" `rm {shlex.quote(str(path))}`."
                )
            _check_entry(folder, path, found, closed)
    if not closed:
        for path in _tree(folder):
            found = path.lstat()
            if not stat.S_ISLNK(found.st_mode):
                _check_entry(folder, path, found)


def _tree(path: Path) -> Iterable[Path]:
    yield path
    for above, folders, files in os.walk(path):
        yield from (Path(above, name) for name in (*folders, *files))


def _check_entry(folder: Path, path: Path, found: os.stat_result, closed: bool = False) -> None:
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise BadRequest(f"{path} is a pipe, a socket or a device, which no run has. `rm {shlex.quote(str(path))}`.")
    if found.st_uid != os.geteuid():
        raise BadRequest(
            f"{path} belongs to {_user(found.st_uid)}, and you are {_user(os.geteuid())}: a run is cancelled, resumed,"
            " removed and unpickled by its owner alone. `launch status` and `launch logs` show it."
        )
    if found.st_mode & 0o022 and not closed:
        raise BadRequest(
            f"{path} can be changed by other users (mode {stat.S_IMODE(found.st_mode):04o}). If you trust what is in it,"
            f" type `chmod -R go-w {shlex.quote(str(folder))}` and try again."
        )


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
