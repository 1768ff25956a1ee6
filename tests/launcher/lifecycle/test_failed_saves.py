"""A checkpoint that cannot be saved is an event, a line for the user and a field of the result, and no end of the run."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.lifecycle import history
from tests.launcher.engines import Project

PROGRAM = """
import torch
from training.context import Context

def main(ctx: Context) -> dict[str, object]:
    model = ctx.setup(torch.nn.Linear(2, 2))
    state = ctx.state(model=model)
    (ctx.run_dir / "checkpoints").write_text("a file")
    for step in range(1, 4):
        state.save(step, wait=True)
    return {"loss": torch.tensor(2.5), "rate": float("nan"), "saves": len(ctx.failed_saves)}
"""


@pytest.mark.slow
def test_a_function_whose_saves_fail(local_project: Project) -> None:
    (local_project.folder / "saves.py").write_text(PROGRAM)
    done = local_project.launch("--cpus", "1", "--name", "failing", "saves:main")
    line = "3 checkpoints could not be saved; step 3: "
    assert line in done.stdout
    assert "the checkpoint of step 1 could not be saved" in done.stdout, "in the log"
    status = local_project.status("failing")
    assert status["state"] == "succeeded"
    assert status["metrics"] == {"loss": 2.5, "rate": "NaN", "saves": 3}
    assert status["failed_saves"]["count"] == 3
    assert [each["step"] for each in status["failed_saves"]["newest"]] == [1, 2, 3]
    assert line in local_project.call("status", "failing").stdout


def test_ranks_that_record_the_same_save_count_once() -> None:
    one: dict[str, Any] = {"event": "save-failed", "step": 5, "error": "OSError: full"}
    events: list[dict[str, Any]] = [{"event": "submitted"}, one | {"rank": 0}, one | {"rank": 1}, one | {"step": 6}]
    assert history.read(events).saves_that_failed() == {
        "count": 2,
        "newest": [{"step": 5, "error": "OSError: full"}, {"step": 6, "error": "OSError: full"}],
    }
    assert history.read([*events, {"event": "submitted"}]).saves_that_failed() is None
    many = [one | {"step": step} for step in range(1, 31)]
    found = history.read(many).saves_that_failed()
    assert found is not None
    assert (found["count"], len(found["newest"]), found["newest"][-1]["step"]) == (30, history.NAMED, 30)
