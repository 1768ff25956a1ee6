"""Standby interpreters: which modules they import, and what a program sees after a restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.rank import imports, standby
from launcher.rank.messages import StartRank
from tests.launcher.engines import Project, until
from training.distributed.world import World

LIBRARY = """
import os, pathlib, threading, uuid
folder = pathlib.Path(__file__).parent
PID, ID, RESTARTS, RANK = os.getpid(), uuid.uuid4().hex, os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
THREAD = threading.Thread(target=threading.Event().wait, daemon=True)
THREAD.start()
print("library loaded")
(folder / f"{RANK}-{PID}").touch()
"""

PROGRAM = """
import json, os, pathlib, sys, time
first = "slow_library" in sys.modules
BEFORE
import slow_library
import mine
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
seen = {
    "attempt": attempt, "rank": os.environ["RANK"], "first": first, "pid": slow_library.PID == os.getpid(),
    "id": slow_library.ID, "thread": slow_library.THREAD.is_alive(), "mine": mine.PID == os.getpid(),
    "library rank": slow_library.RANK, "port": os.environ["MASTER_PORT"],
    "finished": pathlib.Path(os.environ["LAUNCH_FINISHED"]).name,
}
print("seen", json.dumps(seen), flush=True)
pathlib.Path(f"started-{attempt}-{os.environ['RANK']}-{os.getpid()}").touch()
while attempt == 0:
    time.sleep(0.05)
"""


def write(project: Project, before: str = "") -> Path:
    """Write the program and its library; return the folder of the library."""
    library = project.folder.parent / f"{project.folder.name}-lib" / "site-packages"
    library.mkdir(parents=True)
    (library / "slow_library.py").write_text(LIBRARY)
    (project.folder / "mine.py").write_text("import os\nPID = os.getpid()")
    (project.folder / "train.py").write_text(PROGRAM.replace("BEFORE", before))
    return library


def restart(project: Project, library: Path, monkeypatch: pytest.MonkeyPatch, expected: int) -> list[dict[str, Any]]:
    """Run the program with two ranks and kill rank 0 once `expected` processes have imported the library.

    Returns what the ranks of both attempts have seen.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(library), *filter(None, [os.environ.get("PYTHONPATH")])]))
    words = [project.python, "-m", "launcher", "--cpus", "2", "--name", "kept", "train.py"]
    with subprocess.Popen(words, cwd=project.folder, stdout=subprocess.DEVNULL) as command:
        until(lambda: len([*project.folder.rglob("started-0-*")]) == 2, "both ranks")
        until(lambda: len([*library.glob("?-*")]) >= expected, "the imports of their standbys")
        [first] = project.folder.rglob("started-0-0-*")
        os.kill(int(first.name.rpartition("-")[2]), signal.SIGKILL)
        assert command.wait(120) == 0
    lines = [
        line
        for log in sorted((project.folder / "runs/kept/logs").glob("*/*.log"))
        for line in log.read_text().splitlines()
    ]
    assert lines.count("library loaded") == 4, "printed by each rank of each attempt"
    return [json.loads(line[5:]) for line in lines if line.startswith("seen ")]


@pytest.mark.slow
def test_a_restart_continues_with_libraries_of_its_own(local_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    library = write(local_project)
    seen = restart(local_project, library, monkeypatch, expected=4)
    assert [(each["attempt"], each["rank"], each["first"]) for each in seen] == [
        (0, "0", False), (0, "1", False), (1, "0", True), (1, "1", True)]  # fmt: skip
    assert all(
        each["pid"] and each["mine"] and each["thread"] and each["library rank"] == each["rank"] for each in seen
    )
    assert len({each["id"] for each in seen}) == 4
    assert len({each["port"] for each in seen}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("before", ["os.environ['SLOW'] = '1'", "os.putenv('SLOW', '1')"])
def test_a_program_that_writes_its_environment_first_gets_a_plain_interpreter(
    local_project: Project, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    seen = restart(local_project, write(local_project, before), monkeypatch, expected=2)
    assert [each["first"] for each in seen] == [False] * 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "os.environ['PATH'] += ':/x'",
        "import signal; signal.signal(signal.SIGTERM, lambda *_: None)",
        "import sys; 'standby' in sys.orig_argv and sys.exit(3)",
    ],
)
def test_a_library_that_changes_the_process_is_imported_by_the_program_alone(
    local_project: Project, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    library = write(local_project)
    with (library / "slow_library.py").open("a") as file:
        file.write(f"{line}\n")
    seen = restart(local_project, library, monkeypatch, expected=4)
    assert [each["first"] for each in seen] == [False] * 4


def test_what_a_rank_imports_is_recorded_up_to_a_change_of_its_environment(tmp_path: Path) -> None:
    program = """
import os, sys
from launcher.rank.imports import record_imports
record_imports(int(sys.argv[1]))
import wave
os.environ["A"] = "1"
import colorsys
"""
    with (tmp_path / "record").open("wb") as record:
        words = [sys.executable, "-c", program, str(record.fileno())]
        subprocess.run(words, check=True, pass_fds=[record.fileno()])
    text = (tmp_path / "record").read_text()
    names = imports.importable(text, "train.py", [str(tmp_path)])
    assert "wave" in names
    assert "colorsys" not in text
    assert text.endswith(f"{imports.CHANGED}\n")


@pytest.mark.parametrize("own", ["wave.py", "wave/__init__.py", "wave/data.txt"])
def test_a_file_of_the_user_that_hides_a_library_excludes_a_standby(tmp_path: Path, own: str) -> None:
    assert imports.importable("wave\nstruct\n", "train.py", [str(tmp_path)]) == ["wave", "struct"]
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).touch()
    assert imports.importable("wave\nstruct\n", "train.py", [str(tmp_path)]) == []


def test_the_program_itself_is_not_imported_ahead() -> None:
    script = f"{imports.LIBRARIES[0]}tool/main.py"
    assert imports.module_of(script) == "tool.main"
    assert imports.importable("wave\ntool.main\n", script, []) == ["wave"]
    assert imports.importable("wave\ntool\ntool.main\nlauncher.rank\n", "tool.main", []) == ["wave", "tool"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"MASTER_PORT": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"RANK": "1"}, False),
        ({"CUDA_VISIBLE_DEVICES": "1"}, False),
        ({"NEW": ""}, False),
    ],
)
def test_only_the_variables_of_an_attempt_may_differ(change: dict[str, str], expected: bool) -> None:
    before = StartRank(World(), "log", {"RANK": "0", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": "0"})
    after = replace(before, world=replace(before.world, attempt=2), environment=before.environment | change)
    assert standby.fits(before, after) is expected


def test_another_rank_does_not_fit() -> None:
    before = StartRank(World(world_size=2, local_world_size=2, master_port=1), "log", {})
    assert not standby.fits(before, replace(before, world=replace(before.world, rank=1, local_rank=1)))


def test_memory_that_is_left_is_counted() -> None:
    assert 0 < standby.available_memory() < 2**60
