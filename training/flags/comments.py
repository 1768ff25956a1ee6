"""The comments beside the fields of a dataclass and the parameters of a function, which are the help of their flags."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

_DIRECTIVES = ("noqa", "type:", "fmt:", "pragma:", "pylint:")
"""Beginnings of comments that are for programs."""


def of_fields(cls: type[Any]) -> dict[str, str]:
    """Return the comment on the line of each field; empty if there is no source, as for a class made in a shell."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= _comments_in(_source(base), inspect.get_annotations(base))
    return found


def of_parameters(function: Callable[..., Any]) -> dict[str, str]:
    """Return the comment on the line of each parameter of a function; empty if there is no source."""
    source = _source(function)
    try:
        node = ast.parse(source).body[0]
    except (SyntaxError, IndexError):  # a lambda inside an expression; no source
        return {}
    if not isinstance(node, ast.FunctionDef):
        return {}
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    head = "\n".join(source.splitlines()[: node.body[0].lineno - 1])
    return _comments_in(head, [each.arg for each in arguments])


def _source(thing: Any) -> str:
    try:
        return textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        return ""


def _comments_in(source: str, names: Collection[str]) -> dict[str, str]:
    """Return the comments by the name that their line begins with."""
    found: dict[str, str] = {}
    previous = ""
    lines: dict[int, str] = {}
    with suppress(tokenize.TokenError, SyntaxError):  # the head of a function ends early
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            first = not token.line[: token.start[1]].strip()
            if token.type == tokenize.NAME and first and token.string in names:
                lines.setdefault(token.start[0], token.string)
            elif token.type == tokenize.COMMENT:
                text = token.string.lstrip("# ").strip()
                if text.startswith(_DIRECTIVES):
                    continue
                if token.start[0] in lines:
                    previous = lines[token.start[0]]
                    found[previous] = text
                elif previous and token.line.strip().startswith("#") and token.start[1] > 4:
                    found[previous] += " " + text  # a comment that continues on the next line
    return found
