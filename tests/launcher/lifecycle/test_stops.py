"""Stops of programs without a Context: the run does not count as a success, and it can be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.launcher.backends.slurm.test_faults import Week
from tests.launcher.engines import Project, ranks_of, until
from tests.testbed.slurm import SlurmCluster

pytestmark = pytest.mark.slow

PROFILE = 'extends = "{engine}"\ngrace = {grace}\n'


def step_of(project: Project, rank: int = 1) -> int:
    path = project.folder / f"step-{rank}"
    return int(path.read_text() or 0) if path.exists() else 0


def begin(project: Project, name: str, *words: str, grace: float = 20) -> None:
    """Submit ``stops.py`` with two ranks and wait until rank 1 has done some steps."""
    (project.folder / "short.toml").write_text(PROFILE.format(engine=project.engine, grace=grace))
    project.call("--cluster", "./short.toml", "--cpus", "2", "--name", name, "--detach", "stops.py", *words)
    until(lambda: step_of(project) >= 20, "steps")


def events_of(project: Project, name: str, kind: str) -> list[dict[str, object]]:
    return [event for event in project.events(name) if event["event"] == kind]


@pytest.mark.parametrize("way", ["143", "raises", "differ"])  # others: `test_stop_table`
def test_a_script_that_saves_on_sigterm_is_stopped_whatever_its_end(local_project: Project, way: str) -> None:
    begin(local_project, "s", way, "4000")
    assert local_project.call("cancel", "s").stdout == "s: stopped\n"
    assert (local_project.status("s")["state"], local_project.status("s")["failure"]) == ("stopped", None)
    saved = int((local_project.folder / "saved-1").read_text())
    assert 20 <= saved < 4000, "its handler ran to its end"
    assert (local_project.folder / "handled-1").read_text() == f"{saved}\n", "it was asked once"
    stopping, interrupted = (events_of(local_project, "s", kind)[0] for kind in ("stopping", "interrupted"))
    assert (stopping["context"], stopping["ranks"], stopping["grace"]) == (False, 1 if way == "differ" else 2, 20.0)
    words = {
        "143": "ended with exit status 143",
        "raises": "raised RuntimeError: stopped by SIGTERM",
        "differ": "ended with exit status 0",
    }
    assert interrupted["message"] == f"rank 0 {words[way]}; rank 1 {words[way]}"
    assert not interrupted["lost_everything"]
    for rank in range(2):
        (local_project.folder / f"saved-{rank}").write_text("3999")
    local_project.call("resume", "s")
    assert local_project.status("s")["state"] == "succeeded"


@pytest.mark.parametrize(("way", "words"), [("default", "was ended by SIGTERM"), ("ignores", "was killed")])
def test_a_script_that_saves_nothing_is_stopped_and_told_so(local_project: Project, way: str, words: str) -> None:
    begin(local_project, "n", way, "4000", grace=1)
    local_project.call("cancel", "n")
    assert local_project.status("n")["state"] == "stopped"
    interrupted = events_of(local_project, "n", "interrupted")[0]
    assert interrupted["message"] == f"rank 0 {words}; rank 1 {words}"
    assert interrupted["lost_everything"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_stops_a_script_and_promises_no_checkpoint(
    local_project: Project, number: signal.Signals
) -> None:
    with local_project.start("--cpus", "2", "--name", "c", "stops.py", "143", "4000") as running:
        until(lambda: step_of(local_project) >= 20, "steps")
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 3
    assert "launch: stopping: SIGTERM goes to every rank, 60 seconds before those that still run are killed" in err
    assert "launch: stopping: sent SIGTERM to 2 ranks, 60 seconds until they are killed (SIGTERM)" in out
    assert (
        "launch: stopped: rank 0 ended with exit status 143; rank 1 ended with exit status 143; its last line: " in out
    )
    assert "`launch resume c` starts the program again (it saved no checkpoint through launch)" in out
    assert "next step" not in out + err
    assert "checkpoint;" not in out + err


def test_ctrl_c_in_a_program_that_follows_a_run_stops_the_run(local_project: Project) -> None:
    code = "import launcher; launcher.launch('stops.py', '143', '4000', cpus=2, name='p')"
    with subprocess.Popen(
        [local_project.python, "-c", code], cwd=local_project.folder, stderr=subprocess.PIPE
    ) as program:
        until(lambda: (local_project.folder / "runs/p/logs/1/0.log").exists(), "a rank")
        until(lambda: local_project.status("p")["state"] == "running", "ranks")
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=60)
    assert b"RunStopped: run 'p' stopped before its end" in err
    assert local_project.status("p")["state"] == "stopped"


def test_a_script_says_that_it_had_finished(local_project: Project) -> None:
    """With the two lines of the README, a stop after them does not change the success of the run."""
    begin(local_project, "f", "default", "30", "finishes")
    until((local_project.folder / "runs/f/logs/1/0.finished").exists, "its word")
    local_project.call("cancel", "f")
    assert local_project.status("f")["state"] == "succeeded"


def test_a_script_that_ended_by_itself_is_what_its_exit_status_says(local_project: Project) -> None:
    (local_project.folder / "exits.py").write_text("import os, sys\nos._exit(int(sys.argv[1]))\n")
    for status, state in ((0, "succeeded"), (3, "failed"), (143, "failed")):
        name = f"e{status}"
        local_project.launch("--cpus", "1", "--name", name, "exits.py", str(status), status=None)
        assert local_project.status(name)["state"] == state


def test_user_signal_2_does_not_end_a_rank(local_project: Project) -> None:
    """SLURM sends the signal to all processes of a step; the agent asks the ranks to stop."""
    begin(local_project, "u", "0", "4000")
    for pid in ranks_of(local_project.folder / "runs/u/logs/1").values():
        os.kill(pid, signal.SIGUSR2)
    before = step_of(local_project)
    until(lambda: step_of(local_project) > before + 10, "more steps")
    assert local_project.call("cancel", "u").stdout == "u: stopped\n"


NEAR_ITS_END = """
import time

