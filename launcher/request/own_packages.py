"""A project's own `training` or `launcher`: how this toolkit's processes avoid it, and how its programs get it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

NAMES = ("training", "launcher")

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds both packages of this toolkit."""

loaded_at_start: frozenset[str] = frozenset(sys.modules)
"""The modules of a bare interpreter; set when a rank starts (`launcher.rank.worker.enter`)."""

IMPORT_OURS = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launcher, training; sys.path.pop(0); "
"""First statements of each process of this toolkit: PYTHONPATH may lead to a user's package of the same name."""

_RUN_MODULE = IMPORT_OURS + "import runpy; sys.argv.pop(0); runpy._run_module_as_main(sys.argv[0])"


def command(module: str, *args: str) -> list[str]:
    """The command that runs ``python -P -m module args`` with this toolkit's packages, whatever PYTHONPATH holds."""
    return [sys.executable, "-P", "-c", _RUN_MODULE, module, *args]


def spec_in(folder: Path | str, name: str) -> ModuleSpec | None:
    """Find the module `name` in `folder` alone, without importing it."""
    return PathFinder.find_spec(name, [str(folder)])


def code_of(folder: Path | str, name: str) -> Path | None:
    """The file by which `folder` has a package or module `name`; a folder without any Python file is none."""
    spec = spec_in(folder, name)
    if spec is None:
        return None
    if spec.origin and spec.has_location:
        return Path(spec.origin)
    package = Path(folder, name)
    return next((file for pattern in ("*.py", "*/*.py") for file in sorted(package.glob(pattern))), None)


def find(folders: Iterable[Path | str]) -> Iterator[tuple[str, Path, Path]]:
    """Yield name, folder and file of each package in `folders` that is called like one of ours and is no copy of it."""
    importlib.invalidate_caches()
    for name in NAMES:
        for folder in folders:
            code = code_of(folder, name)
            if code is not None and not _is_ours(code, name):
                yield name, Path(folder), code


def _is_ours(code: Path, name: str) -> bool:
    """Whether `code` is this toolkit's package, or a snapshot of it."""
    ours = ROOT / name / "__init__.py"
    return code.name == ours.name and code.is_file() and code.read_bytes() == ours.read_bytes()


def make_regular(folders: Iterable[Path | str]) -> None:
    """Add the ``__init__.py`` that a project's own package in the snapshot lacks.

    Python prefers a package with that file, which ours has, to a folder without it that comes earlier on sys.path.
    """
    for name, folder, code in find(folders):
        package = folder / name
        if package in code.parents and not os.path.islink(package):  # the copy's alone
            (package / "__init__.py").touch()


def give_way(folders: Iterable[Path | str]) -> None:
    """Forget modules that the program's own files in `folders` hide: of this toolkit, and of the standard library.

    A program imports its own ``random.py`` though this toolkit has imported Python's; not if a bare interpreter has imported
    it already. Code of this toolkit keeps its references; it must not import from a forgotten package afterwards.
    """
    places = list(folders)
    hidden = {name for name, _, _ in find(places)}
    loaded = {name.partition(".")[0] for name in sys.modules} - loaded_at_start - {"__main__", "__mp_main__"}
    for place in places:
        hidden |= {name for name in loaded & _names_in(place) if _hides(place, name)}
    for package in hidden:
        for module in [m for m in sys.modules if m == package or m.startswith(f"{package}.")]:
            del sys.modules[module]


def _names_in(folder: Path | str) -> set[str]:
    """The names that modules in `folder` can have."""
    try:
        return {entry.name.partition(".")[0] for entry in os.scandir(folder)}
    except OSError:
        return set()


def _hides(folder: Path | str, name: str) -> bool:
    """Whether `folder` has a module `name` that is not the one imported already."""
    code = code_of(folder, name)
    loaded = getattr(sys.modules.get(name), "__file__", None)
    return code is not None and name not in NAMES and str(code) != loaded


def python_path_without_others() -> str | None:
    """Return PYTHONPATH without folders that hold other packages of our names; None if it has none of them."""
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.environ.get("PYTHONPATH") else []
    others = {str(folder) for _, folder, _ in find([Path(folder) for folder in folders])}
    if not others:
        return None
    return os.pathsep.join(folder for folder in folders if str(Path(folder)) not in others)


def relocate(moved: Mapping[str, str]) -> None:
    """Replace entries of sys.path by their copies; copies of folders that are not there come last.

    Import hooks of editable installs come after sys.path, so a copy of their package is found before it.
    """
    if moved:
        sys.path[:] = [moved.get(entry, entry) for entry in sys.path]
        sys.path += [copy for copy in moved.values() if copy not in sys.path]


def for_children(moved: Mapping[str, str]) -> list[str]:
    """Return the copies in `moved` that may be on PYTHONPATH, which comes before the libraries: those that hide none."""
    if not moved:
        return []
    libraries = set(sys.stdlib_module_names).union(*(_modules_in(entry) for entry in sys.path if entry not in moved))
    return [copy for copy in moved.values() if not _modules_in(copy) & libraries]


def _modules_in(folder: str) -> set[str]:
    """The names of modules in `folder`, and of folders that can be packages."""
    try:
        with os.scandir(folder) as found:
            names = {entry.name for entry in found if entry.name.endswith((".py", ".so")) or entry.is_dir()}
    except OSError:
        return set()
    return {name for name in (name.partition(".")[0] for name in names) if name.isidentifier()} - {"__pycache__"}


@contextmanager
def on_path(folders: Sequence[str]) -> Iterator[None]:
    """Put `folders` first on sys.path; they stay after an error too, since a traceback may still need their sources."""
    added = [f for f in folders if f not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)
