"""All commands refuse a run directory of another format version and do not change it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.cli.main import main
from launcher.client.api import submit
from launcher.client.plan import make_plan
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import FORMAT, RunDir
from launcher.request.spec import RunSpec, State
from tests.launcher.engines import COMMAND

COMMANDS = [
    ["status", "r"],
    ["status", "r", "--json"],
    ["logs", "r"],
    ["logs", "r", "-f"],
    ["logs", "r", "--rank", "0", "--json"],
    ["cancel", "r"],
    ["cancel", "r", "--now"],
    ["resume", "r"],
    ["resume", "r", "--detach", "--cpus", "2"],
    ["status", "runs/r"],
]

OTHERS: list[Any] = [None, 1, FORMAT + 1, FORMAT - 0.0, str(FORMAT), True, -FORMAT, 10**30, [], {}, "x" * 5000]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real failed run, which each command could use."""
    folder = tmp_path_factory.mktemp("format")
    (folder / "script.py").write_text("print('hello')\nraise SystemExit(1)\n")
    command = [*COMMAND, "--cpus", "1", "--name", "r", "--max-restarts", "0", "script.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    return folder


@pytest.fixture
def run(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    monkeypatch.chdir(made)
    found = RunDir(made / "runs" / "r")
    kept = {file: file.read_bytes() for file in (found.plan_file, found.events_file)}
    yield found
    for file, content in kept.items():
        file.write_bytes(content)


def written(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files, with their modification times."""
    return {str(p): (p.stat().st_mtime_ns, b"" if p.is_dir() else p.read_bytes()) for p in folder.rglob("*")}


def change(run: RunDir, file: str, version: Any) -> Path:
    """Write `version` to the plan or the first event; None removes it."""
    path = run.plan_file if file == "plan" else run.events_file
    first, rest = (path.read_text(), "") if file == "plan" else path.read_text().split("\n", 1)
    data = json.loads(first)
    assert data.pop("format") == FORMAT
    path.write_text(json.dumps(data if version is None else {"format": version, **data}) + "\n" + rest)
    return path


def call(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    with pytest.raises(SystemExit) as exited:
        main(argv)
    out, err = capsys.readouterr()
    return exited.value.code, out + err


@pytest.mark.parametrize("file", ["plan", "events"])
@pytest.mark.parametrize("version", OTHERS, ids=[f"{version!r:.12}" for version in OTHERS])
def test_every_command_names_both_versions_and_changes_nothing(
    run: RunDir, capsys: pytest.CaptureFixture[str], file: str, version: Any
) -> None:
    path = change(run, file, version)
    before = written(run.path.parent)
    shown = "no format version" if version is None else f"format version {repr(version)[:10]}"
    for argv in COMMANDS:
        status, text = call(argv, capsys)
        assert status == 2, argv
        assert f"{path} has {shown}" in text
        assert f"reads version {FORMAT}" in text
        assert "Traceback" not in text
        assert written(run.path.parent) == before, argv
    status, text = call(["list"], capsys)
    assert (status, f"unreadable: {path} has {shown}" in text) == (0, True)
    listed = json.loads(call(["list", "--json"], capsys)[1])
    assert [(each["name"], each["state"]) for each in listed] == [("r", "unknown")]
    opened = launcher.runs()[0]
    assert repr(opened) == "Run('r', unreadable)"
    for use in (
        opened.state,
        opened.status,
        opened.cancel,
        opened.kill,
        opened.wait,
        opened.result,
        lambda: list(opened.logs()),
    ):
        with pytest.raises(BadRequest, match=f"reads version {FORMAT}"):
            use()
    with pytest.raises(BadRequest, match=f"reads version {FORMAT}"):
        launcher.resume("r")
    assert written(run.path.parent) == before


def test_a_run_of_this_version_is_opened(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run.plan_file.read_text())["format"] == FORMAT
    assert run.events()[0]["event"] == "submitted"
    assert run.events()[0]["format"] == FORMAT
    assert call(["status", "r"], capsys)[0] == 0
    assert call(["logs", "r"], capsys)[1].startswith("hello\n")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\n", b"[1]\n", b"{}\n", b"x" * 10**6])
def test_a_torn_log_of_events_does_not_hide_a_run(
    run: RunDir, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """The first line may be truncated by a full disk and then has no version."""
    run.events_file.write_bytes(content + b"\n")
    assert call(["status", "r"], capsys)[0] == 0


def test_the_target_is_not_looked_up_again_when_the_plan_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has the folder to copy; ranks check the target's file."""
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "deeper" / "script.py"
    script.parent.mkdir()
    script.touch()
    plan = make_plan(RunSpec("deeper/script.py", cpus=1, name="n", max_restarts=0), tmp_path)
    assert plan.project == script.parent
    script.write_text("def (")
    assert submit(plan).wait(60).state() is State.FAILED
    assert RunDir(tmp_path / "runs" / "n").plan() == plan
