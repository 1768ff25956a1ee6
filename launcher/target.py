"""From what the user typed to what every rank calls."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import BadRequest, nearest
from launcher.spec import Target

if TYPE_CHECKING:
    from training.context import Context


# ---- on the submitting side: where is it? ---------------------------------------------------------------------------


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
    if name.endswith(".py") and ":" not in name:
        script = (cwd / name).resolve()
        if not os.path.isfile(script):
            raise BadRequest(f"no such script: {name} (looked for {script}).")
        _parse(script)
        return Target("script", str(script), tuple(args), source=(str(script),)), script.parent
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
    with _on_path([str(cwd)]):
        importlib.invalidate_caches()
        folder: Path | None = None
        parts = module.split(".")
        spec = _find_spec(parts[0])
        for part in parts[1:]:
            # Looking below a package would import it; its folder says as much.
            if spec is None or not spec.submodule_search_locations:
                spec = None
                break
            folder = Path(next(iter(spec.submodule_search_locations)))
            spec = _spec_in(folder, part)
        if spec is not None and spec.submodule_search_locations and asked.startswith("-m "):
            spec = _spec_in(Path(next(iter(spec.submodule_search_locations))), "__main__")
    if spec is None or not spec.origin or not spec.has_location:
        check_shadowing([str(cwd)])  # ours may have been found where theirs was meant
        where = folder or cwd
        near = nearest(parts[-1], [p.stem for p in where.glob("*.py")] + [p.parent.name for p in where.glob("*/*.py")])
        raise BadRequest(
            f"target {asked!r}: there is no module {module!r} in {where} or among the installed ones{near}."
        )
    return Path(spec.origin)


def _find_spec(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _spec_in(folder: Path, name: str) -> Any:
    return importlib.machinery.PathFinder.find_spec(name, [str(folder)])


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
    origin = origin.resolve()
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")}
    if any(Path(folder).resolve() in origin.parents for folder in installed if folder):
        return None
    above = module.count(".") + (origin.name == "__init__.py" or origin.name == "__main__.py")
    return origin.parents[above]


def check_shadowing(path: Sequence[str]) -> None:
    """Refuse a project whose own ``training`` or ``launcher`` package would be taken for ours, or ours for it.

    Raises:
        BadRequest: both are named.
    """
    for package in ("training", "launcher"):
        ours = _find_spec(package)
        for folder in path:
            theirs = _spec_in(Path(folder), package)
            if theirs is None or ours is None:
                continue
            # Without an __init__.py, a folder of that name is a package only if there is code in it.
            origin = theirs.origin or next(Path(folder, package).glob("*.py"), None)
            if origin and Path(origin).resolve() != Path(ours.origin).resolve():
                raise BadRequest(
                    f"two packages are called {package!r}: yours at {origin} and this toolkit's at {ours.origin}."
                    f" A rank can import only one of them. Rename yours, or move it into a package of its own"
                    f" (myproject.{package})."
                )


def imports_of(files: Sequence[str]) -> list[str]:
    """The absolute import statements found anywhere in `files`, as source lines, each once, in order."""
    found: dict[str, None] = {}
    for file in files:
        try:
            tree = ast.parse(Path(file).read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
                if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                    continue
                found[ast.unparse(node)] = None
    return list(found)


# ---- on the working side: call it -----------------------------------------------------------------------------------


def call(target: Target, pickle: Path, context: Callable[[], Context]) -> Any:
    """Run `target` in this process and return what it returns; `context` makes the Context where one is asked for."""
    with _on_path(target.path):
        match target.kind:
            case "script":
                with _argv([target.name, *target.args]), _on_path([str(Path(target.name).parent)]):
                    runpy.run_path(target.name, run_name="__main__")
                return None
            case "module":
                with _argv([target.name, *target.args]):
                    runpy.run_module(target.name, run_name="__main__", alter_sys=True)
                return None
            case "value":
                import cloudpickle

                function = cloudpickle.loads(pickle.read_bytes())
            case "function":
                function = load(target.name)
        return function(*arguments(function, target.args, context))


def load(name: str) -> Callable[..., Any]:
    """Import the function called ``module:function``.

    Raises:
        BadRequest: the module cannot be imported (its own traceback, short), has no such attribute, or it is not a function.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # exit(0) while it is imported would pass for a success
        raise BadRequest(f"the target's module {module!r} cannot be imported:\n{short_traceback(error)}") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise BadRequest(f"{module} has no {path!r}{nearest(part, vars(found))}.")
        found = getattr(found, part)
    if not callable(found):
        raise BadRequest(f"{name} is {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]


def short_traceback(error: BaseException) -> str:
    """The traceback from the target's first frame on: how this package and runpy came to call it is no news."""
    ours = (str(Path(__file__).parent), "<frozen runpy>", "<frozen importlib", importlib.__file__)
    report = traceback.TracebackException.from_exception(error)
    frames = list(report.stack)
    while len(frames) > 1 and frames[0].filename.startswith(ours):
        del frames[0]
    if isinstance(error, ImportError) and frames and frames[0].filename.startswith(ours):
        report.stack = traceback.StackSummary()  # the target itself is not there
    elif frames and not frames[0].filename.startswith(ours):
        report.stack = traceback.StackSummary.from_list(frames)
    return "".join(report.format())


def signature(function: Callable[..., Any]) -> tuple[bool, type | None]:
    """Return whether `function` takes a Context, and the config dataclass it takes after it.

    Raises:
        BadRequest: it needs other arguments than ``()``, ``(Context)`` or ``(Context, config dataclass)``.
    """
    required = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    named = getattr(function, "__qualname__", repr(function))
    if any(
        each(function)
        for each in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    ):
        raise BadRequest(f"{named} only begins when it is awaited or iterated; a target is a plain function.")
    if not required:
        return False, None
    if len(required) > 2 or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise BadRequest(
            f"{named} needs the arguments {', '.join(p.name for p in required)}. A target takes nothing, a Context, or a"
            " Context and one config dataclass; give the others defaults."
        )
    if len(required) == 1:
        return True, None
    config = required[1].annotation
    if isinstance(config, str):
        # Only this one: the Context's annotation may be a name that is imported for type checkers alone.
        with suppress(NameError, AttributeError):
            config = eval(config, getattr(function, "__globals__", {}))
    if not (isinstance(config, type) and is_dataclass(config)):
        raise BadRequest(
            f"{named}: its second argument {required[1].name!r} needs a dataclass as annotation, whose fields become flags."
        )
    return True, config


def arguments(function: Callable[..., Any], args: Sequence[str], context: Callable[[], Context]) -> list[Any]:
    """Return the positional arguments for `function`, its flags parsed from `args`.

    Raises:
        BadRequest: the function takes no flags but some were given.
        training.errors.ConfigError: a flag is unknown or its value is wrong.
    """
    takes_context, config = signature(function)
    if config is not None:
        from training.flags import parse

        return [context(), parse(config, args)]
    # A function that takes a Context reads what followed it from ctx.args; one that takes nothing can read nothing.
    if args and not takes_context:
        raise BadRequest(f"the target takes no arguments, but {' '.join(args)!r} followed it.")
    return [context()] if takes_context else []


def check(target: Target) -> None:
    """Import the target and check its flags and its own ``check(config)``; for engines that are far away.

    Raises:
        BadRequest, training.errors.ConfigError: with the text for the user.
    """
    if target.kind != "function":
        return
    with _on_path(target.path):
        function = load(target.name)
        _, config = signature(function)
        if config is None:
            return
        from training.flags import parse

        parsed: Any = parse(config, target.args)
        if hasattr(function, "check"):
            function.check(parsed)


@contextmanager
def _on_path(folders: Sequence[str]) -> Iterator[None]:
    """Put `folders` first on sys.path; they stay after an error too, since a traceback may still need their sources."""
    added = [f for f in folders if f not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            if folder in sys.path:
                sys.path.remove(folder)


@contextmanager
def _argv(argv: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = before


def python_path(root: Path, code: Path, first: Path) -> tuple[str, ...]:
    """Map `first` and the entries of sys.path that lie in the project `root` into its snapshot at `code`."""
    wanted = [str(first), *sys.path]
    mapped: dict[str, None] = {}
    for entry in wanted:
        folder = Path(os.path.abspath(entry or "."))
        if folder == Path(sysconfig.get_path("scripts")) or "site-packages" in folder.parts:
            continue
        if folder == root or root in folder.parents:
            mapped[str(code / folder.relative_to(root))] = None
    return tuple(mapped)
