"""List folders of which git knows nothing, within limits."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from launcher.request.code import checkout
from launcher.request.code.places import Places

MAX_SCAN = 20_000
"""Entries that are looked at for code in one folder of which git knows nothing; what lies deeper is linked."""

MAX_IGNORED = 4_000
"""The same for a folder that git ignores, or outside of the project; also files of a checkout that is no submodule."""

MAX_TOTAL = 40_000
"""The same for all such folders; beyond, `MAX_LATER` a folder."""

MAX_LATER = 200

SKIPPED = (".git", "__pycache__")
"""What no program reads beside its code: a copy would be wrong, or is made again."""


class Scan:
    """Lists folders with all that lies below, until `MAX_TOTAL` entries were listed."""

    def __init__(self, places: Places) -> None:
        self.places, self.scanned = places, 0

    def __call__(self, path: Path, name: str, limit: int) -> tuple[dict[str, os.DirEntry[str]], set[str]]:
        """Return the entries below `path`, called `name` in the copy, by their names there, and folders not looked at.

        Hidden folders, environments, checkouts and the like are among the entries; what lies in them is not.
        """
        limit = max(MAX_LATER, min(limit, MAX_TOTAL - self.scanned))
        listed: dict[str, os.DirEntry[str]] = {}
        unknown = set()
        todo = deque([(str(path), name)])
        while todo:
            folder, prefix = todo.popleft()
            if len(listed) >= limit or (len(found := entries(folder)) > limit and folder != str(path)):
                unknown.add(prefix)
                continue
            self.scanned += len(found)
            for entry in found:
                each = join(prefix, entry.name)
                listed[each] = entry
                if (
                    entry.is_dir(follow_symlinks=False)
                    and not self.places.excludes(entry.path)
                    and not (entry.name in SKIPPED or is_checkout(entry) or is_opaque(Path(entry.path)))
                ):
                    todo.append((entry.path, each))
        return listed, unknown


def entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """The entries of a folder by name; none if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError:
        return []


def is_opaque(path: Path) -> bool:
    """Whether a folder without tracked files is never looked through: hidden, an environment, or the directory of a run."""
    if path.name.startswith(".") or path.name in ("node_modules", "site-packages"):
        return True
    return is_environment(path) or (os.path.exists(path / "plan.json") and os.path.isdir(path / "code"))


def is_environment(path: Path) -> bool:
    """Whether the folder is a virtual environment, or one of conda."""
    return any(os.path.exists(path / name) for name in ("pyvenv.cfg", "conda-meta"))


def is_checkout(entry: os.DirEntry[str]) -> bool:
    """Whether the entry of a folder is a git checkout."""
    return os.path.lexists(os.path.join(entry.path, ".git")) and checkout.git_dir_of(Path(entry.path)) is not None


def join(folder: str, name: str) -> str:
    """Return ``folder/name``, or `name` if there is no folder."""
    return f"{folder}/{name}" if folder else name
