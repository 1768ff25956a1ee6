"""Preflight: the report of a node, the comparison of nodes, and the exclusion of real nodes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.agent.coordinator import Coordinator
from launcher.agent.health import node_facts, preflight
from launcher.agent.health.preflight import RUN_FOLDER_BYTES, SCRATCH_BYTES, judge, look, skew
from launcher.agent.job_attempt import JobAttempt
from launcher.agent.protocol import AgentInfo, AgentMessage, CheckNode, Lost, NodeChecked, StopRequest, ToAgent
from launcher.client.follow import describe
from launcher.client.plan import make_plan
from launcher.config.timeouts import Timeouts
from launcher.lifecycle.history import record_warnings
from launcher.lifecycle.policy import Outcome
from launcher.lifecycle.run_dir import RunDir
from launcher.request.spec import RunSpec
from tests.launcher.engines import Project, until
from tests.testbed.slurm import SlurmCluster

ROOM = 2**40
VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


IDLE = """
def main(ctx):
    return {"attempt": ctx.world.attempt}
"""


def facts(ahead: float = 0.0, **more: Any) -> dict[str, Any]:
    """The report of a healthy node whose clock is `ahead` seconds ahead of the coordinator's."""
    return {
        "asked": 100.0,
        "received_at": 100.1 + ahead,
        "sent_at": 100.4 + ahead,
        "answered": 100.5,
        "run folder": {"free": ROOM},
        "scratch": {"path": "/tmp", "free": ROOM},
        "versions": VERSIONS,
        **more,
    }


def unfit(*nodes: dict[str, Any] | None, ranks: int = 2) -> dict[str, str]:
    """The unfit ones of the nodes n0, n1, ...; None: did not answer."""
    hosts = tuple(f"n{number}" for number in range(len(nodes)))
    return judge({host: node for host, node in zip(hosts, nodes, strict=True) if node}, dict.fromkeys(hosts, ranks))


