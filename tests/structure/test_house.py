"""Structure of both packages: order of imports, size limits, unique code, frozen interfaces."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher
from launcher.cli.main import main
from launcher.cli.parser import COMMANDS, launch_parser
from tests.structure.measure import LIMITS, Package, measure
from tests.structure.patterns import Sources
from tests.structure.words import PACKAGES, hits

ROOT = Path(__file__).parents[2]

ORDER = {
    "launcher": (
        *("__main__", "cli", "doctor", "__init__", "client", "backends", "agent", "rank"),
        *("lifecycle", "request", "config", "errors"),
    ),
    "training": (
        *(
            "__main__",
            "libraries",
            "train",
            "bert",
            "reporting",
            "integrations",
            "context",
            "__init__",
            "corpus",
            "loop",
            "data",
        ),
        *("checkpoints", "distributed", "flags", "files", "errors"),
    ),
}
"""A module imports from its own entry and later ones, including imports in functions and for type checkers.

An entry is a module, a folder, or a dotted name in one (``backends.slurm``); the longest match counts.
"""


HEAVY = ("torch", "ray", "submitit", "transformers", "datasets", "accelerate", "numpy")

LONGEST_FILE = 350

SOURCES = {name: Package(ROOT / name) for name in PACKAGES}
FIGURES = {name: measure(ROOT / name) for name in PACKAGES}
CODE = Sources(ROOT)

both = pytest.mark.parametrize("package", PACKAGES)
every_module = pytest.mark.parametrize(
    ("package", "module"), [(package, module) for package in PACKAGES for module in SOURCES[package].files]
)


def entry_of(package: str, module: str) -> str:
    """The longest entry of the order that contains the module; empty if there is none."""
    fits = (entry for entry in ORDER[package] if f"{module}.".startswith(f"{entry}."))
    return max(fits, key=len, default="")


def upwards(package: str) -> set[tuple[str, str]]:
    """The imports against the order, without those of modules that have no entry (another test finds them)."""
    place = {"": len(ORDER[package]), **{entry: number for number, entry in enumerate(ORDER[package])}}
    return {
        (each.source, each.target)
        for each in SOURCES[package].imports()
        if entry_of(package, each.source)
        and place[entry_of(package, each.source)] > place[entry_of(package, each.target)]
    }


@both
def test_every_module_has_its_place_in_the_order(package: str) -> None:
    assert {entry_of(package, module) for module in SOURCES[package].files} == set(ORDER[package])


@both
def test_imports_run_downwards(package: str) -> None:
    assert upwards(package) == set()


def test_training_does_without_the_launcher() -> None:
    assert SOURCES["training"].imports("launcher") == []


@both
def test_imports_are_absolute(package: str) -> None:
    assert SOURCES[package].relative_imports() == []


@both
def test_no_circles(package: str) -> None:
    found = {"/".join(circle) for circle in (*FIGURES[package].typing_circles, *FIGURES[package].folder_circles)}
    assert found == set()


@both
def test_the_depth_of_imports_and_the_number_at_the_top(package: str) -> None:
    figures = FIGURES[package]
    assert figures.depth <= LIMITS["depth"], figures.chain
    assert len(figures.top) <= LIMITS["top"], figures.top


@both
@pytest.mark.parametrize(("limit", "sizes"), [("files", "folders"), ("class", "classes"), ("function", "functions")])
def test_nothing_is_larger_than_its_limit(package: str, limit: str, sizes: str) -> None:
    found = {size.name for size in getattr(FIGURES[package], sizes) if size.count > LIMITS[limit]}
    assert found == set()


@both
def test_a_file_is_not_too_long(package: str) -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in SOURCES[package].files.items()}
    assert {module for module, n in lines.items() if n > LONGEST_FILE} == set()


def undocumented(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = len(node.body) == 1 and not isinstance(node, ast.ClassDef)  # its name suffices
            if not short and ast.get_docstring(node) is None:
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body)


@every_module
def test_public_things_are_documented(package: str, module: str) -> None:
    tree = SOURCES[package].trees[module]
    assert ast.get_docstring(tree) or not tree.body
    assert list(undocumented(tree.body)) == []


@pytest.mark.parametrize(
    "argv", [None, ["--help"], ["list"], ["status"], ["status", "nosuch"], ["clusters"], ["logs", "nosuch"], ["wait", "nosuch"],
    ["diff", "a", "b"], ["rm", "nosuch"], ["prune", "--older", "30d"], ["--dry-run", "--cpus", "1"]]
)  # fmt: skip
def test_a_command_loads_nothing_heavy(tmp_path: Path, argv: list[str] | None) -> None:
    program = f"""
import sys
import launcher
from {main.__module__} import main
try:
    {argv!r} is None or main({argv!r})
except SystemExit:
    pass
print("loaded:", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_what_the_package_offers() -> None:
    expected = [
        *("BadRequest", "LaunchError", "Run", "RunFailed", "RunStopped", "State"),
        *("diff", "launch", "remove", "resume", "runs", "wait"),
    ]
    assert launcher.__all__ == expected
    assert all(hasattr(launcher, name) for name in expected)


def options(parser: argparse.ArgumentParser) -> str:
    return " ".join("/".join(action.option_strings) for action in parser._actions if action.option_strings)


def test_the_command_line() -> None:
    assert options(launch_parser()) == (
        "-h/--help --backend --cluster --gpus --tpus --cpus --nodes --spare-nodes --gpus-per-node --ranks --ranks-per-node"
        " --cpus-per-rank --accelerator --topology --set --env --env-file --time --max-restarts --name --dry-run --detach --debug --debug-port --json --version -m"
    )
    assert list(COMMANDS) == [
        *("list", "status", "logs", "wait", "cancel", "stacks", "exec", "shell", "code", "debug", "profile"),
        *("resume", "diff", "rm", "prune", "clusters", "doctor", "completion"),
    ]


ONCE = {
    "the arithmetic of the restart budget": CODE.grep(r"max_restarts\s*-"),
    "the call of no_progress": [where for where, _ in CODE.calls("no_progress")],
    "the parser of CUDA_VISIBLE_DEVICES": CODE.device_list_parsers(),
    **{f"the event {kind}": places for kind, places in CODE.event_kinds().items()},
}

NOWHERE = {
    "a SLURM command with another environment than the one of all": CODE.slurm_commands(),
    "a comparison with a backend's name": CODE.engine_tests(outside="launcher/backends/"),
    'backend == "': CODE.grep(r"""\bbackend\s*[!=]=\s*["']"""),
    "dict[str, Any] in the protocol": CODE.grep(r"\b([dD]ict|Mapping)\[str, Any\]", under="launcher/agent/protocol"),
    "a time limit outside of Timeouts": CODE.grep(r"^[A-Z_, ]*SECONDS[A-Z_, ]*(: \w+)? = ", under="launcher/"),
    "a message that is a dict": CODE.grep(r"\bMessage\b[^\n=]*=\s*(dict|Mapping)\["),
}


@pytest.mark.parametrize("what", ONCE)
def test_it_is_written_once(what: str) -> None:
    assert len(ONCE[what]) == 1, ONCE[what]


@pytest.mark.parametrize("what", NOWHERE)
def test_it_is_written_nowhere(what: str) -> None:
    assert NOWHERE[what] == []


def test_no_replaced_words() -> None:
    assert [f"{hit.file}:{hit.line}: {hit.word}" for hit in hits(ROOT)] == []
