"""The project that a folder belongs to."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path

from launcher.request.code import checkout

MARKERS = ("pyproject.toml", "setup.py", "setup.cfg")


def project_root(folder: Path, cwd: Path | None = None) -> Path:
    """Return the root of the project that holds `folder`.

    It is the git checkout; outside of git, the nearest folder with a ``pyproject.toml``, ``setup.py`` or ``setup.cfg``;
    else `cwd`, if that holds the folder; else the folder that holds its outermost package. The home folder, a folder
    above it and the folder of temporary files are the project of nothing but themselves.
    """
    top = checkout.top_of(folder)
    if top is not None and (not is_shared(top) or top == folder):
        return top
    for above in (folder, *folder.parents):
        if is_shared(above):
            break
        if any((above / name).is_file() for name in MARKERS):
            return above
    if cwd is not None and not is_shared(cwd) and folder.is_relative_to(cwd):
        return cwd
    while (folder / "__init__.py").is_file() and not is_shared(folder.parent):
        folder = folder.parent
    return folder


def is_shared(folder: Path) -> bool:
    """Whether many projects lie in the folder: the home folder, one above it, or that of temporary files."""
    home = Path(os.path.expanduser("~"))
    return folder == Path(tempfile.gettempdir()) or folder == home or folder in home.parents


def is_installed(path: Path) -> bool:
    """Whether `path` lies in the site-packages of this environment or of another one."""
    return any(part in path.parts for part in ("site-packages", "dist-packages"))


def holds_installed(folder: Path) -> bool:
    """Whether an entry of sys.path holds installed packages, or the commands of this environment."""
    return folder == Path(sysconfig.get_path("scripts")) or is_installed(folder)