def test_nodes_in_order_are_fit() -> None:
    cards: dict[str, Any] = {"gpus": {"count": 8, "faults": []}}
    assert unfit(facts(), facts(0.9), facts(-0.5)) == {}
    assert unfit(facts(**cards), facts(**cards)) == {}
    assert unfit(facts(gpus={}), facts(gpus={})) == {}, "GPUs that are not NVIDIA's have no nvidia-smi"
    assert unfit(facts()) == {}


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (None, "it did not answer the preflight check within 40 s (report it to the cluster administrators)"),
        (facts(90), "its clock is 89.9 s ahead of n0's (check its time service)"),
        (facts(-90), "its clock is 89.9 s behind n0's (check its time service)"),
        ({"versions": VERSIONS | {"torch": "2.12.1"}}, "it has torch 2.12.1, n0 has 2.13.0 (use one environment"),
        ({"versions": {"fault": "did not answer within 30 s"}}, "its Python environment did not answer within 30 s"),
        ({"run folder": {"fault": "fails: Read-only file system"}}, "its run folder fails: Read-only file system (check"),
        ({"run folder": {"free": RUN_FOLDER_BYTES - 2**20}}, "1023 MiB are free in its run folder (minimum 1024 MiB"),
        ({"scratch": {"path": "/local", "free": SCRATCH_BYTES - 1}}, "256 MiB are free in its /local (minimum 256 MiB"),
        ({"scratch": {"fault": "fails: No space left on device"}}, "its TMPDIR fails: No space left on device (clear it"),
        ({"gpus": {"count": 1, "faults": []}}, "its driver shows 1 of 2 GPUs (run nvidia-smi there)"),
        ({"gpus": {"count": 2, "faults": ["GPU 0 (x) could not remap a row"]}}, "GPU 0 (x) could not remap a row (report it"),
        ({"gpus": {"fault": "did not answer within 30 s"}}, "nvidia-smi did not answer within 30 s (report it"),
        ({"gpus": {}}, "it has no nvidia-smi, unlike the other nodes (report it"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_its_remedy(node: dict[str, Any] | None, words: str) -> None:
    good = facts(gpus={"count": 2, "faults": []}) if node and "gpus" in node else facts()
    found = unfit(good, node and {**facts(), **node})
    assert list(found) == ["n1"]
    assert words in found["n1"]


def test_low_limits_are_a_warning_and_no_fault(tmp_path: Path) -> None:
    low = facts(limits={"memlock": 65536, "files": 4096, "shm": 64 << 20, "infiniband": True})
    fine = facts(limits={"memlock": -1, "files": 4096, "shm": 1 << 40, "infiniband": True})
    late = facts(limits={"fault": "did not answer within 30 s"})
    answers, ranks = {"n0": low, "n1": fine, "n2": low, "n3": facts(), "n4": late}, dict.fromkeys(("n0", "n1", "n2"), 2)
    found = preflight.warnings(answers, {**ranks, "n3": 2, "n4": 2})
    assert list(found.values()) == [["n0", "n2"], ["n0", "n2"]]
    memory, shm = found
    assert memory.startswith("at most 64 KiB of memory can be locked")
    assert shm.startswith("/dev/shm has 64 MiB, and 2 ranks")
    assert preflight.judge(answers, {**ranks, "n3": 2, "n4": 2}) == {}
    record_warnings(RunDir(tmp_path), 1, found)
    first, second = RunDir(tmp_path).events()
    assert describe(first) == f"n0 and 1 more node: {memory}"
    assert describe({**second, "hosts": ["n0"]}) == f"n0: {shm}"


def test_of_three_the_odd_one_out_is_unfit_also_where_it_is_the_first() -> None:
    assert list(unfit(facts(90), facts(), facts())) == ["n0"]
    assert list(unfit(facts(versions={"python": "3.12.1"}), facts(), facts())) == ["n0"]
    assert list(unfit(facts(), facts(90), facts(-90))) == ["n1", "n2"], "the first node is the reference if none agree"


def test_several_faults_of_a_node_are_told_together() -> None:
    found = unfit(facts(), facts(90, versions={"python": "3.12.1"}))
    assert found["n1"].count("; ") == 1


def test_the_time_that_a_look_takes_is_no_skew() -> None:
    assert skew({"asked": 0.0, "received_at": 20.0, "sent_at": 50.0, "answered": 60.0}) == 0
    assert skew({"asked": 0.0, "received_at": 30.0, "sent_at": 65.0, "answered": 60.0}) == 5
    assert skew({"asked": 0.0, "received_at": -5.0, "sent_at": 55.0, "answered": 60.0}) == -5


# ---- report of a node -------------------------------------------------------------------------------------------


def run(folder: Path, device: str = "cpu", attempt: int = 3) -> dict[str, Any]:
    return asyncio.run(look(RunDir(folder), attempt, 1, device, os.environ.get("CUDA_VISIBLE_DEVICES")))


def test_a_node_looks_around_in_a_moment_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "logs" / "3").mkdir(parents=True)
    before = time.time()
    found = run(tmp_path, "cuda")
    assert before <= found["received_at"] <= found["sent_at"] < before + 10
    assert found["run folder"]["free"] > 0
    assert found["versions"]["torch"]
    assert found["gpus"] == {}
    assert "gpus" not in run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_node_says_what_fails_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_facts, "TIMEOUTS", Timeouts(probe=0.1))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    (tmp_path / "logs").mkdir()
    found = run(tmp_path)
    assert found["run folder"] == {"fault": "does not show the folder of attempt 3, which the first node made"}
    assert found["scratch"] == {"fault": "fails: No such file or directory"}


def test_what_hangs_on_a_node_does_not_hold_up_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs" / "3").mkdir(parents=True)
    monkeypatch.setattr(preflight, "TIMEOUTS", Timeouts(node_check=0.2))
    monkeypatch.setattr(preflight, "scratch", lambda: time.sleep(1))
    monkeypatch.setattr(preflight, "versions", lambda: VERSIONS)
    found = run(tmp_path)
    assert found["scratch"] == {"fault": "did not answer within 0.2 s"}
    assert found["versions"] == VERSIONS


# ---- judgement by the coordinator -------------------------------------------------------------------------------


def ask(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[Coordinator, int], list[tuple[int, AgentMessage]]]
) -> Outcome | None:
    """Ask nodes 0 and 1 as a coordinator; `said` has the messages that arrive after each question."""
    (folder / "idle.py").write_text(IDLE)
    plan = make_plan(RunSpec("idle:main", cluster="local", cpus=1), folder)
    plan = replace(plan, placement=replace(plan.placement, nodes=2))

    async def inside() -> Outcome | None:
        found = Coordinator(RunDir(folder), plan, AgentInfo(nodes=2, host="n0"))
        found.peers.hosts[1] = "n1"
        monkeypatch.setattr(found.peers, "connected", lambda: connected)

        def send(agent: int, message: ToAgent) -> None:
            assert message == CheckNode(3)
            for emit in said(found, agent):
                found.inbox.put_nowait(emit)

        monkeypatch.setattr(found.agents, "send", send)
        return await JobAttempt(3, found.run_dir, plan, found.agents, found.stops, found.inbox).preflight([0, 1])

    connected = [0, 1]
    return asyncio.run(inside())


