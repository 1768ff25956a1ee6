"""Folders of this user for what is derived from other files: indexes and answers that all commands share."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

MOST_FILES = 1000
"""Files in one folder; the oldest ones are removed."""


def user_folder(name: str, runtime: bool = False) -> Path | None:
    """Return the folder `name` of this user, made with mode 0700; None if there is none that this user alone can change.

    It lies in XDG_CACHE_HOME or ``~/.cache``; with `runtime`, in XDG_RUNTIME_DIR where that is set.
    """
    above = os.environ.get("XDG_RUNTIME_DIR", "") if runtime else ""
    above = above or os.environ.get("XDG_CACHE_HOME", "") or os.path.expanduser("~/.cache")
    if not os.path.isabs(above):  # no home is known
        return None
    folder = Path(above, "launch", name)
    try:
        if _nearest(folder).stat().st_uid != os.geteuid():  # such as the home of the user who called sudo
            return None
        for each in (folder.parent, folder):
            if not each.is_dir():
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = each.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
                return None
    except OSError:
        return None
    return folder


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def remove_old(folder: Path) -> None:
    """Remove the oldest files of `folder` if it has more than `MOST_FILES`."""
    with suppress(OSError):
        entries = list(os.scandir(folder))
        if len(entries) > MOST_FILES:
            entries.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime)
            for entry in entries[: len(entries) - MOST_FILES]:
                with suppress(OSError):
                    os.unlink(entry)
