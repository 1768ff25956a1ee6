"""Find code that should occur once, or in one folder, in both packages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.structure.measure import last_name
from tests.structure.words import PACKAGES

ENGINES = frozenset({"local", "slurm", "ray"})

SLURM_COMMANDS = frozenset({"sbatch", "squeue", "sacct", "sinfo", "scontrol", "scancel", "srun", "salloc", "sacctmgr"})
THROUGH_SHELL = frozenset({"shell.run", "ask", "query.ask", "_scontrol", "shutil.which"})
"""Functions that start a SLURM command with the environment of every such command, and one that starts none."""


class Sources:
    """The parsed files of both packages of a checkout, by path."""

    def __init__(self, repo: Path) -> None:
        files = [path for package in PACKAGES for path in sorted((repo / package).rglob("*.py"))]
        self.texts = {str(path.relative_to(repo)): path.read_text(encoding="utf-8") for path in files}
        self.trees = {file: ast.parse(text) for file, text in self.texts.items()}

    def grep(self, pattern: str, under: str = "") -> list[str]:
        """``file:line`` of each match in the files whose path starts with `under`."""
        return [
            f"{file}:{text.count(chr(10), 0, match.start()) + 1}"
            for file, text in self.texts.items()
            if file.startswith(under)
            for match in re.finditer(pattern, text)
        ]

    def calls(self, name: str) -> list[tuple[str, ast.Call]]:
        """``file:line`` and node of each call of a function or method."""
        return [
            (f"{file}:{node.lineno}", node)
            for file, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and last_name(node.func) == name
        ]

    def slurm_commands(self) -> list[str]:
        """Starts of a SLURM command that do not go through ``shell.run`` or a function that calls it."""
        own = {"launcher/backends/slurm/shell.py"}
        found = [
            f"{file}:{getattr(node, 'lineno', 0)}"
            for file, tree in self.trees.items()
            for node in ast.walk(tree)
            if _starts_slurm_command(node)
        ]
        for name in ("run", "Popen", "call", "check_call", "check_output", "create_subprocess_exec"):
            for where, call in self.calls(name):
                if where.startswith("launcher/backends/slurm/") and where.partition(":")[0] not in own:
                    literal = bool(call.args) and isinstance(call.args[0], ast.List)  # looked at above
                    found += (
                        [where] if ast.unparse(call.func) not in ("shell.run", "asyncio.run") and not literal else []
                    )
        return found

    def event_kinds(self) -> dict[str, list[str]]:
        """The places of each kind of event: ``event("KIND", ...)``."""
        found: dict[str, list[str]] = {}
        for where, call in self.calls("event"):
            if call.args and isinstance(call.args[0], ast.Constant):
                found.setdefault(str(call.args[0].value), []).append(where)
        return found

    def device_list_parsers(self) -> list[str]:
        """Functions that split a list of visible devices at commas."""
        found = []
        for file, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    code = ast.unparse(node)
                    if ".split(',')" in code and re.search(r"\bvisible\b|CUDA_VISIBLE_DEVICES", code):
                        found.append(f"{file}:{node.lineno}")
        return found

    def engine_tests(self, outside: str) -> list[str]:
        """Comparisons of a backend with a string, and tables keyed by engine name, outside one folder."""
        return [
            f"{file}:{getattr(node, 'lineno', 0)}"
            for file, tree in self.trees.items()
            if not file.startswith(outside)
            for node in ast.walk(tree)
            if _compares_backend(node) or _is_engine_table(node)
        ]


def _starts_slurm_command(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        checked, first = ast.unparse(node.func) not in THROUGH_SHELL, node.args[:1]
    else:
        checked, first = isinstance(node, ast.List), getattr(node, "elts", [])[:1]
    words = [str(word.value).split(" ")[0] for word in first if isinstance(word, ast.Constant)]
    return checked and any(word in SLURM_COMMANDS for word in words)


def _strings(node: ast.AST | None) -> Iterator[str]:
    for child in ast.walk(node) if node is not None else ():
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value


def _compares_backend(node: ast.AST) -> bool:
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any(last_name(side) == "backend" for side in sides) and any(s for side in sides for s in _strings(side))


def _is_engine_table(node: ast.AST) -> bool:
    return isinstance(node, ast.Dict) and len(ENGINES & {s for key in node.keys for s in _strings(key)}) > 1