def answer(**more: Any) -> NodeChecked:
    now = time.time()
    return NodeChecked(3, {**facts(), "received_at": now, "sent_at": now, **more})


def test_where_all_are_fit_nothing_keeps_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = NodeChecked(2, {})  # of a node that was given up in the attempt before
    assert ask(tmp_path, monkeypatch, lambda _, agent: [(1, late), (agent, answer())]) is None


def test_who_is_silent_is_unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "TIMEOUTS", Timeouts(node_answer=0.5))
    found = ask(tmp_path, monkeypatch, lambda _, agent: [] if agent else [(agent, answer())])
    assert found is not None
    assert list(found.unfit) == ["n1"]
    assert found.hosts == {0: "n0", 1: "n1"}
    assert not found.all_unfit


@pytest.mark.parametrize(
    "report",
    [
        {},
        {"versions": 5},
        {"run folder": {"free": "much"}},
        {"run folder": []},
        {"scratch": None},
        {"limits": {"nofile": "x"}},
        {"sent_at": "now"},
        {"sent_at": 10**400},
        {"gpus": {"count": "8"}},
        {"gpus": [1]},
    ],
)
def test_a_report_that_cannot_be_read_does_not_end_the_coordinator(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(_: Coordinator, agent: int) -> list[tuple[int, AgentMessage]]:
        bad = NodeChecked(3, (answer().facts | report) if report else {})
        return [(agent, bad if agent else answer())]

    found = ask(tmp_path, monkeypatch, said)
    assert found is not None
    assert list(found.unfit) == ["n1"]
    assert "n1 (node 1) sent a preflight report that cannot be read; its connection" in capsys.readouterr().err


def test_who_is_lost_meanwhile_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(found: Coordinator, agent: int) -> list[tuple[int, AgentMessage]]:
        if agent == 0:
            return [(0, answer())]
        found.peers.connected().remove(1)
        return [(1, Lost())]

    found = ask(tmp_path, monkeypatch, said)
    assert found is not None
    assert (found.lost, found.unfit) == (["n1"], {})


def test_a_stop_does_not_wait_for_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(tmp_path, monkeypatch, lambda _, agent: [(0, StopRequest(signal.SIGTERM))] if agent else [])
    assert found == Outcome({}, stop="SIGTERM")


# ---- runs -------------------------------------------------------------------------------------------------------


def profile(project: Project, engine: str, *lines: str) -> None:
    """A profile ``site`` with a preflight, and a target without requirements."""
    (project.folder / "idle.py").write_text(IDLE)
    (project.folder / "cluster_configs").mkdir()
    text = "\n".join([f'extends = "{engine}"', "preflight = true", *lines])
    (project.folder / "cluster_configs/site.toml").write_text(text)


def test_a_machine_that_is_unfit_ends_a_local_run_with_that_name(
    local_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile(local_project, "local")
    assert local_project.call("--cluster", "site", "--cpus", "1", "--name", "good", "idle:main").returncode == 0
    monkeypatch.setenv("TMPDIR", str(local_project.folder / "gone"))
    done = local_project.call("--cluster", "site", "--cpus", "1", "--name", "bad", "idle:main", status=1)
    assert "its TMPDIR fails: No such file or directory (clear it" in done.stdout
    assert "unfit node: A node did not pass the profile's preflight" in done.stdout
    failure = local_project.status("bad")["failure"]
    assert (failure["kind"], failure["rank"]) == ("unfit node", None)
    assert not [e for e in local_project.events("bad") if e["event"] == "started"]


def started_on(project: Project, run: str) -> list[list[str]]:
    return [e["hosts"] for e in project.events(run) if e["event"] == "started"]


# The first node that runs it is the faulty one, whichever SLURM allocates first.
SMI = """#!/bin/sh
exec 9>>"$0.lock"; flock 9
[ -s "$0.sick" ] || echo "$SLURMD_NODENAME" > "$0.sick"
errors=0; [ "$(cat "$0.sick")" != "$SLURMD_NODENAME" ] || errors=4
case $1 in
*gpu=*) for gpu in 0 1 2 3 4 5 6 7; do echo "$gpu, GPU-$gpu, $errors, [N/A]"; done;;
*) for gpu in 0 1 2 3 4 5 6 7; do echo "GPU-$gpu, 0, 0"; done;;
esac
"""


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_goes_on_away_from_a_node_whose_gpu_has_errors(slurm_project: Project) -> None:
    """nvidia-smi is a fake script first on PATH."""
    smi = slurm_project.folder / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI)
    smi.chmod(0o755)
    line = f"export PATH='{smi.parent}':\"$PATH\""
    profile(slurm_project, "slurm", "[slurm]", f"node_setup = {json.dumps([line])}")
    slurm_project.call("--cluster", "site", "--gpus", "1", "--name", "s", "idle:main")
    sick = Path(f"{smi}.sick").read_text().strip()
    events = slurm_project.events("s")
    ((fit,),) = started_on(slurm_project, "s")
    assert fit != sick
    assert [(e["reason"], e["exclude"]) for e in events if e["event"] == "requeued"] == [("unfit node", [sick])]
    fields = next(e["message"] for e in events if e["event"] == "failed")
    assert fields == f"{sick}: GPU 0 (GPU-0) has 4 uncorrected ECC errors (report it to the cluster administrators)"
    shown = slurm_project.call("status", "s").stdout
    assert f"attempt     2 (unfit node on {sick} before)" in shown
    assert f"excluded: {sick}" in shown


def fast_clock(project: Project) -> str:
    """A line of node_setup that sets the clock of the first job's second node 90 s ahead."""
    odd, sick = project.folder / "odd", project.folder / "sick"
    odd.mkdir()
    (odd / "sitecustomize.py").write_text("import time\nright = time.time\ntime.time = lambda: right() + 90\n")
    chosen = f"[ \"$SLURM_NODEID\" != 1 ] || [ -s '{sick}' ] || echo \"$SLURMD_NODENAME\" > '{sick}'"
    return f"{chosen}; [ \"$(cat '{sick}' 2>&1)\" != \"$SLURMD_NODENAME\" ] || export PYTHONPATH='{odd}'"


@pytest.mark.slow
@pytest.mark.slurm
def test_a_spare_node_takes_the_place_of_one_whose_clock_is_off(slurm_project: Project, on_slurm: SlurmCluster) -> None:
    """In the same job; after a requeue by an operator, the job starts without that node."""
    profile(slurm_project, "slurm", "[slurm]", f"node_setup = {json.dumps([fast_clock(slurm_project)])}")
    arguments = ("--cluster", "site", "--cpus", "2", "--nodes", "2", "--spare-nodes", "1", "--name", "p", "--detach")
    slurm_project.call(*arguments, "steps:main", "--steps", "100", "--seconds", "0.2")
    until(lambda: slurm_project.status("p")["progress"].get("step", 0) > 10, "ten steps")
    (sick,) = slurm_project.status("p")["excluded_nodes"]
    events = slurm_project.events("p")
    assert not [e for e in events if e["event"] == "requeued"], "it is the same job"
    ((first, second),) = started_on(slurm_project, "p")
    assert sick not in (first, second)
    fields = next(e["message"] for e in events if e["event"] == "failed")
    assert fields.startswith(f"{sick}: its clock is ")
    assert fields.endswith(f" s ahead of {first}'s (check its time service)")
    job = str(slurm_project.status("p")["job_id"])
    on_slurm.run("scontrol", "requeue", job)
    until(lambda: slurm_project.status("p")["state"] == "succeeded", "the end", 120)
    _, again = started_on(slurm_project, "p")
    assert f"ExcNodeList={sick} " in on_slurm.run("scontrol", "show", "job", "--oneliner", job)
    assert sick not in again
    assert [s["kind"] for s in slurm_project.status("p")["failed_attempts"]] == ["unfit node"], "it was not met again"
    assert f"excluded: {sick}" in slurm_project.call("status", "p").stdout


@pytest.mark.slow
@pytest.mark.slurm
def test_where_all_nodes_are_unfit_the_run_ends_and_strikes_none(slurm_project: Project) -> None:
    """A fault of all nodes does not lead to another node."""
    line = f"export TMPDIR='{slurm_project.folder}/gone'"
    profile(slurm_project, "slurm", "[slurm]", f"node_setup = {json.dumps([line])}")
    done = slurm_project.call("--cluster", "site", "--cpus", "2", "--nodes", "2", "--name", "a", "idle:main", status=1)
    assert done.stdout.count("its TMPDIR fails: No such file or directory") == 2
    assert not [e for e in slurm_project.events("a") if e["event"] in ("started", "requeued", "excluded")]
    assert slurm_project.status("a")["excluded_nodes"] == []
