"""Recognise a function that is written for a worker of Ray Train, from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from launcher.errors import BadRequest

WORKER_ONLY = frozenset(
    (
        *("report", "get_context", "get_checkpoint", "get_all_reported_checkpoints", "get_dataset_shard"),
        *(
            "get_preemption_info",
            "prepare_model",
            "prepare_data_loader",
            "prepare_trainer",
            "get_device",
            "get_devices",
        ),
        *("barrier", "broadcast_from_rank_zero", "RayTrainReportCallback", "RayDDPStrategy", "RayFSDPStrategy"),
    )
)
"""Names below ``ray.train`` that raise outside of a train function, as the reference of Ray Train 2.60 says."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def refuse_train_function(tree: ast.Module, function: str, modules: Mapping[str, str] | None = None) -> None:
    """Refuse a function that Ray Train would have to call; one that takes a Context is left alone.

    Calls in a ``try`` are not counted, nor those of functions inside it, which may be given to a trainer.

    Args:
        tree: the source of its module, or of itself.
        modules: what names of that source stand for if it does not import them, such as "train" for "ray.train".

    Raises:
        BadRequest: the call, its line, and how to start such a function.
    """
    functions = {node.name: node for node in tree.body if isinstance(node, _Function)}
    if function not in functions or _takes_context(functions[function]):
        return
    names = dict(modules or {}) | dict(_imported(tree))
    pending, seen = [function], {function}
    while pending:
        for line, called in _calls(functions[pending.pop()]):
            first, _, rest = called.partition(".")
            full = ".".join(filter(None, [names.get(first, first), rest]))
            if full.startswith(("ray.train.", "ray.air.session.")) and full.rpartition(".")[2] in WORKER_ONLY:
                raise BadRequest(
                    f"{function} is written for Ray Train: line {line} calls {called}(), which works only inside a trainer's"
                    f" `fit()`. `launch` starts ranks as torchrun does. Make the target a function that calls"
                    f" TorchTrainer({function}, train_loop_config={{...}}, scaling_config=ScalingConfig(num_workers=0)).fit(),"
                    f" which runs {function} in each rank; or take a Context and call ctx.log(step, ...) instead."
                )
            if not rest and first in functions and first not in seen:
                seen.add(first)
                pending.append(first)


def refuse_train_object(function: Callable[..., Any]) -> None:
    """The same for a function that is given as an object, if its source can be read.

    Raises:
        BadRequest: as `refuse_train_function`.
    """
    function = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, built in, or a lambda within an expression
        return
    names = {}
    for name, value in getattr(function, "__globals__", {}).items():
        if isinstance(value, ModuleType):
            names[name] = value.__name__
        elif str(getattr(value, "__module__", "")).startswith("ray.train."):
            names[name] = f"{value.__module__}.{getattr(value, '__name__', name)}"
    refuse_train_function(tree, function.__name__, names)


def _takes_context(function: _Function) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return any(
        each.arg in ("ctx", "context") or (each.annotation is not None and "Context" in ast.unparse(each.annotation))
        for each in arguments
    )


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The names that imports anywhere in the source bind, and what they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                yield (each.asname, each.name) if each.asname else (each.name.partition(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for each in node.names:
                yield each.asname or each.name, f"{node.module}.{each.name}"


def _calls(function: _Function) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of each call that the function makes itself, outside of a ``try``."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, _Function | ast.ClassDef | ast.Lambda | ast.Try):
            continue
        if isinstance(node, ast.Call) and (name := _dotted(node.func)):
            yield node.lineno, name
        pending[:0] = ast.iter_child_nodes(node)


def _dotted(node: ast.AST) -> str:
    """The name that an expression such as ``ray.train.report`` is, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := _dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""
