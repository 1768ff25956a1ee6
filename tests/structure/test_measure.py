"""Figures of small packages that the tests write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure.measure import Package, circles, graph, measure
from tests.structure.patterns import Sources
from tests.structure.words import hits


def package(root: Path, files: dict[str, str], name: str = "launcher") -> Path:
    for file, text in files.items():
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / name


def test_a_circle_of_modules_is_found(tmp_path: Path) -> None:
    files = {
        "a.py": "from launcher import b",
        "b.py": "import launcher.c",
        "c.py": "from launcher.a import x",
        "d.py": "",
    }
    assert measure(package(tmp_path, files)).circles == (("a", "b", "c"),)


def test_an_import_inside_of_a_function_counts(tmp_path: Path) -> None:
    files = {"a.py": "def f():\n    from launcher.b import x", "b.py": "import launcher.a"}
    assert measure(package(tmp_path, files)).circles == (("a", "b"),)


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_an_import_for_type_checkers_is_no_edge_but_is_listed(tmp_path: Path, test: str) -> None:
    files = {"a.py": f"if {test}:\n    from launcher.b import x\nelse:\n    import launcher.c", "b.py": "", "c.py": ""}
    found = Package(package(tmp_path, files)).imports()
    assert [(i.target, i.typing_only) for i in found] == [("b", True), ("c", False)]
    assert graph(found)["a"] == {"c"}


def test_a_circle_through_an_import_for_type_checkers_is_counted_apart(tmp_path: Path) -> None:
    files = {"a.py": "if TYPE_CHECKING:\n    from launcher.b import x", "b.py": "import launcher.a"}
    figures = measure(package(tmp_path, files))
    assert (figures.circles, figures.typing_circles) == ((), (("a", "b"),))


def test_import_module_with_a_literal_name_counts(tmp_path: Path) -> None:
    files = {"a.py": 'import importlib\nimportlib.import_module("launcher.b")', "b.py": ""}
    assert [i.target for i in Package(package(tmp_path, files)).imports()] == ["b"]


def test_names_of_a_package_are_resolved_to_its_modules(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "a.py": "import launcher\nfrom launcher import agent\nfrom launcher.agent import main, NAME\nimport launchers.x",
        "agent/__init__.py": "",
        "agent/main.py": "from . import peers\nfrom .. import a",
        "agent/peers.py": "",
    }
    found = Package(package(tmp_path, files))
    targets = [(i.source, i.target) for i in found.imports()]
    assert targets == [
        ("a", "__init__"),
        ("a", "agent.__init__"),
        ("a", "agent.main"),
        ("a", "agent.__init__"),
        ("agent.main", "agent.peers"),
        ("agent.main", "a"),
    ]
    assert found.relative_imports() == ["launcher/agent/main.py:1", "launcher/agent/main.py:2"]


def test_depth_is_the_longest_chain_and_a_circle_is_one_link(tmp_path: Path) -> None:
    files = {
        "a.py": "import launcher.b, launcher.d",
        "b.py": "import launcher.c",
        "c.py": "import launcher.b, launcher.d",
        "d.py": "",
    }
    figures = measure(package(tmp_path, files))
    assert (figures.depth, figures.chain) == (3, ("a", "b+c", "d"))


def test_folders_count_as_one_at_the_top(tmp_path: Path) -> None:
    files = {
        "a.py": "import launcher.agent.x, launcher.agent.y",
        "agent/x.py": "import launcher.agent.y, launcher.b",
        "agent/y.py": "import launcher.b",
        "b.py": "",
    }
    figures = measure(package(tmp_path, files))
    assert (figures.top, figures.pairs) == (("a", "agent", "b"), 2)


def test_a_circle_of_folders_without_a_circle_of_modules(tmp_path: Path) -> None:
    files = {"x/a.py": "import launcher.y.a", "y/a.py": "", "y/b.py": "import launcher.x.b", "x/b.py": ""}
    figures = measure(package(tmp_path, files))
    assert (figures.circles, figures.folder_circles) == ((), (("x", "y"),))


def test_a_circle_of_folders_inside_of_a_folder(tmp_path: Path) -> None:
    files = {"z/x/a.py": "import launcher.z.b", "z/b.py": "", "z/c.py": "", "z/x/c.py": ""}
    assert measure(package(tmp_path, files)).folder_circles == ()
    files |= {"z/b.py": "import launcher.z.x.c", "z/__init__.py": ""}
    figures = measure(package(tmp_path, files))
    assert (figures.circles, figures.folder_circles) == ((), (("z.b", "z.x"),))


def test_sizes(tmp_path: Path) -> None:
    files = {
        "__init__.py": "",
        "py.typed": "",
        "a.py": "class A:\n    x = 1\n    async def f(self):\n        return 1\n\n\ndef g():\n    return (\n        1\n    )\n",
        "data/words.txt": "",
        "data/more.csv": "",
        "__pycache__/a.pyc": "",
    }
    figures = measure(package(tmp_path, files))
    assert [(s.count, s.name) for s in figures.folders] == [(2, "launcher/data"), (1, "launcher")]
    assert [(s.count, s.name, s.where) for s in figures.classes] == [(4, "A", "launcher/a.py:1")]
    assert [(s.count, s.name) for s in figures.functions] == [(4, "g"), (2, "f")]


def test_the_measured_code_is_not_imported(tmp_path: Path) -> None:
    assert measure(package(tmp_path, {"a.py": "raise SystemExit"})).depth == 1


def test_circles_of_nothing() -> None:
    assert circles({}) == ()


def words(root: Path, text: str, name: str = "launcher") -> list[tuple[int, str, str]]:
    package(root, {"file.py": text}, name)
    return [(hit.line, hit.kind, hit.word) for hit in hits(root)]


@pytest.mark.parametrize(
    "text",
    [
        "requests.post(url)",
        "end = file.tell()",
        "items = list(x)  # in order; release the worker",
        "place = settle(release, seated)",
        "def f():\n    '''Reorder the posts, leased from nobody; a heartbeat.'''",
        "ahead = blocked = copied = pins = 1",
        "n = args.since",
    ],
)
def test_innocent_words(tmp_path: Path, text: str) -> None:
    assert words(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from x import Seat", (1, "identifier", "seat")),
        ("class RayStewards: ...", (1, "identifier", "stewards")),
        ("def f(*, lost_lease): ...", (1, "identifier", "lease")),
        ("self.post(1)", (1, "identifier", "post")),
        ("x = f'{seat.host}'", (1, "identifier", "seat")),
        ("x = 1\n# Whoever asks", (2, "prose", "whoever")),
        ("'''One.\n\nThe rank is told.'''", (3, "prose", "told")),
        ("x = 'in vain'", (1, "prose", "vain")),
        ("match x:\n    case [*theirs]: ...", (2, "identifier", "theirs")),
    ],
)
def test_replaced_words(tmp_path: Path, text: str, expected: tuple[int, str, str]) -> None:
    assert words(tmp_path, text) == [expected]


def test_a_file_name_and_words_of_training(tmp_path: Path) -> None:
    package(tmp_path, {"ahead.py": "blocked = 1"}, "training")
    assert [(hit.file, hit.word) for hit in hits(tmp_path)] == [
        ("training/ahead.py", "ahead"),
        ("training/ahead.py", "blocked"),
    ]


def test_patterns(tmp_path: Path) -> None:
    code = """
