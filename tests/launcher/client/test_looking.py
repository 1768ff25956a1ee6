"""Looking at runs: what is read, how often, and in how much memory."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.main import main
from launcher.client.follow import Follower, follow
from launcher.client.run import Run
from launcher.config.timeouts import TIMEOUTS
from launcher.lifecycle.records import index
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import State
from tests.launcher.plans import planned_run
from training.files import append_line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that has logged ten steps and an evaluation, and has no result."""
    made = planned_run(tmp_path / "runs" / "it", "local", 1)
    made.claim_attempt()
    for step in range(1, 11):
        append_line(
            made.metrics_file, {"time": 100.0 + step, "attempt": 1, "step": step, "total_steps": 20, "loss": 1 / step}
        )
    append_line(made.metrics_file, {"time": 111.0, "attempt": 1, "step": 10, "eval": {"f1": 0.5}})
    monkeypatch.chdir(tmp_path)
    return made


def running(run: RunDir) -> None:
    """Let this process be the supervisor of the run."""
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    run.write_job("local", f"{os.uname().nodename}:{os.getpid()}:{started}")


def launch(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exited:
        main(argv)
    assert exited.value.code == 0
    return capsys.readouterr().out


def test_the_whole_logs_are_read_for_the_ledger_only(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_result(State.FAILED, failure={"kind": "killed", "message": "rank 0 was killed"})
    assert json.loads(launch("status", "--json", "it", capsys=capsys))["ledger"]["total"]["attempt"] == 0
    monkeypatch.setattr(index, "read_digests", lambda *_: pytest.fail("whole logs are read"))
    status = launch("status", "it", capsys=capsys)
    assert "step 10  total_steps 20" in status
    assert "f1 0.5" in status
    line = launch("list", capsys=capsys)
    assert "10/20" in line
    assert "f1 0.5000" in line
    assert Run(run).has_saved() is False


def test_the_newest_values_of_the_result_count_while_the_log_is_as_it_was(run: RunDir) -> None:
    newest = run.newest_lines()
    assert newest == {
        "bytes": run.metrics_file.stat().st_size,
        "progress": {"step": 10, "total_steps": 20, "loss": 0.1},
        "evaluation": {"f1": 0.5},
    }
    run.write_result(State.SUCCEEDED, newest={**newest, "evaluation": {"f1": 0.75}})
    for found in (Run(run).brief(), Run(run).overview()):
        assert found["evaluation"] == {"f1": 0.75}
    append_line(run.metrics_file, {"time": 112.0, "attempt": 1, "step": 11, "loss": 0.5})
    for found in (Run(run).brief(), Run(run).overview()):
        assert (found["evaluation"], found["progress"]) == ({"f1": 0.5}, {"step": 11, "loss": 0.5})
    for odd in ({}, {"bytes": newest["bytes"]}, {**newest, "progress": 3}):
        run.write_result(State.SUCCEEDED, newest=odd)
        assert Run(run).brief()["evaluation"] == {"f1": 0.5}
    run.metrics_file.unlink()
    assert Run(run).brief()["progress"] == {}


@pytest.mark.parametrize("values", [3, "x", [], None, {"f1": {}}, {"f1": "0.5"}, {"f1": 10**300}])
def test_evaluations_of_any_type_are_shown(run: RunDir, values: Any, capsys: pytest.CaptureFixture[str]) -> None:
    append_line(run.metrics_file, {"loss": values, "total_steps": values, "eval": values})
    for argv in (("list",), ("status", "it"), ("list", "--json"), ("status", "--json", "it")):
        launch(*argv, capsys=capsys)


def test_a_silent_run_is_looked_at_less_often(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    running(run)
    clock, pauses = [1000.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock[0] += seconds
        if len(pauses) == 200:
            with run.log(1, 0).open("a") as log:
                log.write("news\n")
        if len(pauses) == 210:
            run.write_result(State.SUCCEEDED)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    out = io.StringIO()
    assert follow(Run(run), out) is State.SUCCEEDED
    assert "news\n" in out.getvalue()
    assert set(pauses[:20]) == {TIMEOUTS.follow}
    assert pauses[:200] == sorted(pauses[:200])
    assert pauses[199] == TIMEOUTS.follow_silent
    assert pauses[200] == TIMEOUTS.follow, "where something is written, more may follow"
    assert pauses[199] <= (sum(pauses[:200])) / 20, "the end is noticed within 5 % of the silence before it"


def test_a_look_at_a_silent_run_reads_nothing_again(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    running(run)
    for number in range(2000):
        run.event("saved", attempt=1, step=number)
    follower = Follower(Run(run), io.StringIO())
    follower._look()
    opened: list[str] = []
    real = os.open

    def note(path: str | Path, *args: Any, **options: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", note)
    follower._look()
    assert opened == ["events.jsonl", "it", "logs", "1", "0.log"], "from where they were read to"


def test_a_large_log_takes_little_memory(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "x" * 99
    run.log(1, 0).write_text(f"{line}\n" * 60_000)
    run.write_result(State.SUCCEEDED)
    for argv in (["logs", "it"], ["logs", "--json", "it"], ["logs", "-f", "it"]):
        with (tmp_path / "out").open("w") as out:
            monkeypatch.setattr(sys, "stdout", out)
            tracemalloc.start()
            try:
                with pytest.raises(SystemExit):
                    main(argv)
                assert tracemalloc.get_traced_memory()[1] < 3 << 20, argv
            finally:
                tracemalloc.stop()
                monkeypatch.undo()
                monkeypatch.chdir(tmp_path)
        text = (tmp_path / "out").read_text()
        found = json.loads(text) if "--json" in argv else text.splitlines()
        assert [each for each in found if each != line and not each.startswith("launch: ")] == []
        assert len(found) >= 60_000
    run.log(1, 0).unlink()
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit):
            main(["logs", "--json", "it"])
    assert json.loads((tmp_path / "out").read_text()) == []
