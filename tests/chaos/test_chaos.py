"""A short chaos run with a fixed seed; the long one is ``python -m tests.chaos``."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from launcher.config.cluster import Cluster
from launcher.lifecycle.run_dir import RunDir
from launcher.request.placement.devices import Placement
from launcher.request.spec import Plan, RunSpec, Target
from tests.chaos.__main__ import SHARES
from tests.chaos.faults import FAULTS
from tests.chaos.play import Ending, Finding, Player, schedule
from tests.chaos.report import Record, table
from tests.chaos.subject import Subject, listening
from tests.launcher.engines import make_project
from tests.testbed.keeper import free_ports
from tests.testbed.ray import RayCluster
from tests.testbed.slurm import SlurmCluster


def test_the_seed_decides_and_no_fault_is_left_out() -> None:
    for engine in ("local", "slurm", "ray"):
        known = {fault.name for fault in FAULTS if engine in fault.engines}
        once = schedule(engine, 1, 3 * len(known))
        assert once == schedule(engine, 1, 3 * len(known))
        assert once != schedule(engine, 2, 3 * len(known))
        assert Counter(fault.name for fault in once) == dict.fromkeys(known, 3)
        assert {fault.name for fault in once[: len(known)]} == known
        assert (
            min(
                Counter(
                    fault.name for fault in schedule(engine, 1, 200 * SHARES[engine] // sum(SHARES.values()))
                ).values()
            )
            >= 3
        )
    drawn = Counter(fault.name for fault in schedule("slurm", 1, 500))
    assert drawn["time limit"] == 3 < drawn["scontrol requeue"] < drawn["kill -9 rank"]
    assert [f.name for f in schedule("slurm", 1, 5, ["time limit"])] == ["time limit"] * 5


def test_the_table_says_what_did_not_heal(tmp_path: Path) -> None:
    findings = [
        Finding("kill -9 rank", "local", "healed", 0.5, 3),
        Finding("kill -9 rank", "local", "healed", 1.5, 4),
        Finding("kill driver", "ray", "lost; resumed by hand", None, 2),
    ]
    endings = [
        Ending("local", ("kill -9 rank", "kill -9 rank"), "succeeded", True, ()),
        Ending("ray", ("kill driver",), "failed", False, ("file .x.tmp",)),
    ]
    record = Record(tmp_path / "record.jsonl")
    for each in findings[:2] + endings[:1]:
        record.note(each)
    assert record.well()
    for each in findings[2:] + endings[1:]:
        record.note(each)
    assert not record.well(), "its run failed"
    for engine in ("local", "ray"):
        record.note_undisturbed(engine, engine)
    lines = table(record).splitlines()
    assert " ".join(lines[1].split()) == "kill -9 rank local 2 1.0 (max 1.5) 4 (max 4) 1/1 healed (2)"
    assert " ".join(lines[2].split()) == "kill driver ray 1 - 2 (max 2) 0/1 lost; resumed by hand (1)"
    said = "3 faults: 2 without a hand, 1 that need one resumed by hand, 0 that did not end as they should"
    assert said in lines
    assert "undisturbed runs on local, ray ended in DIFFERENT weights" in lines
    assert lines[-2:] == ["left behind:", "  ray, after kill driver: file .x.tmp"]


def test_what_a_run_leaves_behind_is_seen(tmp_path: Path) -> None:
    subject = Subject(make_project(tmp_path, "local"), "x")
    run_dir = RunDir(subject.path)
    run_dir.create()
    site, placement, target = Cluster("local", "local"), Placement(1, 1, "cpu"), Target("script", "x.py")
    run_dir.write_plan(Plan("x", subject.path, RunSpec("x.py"), "local", site, placement, target, tmp_path, 60))
    subject.temporary.mkdir()
    assert subject.left_behind(0) == []
    (subject.path / ".result.json.1.tmp").touch()
    (subject.temporary / "pymp-1").mkdir()
    (port,) = free_ports(1)
    program = (
        f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); print(1, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], env={"LAUNCH_CHAOS": subject.token}, stdout=subprocess.PIPE
    ) as stray:
        assert stray.stdout is not None
        stray.stdout.readline()
        assert listening(stray.pid) == [port]
        left = subject.left_behind(0)
    assert [text.split()[0] for text in left] == ["process", "port", "file", "file"]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)), "it was killed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_faults_on_this_machine(tmp_path: Path) -> None:
    all_heal(tmp_path, "local", None, "SIGSTOP rank (hang)", "truncated newest checkpoint")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_on_slurm(tmp_path: Path, on_slurm: SlurmCluster) -> None:
    all_heal(tmp_path, "slurm", on_slurm, "kill agent of node 1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_faults_on_ray(tmp_path: Path, on_ray: RayCluster) -> None:
    all_heal(tmp_path, "ray", on_ray, "kill steward")


def all_heal(folder: Path, engine: str, cluster: SlurmCluster | RayCluster | None, *names: str) -> None:
    """Each fault heals; the final weights are those of an uninterrupted run, and nothing is left behind."""
    player = Player(folder, engine, 7, cluster)
    player.play(schedule(engine, 7, len(names), names), player.undisturbed())
    assert [finding.outcome for finding in player.findings] == ["healed"] * len(names), player.findings
    for ending in player.endings:
        assert (ending.state, ending.equal, ending.left) == ("succeeded", True, ())
