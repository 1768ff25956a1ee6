"""One question to the scheduler serves all runs and all watchers of a user, with a squeue that counts its calls."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.backends import answers
from launcher.backends.slurm.backend import SlurmBackend
from launcher.cli.main import main
from launcher.client.run import Run
from launcher.lifecycle.records.user_files import MOST_FILES, remove_old, user_folder
from launcher.request.spec import State
from tests.launcher.plans import planned_run

SQUEUE = """#!/bin/sh
echo "squeue $*" >> {folder}/calls
[ -e {folder}/down ] && {{ echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1; }}
for word; do case $word in
  --me) cat {folder}/jobs;;
  --jobs=*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
esac; done
"""
SACCT = """#!/bin/sh
echo "sacct $*" >> {folder}/calls
cat {folder}/accounting 2>/dev/null
"""


class Site:
    """A SLURM of which only the answers about jobs exist."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.backend = folder, SlurmBackend()
        self.jobs("")

    def jobs(self, text: str) -> None:
        (self.folder / "jobs").write_text(text)

    def calls(self) -> list[str]:
        """The commands since the last look."""
        file = self.folder / "calls"
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return found

    def states(self, *jobs: str, submitted: float = 0.0) -> dict[str, State]:
        found = answers.states(self.backend, dict.fromkeys(jobs, submitted))
        return {job: found[job] for job in jobs}

    def answer_file(self) -> Path:
        (file,) = (self.folder / "runtime" / "launch" / "answers").glob("*.json")
        return file

    def age(self, seconds: float) -> None:
        """Make the shared answer older."""
        data = json.loads(self.answer_file().read_text())
        self.answer_file().write_text(json.dumps({**data, "asked": data["asked"] - seconds}))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    (tmp_path / "bin").mkdir()
    for name, text in (("squeue", SQUEUE), ("sacct", SACCT)):
        (tmp_path / "bin" / name).write_text(text.format(folder=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("SLURM_CONF", raising=False)
    monkeypatch.chdir(tmp_path)
    return Site(tmp_path)


def test_a_list_of_queued_runs_asks_once(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1, 41):
        planned_run(site.folder / "runs" / f"r{number}", "slurm").write_job("slurm", str(number))
    site.jobs("".join(f"{number} PENDING\n" for number in range(1, 41)))
    for _ in range(2):
        with pytest.raises(SystemExit) as exited:
            main(["list", "--all"])
        assert (exited.value.code, capsys.readouterr().out.count(" queued ")) == (0, 40)
    (call,) = site.calls()
    assert " --me " in call
    again = planned_run(site.folder / "elsewhere" / "r", "slurm")
    again.write_job("slurm", "40")
    assert Run(again).state() is State.QUEUED
    assert site.calls() == []


def test_watchers_at_the_same_time_ask_once(site: Site) -> None:
    site.jobs("7 RUNNING\n8_1 PENDING\n")
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: site.states("7", "8_1"), range(200)))
    assert found == [{"7": State.RUNNING, "8_1": State.QUEUED}] * 200
    assert len(site.calls()) == 1
    site.age(5.0)
    site.jobs("7 COMPLETED\n8_1 RUNNING\n")
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: site.states("7", "8_1"), range(200)))
    assert found == [{"7": State.LOST, "8_1": State.RUNNING}] * 200
    assert len(site.calls()) == 1


def test_a_job_that_was_just_submitted_is_not_lost(site: Site) -> None:
    site.jobs("7 RUNNING\n")
    site.states("7")
    site.calls()
    assert site.states("8", submitted=time.time()) == {"8": State.QUEUED}
    assert site.calls() == []
    site.jobs("7 RUNNING\n8 RUNNING\n")
    site.age(5.0)
    assert site.states("8", submitted=time.time()) == {"8": State.RUNNING}
    for hours in (-1, 1):  # submitted on a host whose clock differs
        assert site.states(f"9{hours + 1}", submitted=time.time() + 3600 * hours) == {f"9{hours + 1}": State.LOST}
    site.calls()
    assert site.states("90", "92") == {"90": State.LOST, "92": State.LOST}
    assert site.calls() == []