left = spec.max_restarts - len(past)
def parse(visible): return visible.split(",")
def names(text): return text.split(",")
def no_progress(): ...
policy.no_progress(past)
run_dir.event("failed"); event("failed"); run_dir.event("ended")
if plan.spec.backend == "local" or backend in ("slurm", "ray"): ...
if backend == other: ...
TABLE = {"local": 1, "slurm": 2}
"""
    package(tmp_path, {"a.py": code, "backends/b.py": "backend == 'ray'"})
    sources = Sources(tmp_path)
    assert sources.grep(r"max_restarts\s*-") == ["launcher/a.py:2"]
    assert sources.device_list_parsers() == ["launcher/a.py:3"]
    assert [where for where, _ in sources.calls("no_progress")] == ["launcher/a.py:6"]
    assert sources.event_kinds() == {"failed": ["launcher/a.py:7"] * 2, "ended": ["launcher/a.py:7"]}
    assert sources.engine_tests("launcher/backends/") == ["launcher/a.py:10", "launcher/a.py:8", "launcher/a.py:8"]


def test_the_command_measures_another_checkout_and_a_commit(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    package(tmp_path, {"a.py": "", "b.py": "import launcher.a"})
    git("add", ".")
    git("commit", "-m", "first")
    package(tmp_path, {"c.py": "import launcher.b"})
    command = [sys.executable, "-m", "tests.structure", "--repo", str(tmp_path), "--against", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["launcher", "limit", "HEAD", "now"]
    assert ["import", "depth", "12", "2", "3"] in rows
