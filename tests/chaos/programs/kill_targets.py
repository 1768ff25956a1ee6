"""The programs that are killed by schedule: the function of the how-to, and a transformers Trainer with our callback."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from tests.training.loop.jobs import Config, Net, Rows, fit_in_world
from training.context import Context
from training.distributed.world import World

FUNCTION = Config(size=53, global_batch=8, microbatch=3, epochs=3, every=2)


def function(world: World, run_dir: Path) -> dict[str, Any]:
    """The function, with dropout, uneven last batches and accumulation."""
    return fit_in_world(world, run_dir, FUNCTION)


class Numbered(torch.nn.Module):
    """As the Trainer calls a model; records the numbers of the samples that it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.note: Any = None

    def forward(self, x: torch.Tensor, labels: torch.Tensor, number: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.note(number.tolist())
        out = self.net(x)
        return {"loss": (out - labels).square().mean(), "logits": out}


def trainer(world: World, run_dir: Path) -> int:
    """A Trainer whose global batch does not depend on the number of ranks."""
    os.environ.update(world.environment())  # as a launcher does; the process is the harness's own
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from training.integrations.transformers import RunCallback

    torch.set_num_threads(1)
    with Context(run_dir, world) as ctx:
        life = ctx.group.broadcast(time.monotonic())
        torch.manual_seed(0)
        rows = Rows(56)
        data = [{"x": x, "labels": y, "number": n} for n, (x, y) in enumerate(zip(rows.x, rows.y, strict=True))]
        run, model = RunCallback(ctx), Numbered()
        arguments = TrainingArguments(
            run.output_dir, per_device_train_batch_size=8 // world.world_size, num_train_epochs=3, save_steps=2,
            save_total_limit=2, logging_steps=1, eval_strategy="epoch", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        it = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:10], callbacks=[run])

        it.remove_callback(PrinterCallback)

        def note(ids: list[int]) -> None:
            step = it.state.global_step + 1
            ctx.event("ids", step=step, epoch=(step - 1) // 7, ids=ids, life=life)

        model.note = note
        it.train(resume_from_checkpoint=run.newest_checkpoint())
        return int(it.state.global_step)
