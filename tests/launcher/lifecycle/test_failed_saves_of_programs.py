"""Each kind of failed save, for each kind of program: an event, a line for the user and a field of the result."""

from __future__ import annotations

from typing import Any

import pytest

from tests.launcher.engines import Project, until

pytestmark = pytest.mark.slow

OBSTACLES = {
    "file": """
(ctx.run_dir / "checkpoints").rename(ctx.run_dir / "moved")
(ctx.run_dir / "checkpoints").write_text("a file")""",
    "full disk": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))",
    "sparse": "big.value = torch.ones(2).to_sparse()",
    "object": "big.value = object()",
    "killed": """
if ctx.world.attempt == 1:
    import os, signal, threading, training.checkpoints.store as store
    store.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)""",
}
"""What a program does before its save of step 2, by the kind of failure."""

TEXTS = {
    "file": "Error: ",
    "full disk": "File too large",
    "sparse": "without pickle",
    "object": "without pickle",
    "killed": "interrupted: the rank was killed before the checkpoint was complete",
}

PROGRAM = """
import sys
from pathlib import Path

import torch

from training.context import Context


class Big:
    value = torch.zeros(100_000)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def main(ctx: Context, obstacle: str) -> dict[str, object]:
    big = Big()
    state = ctx.state(big=big)
    for step in range(state.restore() + 1, 4):
        if step == 2:
            exec(Path(obstacle).read_text(), {"ctx": ctx, "big": big, "torch": torch})
        state.save(step, wait=True)
    return {"steps": 3}


if __name__ == "__main__":
    main(Context.current(), sys.argv[1])
"""


def check(project: Project, name: str, text: str, steps: list[int]) -> None:
    """The failed saves of a run that has ended well."""
    status = project.status(name)
    events = [event for event in project.events(name) if event["event"] in ("save-failed", "save-interrupted")]
    assert list(dict.fromkeys(event["step"] for event in events)) == steps
    assert all(text in event["error"] for event in events)
    result: dict[str, Any] = status["failed_saves"]
    assert (result["count"], [each["step"] for each in result["newest"]]) == (len(steps), steps)
    line = f"{len(steps)} checkpoint{'s' * (len(steps) > 1)} could not be saved; step {steps[-1]}: "
    assert line in project.call("status", name).stdout


@pytest.mark.parametrize("kind", ["function", "script"])
def test_a_program_with_a_context(kind: str, local_project: Project) -> None:
    (local_project.folder / "saving.py").write_text(PROGRAM)
    for obstacle, code in OBSTACLES.items():
        name = obstacle.replace(" ", "-")
        (local_project.folder / name).write_text(code)
        words = ["saving:main", "--obstacle", name] if kind == "function" else ["saving.py", name]
        local_project.launch("--cpus", "1", "--name", name, "--detach", *words)
    for obstacle in OBSTACLES:
        name = obstacle.replace(" ", "-")
        until(lambda name=name: (local_project.folder / "runs" / name / "result.json").exists(), name)  # type: ignore[misc]
        assert local_project.status(name)["state"] == "succeeded"
        check(local_project, name, TEXTS[obstacle], [2] if obstacle == "killed" else [2, 3])


def test_the_line_for_whoever_watches(local_project: Project) -> None:
    (local_project.folder / "saving.py").write_text(PROGRAM)
    (local_project.folder / "killed").write_text(OBSTACLES["killed"])
    done = local_project.launch("--cpus", "1", "--name", "k", "saving:main", "--obstacle", "killed")
    assert f"launch: the checkpoint of step 2 could not be saved: {TEXTS['killed']}\n" in done.stdout
    assert f"1 checkpoint could not be saved; step 2: {TEXTS['killed']}" in done.stdout


def test_the_bundled_job(local_project: Project) -> None:
    job = ("--max-steps", "4", "--save-every", "2", "--log-with=", "--batch-size", "8")
    local_project.launch("--cpus", "1", "--name", "r", "--detach", "--", *job)
    until(lambda: (local_project.folder / "runs/r/logs").exists(), "the run")
    (local_project.folder / "runs/r/checkpoints").write_text("a file")
    until((local_project.folder / "runs/r/result.json").exists, "the end")
    check(local_project, "r", "Error: ", [2, 4])


TRAINER = """
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from training.context import Context
from training.integrations.transformers import RunCallback


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


class Obstacle(TrainerCallback):
    def on_save(self, args, state, control, **_):
        (Path(args.output_dir) / f"checkpoint-{state.global_step}/manifest.json").mkdir()


ctx = Context.current()
data = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 8
arguments = TrainingArguments("out", per_device_train_batch_size=4, max_steps=4, save_steps=2, report_to=[], use_cpu=True)
Trainer(model=Model(), args=arguments, train_dataset=data, callbacks=[Obstacle(), RunCallback(ctx)]).train()
"""


def test_a_trainer_with_our_callback(local_project: Project) -> None:
    (local_project.folder / "fine_tune.py").write_text(TRAINER)
    local_project.launch("--cpus", "1", "--name", "t", "fine_tune.py")
    check(local_project, "t", "Error: ", [2, 4])
