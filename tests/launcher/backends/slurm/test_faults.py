"""Faults of a SLURM cluster: each time the run recovers without a user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.engines import Project, ranks_of, until
from tests.testbed import keeper
from tests.testbed.slurm import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(900)]


def processes(pattern: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


class Week:
    """A run of two nodes with two ranks each, and its faults."""

    def __init__(self, project: Project, cluster: SlurmCluster, run: str) -> None:
        self.project, self.cluster, self.run = project, cluster, run
        self.path = project.folder / "runs" / run

    @property
    def job(self) -> str:
        return str(json.loads((self.path / "job.json").read_text())["job_id"])

    def metrics(self) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def hosts(self) -> list[str]:
        return list([e for e in self.project.events(self.run) if e["event"] == "started"][-1]["hosts"])

    def agent(self, host: str) -> int:
        """The pid of the agent on `host`."""
        agents = processes(f"^[^ ]*python[0-9.]* -P -u -m submitit.core._submit {self.path}/")
        name = f"SLURMD_NODENAME={host}\0"
        return next(pid for pid in agents if name in Path(f"/proc/{pid}/environ").read_text())

    def meets(self, fault: Callable[[], None], seconds: float = 300) -> None:
        """Wait for progress, inject `fault`, and wait for progress in a later attempt.

        SLURM detects a lost node after 20 s, on a busy machine after minutes.
        """
        attempt = max((m["attempt"] for m in self.metrics()), default=1)
        until(lambda: len([m for m in self.metrics() if m["attempt"] == attempt]) > 10, "ten steps")
        fault()
        until(lambda: any(m["attempt"] > attempt for m in self.metrics()), f"a step after {fault}", seconds)

    # ---- faults -----------------------------------------------------------------------------------------------------

    def rank_killed(self) -> None:
        attempt = max(m["attempt"] for m in self.metrics())
        os.kill(next(iter(ranks_of(self.path / f"logs/{attempt}").values())), signal.SIGKILL)

    def preempted(self) -> None:
        self.cluster.run("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o", os.devnull, "--wrap", "sleep 1")

    def requeued_by_an_operator(self) -> None:
        self.cluster.run("scontrol", "requeue", self.job)

    def agent_killed(self) -> None:
        os.kill(self.agent(self.hosts()[1]), signal.SIGKILL)

    def coordinating_agent_killed(self) -> None:
        os.kill(self.agent(self.hosts()[0]), signal.SIGKILL)

    def first_node_killed(self) -> None:
        """As the OOM killer or a site's clean-up does: agent, ranks, srun and batch script, but no daemon of SLURM."""
        host = self.hosts()[0]
        victims = keeper.processes_with(f"SLURMD_NODENAME={host}\0", f"SLURM_JOB_ID={self.job}\0")
        found = [pid for pid, command in victims.items() if not command.startswith("slurmstepd")]
        script = [pid for pid in found if "slurm_script" in victims[pid]]
        assert script, victims
        keeper.kill(found)

    def first_node_killed_with_its_daemons(self) -> None:
        """Of SLURM's daemons there only slurmd is left, which does not miss the others."""
        host = self.hosts()[0]
        keeper.kill(set(self.cluster.step_daemons(host)))
        self.first_node_killed()

    def node_set_down(self) -> None:
        self.cluster.set_node(self.hosts()[1], "down")

    def power_lost(self) -> None:
        self.cluster.kill_slurmd(self.hosts()[0], jobs=True)


def test_a_bad_week(slurm_project: Project, on_slurm: SlurmCluster) -> None:
    """All 200 steps are done; only those lost by a kill are repeated."""
    arguments = ("--cpus", "4", "--nodes", "2", "--max-restarts", "4", "--name", "w", "--detach")
    slurm_project.launch(*arguments, "steps:main", "--steps", "200", "--seconds", "0.05")
    week = Week(slurm_project, on_slurm, "w")
    agreed = [week.preempted, week.requeued_by_an_operator]
    sudden = [week.rank_killed, week.agent_killed, week.coordinating_agent_killed, week.node_set_down, week.power_lost]
    for fault in (*agreed, *sudden):
        week.meets(fault)
    on_slurm.signal_daemon("slurmctld", signal.SIGSTOP)  # a run can end without the controller
    try:
        until(lambda: slurm_project.status("w")["state"] == "succeeded", "the end")
    finally:
        on_slurm.signal_daemon("slurmctld", signal.SIGCONT)
    assert slurm_project.status("w")["attempt"] == len(agreed) + len(sudden) + 1
    steps = Counter(m["step"] for m in week.metrics())
    assert sorted(steps) == list(range(1, 201))
    assert sum(count - 1 for count in steps.values()) <= len(sudden), "a step whose end was not written is done again"
    reasons = [e["reason"] for e in slurm_project.events("w") if e["event"] == "requeued"]
    assert reasons[:4] == ["preempted", "scheduler", "node lost", "node lost"]


