"""The shape of the package: which way imports run, what a command may load, and what nobody may change by accident."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher
from launcher.cli import launch_parser
from launcher.options import COMMANDS

ROOT = Path(__file__).parents[2]

FLOORS = [
    "__main__",
    "cli",
    "version",
    "completion",
    "living",
    "options",
    "on_nodes",
    "doctor",
    "first_profile",
    "__init__",
    "api",
    "view",
    "plan",
    "run",
    "check",
    "backends",
    "backends.ray_on_slurm",
    "backends.fake",
    "backends.ray_driver",
    "backends.ray_attempt",
    "backends.ray_room",
    "backends.ray_stewards",
    "backends.ray_steward",
    "backends.ray_lease",
    "backends.ray_worker",
    "backends.ray_cluster",
    "backends.ray_node",
    "backends.slurm",
    "backends.ray",
    "backends.local",
    "backends.process",
    "backends.slurm_doctor",
    "backends.ray_doctor",
    "backends.slurm_job",
    "backends.slurm_limits",
    "backends.slurm_site",
    "backends.slurm_node",
    "backends.base",
    "agent",
    "coordinator",
    "peers",
    "attempt",
    "ranks",
    "ending",
    "policy",
    "history",
    "watch",
    "forkserver",
    "rank_environment",
    "worker",
    "resolve",
    "target",
    "preflight",
    "probe",
    "fabric",
    "output",
    "exit_status",
    "rundir",
    "trust",
    "ledger",
    "snapshot",
    "network",
    "environment",
    "gpus",
    "binding",
    "durations",
    "spec",
    "placement",
    "reference",
    "profiles",
    "shapes",
    "tpu",
    "devices",
    "cluster",
    "config_check",
    "records",
    "error_signs",
    "errors",
]
"""A file imports only from those after it; imports inside of functions count."""

UPWARDS: set[tuple[str, str]] = set()

HEAVY = ("torch", "ray", "submitit", "transformers", "datasets", "accelerate", "numpy")


def name_of(path: Path, package: str = "launcher") -> str:
    return ".".join(path.relative_to(ROOT / package).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted((ROOT / "launcher").rglob("*.py"))}


def imports(path: Path, package: str) -> Iterator[str]:
    """The modules of `package` that the file at `path` imports, anywhere."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            of, _, module = node.module.partition(".")
            if of == package:
                inner = [f"{module}.{alias.name}".strip(".") for alias in node.names]
                yield from (name if name in FILES else module or "__init__" for name in inner)
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == package)


def test_every_file_has_its_floor() -> None:
    assert sorted(FLOORS) == sorted(FILES)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_run_downwards(name: str) -> None:
    below = FLOORS[FLOORS.index(name) + 1 :]
    assert {(name, other) for other in imports(FILES[name], "launcher") if other not in below} <= UPWARDS


def test_no_exception_outlives_its_reason() -> None:
    assert all(upper in imports(FILES[lower], "launcher") for lower, upper in UPWARDS)


ENGINES = {"local", "slurm", "ray", "ray_on_slurm"}


def engine_names(tree: ast.AST) -> Iterator[str]:
    """The names of engines that decide something: compared with, matched, or the keys of a table."""
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        for part in parts:
            for each in part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]:
                if isinstance(each, ast.Constant) and each.value in ENGINES:
                    yield str(each.value)


def test_no_engine_is_told_by_its_name_outside_of_the_backends() -> None:
    files = {name: path for name, path in FILES.items() if not name.startswith("backends")}
    found = {name: list(engine_names(ast.parse(path.read_bytes()))) for name, path in files.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_how_an_engine_would_be_told_by_its_name() -> None:
    for text in ('x == "ray"', 'x not in ("a", "slurm")', '{"local": 1}', 'match x:\n    case "ray_on_slurm": pass'):
        assert list(engine_names(ast.parse(text))), text


def test_training_does_without_the_launcher() -> None:
    users = [path.name for path in (ROOT / "training").rglob("*.py") if list(imports(path, "launcher"))]
    assert users == []


@pytest.mark.parametrize(
    "argv", [None, ["--help"], ["list"], ["status", "nosuch"], ["clusters"], ["logs", "nosuch"], ["--dry-run", "--cpus", "1"]]
)  # fmt: skip
def test_a_command_loads_nothing_heavy(tmp_path: Path, argv: list[str] | None) -> None:
    program = f"""
import sys
import launcher, launcher.cli
try:
    {argv!r} is None or launcher.cli.main({argv!r})
except SystemExit:
    pass
print("loaded:", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_what_the_package_offers() -> None:
    expected = ["BadRequest", "LaunchError", "Run", "RunFailed", "RunStopped", "State", "launch", "resume", "runs"]
    assert launcher.__all__ == expected
    assert all(hasattr(launcher, name) for name in expected)


def options(parser: argparse.ArgumentParser) -> str:
    return " ".join("/".join(action.option_strings) for action in parser._actions if action.option_strings)


def test_the_command_line() -> None:
    assert options(launch_parser()) == (
        "-h/--help --backend --cluster --gpus --tpus --cpus --nodes --spare-nodes --accelerator --topology --time"
        " --max-restarts --name --dry-run --detach --json --version -m"
    )
    assert list(COMMANDS) == ["list", "status", "logs", "cancel", "resume", "clusters", "doctor", "completion"]


def undocumented(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = len(node.body) == 1 and not isinstance(node, ast.ClassDef)  # its name says all that it does
            if not short and ast.get_docstring(node) is None:
                yield node
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node.body)


@pytest.mark.parametrize("name", FLOORS)
def test_public_things_say_what_they_are(name: str) -> None:
    tree = ast.parse(FILES[name].read_bytes())
    assert ast.get_docstring(tree)
    assert [getattr(node, "name", "") for node in undocumented(tree.body)] == []


def test_a_file_is_one_room() -> None:
    assert {name: n for name, path in FILES.items() if (n := len(path.read_text().splitlines())) > 350} == {}