import torch

from training.context import Context

points = torch.randn(160, 8, generator=torch.Generator().manual_seed(0))

def main(ctx: Context) -> dict:
    model = ctx.setup(torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    steps = ctx.steps([(row, int(row.sum() > 0)) for row in points], global_batch=2, epochs=1)
    state = ctx.state(model=model, optimizer=optimizer, steps=steps)
    state.restore()
    for step in steps:
        for x, y in step:
            step.backward(torch.nn.functional.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
        ctx.log(step, loss=step.loss)
        while step.number == 78 and not ctx.stop_reason:  # the file `stop` alone is looked for four times a second
            time.sleep(0.05)
        if ctx.should_stop(step, save=state, every=50):
            break
    return {"loss": steps.loss}
"""


def test_a_function_cancelled_at_step_78_of_80_resumes_there(local_project: Project) -> None:
    """The function of the README: its newest regular checkpoint is that of step 50."""
    (local_project.folder / "near.py").write_text(NEAR_ITS_END)
    local_project.launch("--cpus", "2", "--name", "e", "--detach", "near:main")
    metrics = local_project.folder / "runs/e/metrics.jsonl"
    until(lambda: metrics.exists() and '"step":78,' in metrics.read_text(), "step 78")
    assert local_project.call("cancel", "e").stdout == "e: stopped\n"
    saved = [event["step"] for event in events_of(local_project, "e", "saved")]
    assert saved[0] == 50
    assert saved[-1] in (78, 79)
    done = local_project.call("resume", "e")
    assert f"continuing after step {saved[-1]}" in done.stdout
    status = local_project.status("e")
    assert (status["state"], status["progress"]["step"]) == ("succeeded", 80)


FUNCTION = """
import time
from pathlib import Path

def main():
    while True:
        time.sleep(0.02)
        Path("began").touch()
"""


def test_a_function_without_a_context_counts_as_a_script(local_project: Project) -> None:
    (local_project.folder / "plain.py").write_text(FUNCTION)
    local_project.launch("--cpus", "1", "--name", "p", "--detach", "plain:main")
    until((local_project.folder / "began").exists, "its start")
    local_project.call("cancel", "p")
    assert events_of(local_project, "p", "interrupted")[0]["message"] == "rank 0 was ended by SIGTERM"


# ---- on SLURM


def send(project: Project, name: str, *words: str) -> None:
    (project.folder / "short.toml").write_text(PROFILE.format(engine="slurm", grace=20))
    request = ("--cluster", "./short.toml", "--cpus", "2", "--nodes", "2", "--name", name, "--detach")
    project.call(*request, "stops.py", *words)
    until(lambda: step_of(project) >= 20, "steps")


def finishes(project: Project, name: str) -> None:
    """Shorten the next attempt and wait for its end."""
    for rank in range(2):
        until((project.folder / f"saved-{rank}").exists, "what the handler saved")
    until(lambda: events_of(project, name, "requeued"), "a requeue")
    for rank in range(2):
        (project.folder / f"saved-{rank}").write_text("3999")
    until(lambda: project.status(name)["state"] not in ("running", "queued"), "the end", 200)
    assert (project.status(name)["state"], project.status(name)["attempt"]) == ("succeeded", 2)
    assert [event["reason"] for event in events_of(project, name, "requeued")] == ["preempted"]


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_script_whose_agent_is_paused_is_requeued_and_goes_on(slurm_project: Project, on_slurm: SlurmCluster) -> None:
    send(slurm_project, "q", "0", "4000")
    week = Week(slurm_project, on_slurm, "q")
    agent = week.agent(week.hosts()[0])
    os.kill(agent, signal.SIGSTOP)
    on_slurm.run("scancel", "--signal=USR2", week.job)
    time.sleep(1.5)
    os.kill(agent, signal.SIGCONT)
    finishes(slurm_project, "q")
    for rank in range(2):
        assert len((slurm_project.folder / f"handled-{rank}").read_text().split()) == 1, "SIGTERM came once"


@pytest.mark.slurm
@pytest.mark.timeout(600)
def test_a_preempted_script_whose_ranks_end_before_their_agent_looks(
    slurm_project: Project, on_slurm: SlurmCluster
) -> None:
    """The ranks receive SIGTERM and exit with 0 while the agent, which received SIGUSR2, is stopped."""
    send(slurm_project, "r", "0", "4000")
    week = Week(slurm_project, on_slurm, "r")
    agent = week.agent(week.hosts()[0])
    os.kill(agent, signal.SIGSTOP)
    for pid in ranks_of(week.path / "logs/1").values():
        os.kill(pid, signal.SIGTERM)
    until(lambda: not ranks_of(week.path / "logs/1"), "the end of the ranks")
    os.kill(agent, signal.SIGUSR2)
    os.kill(agent, signal.SIGCONT)
    finishes(slurm_project, "r")
