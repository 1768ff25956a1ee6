"""The registry of a user's runs: what is found, and what is passed over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.lifecycle.records import registry
from tests.launcher.engines import Launch
from tests.launcher.plans import planned_run


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def run(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "plan.json").write_text("{}")
    registry.register(path)
    return path


def test_runs_of_several_folders_are_known_newest_first(tmp_path: Path) -> None:
    assert registry.known() == []
    found = [run(tmp_path / folder / "runs" / name) for folder in "ab" for name in ("x", "y")]
    for age, path in enumerate(reversed(found)):
        link = registry.folder() / registry._link_name(path)
        os.utime(link, (1e9 - age, 1e9 - age), follow_symlinks=False)
    assert registry.known() == found[::-1]
    assert registry.named("x") == [found[2], found[0]]
    assert registry.named("nosuch") == []


def test_a_run_that_is_gone_or_forgotten_is_passed_over(tmp_path: Path) -> None:
    first, second, third = (run(tmp_path / name) for name in ("first", "second", "third"))
    (first / "plan.json").unlink()
    registry.forget(second)
    registry.forget(tmp_path / "never")
    assert registry.known() == [third]
    registry.register(third)
    assert registry.known() == [third], "once"


def test_what_lies_there_otherwise_is_passed_over(tmp_path: Path) -> None:
    good = run(tmp_path / "good")
    links = registry.folder()
    assert links.stat().st_mode & 0o777 == 0o700
    (links / "file~0123").write_text("text")
    (links / "nodigest").symlink_to(good)
    (links / "other~0123").symlink_to(good)
    (links / "good~relative").symlink_to("good")
    (links / "loop~0123").symlink_to(links / "loop~0123")
    (links / "folder~0123").mkdir()
    assert registry.known() == [good]


def test_a_state_folder_that_cannot_be_used_is_none(tmp_path: Path, state: Path) -> None:
    state.write_text("a file")
    path = tmp_path / "r"
    path.mkdir()
    (path / "plan.json").write_text("{}")
    registry.register(path)
    registry.forget(path)
    assert registry.known() == []


def test_commands_find_a_run_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: Launch) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        for name in ("both", f"only-{place}"):
            registry.register(planned_run(tmp_path / place / "kept" / name, "local").path)
    monkeypatch.chdir(tmp_path / "a")
    planned_run(tmp_path / "a" / "runs" / "both", "local")
    assert f"run dir     {tmp_path}/b/kept/only-b" in launch("status", "only-b")[1]
    assert f"run dir     {tmp_path}/a/runs/both" in launch("status", "both")[1], "the folder comes first"
    listed = launch("list")[1].splitlines()
    assert len(listed) == 5
    assert sum(f"in {tmp_path}/b/kept" in line for line in listed) == 2
    assert sum(" in " in line for line in listed) == 4  # not the one in this folder's runs
    assert all(Path(run["run_dir"]).is_absolute() for run in json.loads(launch("list", "--json")[1]))
    assert [line.split()[0] for line in launch("list", "--here")[1].splitlines()] == ["both"]
    status, _, err = launch("status", "only-b", "--runs", "kept")
    assert (status, "there is no run 'only-b'" in err) == (2, True), "another folder was asked for"
    monkeypatch.chdir(tmp_path)
    status, _, err = launch("status", "both")
    assert (status, "2 runs are called 'both'" in err, "Write the path of one of them." in err) == (2, True, True)
