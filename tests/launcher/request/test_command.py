"""Any command as the target: on every rank, with its own exit status and signals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launcher.engines import make_project, until

pytestmark = pytest.mark.slow


def test_a_command_runs_on_every_rank_with_its_place(tmp_path: Path) -> None:
    project = make_project(tmp_path, "local")
    (tmp_path / "hello.sh").write_text('#!/bin/sh\necho "$RANK of $WORLD_SIZE: $1" >> seen\n')
    (tmp_path / "hello.sh").chmod(0o755)
    project.call("--cpus", "2", "--name", "r", "--", "./hello.sh", "a b")
    assert sorted((tmp_path / "seen").read_text().splitlines()) == ["0 of 2: a b", "1 of 2: a b"]
    project.call("--cpus", "1", "--name", "s", "--", "sh", "-c", "echo $0 on $RANK", "x")
    assert "x on 0" in project.call("logs", "s").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sh", "-c", "exit 3"], "exit status 3"),
        (["sh", "-c", "kill -9 $$"], "SIGKILL"),
        (["nosuchcommand"], "nosuchcommand: No such file or directory"),
        (["./missing"], "missing: No such file or directory"),
    ],
)
def test_its_end_is_that_of_the_run(tmp_path: Path, words: list[str], said: str) -> None:
    project = make_project(tmp_path, "local")
    status = 2 if "No such" in said else 1
    done = project.call("--cpus", "1", "--name", "r", "--max-restarts", "0", "--", *words, status=status)
    assert said in done.stdout + done.stderr


def test_a_stop_reaches_it_once_and_it_is_no_success(tmp_path: Path) -> None:
    project = make_project(tmp_path, "local")
    script = "trap 'echo stopped >> seen; exit 0' TERM; echo started >> seen; while :; do sleep 0.05; done"
    project.call("--cpus", "1", "--name", "r", "--detach", "--", "sh", "-c", script)
    seen = tmp_path / "seen"
    until(lambda: seen.exists() and "started" in seen.read_text(), "the command", 60)
    project.call("cancel", "r")
    until(lambda: project.status("r")["state"] == "stopped", "the end", 60)
    assert seen.read_text() == "started\nstopped\n"
