"""A `transformers.Trainer` in a run: it is stopped by agreement, and goes on at its newest whole checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.loop.jobs import Net, Rows
from tests.training.ranks import losses, spawn
from training.context import Context
from training.distributed.world import World
from training.files import read_lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("rank_server")]


class WithLoss(torch.nn.Module):
    """As the Trainer calls a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def train(world: World, run_dir: Path, stop_at: int, limit: int = 2) -> tuple[int, bool]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from training.integrations.transformers import RunCallback

    os.environ.update(world.environment())  # as a launcher does; the process is the test's own
    run_dir.mkdir(exist_ok=True)

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop_at and world.rank == world.world_size - 1:
                ctx.request_stop("test")

    with Context(run_dir, world) as ctx:
        _ = ctx.group
        torch.manual_seed(0)
        data = [{"x": x, "labels": y} for x, y in zip(Rows(64).x, Rows(64).y, strict=True)]
        run = RunCallback(ctx)
        arguments = TrainingArguments(
            run.output_dir, per_device_train_batch_size=8 // world.world_size, num_train_epochs=2, save_steps=3,
            save_total_limit=limit, logging_steps=1, eval_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model=WithLoss(),
            args=arguments,
            train_dataset=data,
            eval_dataset=data[:10],
            callbacks=[Stop(), run],
        )
        trainer.train(resume_from_checkpoint=run.newest_checkpoint())
        return trainer.state.global_step, ctx.stopped


def events(run_dir: Path, kind: str) -> list[int]:
    return [line.get("step", 0) for line in read_lines(run_dir / "events.jsonl") if line["event"] == kind]


@pytest.mark.parametrize("size", [1, 2])
def test_stopped_and_resumed_ends_as_if_never_stopped(tmp_path: Path, size: int) -> None:
    assert spawn(train, size, tmp_path / "whole", 0) == [(16, False)] * size
    stopped = 4 if size == 1 else 5  # the request of one step is agreed at the next
    assert spawn(train, size, tmp_path / "parts", 4) == [(stopped, True)] * size
    assert events(tmp_path / "parts", "saved") == [3, stopped]
    assert spawn(train, size, tmp_path / "parts", 0) == [(16, False)] * size
    assert events(tmp_path / "parts", "resumed") == [stopped]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    lines = [line["eval"] for line in read_lines(tmp_path / "parts" / "metrics.jsonl") if "eval" in line]
    assert all(line["loss"] > 0 for line in lines)


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    spawn(train, 1, tmp_path, 4)
    output = tmp_path / "trainer"
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-9")
    (output / "checkpoint-9" / "manifest.json").unlink()  # killed before it was sealed
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-10")
    (output / "checkpoint-10" / "optimizer.pt").write_bytes(b"damaged")
    assert spawn(train, 1, tmp_path, 0) == [(16, False)]
    assert events(tmp_path, "resumed") == [4]
    assert len(events(tmp_path, "checkpoint-damaged")) == 1, "the other one was interrupted"


def train_and_die(world: World, run_dir: Path) -> None:
    """Train with one checkpoint to keep; killed after the Trainer has written the second one, before it is sealed."""
    from training.integrations import sealed, transformers

    def dying(folder: Path, step: int) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        sealed.seal(folder, step)

    vars(transformers)["seal"] = dying
    train(world, run_dir, 0, 1)


def test_a_whole_checkpoint_stays_until_the_next_one_is_sealed(tmp_path: Path) -> None:
    spawn(train_and_die, 1, tmp_path / "parts")
    assert sorted(path.name for path in (tmp_path / "parts" / "trainer").iterdir()) == ["checkpoint-3", "checkpoint-6"]
    assert spawn(train, 1, tmp_path / "parts", 0, 1) == [(16, False)]
    assert events(tmp_path / "parts", "resumed") == [3]
    assert [path.name for path in (tmp_path / "parts" / "trainer").iterdir()] == ["checkpoint-16"]
    spawn(train, 1, tmp_path / "whole", 0, 1)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
