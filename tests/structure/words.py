"""Find words and identifiers of the first edition that the style guide replaced."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.structure.measure import last_name

PACKAGES = ("launcher", "training")

NAMES = frozenset(
    [
        "Fate",
        "FULL",
        "REFUSED",
        "UNHEARD",
        "LAST_WORDS",
        "Place",
        "Watch",
        "Beat",
        "Pulse",
        "Patient",
        "HandsOff",
        "Room",
        "room",
        "hire",
        "mine",
        "theirs",
        "away",
        "here",
        "orders",
        "hear",
        "tell",
        "post",
        "times_up",
        "accuse",
        "stand_in",
        "by_itself",
        "any_shape",
        "lessons",
        "taught",
        "blind",
        "since",
    ]
)
"""Whole identifiers, case-sensitive."""

TRAINING_NAMES = frozenset({"ahead", "copied", "blocked", "pins"})
"""Whole identifiers that are replaced in `training` only; elsewhere they are ordinary words."""

PARTS = frozenset(
    [
        "seat",
        "seats",
        "setback",
        "setbacks",
        "fruitless",
        "vain",
        "struck",
        "forgive",
        "forgiven",
        "unheard",
        "told",
        "whoever",
        "lease",
        "leases",
        "enrol",
        "enrols",
        "enrolled",
        "evict",
        "evicts",
        "evicted",
        "steward",
        "stewards",
        "deaf",
        "pulse",
        "pulses",
        "theirs",
    ]
)
"""Words of identifiers, split at underscores and capitals: ``steward`` of ``steward_name`` and ``RayStewards``."""

INNOCENT = {
    "post": frozenset({"requests", "session", "client", "http", "httpx"}),
    "tell": frozenset({"file", "stream", "raw", "buffer", "handle", "study"}),
    "since": frozenset({"args", "options", "asked"}),
}
"""Objects with an attribute of that name that is allowed: HTTP, files, command-line options."""

PROSE = re.compile(
    r"\b(told|whoever|theirs|vain|fruitless|struck|setbacks?|seats?|stewards?|leases?|enrol(?:s|led|ling)?"
    r"|evict(?:s|ed|ing|ion|ions)?|forg(?:ive|ives|iven|ave)|hire[sd]?|accuse[sd]?|taught|lessons?|deaf|blind"
    r"|(?:un)?heard|hears?|tells?|luck|keepers?|(?:from|second) (?:a )?hat|of peace|at hand|lost each other"
    r"|wants? to be asked|moments? ago|(?:has|have|had) in mind|stay(?:s|ing)? away)\b",
    re.IGNORECASE,
)
"""Words and phrases of comments, docstrings and strings."""


@dataclass(frozen=True)
class Hit:
    """One replaced word in a file; `kind` is "identifier" or "prose"."""

    file: str
    line: int
    kind: str
    word: str


def parts(identifier: str) -> list[str]:
    """``RayStewards`` -> ray, stewards; ``_told`` -> told."""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Line, name, and the name of the object that it is an attribute of (else empty), of each identifier."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 1)
        match node:
            case ast.Attribute(value=value, attr=name):
                yield line, name, last_name(value)
            case ast.Name(id=name) | ast.arg(arg=name):
                yield line, name, ""
            case ast.keyword(arg=str(name)):
                yield line, name, ""
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield line, name, ""
            case ast.ImportFrom(module=str(module)):
                yield from ((line, name, "") for name in module.split("."))
            case ast.alias(name=module, asname=asname):
                yield from ((line, name, "") for name in [*module.split("."), *([asname] if asname else [])])
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield line, name, ""


def prose(source: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each comment and string."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def replaced_identifier(name: str, owner: str, package: str) -> str:
    """The replaced word in an identifier; empty if there is none."""
    if name in NAMES or (package == "training" and name in TRAINING_NAMES):
        return "" if owner in INNOCENT.get(name, ()) else name
    return next((part for part in parts(name) if part in PARTS), "")


def hits(repo: Path) -> list[Hit]:
    """All replaced words in both packages of a checkout, file names included."""
    found: list[Hit] = []
    for package in PACKAGES:
        for path in sorted((repo / package).rglob("*.py")):
            file, source = str(path.relative_to(repo)), path.read_text(encoding="utf-8")
            tree = ast.parse(source)
            named = [(1, path.stem, ""), *identifiers(tree)]
            words = ((line, replaced_identifier(name, owner, package)) for line, name, owner in named)
            found += [Hit(file, line, "identifier", word) for line, word in words if word]
            for line, text in prose(source, tree):
                for match in PROSE.finditer(text):
                    number = line + text.count("\n", 0, match.start())
                    found.append(Hit(file, number, "prose", match[0].lower()))
    return found


def report(repo: Path) -> str:
    """The count and lines of each word in each file, the file with most first."""
    found = hits(repo)
    lines = [f"{len(found)} in {len({hit.file for hit in found})} files"]
    for file, count in Counter(hit.file for hit in found).most_common():
        lines.append(f"{count:5}  {file}")
        here = [hit for hit in found if hit.file == file]
        for (kind, word), n in Counter((hit.kind, hit.word) for hit in here).most_common():
            at = sorted({hit.line for hit in here if (hit.kind, hit.word) == (kind, word)})
            lines.append(f"       {n:4}  {kind:10}  {word:14} lines {', '.join(map(str, at))}")
    return "\n".join(lines)
