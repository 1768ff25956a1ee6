"""The target as every rank has it: found, checked and called."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import linecache
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.errors import BadRequest, nearest
from launcher.request import own_packages
from launcher.request.binding import call_of
from launcher.request.spec import Target
from training.files import read_json

if TYPE_CHECKING:
    from training.context import Context


def call(target: Target, pickle: Path, context: Callable[[], Context], values: Path = Path()) -> Any:
    """Run `target` in this process and return what it returns; `context` makes the Context where one is asked for.

    `pickle` holds a function that travels by value, and `values` the values of its parameters if they are pickled.
    """
    own_packages.relocate(target.moved)
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
        case "command":
            run_command(target.name, target.args)
    with own_packages.on_path(target.path):
        match target.kind:
            case "value":
                import cloudpickle

                show_sources(pickle.with_name("sources.json"))
                function = cloudpickle.loads(pickle.read_bytes())
            case "function":
                function = load(target.name)
        return call_of(target, function, values).run(function, context)


def run_command(program: str, args: Sequence[str]) -> NoReturn:
    """Run a program in place of this process: it gets the SIGTERM of the rank, and its end is that of the rank.

    Raises:
        BadRequest: this machine has no such program.
    """
    try:
        process = subprocess.Popen([program, *args])
    except OSError as error:
        raise BadRequest(f"{program}: {error.strerror or error} on {socket.gethostname()}.") from None
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    status = process.wait()
    if status < 0:
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    raise SystemExit(status)


def show_sources(file: Path) -> None:
    """Have tracebacks, `pdb` and `inspect` find the source of functions that were defined in notebook cells."""
    with suppress(OSError, ValueError):
        for name, text in (read_json(file) or {}).items():
            linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name


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
    main.__dict__.update(__builtins__=builtins, __annotations__={})
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


def check(target: Target, values: Path) -> None:
    """Import the target and check its arguments and its own ``check(config)``; for engines that are far away.

    Raises:
        BadRequest, training.errors.ConfigError: with the text for the user.
    """
    if target.kind != "function":
        return
    own_packages.relocate(target.moved)
    with own_packages.on_path(target.path):
        function: Any = load(target.name)
        made = call_of(target, function, values)
        configs = made.configs() if hasattr(function, "check") else []
        if configs:
            function.check(*configs)
