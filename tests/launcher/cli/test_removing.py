"""`launch rm` and `launch prune`: what is removed, what stays, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pexpect
import pytest

import launcher
from launcher.client.run import Run
from launcher.lifecycle.records import registry, removal
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import State
from tests.launcher.cli.test_sent_runs import leave
from tests.launcher.engines import COMMAND, Launch, Project

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as a second user")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def ended(path: Path, hours: float = 1, state: State = State.SUCCEEDED) -> RunDir:
    """A run that was sent and ended so many hours ago."""
    run = leave(path, hours, state)
    for file in (run.result_file, run.events_file):
        os.utime(file, ns=(run.plan_file.stat().st_mtime_ns,) * 2)
    return run


def test_a_run_is_removed_with_its_link_and_without_what_it_links_to(folder: Path, launch: Launch) -> None:
    data = folder / "data"
    data.mkdir()
    (data / "samples.bin").write_bytes(b"samples")
    run = ended(folder / "runs/old")
    (run.code / "inner").mkdir(parents=True)
    (run.code / "data").symlink_to(data)
    (run.code / "inner/samples.bin").symlink_to(data / "samples.bin")
    (run.path / "checkpoints").symlink_to(data)
    (run.path / "same").hardlink_to(data / "samples.bin")
    (run.code / "inner").chmod(0o500)
    assert registry.known() == [run.path]
    status, out, err = launch("rm", "old", "--yes")
    assert (status, err) == (0, "")
    assert out.startswith("removed old, ")
    assert [path.name for path in (folder / "runs").iterdir()] == [".gitignore"]
    assert (data / "samples.bin").read_bytes() == b"samples"
    assert list(registry.folder().iterdir()) == []
    assert launch("rm", "old", "--yes")[0] == 2


def test_a_dry_run_and_a_refusal_remove_nothing(folder: Path, launch: Launch) -> None:
    ended(folder / "runs/one")
    ended(folder / "runs/two", state=State.FAILED)
    leave(folder / "runs/going", 1)
    for argv, status in (
        (["rm", "one", "two", "--dry-run"], 0),
        (["rm", "one", "two"], 2),
        (["rm", "one", "going", "--yes"], 2),
        (["prune", "--keep", "0", "--dry-run"], 0),
        (["prune", "--keep", "0"], 2),
        (["prune", "--older", "1h", "--dry-run", "--json"], 0),
    ):
        assert launch(*argv)[0] == status, argv
        assert sorted(path.name for path in (folder / "runs").glob("*/")) == ["going", "one", "two"]
    out = launch("rm", "one", "two", "--dry-run")[1].splitlines()
    assert [line.split()[:2] for line in out[:2]] == [["one", "succeeded"], ["two", "failed"]]
    assert out[2].startswith("2 runs, ")
    found = json.loads(launch("rm", "one", "--dry-run", "--json")[1])
    assert [(each["name"], each["state"], each["removed"]) for each in found] == [("one", "succeeded", False)]
    assert found[0]["bytes"] >= 4096
    assert launch("rm", "going", "--yes")[2] == (
        "launch: run 'going' is running; `launch cancel going` ends it first.\n"
    )


@pytest.mark.parametrize("backend", ["local"])
def test_a_run_of_which_no_end_is_known_is_not_removed(folder: Path, launch: Launch, backend: str) -> None:
    run = leave(folder / "runs/far", 1, State.SUCCEEDED)
    run.result_file.unlink()
    run.write_job(backend, "elsewhere:12:2")
    status, _, err = launch("rm", "far", "--yes")
    assert (status, "run 'far' is unknown; `launch cancel far` ends it first." in err) == (2, True)
    assert run.path.exists()


def test_a_lost_run_with_a_heartbeat_is_not_removed(folder: Path, launch: Launch) -> None:
    """An engine of another cluster calls it lost, such as a SLURM that does not know the job's number."""
    run = leave(folder / "runs/far", 100, State.SUCCEEDED)
    run.result_file.unlink()
    run.beat()
    status, _, err = launch("rm", "far", "--yes")
    assert (status, "is lost by what its engine says here, but its supervisor was alive 0 s ago." in err) == (2, True)
    old = time.time() - 60
    os.utime(run.heartbeat_file, (old, old))
    assert launch("rm", "far", "--yes")[0] == 0


def others_can_write(run: RunDir) -> None:
    run.path.chmod(0o777)


def other_owner(run: RunDir) -> None:
    os.chown(run.path, 65534, 65534)


def link_in_logs(run: RunDir) -> None:
    run.logs.symlink_to(run.path.parent)


def other_format(run: RunDir) -> None:
    run.plan_file.write_text('{"format": 1}')


def no_plan(run: RunDir) -> None:
    run.plan_file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (others_can_write, "can be changed by other users"),
        pytest.param(
            other_owner, "a run is cancelled, resumed, removed and unpickled by its owner alone", marks=as_root
        ),
        (link_in_logs, "is a symbolic link out of the run directory"),
        (other_format, "this launch reads version 2"),
        (no_plan, "there is no run 'old'"),
    ],
)
def test_what_may_not_be_this_users_run_is_not_removed(
    folder: Path, launch: Launch, damage: Callable[[RunDir], None], words: str
) -> None:
    run = ended(folder / "runs/old", 100)
    damage(run)
    before = sorted(folder.rglob("*"))
    status, _, err = launch("rm", "old", "--yes")
    assert (status, words in err) == (2, True), err
    status, out, err = launch("prune", "--older", "1d", "--yes")
    assert (status, out) == (0, "no runs to remove\n")
    assert sorted(folder.rglob("*")) == before
    if damage in (others_can_write, other_owner, link_in_logs):
        assert err.startswith("launch: left: ")
        assert words in err


