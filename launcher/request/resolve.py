"""From what the user typed to a target, and the folder that travels with it; nothing of the user's is imported."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import BadRequest, nearest
from launcher.request import own_packages
from launcher.request.code.roots import holds_installed, is_installed
from launcher.request.own_packages import ROOT, code_of, on_path, spec_in
from launcher.request.ray_train import refuse_train_function
from launcher.request.spec import Target


def resolve(name: str, args: Sequence[str], cwd: Path) -> tuple[Target, Path | None]:
    """Find the target `name` without importing it, and the folder of the project it belongs to.

    The folder is None for code that is installed in the environment: nothing of it needs to travel.

    Raises:
        BadRequest: there is no such script, module or function.
    """
    if name.startswith("-m "):
        module = name[3:]
        origin = _find_module(module, cwd, f"-m {module}")
        if origin.suffix == ".py":
            _parse(origin)
        return Target("module", module, tuple(args), source=(str(origin),)), _project_folder(origin, module)
    if name.startswith("-- "):
        program = name[3:]
        found = str((cwd / program).resolve()) if os.sep in program else program
        return Target("command", found, tuple(args)), None
    if name.endswith(".py") and ":" not in name:
        script = (cwd / name).resolve()
        if not os.path.isfile(script):
            raise BadRequest(f"no such script: {name} (looked for {script}).")
        _parse(script)
        folder = None if is_installed(script) else script.parent
        return Target("script", str(script), tuple(args), source=(str(script),)), folder
    module, colon, function = name.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
        raise BadRequest(
            f"target {name!r}: write package.module:function, path/to/script.py or -m module."
            + (f" Did you mean ./{name}.py?" if os.path.isfile(cwd / f"{name}.py") else "")
        )
    origin = _find_module(module, cwd, name)
    _check_function(origin, module, function)
    return Target("function", name, tuple(args), source=(str(origin),)), _project_folder(origin, module)


def _find_module(module: str, cwd: Path, asked: str) -> Path:
    with on_path([str(cwd)]):
        importlib.invalidate_caches()
        folder: Path | None = None
        parts = module.split(".")
        spec = _find_spec(parts[0], as_program=asked.startswith("-m "))
        for part in parts[1:]:
            # Looking below a package would import it; its folder says as much.
            if spec is None or not spec.submodule_search_locations:
                spec = None
                break
            folder = Path(next(iter(spec.submodule_search_locations)))
            spec = spec_in(folder, part)
        if spec is not None and spec.submodule_search_locations and asked.startswith("-m "):
            spec = spec_in(Path(next(iter(spec.submodule_search_locations))), "__main__")
    if spec is None or not spec.origin or not spec.has_location:
        for name, _, code in own_packages.find([cwd]):
            if name == parts[0]:
                raise _shadowed(name, code)  # this toolkit's package may hide one of the project
        where = folder or cwd
        near = nearest(parts[-1], [p.stem for p in where.glob("*.py")] + [p.parent.name for p in where.glob("*/*.py")])
        raise BadRequest(
            f"target {asked!r}: there is no module {module!r} in {where} or among the installed ones{near}."
        )
    return Path(spec.origin)


def _find_spec(name: str, as_program: bool) -> Any:
    if as_program and name in own_packages.NAMES:
        # In this process the name stands for this toolkit's package; a program's own comes first.
        for folder in sys.path:
            if code_of(folder, name) is not None:
                return spec_in(folder, name)
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _check_function(origin: Path, module: str, function: str) -> None:
    """Refuse a misspelt function without importing the module; a name that is made at run time passes."""
    if origin.suffix != ".py":
        return
    tree = _parse(origin)
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imported = {
        a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }
    first = function.split(".")[0]
    if first not in defined | bound | imported and "*" not in imported and "__getattr__" not in defined:
        public = sorted(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_"))
        raise BadRequest(
            f"{origin} has no function {first!r}{nearest(first, public)}. It has: {', '.join(public) or 'none'}"
            f" (as {module}:NAME)."
        )
    refuse_train_function(tree, function)


def _parse(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes())
    except SyntaxError as error:
        where = f"{file}:{error.lineno}" if error.lineno else file
        line = f"\n    {error.text.strip()}" if error.text else ""
        raise BadRequest(f"{where}: the target is not valid Python: {error.msg}{line}") from None
    except ValueError as error:
        raise BadRequest(f"{file}: the target is not valid Python: {error}") from None


def _project_folder(origin: Path, module: str) -> Path | None:
    real = origin.resolve()
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    if any(Path(folder).resolve() in real.parents for folder in installed if folder) or is_installed(real):
        return None
    above = module.count(".") + (origin.name == "__init__.py" or origin.name == "__main__.py")
    # Not of the real path: a package may be a link with another name.
    return Path(os.path.abspath(origin)).parents[above]


def check_shadowing(target: Target, project: Path) -> None:
    """Refuse a function of a `project` whose own `training` or `launcher` package it would not find.

    A rank that calls a function has imported this toolkit's packages; a script or module gets a process without them.

    Raises:
        BadRequest: both packages are named.
    """
    if target.kind in ("script", "module"):
        return
    for name, _, code in own_packages.find([project]):
        raise _shadowed(name, code)


def _shadowed(name: str, code: Path) -> BadRequest:
    return BadRequest(
        f"two packages are called {name!r}: yours at {code} and this toolkit's at {ROOT / name / '__init__.py'}."
        f" The rank of a function can import only one of them. Rename yours, move it into a package of its own"
        f" (myproject.{name}), or make the target a script (`launch train.py`) or a module (`launch -m package.module`),"
        f" which finds yours."
    )


def python_path(root: Path, code: Path, first: Path) -> tuple[str, ...]:
    """Map `first` and the entries of sys.path that lie in the project `root` into its snapshot at `code`."""
    wanted = [str(first), *sys.path]
    mapped: dict[str, None] = {}
    for entry in wanted:
        folder = Path(os.path.abspath(entry or "."))
        if holds_installed(folder):
            continue
        if folder == root or root in folder.parents:
            mapped[str(code / folder.relative_to(root))] = None
    return tuple(mapped)