def test_jobs_that_are_not_listed_are_asked_for_together(site: Site) -> None:
    (site.folder / "accounting").write_text("5|CANCELLED by 1000\n6|RUNNING\n6.batch|RUNNING\n")
    expected = {"4": State.LOST, "5": State.LOST, "6": State.RUNNING}
    assert site.states("4", "5", "6") == expected
    assert [call.split()[0] for call in site.calls()] == ["squeue", "squeue", "sacct"]
    assert site.states("6") == {"6": State.RUNNING}
    assert site.calls() == []
    site.age(5.0)
    site.states("6")
    named = [call for call in site.calls() if "--jobs=" in call]
    assert all("--jobs=4,5,6" in call for call in named), "the next question names all that are watched"
    assert len(named) == 2


def test_a_scheduler_that_does_not_answer_is_asked_once(site: Site) -> None:
    (site.folder / "down").touch()
    assert site.states("1", "2") == {"1": State.UNKNOWN, "2": State.UNKNOWN}
    assert site.states("3") == {"3": State.UNKNOWN}
    assert len(site.calls()) == 1
    (site.folder / "down").unlink()
    site.jobs("3 RUNNING\n")
    site.age(5.0)
    assert site.states("3") == {"3": State.RUNNING}


def test_another_cluster_has_another_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.jobs("7 RUNNING\n")
    assert site.states("7") == {"7": State.RUNNING}
    monkeypatch.setenv("SLURM_CONF", str(site.folder / "other.conf"))
    site.jobs("7 PENDING\n")
    assert site.states("7") == {"7": State.QUEUED}


DAMAGE = [
    "",
    "{",
    "[]",
    "null",
    "[" * 100_000,
    '{"asked": 1e999}',
    '{"asked": 0, "answered": true, "states": {}, "wanted": {"--me": 1e12, "-1": 1e300}}',
    '{"asked": "x", "states": {}, "wanted": {}, "answered": 1}',
]


@pytest.mark.parametrize("damage", [*DAMAGE, "states", "future", "link", "pipe", "folder"])
def test_a_damaged_answer_is_none(site: Site, damage: str) -> None:
    site.jobs("7 RUNNING\n")
    site.states("7")
    file = site.answer_file()
    match damage:
        case "states":
            file.write_text(file.read_text().replace("running", "nosuch"))
        case "future":
            site.age(-3600)
        case "link":
            file.unlink()
            file.symlink_to("/dev/zero")
        case "pipe":
            file.unlink()
            os.mkfifo(file)
        case "folder":
            file.unlink()
            file.mkdir()
        case _:
            file.write_text(damage)
    site.jobs("7 PENDING\n")
    assert site.states("7") == {"7": State.QUEUED}


def test_a_folder_that_others_can_change_is_not_used(site: Site) -> None:
    site.jobs("7 RUNNING\n")
    folder = site.folder / "runtime" / "launch" / "answers"
    folder.mkdir(parents=True, mode=0o700)
    folder.chmod(0o777)
    for _ in range(2):
        assert site.states("7") == {"7": State.RUNNING}
    assert (len(site.calls()), list(folder.iterdir())) == (2, [])
    folder.chmod(0o700)
    site.states("7")
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_the_folders_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    before = os.umask(0)
    try:
        folder = user_folder("x", runtime=True)
    finally:
        os.umask(before)
    assert folder == tmp_path / "cache" / "launch" / "x"
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}
    for number in range(MOST_FILES + 5):
        (folder / str(number)).touch()
        os.utime(folder / str(number), (number, number))
    remove_old(folder)
    assert sorted(int(path.name) for path in folder.iterdir()) == list(range(5, MOST_FILES + 5))
    if os.geteuid() == 0:
        (tmp_path / "other").mkdir()
        os.chown(tmp_path / "other", 65534, 65534)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other" / "deeper"))
        assert user_folder("x") is None
        assert list((tmp_path / "other").iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder("x") is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert user_folder("x") is None
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "launch").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "linked"))
    assert user_folder("x") is None


@pytest.mark.slurm
def test_a_real_squeue_knows_the_options(on_slurm: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    backend = SlurmBackend()
    backend.capabilities = replace(backend.capabilities, poll_seconds=3600.0)
    assert set(answers.states(backend, {"4000000": 0.0, "4000001": 0.0}).values()) == {State.LOST}
    done = subprocess.run(
        ["sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 60"], capture_output=True, text=True, check=True
    )
    job = done.stdout.strip()
    assert answers.states(backend, {job: 0.0})[job] in (State.QUEUED, State.RUNNING)
    assert answers.states(backend, {"4000000": 0.0, job: 0.0})[job] in (State.QUEUED, State.RUNNING)