@pytest.mark.parametrize("node", [1, pytest.param(0, marks=pytest.mark.soak)])
def test_a_killed_step_daemon_does_not_hold_up_what_follows(
    node: int, slurm_project: Project, on_slurm: SlurmCluster
) -> None:
    """srun does not notice the exit of the task, nor the batch script that of srun; the run recovers nevertheless."""
    arguments = ("--cpus", "2", "--nodes", "2", "--name", "d", "--detach")
    slurm_project.launch(*arguments, "steps:main", "--steps", "100", "--seconds", "0.1")
    week = Week(slurm_project, on_slurm, "d")

    def struck_twice() -> None:
        on_slurm.kill_step_daemon(week.hosts()[node])
        week.coordinating_agent_killed()

    week.meets(struck_twice)
    until(lambda: slurm_project.status("d")["state"] == "succeeded", "the end")
    reasons = [e["reason"] for e in slurm_project.events("d") if e["event"] == "requeued"]
    # The earlier srun may outlive its batch script by seconds and then end the next start's step of that number.
    assert reasons in (["node lost"], ["node lost"] * 2)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["first_node_killed", "first_node_killed_with_its_daemons"])
def test_the_other_nodes_see_to_a_run_whose_first_node_lost_all_processes(
    how: str, slurm_project: Project, on_slurm: SlurmCluster
) -> None:
    """Nobody is left there to ask for the requeue; of the others, one does, well before SLURM itself (92 s)."""
    arguments = ("--cpus", "3", "--nodes", "3", "--name", "o", "--detach")
    slurm_project.launch(*arguments, "steps:main", "--steps", "100", "--seconds", "0.1")
    week = Week(slurm_project, on_slurm, "o")
    until(lambda: len(week.metrics()) > 10, "ten steps")
    began, first = time.monotonic(), week.hosts()[0]
    getattr(week, how)()
    until(lambda: slurm_project.events("o")[-1]["event"] == "requeued", "the requeue", 60)
    print(f"{how}: requeued after {time.monotonic() - began:.1f} s")
    until(lambda: slurm_project.status("o")["state"] == "succeeded", "the end", 300)
    events = slurm_project.events("o")
    assert [e["reason"] for e in events if e["event"] == "requeued"] == ["node lost"]
    assert [(e["kind"], e["host"]) for e in events if e["event"] == "failed"] == [
        ("node lost", f"the agent on {first}")
    ]
    assert sorted({m["step"] for m in week.metrics()}) == list(range(1, 101))


def test_a_run_leaves_the_node_of_a_sick_gpu(slurm_project: Project) -> None:
    slurm_project.launch("--gpus", "1", "--name", "s", "sick:main")
    events = slurm_project.events("s")
    first, second = (e["hosts"][0] for e in events if e["event"] == "started")
    assert first != second
    assert [(e["reason"], e["exclude"]) for e in events if e["event"] == "requeued"] == [("device", [first])]
    shown = slurm_project.call("status", "s").stdout
    assert f"excluded: {first}" in shown


def test_where_no_requeue_is_allowed_another_job_follows(slurm_project: Project, on_slurm: SlurmCluster) -> None:
    profile = slurm_project.folder / "once.toml"
    profile.write_text('extends = "slurm"\n[slurm.sbatch]\nrequeue = false\nno-requeue = true\n')
    arguments = ("--cluster", str(profile), "--cpus", "2", "--name", "f", "--detach")
    slurm_project.launch(*arguments, "steps:main", "--steps", "60", "--seconds", "0.05")
    week = Week(slurm_project, on_slurm, "f")
    first = week.job
    week.meets(lambda: print(on_slurm.run("scancel", "--signal=USR2", first)))
    until(lambda: slurm_project.status("f")["state"] == "succeeded", "the end")
    assert week.job != first
    assert [m["step"] for m in week.metrics()] == list(range(1, 61)), "each step once"


def test_a_spare_node_takes_the_place_of_a_lost_one(slurm_project: Project, on_slurm: SlurmCluster) -> None:
    arguments = ("--cpus", "2", "--nodes", "2", "--spare-nodes", "1", "--name", "p", "--detach")
    slurm_project.launch(*arguments, "steps:main", "--steps", "60", "--seconds", "0.05")
    week = Week(slurm_project, on_slurm, "p")
    week.meets(week.agent_killed)
    until(lambda: slurm_project.status("p")["state"] == "succeeded", "the end")
    first, second = (e["hosts"] for e in slurm_project.events("p") if e["event"] == "started")
    assert (len(first), second[0]) == (2, first[0])
    assert second[1] not in first
    assert not [e for e in slurm_project.events("p") if e["event"] == "requeued"], "it is the same job"
