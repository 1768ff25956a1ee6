"""Remove a run directory. It is renamed first, so that a half-removed run is no run."""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from launcher.errors import BadRequest
from launcher.lifecycle.records import registry

PREFIX = ".removed-"
"""Begins the names of directories that are being removed; no run's name does."""

_REMAINS = re.compile(re.escape(PREFIX) + "[0-9a-f]{16}")

TRIES = 20
"""A supervisor that is still ending may write a file meanwhile, and the removal is tried again."""


def disk_bytes(run: Path) -> int:
    """Return the bytes of disk space that the directory takes; a file with several names counts once. Follows no link.

    Raises:
        BadRequest: something is mounted in it, which would be removed with it.
    """
    top = run.lstat()
    total, seen = top.st_blocks * 512, set[int]()
    todo = [str(run)]
    while todo:
        with suppress(FileNotFoundError, PermissionError), os.scandir(todo.pop()) as entries:
            for entry in entries:
                found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    if found.st_dev != top.st_dev:
                        raise BadRequest(f"{entry.path} is another file system, mounted there; unmount it first.")
                    todo.append(entry.path)
                if found.st_ino not in seen:
                    total += found.st_blocks * 512
                if found.st_nlink > 1:
                    seen.add(found.st_ino)
    return total


def remove(run: Path) -> None:
    """Remove the directory of a run, and its link in the registry; nothing to which a link in it leads.

    Raises:
        BadRequest: another directory took its place meanwhile.
        OSError: it cannot be renamed, and is unchanged; or a part of it could not be removed, and `remove_remains`
            removes that.
    """
    before = run.lstat()
    hidden = run.with_name(f"{PREFIX}{os.urandom(8).hex()}")
    os.rename(run, hidden)
    after = hidden.lstat()
    if (before.st_dev, before.st_ino) != (after.st_dev, after.st_ino) or not stat.S_ISDIR(after.st_mode):
        os.rename(hidden, run)
        raise BadRequest(f"{run} was replaced by something else just now; nothing was removed.")
    with suppress(FileNotFoundError):
        os.unlink(hidden / "plan.json")
    registry.forget(run)
    _delete(hidden)


def remove_remains(folder: Path) -> None:
    """Remove what interrupted removals of this user left in a folder of runs."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _REMAINS.fullmatch(entry.name):
                with suppress(OSError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                        _delete(Path(entry.path))


def _delete(folder: Path) -> None:
    for left in reversed(range(TRIES)):
        try:
            _allow_removal(folder)
            shutil.rmtree(folder)  # by descriptors, without following a link
            return
        except FileNotFoundError:
            if not os.path.lexists(folder):
                return
        except OSError:
            if not left:
                raise
        time.sleep(0.05)


def _allow_removal(folder: Path) -> None:
    """Give the user the right to change the folders below `folder`, of which a program may have made some read-only."""
    for above, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(above, name)
            with suppress(FileNotFoundError):
                mode = os.lstat(path).st_mode
                if stat.S_ISDIR(mode) and mode & stat.S_IRWXU != stat.S_IRWXU:
                    os.chmod(path, stat.S_IMODE(mode) | stat.S_IRWXU)
