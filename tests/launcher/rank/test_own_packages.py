"""A user's packages `training` and `launcher`: imported by the user's programs, not by this toolkit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.request import own_packages
from tests.launcher.engines import Project

pytestmark = pytest.mark.slow

ITEMS = """
NAME = "theirs"

class Item:
    def __init__(self, n): self.n = n

def make(n): return Item(n)
"""

SCRIPT = """
import atexit, multiprocessing, os, subprocess, sys
import launcher
from training import items

if __name__ == "__main__":
    atexit.register(lambda: print("atexit", __import__("training.items").items.NAME))
    pooled = []
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            [item] = pool.map(items.make, [7])
        pooled.append(type(item) is items.Item and item.n)
    child = "import launcher, training.items; print(launcher.VALUE, training.items.NAME)"
    printed = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True).stdout.strip()
    print("rank", os.environ["RANK"], launcher.VALUE, items.NAME, pooled, printed)
    if sys.argv[1:] == ["raise"]:
        raise RuntimeError("theirs failed")
    sys.exit(*map(int, sys.argv[1:]))
"""

EXPECTED = ["atexit theirs"] * 2 + [f"rank {rank} 5 theirs [7, 7] 5 theirs" for rank in (0, 1)]


def write_packages(folder: Path, regular: bool = True) -> None:
    """Write a package `training` (without `regular`: a namespace package), a module `launcher` and a script."""
    (folder / "training").mkdir()
    (folder / "training/items.py").write_text(ITEMS)
    if regular:
        (folder / "training/__init__.py").touch()
    (folder / "training/fit.py").write_text(SCRIPT)
    (folder / "launcher.py").write_text("VALUE = 5")
    (folder / "train.py").write_text(SCRIPT)


def printed(project: Project, run: str) -> list[str]:
    """The lines of the ranks, without their prefixes."""
    lines = [p.read_text().splitlines() for p in (project.folder / "runs" / run / "logs").rglob("*.log")]
    return sorted(line for file in lines for line in file if line.startswith(("rank ", "atexit ")))


def test_a_script_sees_its_own_packages(project: Project) -> None:
    write_packages(project.folder)
    project.launch("--cpus", "2", "--name", "own", "train.py")
    assert printed(project, "own") == EXPECTED


def test_a_module_of_a_folder_of_code_that_is_on_pythonpath_too(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packages(project.folder, regular=False)
    (project.folder / "launcher.py").rename(project.folder / "hidden.py")  # `python -m launcher` would find it
    (project.folder / "training/fit.py").write_text(SCRIPT.replace("import launcher", "import hidden as launcher"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(project.folder), *filter(None, [os.getenv("PYTHONPATH")])]))
    project.launch("--cpus", "2", "--name", "own", "-m", "training.fit")
    assert printed(project, "own") == EXPECTED


@pytest.mark.parametrize(("argument", "text"), [("raise", "RuntimeError: theirs failed"), ("3", "exit status 3")])
def test_what_a_script_with_own_packages_ends_with_is_recorded(
    local_project: Project, argument: str, text: str
) -> None:
    write_packages(local_project.folder)
    done = local_project.launch("--cpus", "2", "--name", "own", "train.py", argument, status=1)
    assert text in done.stdout + done.stderr
    assert printed(local_project, "own") == EXPECTED


def test_a_script_without_own_packages_keeps_ours(local_project: Project) -> None:
    (local_project.folder / "training").mkdir()
    (local_project.folder / "training/data.csv").touch()
    script = (
        "import launcher, training.context; print('rank', training.context.Context.__name__, len(launcher.__all__) > 3)"
    )
    (local_project.folder / "train.py").write_text(script)
    local_project.launch("--cpus", "1", "--name", "own", "train.py")
    assert printed(local_project, "own") == ["rank Context True"]


def test_a_function_beside_own_packages_is_refused_before_anything_is_sent(local_project: Project) -> None:
    write_packages(local_project.folder)
    (local_project.folder / "mine.py").write_text("from training.items import make\ndef main(): make(1)")
    done = local_project.launch("--cpus", "1", "--name", "own", "mine:main", status=None)
    assert done.returncode
    assert "two packages are called 'training'" in done.stderr
    assert not (local_project.folder / "runs/own").exists()


@pytest.mark.parametrize("own", ["training/__init__.py", "launcher/__init__.py", "launcher.py", "training.py"])
def test_a_process_of_ours_starts_whatever_pythonpath_holds(tmp_path: Path, own: str) -> None:
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("raise SystemExit('the wrong one')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = own_packages.command("launcher.cli.version")
    for words in (command, [sys.executable, "-c", own_packages.IMPORT_OURS + "import launcher.rank.worker"]):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("own", "kept"), [("training.py", "elsewhere"), ("data/file.csv", None)])
def test_the_batch_script_leaves_out_folders_with_other_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, kept: str | None
) -> None:
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}elsewhere")
    assert own_packages.python_path_without_others() == kept
