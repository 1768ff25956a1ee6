"""Code outside of the project that ranks import: editable installs, and folders on PYTHONPATH."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from launcher.request.code.roots import holds_installed, is_shared, project_root
from launcher.request.own_packages import ROOT

INSTALL = "installed without -e, it would be kept from later edits"


@dataclass(frozen=True)
class Outside:
    """A folder from which modules are imported.

    Attributes:
        folder: the entry of sys.path, or the folder that holds a package which an import hook finds.
        root: its project, which is copied; the same for several folders.
        first: it comes before the standard library, as PYTHONPATH does.
        live: why no copy is made; empty: one is.
    """

    folder: Path
    root: Path
    first: bool = False
    live: str = ""


def find(project: Path, cwd: Path, as_module: bool) -> list[Outside]:
    """The folders of code that ranks import besides `project` (its root) and installed packages.

    ``python -m`` (`as_module`) imports from the current folder too.
    """
    found: dict[Path, Outside] = {}
    current = [(cwd, True, "")] if as_module and not is_shared(cwd) else []
    for folder, first, live in (*current, *_on_path(cwd), *_hooked()):
        if folder not in found and folder != ROOT and not _is_toolkit(folder) and folder.is_dir():
            root = project if folder.is_relative_to(project) else project_root(folder)
            if is_shared(root):
                live = "many projects lie in it; edits of its modules reach the run"
            found[folder] = Outside(folder, root, first, live)
    return list(found.values())


def _on_path(cwd: Path) -> Iterator[tuple[Path, bool, str]]:
    first = True
    given = {os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    for entry in sys.path:
        folder = Path(os.path.abspath(entry or cwd))
        if _is_standard(folder):
            first = False
        elif not holds_installed(folder) and (folder != cwd or str(folder) in given):
            yield folder, first, ""


def _is_standard(folder: Path) -> bool:
    """Whether the folder, or the archive, holds the standard library."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    return str(folder) in paths or re.fullmatch(r"python\d+\.zip|lib-dynload", folder.name) is not None


def _is_toolkit(folder: Path) -> bool:
    """Whether the folder holds another copy of this toolkit."""
    return all((folder / name / "__init__.py").is_file() for name in ("launcher/rank", "training/distributed"))


def _hooked() -> Iterator[tuple[Path, bool, str]]:
    """The folders of packages that the import hooks of editable installs know (setuptools, hatch, scikit-build-core)."""
    before = True
    for finder in sys.meta_path:
        if finder is PathFinder:
            before = False
            continue
        module = sys.modules.get(getattr(finder, "__module__", ""))
        for name, file in _mapping(finder, module).items():
            path = Path(os.path.abspath(file))
            while path.name in ("__init__.py", "__init__.pyi") or path.suffix == ".py":
                path = path.parent if path.name.startswith("__init__.") else path.with_suffix("")
            parts = tuple(name.split("."))
            if path.parts[-len(parts) :] == parts:
                why = f"the import hook {getattr(module, '__name__', '')} finds it before any copy; {INSTALL}"
                yield path.parents[len(parts) - 1], False, why if before else ""


def _mapping(finder: Any, module: Any) -> Mapping[str, str]:
    known = [getattr(module, "MAPPING", None), getattr(finder, "_redirections", None)]
    known.append(getattr(finder, "known_source_files", None))
    return {
        str(name): str(file)
        for mapping in known
        if isinstance(mapping, Mapping)
        for name, file in mapping.items()
        if isinstance(file, str | os.PathLike)
    }
