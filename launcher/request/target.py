"""The target as every rank has it: what it takes, and the call."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import inspect
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import BadRequest, nearest
from launcher.request import own_packages
from launcher.request.spec import Target

if TYPE_CHECKING:
    from training.context import Context


def call(target: Target, pickle: Path, context: Callable[[], Context]) -> Any:
    """Run `target` in this process and return what it returns; `context` makes the Context where one is asked for."""
    match target.kind:
        case "script":
            sys.path[:0] = [folder for folder in target.path if folder not in sys.path]
            own_packages.give_way([*target.path, Path(target.name).parent])
            run_script(Path(target.name), target.args)
            return None
        case "module":
            own_packages.give_way(target.path)
            run_module(target.name, target.args, target.path)
            return None
    with on_path(target.path):
        match target.kind:
            case "value":
                import cloudpickle

                function = cloudpickle.loads(pickle.read_bytes())
            case "function":
                function = load(target.name)
        return function(*arguments(function, target.args, context))


def run_script(script: Path, args: Sequence[str]) -> None:
    """Run `script` as ``python script.py`` does. `sys` keeps what that changes until this process ends."""
    if sys.path[:1] != [str(script.parent)]:
        sys.path.insert(0, str(script.parent))
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=str(script), __cached__=None, __loader__=SourceFileLoader("__main__", str(script)))
    _run_main(main, compile(script.read_bytes(), str(script), "exec", dont_inherit=True), [str(script), *args])


def run_module(name: str, args: Sequence[str], path: Sequence[str]) -> None:
    """Run a module as ``python -m name`` does, `path` first on sys.path."""
    sys.path[:0] = [folder for folder in path if folder not in sys.path]
    sys.argv = ["-m", *args]  # as a package sees it that is imported on the way to the module
    _, spec, code = runpy._get_module_details(name)  # type: ignore[attr-defined]
    main = types.ModuleType("__main__")
    main.__dict__.update(
        __file__=spec.origin, __cached__=spec.cached, __loader__=spec.loader, __package__=spec.parent, __spec__=spec
    )
    _run_main(main, code, [spec.origin, *args])


def _run_main(main: types.ModuleType, code: types.CodeType, argv: list[str]) -> None:
    """Run `code` as the module ``__main__``.

    `runpy` would put the former ``__main__`` back. Exit handlers, threads and `multiprocessing`, which has a name of its
    own for it, look the program's classes up in it.
    """
    main.__dict__["__builtins__"] = builtins
    sys.argv = argv
    sys.modules["__main__"] = main
    if "multiprocessing" in sys.modules:
        sys.modules["__mp_main__"] = main
    exec(code, main.__dict__)


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
            raise BadRequest(f"{module} has no {path!r}{nearest(part, dir(found))}.")
        found = getattr(found, part)
    if not callable(found):
        raise BadRequest(f"{name} is {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]


def short_traceback(error: BaseException) -> str:
    """The traceback from the target's first frame on: how this package and runpy came to call it is no news."""
    ours = (str(Path(__file__).parents[1]), "<frozen runpy>", "<frozen importlib", importlib.__file__)
    report = traceback.TracebackException.from_exception(error)
    frames = list(report.stack)
    while len(frames) > 1 and frames[0].filename.startswith(ours):
        del frames[0]
    if isinstance(error, ImportError | SyntaxError) and frames and frames[0].filename.startswith(ours):
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
    with on_path(target.path):
        function = load(target.name)
        _, config = signature(function)
        if config is None:
            return
        from training.flags import parse

        parsed: Any = parse(config, target.args)
        if hasattr(function, "check"):
            function.check(parsed)


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
