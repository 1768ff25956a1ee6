"""Record which libraries a rank imports, for the standby interpreter of its next attempt."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from launcher.request.own_packages import NAMES, ROOT

CHANGED = "!"
"""The record's line after which imports count no more: the program has changed its environment."""

LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in dict.fromkeys(
        (
            *(path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")),
            *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")),
        )
    )
)
"""Folders of libraries; site-packages may lie inside the folder of the standard library, so they come first."""

OURS = tuple(f"{ROOT / name}{os.sep}" for name in NAMES)


def record_imports(descriptor: int) -> None:
    """Write the name of each library module that this process imports from now on to `descriptor`, one a line.

    An audit hook (PEP 578) is called before the code of a module runs and changes nothing. The record ends with `CHANGED`
    once code outside of the libraries sets an environment variable, which later imports may read.
    """
    recording = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("exec", "os.putenv", "os.unsetenv") or not recording[0]:
            return
        if event == "exec":
            line = module_of(arguments[0].co_filename)
        elif _by_library():
            return
        else:
            line, recording[0] = CHANGED, False
        if line:
            with suppress(OSError):
                os.write(descriptor, line.encode() + b"\n")

    sys.addaudithook(hook)


def module_of(file: str) -> str:
    """Return the dotted name of the library module in `file`; empty for any other file."""
    folder = next((folder for folder in LIBRARIES if file.startswith(folder)), "")
    if not folder or not file.endswith(".py"):
        return ""
    parts = file[len(folder) : -len(".py")].split(os.sep)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts) if all(map(str.isidentifier, parts)) else ""


def _by_library() -> bool:
    """Whether the innermost frame outside of this file and of `os` is that of an installed library, or ours."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename in (__file__, os.__file__, "<frozen os>"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith((*LIBRARIES, *OURS, "<frozen"))


def importable(record: str, target: str, user_folders: Sequence[str]) -> list[str]:
    """Return the modules of a record that a standby imports, in order; none if a file of the user hides one of them.

    Args:
        target: the name or the file of the program itself, which may be an installed module.
        user_folders: the folders that come before the libraries on sys.path of the rank.
    """
    lines = record.partition(f"{CHANGED}\n")[0].split()
    ours = (target, module_of(target), "launcher", "training", "__main__")
    names = [name for name in dict.fromkeys(lines) if name not in ours and name.partition(".")[0] not in ours]
    tops = {name.partition(".")[0] for name in names}
    return [] if any(PathFinder.find_spec(top, user_folders) is not None for top in tops) else names
