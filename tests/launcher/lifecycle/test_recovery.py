"""The end of a run: what ranks were writing when they were killed is removed; the warnings of NCCL are kept."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher.client.run import _explanation
from launcher.config.cluster import Cluster
from launcher.lifecycle.policy import Failure
from launcher.lifecycle.recovery import end_run, nccl_warnings, remove_unfinished
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target
from training.files import write_atomic


def test_temporary_files_of_killed_ranks_are_removed(tmp_path: Path) -> None:
    ranks = [".value.json.bdd012dab05ba2fe.tmp", ".value.pkl.0a.tmp", "errors/1/.1.json.bdd012dab05ba2fe.tmp"]
    others = [".poll.json.bdd012dab05ba2fe.tmp", "value.json", "errors/1/1.json", "errors/file"]
    for name in (*ranks, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_unfinished(RunDir(tmp_path))
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(others)


def test_a_run_directory_that_is_gone(tmp_path: Path) -> None:
    remove_unfinished(RunDir(tmp_path / "gone"))


WARNING = "n1:71:93 [0] misc/socket.cc:50 NCCL WARN socketProgress: Connection closed by remote peer\n"


def test_the_warnings_of_nccl_are_counted_by_rank_and_shown_with_a_failure(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    (run_dir.logs / "2").mkdir(parents=True)
    run_dir.log(2, 0).write_text("step 1\n")
    run_dir.log(2, 1).write_text(WARNING)
    run_dir.log(2, 3).write_bytes(
        b"n1:7:9 [0] NCCL INFO fine\n" + WARNING.encode() * 2 + b"NCCL WARN \xff" + b"x" * 999
    )
    lines = nccl_warnings(run_dir, 2, 4)
    assert lines[0] == "rank 1: 1 warning of NCCL, the last: socketProgress: Connection closed by remote peer"
    assert lines[1].startswith("rank 3: 3 warnings of NCCL, the last: \ufffdxxx")
    assert (len(lines), len(lines[1])) == (2, 300)
    failure = Failure("hung", "rank 1 did not enter", 1, advice="look")
    write_atomic(
        run_dir.result_file, json.dumps({"state": "failed", "failure": asdict(failure) | {"nccl_warnings": lines}})
    )
    assert lines[0] in _explanation(run_dir, None)
    many = [f"rank {rank}: 1 warning of NCCL, the last: x" for rank in range(9)]
    write_atomic(
        run_dir.result_file, json.dumps({"state": "failed", "failure": asdict(failure) | {"nccl_warnings": many}})
    )
    assert "rank 3: 1 warning of NCCL, the last: x\n... and those of 5 more ranks\nhung: look" in _explanation(
        run_dir, None
    )


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_failed_run_on_gpus_has_the_warnings_in_its_result(tmp_path: Path, device: Any) -> None:
    run_dir = RunDir(tmp_path)
    (run_dir.logs / "1").mkdir(parents=True)
    run_dir.log(1, 1).write_text(WARNING)
    target = Target("script", str(tmp_path / "x.py"))
    plan = Plan(
        "x", tmp_path, RunSpec("x.py"), "local", Cluster("c", "local"), Placement(1, 2, device), target, tmp_path, 60
    )
    end_run(run_dir, plan, State.FAILED, 1, 0.0, Failure("hung", "text"))
    found = (run_dir.result() or {})["failure"]
    assert len(found.get("nccl_warnings", [])) == (device == "cuda")