def test_the_working_directory_is_not_removed(folder: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ended(folder / "runs/old")
    run.code.mkdir()
    monkeypatch.chdir(run.code)
    status, _, err = launch("rm", str(run.path), "--yes")
    assert (status, f"{run.path} is not removed: {run.code} is in it." in err) == (2, True)


def test_a_half_removed_run_is_none_and_is_removed_by_the_next_removal(
    folder: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(folder / "runs/first")
    ended(folder / "runs/second")
    monkeypatch.setattr(removal, "TRIES", 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error", str(path))))
        status, _, err = launch("rm", "first", "--yes")
    assert (status, "cannot be used: Input/output error" in err) == (2, True)
    assert [run["name"] for run in json.loads(launch("list", "--json")[1])] == ["second"]
    assert len(list((folder / "runs").glob(".removed-*"))) == 1
    assert launch("status", "first")[0] == 2
    (folder / "runs/.removed-notes").mkdir()
    assert launch("rm", "second", "--yes")[0] == 0
    assert [path.name for path in (folder / "runs").iterdir()] == [".gitignore", ".removed-notes"]


def test_another_directory_in_the_place_of_the_run_is_put_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ended(folder / "runs/old")
    rename = os.rename

    def exchange(source: Path, target: Path) -> None:
        if Path(source) == run.path and run.plan_file.exists():
            rename(run.path, folder / "kept")
            run.path.mkdir()
            (run.path / "other").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", exchange)
    with pytest.raises(launcher.BadRequest, match="was replaced by something else just now"):
        launcher.remove(Run(run))
    assert (run.path / "other").exists()
    assert (folder / "kept/plan.json").exists()


def test_a_run_that_was_reached_by_another_path_leaves_no_link(folder: Path, launch: Launch) -> None:
    (folder / "alias").symlink_to(folder / "runs")
    run = ended(folder / "runs/old")
    registry.register(folder / "alias" / "old")
    assert len(list(registry.folder().iterdir())) == 2
    assert launch("rm", str(run.path), "--yes")[0] == 0
    assert list(registry.folder().iterdir()) == []


def test_prune_removes_by_age_state_and_number(folder: Path, launch: Launch) -> None:
    def left() -> set[str]:
        return {run.name for run in launcher.runs(None)}

    for name, hours, state in (
        ("new", 1, State.SUCCEEDED), ("old-good", 100, State.SUCCEEDED), ("old-bad", 101, State.FAILED),
        ("older-bad", 200, State.FAILED),
    ):  # fmt: skip
        ended(folder / ("runs" if name == "new" else "../other/runs") / name, hours, state)
    leave(folder / "runs/long", 300)
    late = ended(folder / "runs/late", 250)
    os.utime(late.result_file)
    assert launch("prune", "--older", "3d", "--state", "stopped", "--yes") == (0, "no runs to remove\n", "")
    assert launch("prune", "--older", "3d", "--here", "--yes") == (0, "no runs to remove\n", "")
    status, out, _ = launch("prune", "--older", "3d", "--state", "failed", "--keep", "3", "--yes", "--json")
    assert (status, [(each["name"], each["removed"]) for each in json.loads(out)]) == (0, [("older-bad", True)])
    status, out, _ = launch("prune", "--older", "3d", "--yes")
    assert [line.split(",")[0] for line in out.splitlines()] == ["removed old-good", "removed old-bad", "2 runs"]
    assert left() == {"new", "long", "late"}, "a run that goes on, or ended only now, is not old"
    assert launch("prune", "--keep", "1", "--yes")[0] == 0
    assert left() == {"new", "long"}
    assert launch("prune", "--keep", "0", "--yes", "--json")[0] == 0
    assert launch("prune", "--older", "3d", "--json") == (0, "[]\n", "")
    assert left() == {"long"}


def test_a_removal_is_asked_for_on_a_terminal(local_project: Project) -> None:
    local_project.call("--cpus", "1", "--name", "r", "steps:main", "--steps", "1")

    def answer(text: str, *argv: str) -> tuple[int, str]:
        child = pexpect.spawn(
            COMMAND[0], [*COMMAND[1:], *argv], cwd=str(local_project.folder), encoding="utf-8", timeout=60
        )
        child.expect(r"Remove it\? \[y/N\] ")
        listed = child.before
        if text:
            child.sendline(text)
        else:
            child.sendeof()
        child.expect(pexpect.EOF)
        child.wait()
        assert listed.startswith("r   ")
        return child.exitstatus, child.before

    for text in ("n", "", "nothing"):
        status, shown = answer(text, "rm", "r")
        assert (status, "nothing was removed" in shown) == (3, True)
    assert (local_project.folder / "runs/r/plan.json").exists()
    assert answer("y", "prune", "--older", "0s")[0] == 0
    assert not (local_project.folder / "runs/r").exists()


def test_bytes_of_a_run_count_a_file_with_two_names_once(folder: Path) -> None:
    run = ended(folder / "runs/old")
    before = removal.disk_bytes(run.path)
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints/a").write_bytes(os.urandom(1 << 20))
    os.link(run.path / "checkpoints/a", run.path / "checkpoints/b")
    (run.path / "checkpoints/c").symlink_to("/usr")
    assert 1 << 20 <= removal.disk_bytes(run.path) - before < 1.1 * 2**20
