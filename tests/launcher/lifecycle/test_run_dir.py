"""The run directory: created once, claimed by one process, readable by all."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from launcher.config.cluster import Cluster
from launcher.errors import BadRequest
from launcher.lifecycle.run_dir import RunDir, all_runs, tail
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "runs" / "mine")
    made.create()
    return made


def make_plan(run: RunDir) -> Plan:
    placement, target = Placement(1, 1, "cpu"), Target("script", "x.py")
    return Plan(
        run.path.name, run.path, RunSpec("x.py"), "local", Cluster("local", "local"), placement, target, run.path, 60
    )


def test_git_is_told_to_leave_the_runs_alone(run: RunDir) -> None:
    assert (run.path.parent / ".gitignore").read_text() == "*\n"


def test_a_runs_folder_that_was_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    RunDir(tmp_path / "mine" / "run").create()
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["run"]


def test_a_name_in_use(run: RunDir) -> None:
    with pytest.raises(
        BadRequest, match=r"run 'mine' exists already in .*`launch resume mine` goes on with it; another"
    ):
        run.create()


@pytest.mark.parametrize("blocked", ["runs", "runs/deeper"])
def test_a_place_where_no_folder_can_be(tmp_path: Path, blocked: str) -> None:
    (tmp_path / "runs").write_text("a file")  # root can write anywhere, but not create a folder below a file
    with pytest.raises(BadRequest, match=r"the run directory .*/mine cannot be made: Not a directory\."):
        RunDir(tmp_path / blocked / "mine").create()


def test_many_first_runs_at_once(tmp_path: Path) -> None:
    def create(name: int) -> None:
        RunDir(tmp_path / "new" / "runs" / str(name)).create()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, range(32)))
    assert len(list((tmp_path / "new" / "runs").iterdir())) == 32 + 1


def claim(path: Path, times: int, out: Any) -> None:
    for _ in range(times):
        out.put(RunDir(path).claim_attempt())


def test_no_two_processes_claim_the_same_attempt(run: RunDir) -> None:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    processes = [context.Process(target=claim, args=(run.path, 5, out)) for _ in range(8)]
    for process in processes:
        process.start()
    numbers = [out.get() for _ in range(40)]
    for process in processes:
        process.join()
        process.close()
    out.close()
    assert sorted(numbers) == list(range(1, 41))
    assert run.last_attempt() == 40
    assert run.log(40, 0).parent.is_dir()


def test_attempts_count_from_one_and_ignore_other_names(run: RunDir) -> None:
    assert run.last_attempt() == 0
    run.logs.mkdir()
    run.agent_log(0).touch()
    (run.logs / "notes").mkdir()
    assert (run.claim_attempt(), run.claim_attempt(), run.last_attempt()) == (1, 2, 2)


def leave_error(run: RunDir, rank: int, kind: str, time: float) -> None:
    path = run.error(1, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rank": rank, "kind": kind, "time": time}))


def test_the_likeliest_cause_comes_first(run: RunDir) -> None:
    """A rank that lost its peers reports first; the cause is the rank that left."""
    assert run.errors(1) == []
    for rank, kind, time in ((0, "communication", 1.0), (1, "user error", 5.0), (2, "disk full", 4.0)):
        leave_error(run, rank, kind, time)
    leave_error(run, 3, "communication", 0.5)
    assert [e["rank"] for e in run.errors(1)] == [2, 1, 3, 0]


@pytest.mark.parametrize(
    ("text", "lines", "expected"),
    [
        ("", 3, []),
        ("a\nb\nc\nd\n", 2, ["c", "d"]),
        ("a\nb", 5, ["a", "b"]),
        ("é\nno end", 1, ["no end"]),
        ("x" * 100_000 + "\nlast\n", 1, ["last"]),
    ],
)
def test_the_tail_of_a_log(tmp_path: Path, text: str, lines: int, expected: list[str]) -> None:
    (tmp_path / "log").write_text(text)
    assert tail(tmp_path / "log", lines) == expected


def test_the_tail_reads_the_end_of_a_huge_log_only(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        log.truncate(10 * 2**30)  # sparse
        log.seek(0, 2)
        log.write(b"\nthe end \xff\n")
    assert tail(tmp_path / "log", 1) == ["the end \N{REPLACEMENT CHARACTER}"]
    assert tail(tmp_path / "absent") == []


def test_a_plan_comes_back_and_what_is_no_run_says_so(run: RunDir) -> None:
    with pytest.raises(BadRequest, match=r"mine is not a run directory: it has no plan\.json"):
        run.plan()
    run.write_plan(make_plan(run))
    assert run.plan() == make_plan(run)


def test_reopening_forgets_the_end_and_keeps_the_history(run: RunDir) -> None:
    run.write_plan(make_plan(run))
    run.write_job("local", "host:12:2")
    run.claim_attempt()
    run.event("finished", state="failed")
    leave_error(run, 0, "user error", 1.0)
    run.beat()
    run.request_stop("cancelled")
    run.value_pickle.touch()
    run.value_file.touch()
    run.rendezvous_file.touch()
    run.write_result(State.FAILED, attempts=1)
    assert (run.result() or {})["state"] == "failed"
    run.reopen()
    run.reopen()  # a second call changes nothing
    assert run.result() is None
    assert run.heartbeat_age() is None
    assert sorted(p.name for p in run.path.iterdir()) == ["errors", "events.jsonl", "job.json", "logs", "plan.json"]
    assert (run.last_attempt(), run.events()[0]["event"], (run.job() or {})["job_id"]) == (1, "finished", "host:12:2")


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for age, name in enumerate(("old", "new", "newest")):
        run = RunDir(tmp_path / name)
        run.create()
        run.write_plan(make_plan(run))
        os.utime(run.plan_file, (age, age))
    (tmp_path / "no run").mkdir()
    assert [r.path.name for r in all_runs(tmp_path)] == ["newest", "new", "old"]
    assert list(all_runs(tmp_path / "absent")) == []


def test_a_beat_is_fresh(run: RunDir) -> None:
    run.beat()
    age = run.heartbeat_age()
    assert age is not None
    assert -1 < age < 10
